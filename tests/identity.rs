//! The promise: logits and tokens are bit-identical whatever brings the weights, wherever they rest, and whatever else is
//! in the pass.

mod common;
mod engine_common;

use std::collections::HashMap;
use std::sync::{Mutex, OnceLock};

use engine_common::{
    accelerate, finish, in_place, job, named_budget, open, packed, same_bits, score, scoring,
};
use proptest::prelude::*;
use tensorpager::engine::{EngineOptions, HostMemory, SLACK_BYTES};
use tensorpager::error::Code;
use tensorpager::io::ReaderKind;
use tensorpager::paging::{PagerOptions, Placement, Tier, VerifyWhen};
use tensorpager::spec::UnitKind;
use tensorpager::store::Store;
use tensorpager::text::SamplingParams;

/// Packed once for all cases.
fn offload() -> &'static std::path::Path {
    static DIR: OnceLock<tempfile::TempDir> = OnceLock::new();
    DIR.get_or_init(|| tempfile::tempdir().unwrap()).path()
}

/// Packing takes the folder's lock: one at a time, then it is only opened.
fn packed_once(name: &str) -> Store {
    static LOCK: Mutex<()> = Mutex::new(());
    let _one = LOCK.lock().unwrap_or_else(|e| e.into_inner());
    packed(name, offload())
}

fn inputs(name: &str) -> Vec<Vec<u32>> {
    common::golden(&engine_common::fixture(name))
        .into_iter()
        .map(|g| g.ids)
        .collect()
}

/// What every other way must give, to the bit: packed, all in memory, one thread.
fn reference(name: &str) -> Vec<Vec<f32>> {
    static KEPT: OnceLock<Mutex<HashMap<String, Vec<Vec<f32>>>>> = OnceLock::new();
    let mut kept = KEPT
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(|e| e.into_inner());
    kept.entry(name.to_string())
        .or_insert_with(|| {
            let options = EngineOptions {
                placement: Placement::Cpu,
                threads: Some(1),
                ..scoring(512)
            };
            score(
                &mut open(&packed_once(name), &options).unwrap(),
                &inputs(name),
            )
            .unwrap()
        })
        .clone()
}

#[derive(Clone, Copy, Debug)]
enum From {
    Packed,
    InPlace,
    Accelerate,
}

#[derive(Clone, Debug)]
enum Where {
    Disk,
    Cpu,
    /// Room for so many bytes of weights.
    Budget(u64),
    /// Bit i: unit i rests in memory.
    Mask(u64),
}

/// One way to bring the same weights to the same computation.
#[derive(Clone, Debug)]
struct Way {
    model: &'static str,
    from: From,
    reader: ReaderKind,
    page_bytes: u64,
    prefetch_depth: usize,
    queue_depth: usize,
    place: Where,
    verify: VerifyWhen,
    threads: usize,
    pass_tokens: usize,
    direct: bool,
}

fn ways() -> impl Strategy<Value = Way> {
    let place = prop_oneof![
        3 => Just(Where::Disk),
        1 => Just(Where::Cpu),
        2 => (0u64..3 << 20).prop_map(Where::Budget),
        2 => any::<u64>().prop_map(Where::Mask),
    ];
    let reader = prop::sample::select(ReaderKind::ALL.to_vec());
    let verify = prop::sample::select(vec![
        VerifyWhen::Always,
        VerifyWhen::First,
        VerifyWhen::Never,
    ]);
    let source = prop_oneof![
        4 => (prop::sample::select(common::MODELS.to_vec()), Just(From::Packed)),
        4 => (prop::sample::select(common::MODELS.to_vec()), Just(From::InPlace)),
        1 => Just(("qwen2-bf16", From::Accelerate)),
    ];
    (
        source,
        reader,
        (
            0u32..7,
            0usize..5,
            prop::sample::select(vec![1usize, 2, 3, 8, 33, 128]),
        ),
        place,
        verify,
        (
            1usize..4,
            prop::sample::select(vec![16usize, 17, 64, 200]),
            any::<bool>(),
        ),
    )
        .prop_map(
            |((model, from), reader, (page, prefetch_depth, queue_depth), place, verify, more)| {
                Way {
                    model,
                    from,
                    reader,
                    page_bytes: 65_536 << page,
                    prefetch_depth,
                    queue_depth,
                    place,
                    verify,
                    threads: more.0,
                    pass_tokens: more.1,
                    direct: more.2,
                }
            },
        )
}

impl Way {
    fn store(&self) -> Store {
        match self.from {
            From::Packed => packed_once(self.model),
            From::InPlace => in_place(self.model),
            From::Accelerate => accelerate(),
        }
    }

    fn options(&self, store: &Store, mut base: EngineOptions) -> EngineOptions {
        let unit = |i: usize, mask: u64| {
            // The final norm is no unit of a pass's stream.
            match (store.units[i].kind, mask >> (i % 64) & 1) {
                (UnitKind::Norm, _) | (_, 1) => Tier::Cpu,
                _ => Tier::Disk,
            }
        };
        base.placement = match self.place {
            Where::Disk => Placement::Disk,
            Where::Cpu => Placement::Cpu,
            Where::Budget(_) => Placement::Auto,
            Where::Mask(mask) => {
                Placement::Units((0..store.units.len()).map(|i| unit(i, mask)).collect())
            }
        };
        if let Where::Budget(room) = self.place {
            base.cpu_memory = Some(HostMemory::read().resident + SLACK_BYTES + (6 << 20) + room);
        }
        base.prefetch_depth = Some(self.prefetch_depth);
        base.page_bytes = Some(self.page_bytes);
        base.threads = Some(self.threads);
        base.pager = PagerOptions {
            reader: self.reader,
            queue_depth: self.queue_depth,
            verify: self.verify,
            direct: self.direct,
            ..PagerOptions::default()
        };
        base
    }

    /// Opens, with the budget that a refusal names where the one drawn is too small. `None`: no io_uring on this system.
    fn engine(&self, store: &Store, base: EngineOptions) -> Option<tensorpager::engine::Engine> {
        let options = self.options(store, base);
        match open(store, &options) {
            Ok(engine) => Some(engine),
            Err(e) if e.code() == Code::Unsupported && self.reader == ReaderKind::IoUring => {
                println!("skipped: {}", e.cause());
                None
            }
            Err(e) => {
                let cpu_memory = Some(named_budget(&e) + (64 << 20));
                Some(
                    open(
                        store,
                        &EngineOptions {
                            cpu_memory,
                            ..options
                        },
                    )
                    .unwrap(),
                )
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 64, ..ProptestConfig::default() })]

    #[test]
    fn logits_do_not_depend_on_the_way_of_the_bytes(way in ways()) {
        let store = way.store();
        let inputs = inputs(way.model);
        let wanted = way.pass_tokens;
        let base = EngineOptions { pass_tokens: wanted, logits_rows: wanted, kv_tokens: Some(512 + wanted * 17), ..scoring(512) };
        if let Some(mut engine) = way.engine(&store, base) {
            let got = score(&mut engine, &inputs).unwrap();
            prop_assert!(same_bits(&got, &reference(way.model)));
            // The second time the stream is warm, and what was recorded on the first read is compared.
            let again = score(&mut engine, &inputs[..1]).unwrap();
            prop_assert!(same_bits(&again, &reference(way.model)[..1]));
        }
    }

    /// Sampled tokens hang on every bit of the logits and on the draw's key, so equal tokens at temperature 1 say that a
    /// sequence does not notice who else is there, when it was admitted, in which chunks its prompt went, or that it was
    /// set back for want of KV room.
    #[test]
    fn tokens_do_not_depend_on_the_company(
        way in ways(),
        company in prop::collection::vec((1usize..70, 1usize..12, any::<u64>()), 1..6),
        at_once in 1usize..6,
        pass_tokens in 8usize..80,
        tight in any::<bool>(),
        late in 0usize..4,
    ) {
        let store = way.store();
        let all = inputs(way.model).concat();
        let context = 96;
        let jobs: Vec<_> = company.iter().map(|&(prompt, tokens, seed)| {
            let from = seed as usize % (all.len().saturating_sub(prompt).max(1));
            let prompt = &all[from..(from + prompt).min(all.len())];
            job(prompt, tokens, SamplingParams { temperature: 1.0, seed, ..SamplingParams::greedy() })
        }).collect();
        let alone: Vec<Vec<u32>> = {
            let options = EngineOptions { placement: Placement::Cpu, threads: Some(1), context, ..EngineOptions::default() };
            let mut engine = open(&packed_once(way.model), &options).unwrap();
            jobs.iter().map(|j| {
                let id = engine.submit(j.clone()).unwrap();
                finish(&mut engine, &[id]).unwrap().remove(0)
            }).collect()
        };
        let base = EngineOptions {
            context,
            max_sequences: at_once,
            logits_rows: at_once,
            pass_tokens,
            kv_tokens: if tight { Some(context) } else { None },
            ..EngineOptions::default()
        };
        if let Some(mut engine) = way.engine(&store, base) {
            let late = late.min(jobs.len() - 1);
            let mut ids: Vec<_> = jobs[late..].iter().map(|j| engine.submit(j.clone()).unwrap()).collect();
            let mut early = Vec::new();
            engine.step(&mut early).unwrap();
            // Those that come later join passes under way. Their tokens are checked apart from the first step's.
            let joined: Vec<_> = jobs[..late].iter().map(|j| engine.submit(j.clone()).unwrap()).collect();
            ids.extend(&joined);
            let mut got = vec![Vec::new(); ids.len()];
            let mut events = early;
            loop {
                for event in events.drain(..) {
                    if let tensorpager::engine::Event::Token { job, token, .. } = event {
                        got[ids.iter().position(|i| *i == job).unwrap()].push(token);
                    }
                }
                if engine.pending() == 0 { break; }
                let before = engine.stats().rows;
                engine.step(&mut events).unwrap();
                prop_assert!(engine.stats().rows > before, "a step without a row while jobs are pending");
            }
            let expected: Vec<Vec<u32>> = alone[late..].iter().chain(&alone[..late]).cloned().collect();
            prop_assert_eq!(got, expected);
        }
    }
}

#[test]
fn a_cancelled_job_leaves_no_trace_in_the_others() {
    let store = packed_once("qwen3-bf16");
    let prompt = &inputs("qwen3-bf16")[2];
    let options = EngineOptions {
        context: 128,
        max_sequences: 3,
        logits_rows: 3,
        placement: Placement::Disk,
        ..EngineOptions::default()
    };
    let sampling = |seed| SamplingParams {
        temperature: 1.0,
        seed,
        ..SamplingParams::greedy()
    };
    let mut engine = open(&store, &options).unwrap();
    let id = engine.submit(job(prompt, 12, sampling(3))).unwrap();
    let alone = finish(&mut engine, &[id]).unwrap();
    let mut engine = open(&store, &options).unwrap();
    let doomed = engine
        .submit(job(&prompt[..prompt.len() / 2], 40, sampling(1)))
        .unwrap();
    let kept = engine.submit(job(prompt, 12, sampling(3))).unwrap();
    let waiting = engine.submit(job(prompt, 40, sampling(4))).unwrap();
    let mut events = Vec::new();
    for _ in 0..3 {
        engine.step(&mut events).unwrap();
    }
    engine.cancel(doomed);
    engine.cancel(waiting);
    engine.cancel(waiting);
    assert_eq!(engine.pending(), 1);
    let mut got: Vec<u32> = Vec::new();
    let take = |events: &mut Vec<tensorpager::engine::Event>, got: &mut Vec<u32>| {
        for e in events.drain(..) {
            if let tensorpager::engine::Event::Token { job, token, .. } = e
                && job == kept
            {
                got.push(token);
            }
        }
    };
    take(&mut events, &mut got);
    while engine.pending() > 0 {
        engine.step(&mut events).unwrap();
        take(&mut events, &mut got);
    }
    assert_eq!(got, alone[0]);
}

#[test]
fn a_pass_whose_logits_nobody_wants_reads_no_head() {
    for (name, placement) in [
        ("llama3-bf16", Placement::Disk),
        ("qwen3-bf16", Placement::Disk),
        ("qwen3-bf16", Placement::Cpu),
    ] {
        let store = packed_once(name);
        let units = |wanted: fn(UnitKind) -> bool| {
            store.units.iter().filter(|u| wanted(u.kind)).count() as u64
        };
        let layers = units(|k| matches!(k, UnitKind::Layer(_)));
        let head = units(|k| matches!(k, UnitKind::Head(_)));
        let prompt: Vec<u32> = (0..40).collect();
        let options = EngineOptions {
            context: 128,
            pass_tokens: 16,
            placement,
            ..EngineOptions::default()
        };
        let mut engine = open(&store, &options).unwrap();
        let id = engine
            .submit(job(&prompt, 3, SamplingParams::greedy()))
            .unwrap();
        let (mut events, mut read) = (Vec::new(), Vec::new());
        while engine.pending() > 0 {
            let before = engine.stats().paging.units;
            engine.step(&mut events).unwrap();
            read.push(engine.stats().paging.units - before);
        }
        let all = layers + 1 + head;
        assert_eq!(read, [layers, layers, all, all, all], "{name}");
        let whole = EngineOptions {
            pass_tokens: 64,
            ..options
        };
        let mut engine = open(&store, &whole).unwrap();
        let other = engine
            .submit(job(&prompt, 3, SamplingParams::greedy()))
            .unwrap();
        let token = |e: &tensorpager::engine::Event| match e {
            tensorpager::engine::Event::Token { job, token, .. } if *job == id => Some(*token),
            _ => None,
        };
        let chunked: Vec<u32> = events.iter().filter_map(token).collect();
        assert_eq!(finish(&mut engine, &[other]).unwrap()[0], chunked);
    }
}
