//! A pass that is broken off costs nothing but itself: the engine goes on, and says what it would have said.

mod engine_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use engine_common::{finish, in_place, job, open};
use tensorpager::engine::EngineOptions;
use tensorpager::error::Code;
use tensorpager::paging::Placement;
use tensorpager::text::SamplingParams;

#[test]
fn after_a_pause_at_any_unit_the_answers_are_the_same() {
    let prompt: Vec<u32> = (1..40).collect();
    let wanted = || job(&prompt, 6, SamplingParams::greedy());
    for placement in [Placement::Disk, Placement::Cpu] {
        let options = EngineOptions {
            placement,
            ..EngineOptions::default()
        };
        let store = in_place("qwen2-bf16");
        let mut engine = open(&store, &options).unwrap();
        let id = engine.submit(wanted()).unwrap();
        let expected = finish(&mut engine, &[id]).unwrap();
        let flag = Arc::new(AtomicBool::new(false));
        engine.pause_by(flag.clone());
        for at in 1..engine.units_of_a_pass() {
            let id = engine.submit(wanted()).unwrap();
            let paused = engine.step_watched(&mut Vec::new(), &mut |_, unit, _| {
                assert!(unit <= at, "it went on to unit {unit}");
                flag.store(unit == at, Relaxed);
            });
            assert_eq!(paused.unwrap_err().code(), Code::Interrupted);
            flag.store(false, Relaxed);
            // Forgotten, or gone on with.
            let id = match at % 2 {
                0 => id,
                _ => {
                    engine.cancel(id);
                    engine.submit(wanted()).unwrap()
                }
            };
            assert_eq!(finish(&mut engine, &[id]).unwrap(), expected, "unit {at}");
        }
    }
}
