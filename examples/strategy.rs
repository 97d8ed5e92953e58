//! A placement of one's own: keep the last layers in memory, stream the first.
//!
//! `cargo run --release --example strategy -- MODEL_FOLDER 512MiB "text to continue by token id: 1 2 3"`

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tensorpager::checkpoint::{Checkpoint, OpenOptions};
use tensorpager::engine::{Engine, EngineOptions, Event, Job};
use tensorpager::error::Result;
use tensorpager::paging::{Placement, Planner, Problem, Strategy, Tier, is_streamed};
use tensorpager::store::Store;
use tensorpager::units::{human_bytes, parse_size};

/// Fills memory from the end of the pass backwards.
struct LastFirst;

impl Strategy for LastFirst {
    fn name(&self) -> &str {
        "last first"
    }

    fn place(&self, problem: &Problem<'_>) -> Result<Vec<Tier>> {
        let mut tiers = problem.all_on_disk();
        for unit in (0..problem.units.len()).rev() {
            if is_streamed(problem.units[unit].kind) {
                tiers[unit] = Tier::Cpu;
                // `needs` counts slots too: they shrink with the largest unit that is left on disk.
                if !problem.needs(&tiers).within(&problem.budget) {
                    tiers[unit] = Tier::Disk;
                }
            }
        }
        Ok(tiers)
    }
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let model = args
        .next()
        .unwrap_or_else(|| "tests/fixtures/qwen2-bf16".into());
    let budget = parse_size(&args.next().unwrap_or_else(|| "256MiB".into()))?;
    let store = Store::open_in_place(&Checkpoint::open(&model, &OpenOptions::default())?)?;
    for strategy in [Arc::new(LastFirst) as Arc<dyn Strategy>, Arc::new(Planner)] {
        let name = strategy.name().to_string();
        let options = EngineOptions {
            cpu_memory: Some(budget),
            placement: Placement::By(strategy),
            context: 64,
            ..EngineOptions::default()
        };
        let cancel = Arc::new(AtomicBool::new(false));
        let mut engine = Engine::open(&store, &options, cancel, &mut |_, _| {})?;
        engine.submit(Job {
            prompt: vec![1, 2, 3],
            max_tokens: 8,
            ..Job::default()
        })?;
        let mut events = Vec::new();
        while engine.pending() > 0 {
            engine.step(&mut events)?;
        }
        let tokens: Vec<u32> = events
            .iter()
            .filter_map(|e| match e {
                Event::Token { token, .. } => Some(*token),
                _ => None,
            })
            .collect();
        println!(
            "{name}: {} in memory, {} from disk a pass, tokens {tokens:?}",
            human_bytes(engine.plan().resident_bytes),
            human_bytes(engine.plan().streamed_bytes)
        );
    }
    Ok(())
}
