//! Pictures, from files to logits, against transformers in float32: pixel values, positions, token ids, embeddings, logits, greedy tokens.

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use common::{MemoryModel, Tensor, nmse, read_safetensors};
use serde_json::Value;
use tensorpager::checkpoint::{Checkpoint, OpenOptions};
use tensorpager::device::Device;
use tensorpager::engine::{
    Engine, EngineOptions, Event, Job, ScoreInput, Stage, VisionRoom, expand_pictures,
};
use tensorpager::error::Code;
use tensorpager::media::{Options, Processor, VideoTools, Visual, requests, without_media};
use tensorpager::model::mrope::{PictureSpan, positions, time_step};
use tensorpager::model::vision::{Limits, Slice, Tower};
use tensorpager::paging::{Placement, is_vision};
use tensorpager::store::{PackOptions, Store};
use tensorpager::text::{ChatTemplate, Message, RenderOptions, SamplingParams, Tokenizer};
use tensorpager::units::UnitId;

struct Case {
    name: String,
    ids: Vec<u32>,
    media: Vec<Arc<Visual>>,
    json: Value,
}

struct Reference {
    dir: PathBuf,
    cases: Vec<Case>,
    tensors: HashMap<String, Tensor>,
    /// Of each patch row, the golden file has every n-th value.
    every: usize,
}

/// The repository's fixtures, and the larger one in TENSORPAGER_FIXTURES if that is set.
fn references() -> Vec<Reference> {
    let own = ["vl-bf16", "vl-deep-bf16"].map(|name| reference(&common::fixtures().join(name), 37));
    let mut all = Vec::from(own);
    match std::env::var_os("TENSORPAGER_FIXTURES") {
        Some(dir) => all.push(reference(&PathBuf::from(dir).join("tiny-qwen2_5_vl"), 1)),
        None => println!("skipped: the larger fixture (TENSORPAGER_FIXTURES is not set)"),
    }
    all
}

fn own() -> Reference {
    reference(&common::fixtures().join("vl-bf16"), 37)
}

fn reference(dir: &Path, every: usize) -> Reference {
    let json: Value =
        serde_json::from_slice(&std::fs::read(dir.join("golden.json")).unwrap()).unwrap();
    let model = MemoryModel::load(dir);
    let spec = model.spec.vision.unwrap();
    let processor = Processor::load(dir, &spec).unwrap();
    let tokenizer = Tokenizer::load(dir).unwrap();
    let template = ChatTemplate::load(dir).unwrap().unwrap();
    let cases = json["cases"].as_array().unwrap().iter().map(|case| {
        let messages = Message::list(&with_places(case), "golden.json").unwrap();
        let mut media = Vec::new();
        let mut plain = Vec::new();
        for m in &messages {
            let parts = m.parts().unwrap();
            for r in requests(parts, &Options::default()).unwrap() {
                media.push(Arc::new(
                    processor
                        .load_request(&r, dir, &VideoTools::default())
                        .unwrap(),
                ));
            }
            plain.push(m.with_content(without_media(parts)));
        }
        let options = RenderOptions {
            add_generation_prompt: true,
            ..RenderOptions::default()
        };
        let text = template.render(&plain, &options).unwrap();
        assert_eq!(text, case["rendered"].as_str().unwrap());
        let ids = tokenizer.encode(&text, false).unwrap();
        let name = case["case"].as_str().unwrap().to_string();
        let ids = expand_pictures(&ids, &media, Some(&spec)).unwrap();
        assert_eq!(ids, numbers(&case["input_ids"]), "{name}: token ids");
        Case {
            name,
            ids,
            media,
            json: case.clone(),
        }
    });
    Reference {
        cases: cases.collect(),
        tensors: read_safetensors(&dir.join("golden.safetensors")),
        dir: dir.into(),
        every,
    }
}

/// The larger fixture's messages do not say where their pictures lie; lists beside them do.
fn with_places(case: &Value) -> Value {
    let mut messages = case["messages"].clone();
    let mut images = case["images"]
        .as_array()
        .cloned()
        .unwrap_or_default()
        .into_iter();
    for m in messages.as_array_mut().unwrap() {
        for part in m["content"].as_array_mut().unwrap() {
            if part["type"] == "image" && part.get("image").is_none() {
                part["image"] = images.next().unwrap();
            }
            if part["type"] == "video" && part.get("video").is_none() {
                part["video"] = case["video_frames"].clone();
                part["fps"] = case["fps"].clone();
            }
        }
    }
    messages
}

fn numbers(v: &Value) -> Vec<u32> {
    let list = v.as_array().unwrap();
    list.iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// Images first, then videos: the order in which transformers keeps them.
fn by_kind(case: &Case) -> Vec<Arc<Visual>> {
    let video = |v: &Arc<Visual>| v.kind != tensorpager::media::Kind::Image;
    let mut all = case.media.clone();
    all.sort_by_key(video);
    all
}

fn patches(v: &Visual) -> Vec<f32> {
    let mut out = vec![0.0; v.grid.patches() * v.patch_len()];
    v.write_patches(0, &mut out);
    out
}

#[test]
fn pixel_values_are_those_of_the_pil_processor() {
    for r in references() {
        for case in &r.cases {
            for (key, video) in [("pixel_values", false), ("pixel_values_videos", true)] {
                let Some(want) = r.tensors.get(&format!("{}.{key}", case.name)) else {
                    continue;
                };
                let of_kind =
                    |v: &&Arc<Visual>| (v.kind != tensorpager::media::Kind::Image) == video;
                let got: Vec<f32> = case
                    .media
                    .iter()
                    .filter(of_kind)
                    .flat_map(|v| {
                        let len = v.patch_len();
                        let rows = patches(v);
                        rows.chunks_exact(len)
                            .flat_map(|row| row.iter().copied().step_by(r.every))
                            .collect::<Vec<f32>>()
                    })
                    .collect();
                let want = want.f32s();
                assert_eq!(got.len(), want.len(), "{} {key}", case.name);
                let off = got.iter().zip(&want).filter(|(a, b)| a != b).count();
                if video && r.every == 1 {
                    // Made with torchvision's resize: never more than a level off (1/255/std), on at most 1 % of samples.
                    let worst = got
                        .iter()
                        .zip(&want)
                        .map(|(a, b)| (a - b).abs())
                        .fold(0.0, f32::max);
                    let far = got
                        .iter()
                        .zip(&want)
                        .filter(|(a, b)| (*a - *b).abs() > 1e-5)
                        .count();
                    assert!(
                        worst < 1.01 / 255.0 / 0.261 && far * 100 <= got.len(),
                        "{worst} {far}"
                    );
                } else {
                    assert_eq!(off, 0, "{} {key}: {off} of {} differ", case.name, got.len());
                }
            }
        }
    }
}

#[test]
fn positions_are_those_of_the_reference() {
    for r in references() {
        let spec = MemoryModel::load(&r.dir).spec.vision.unwrap();
        for case in &r.cases {
            let mut spans = Vec::new();
            let mut at = 0;
            for v in &case.media {
                let pad = |id: &u32| *id == spec.image_token || *id == spec.video_token;
                let start = at + case.ids[at..].iter().position(pad).unwrap();
                spans.push(PictureSpan {
                    start,
                    cells: [v.grid.t, v.grid.h / 2, v.grid.w / 2],
                    step: match v.kind {
                        tensorpager::media::Kind::Image => 1.0,
                        tensorpager::media::Kind::Video { seconds_per_grid } => {
                            time_step(spec.tokens_per_second, seconds_per_grid)
                        }
                    },
                });
                at = start + v.tokens();
            }
            let (got, delta) = positions(case.ids.len(), &spans).unwrap();
            let t = &r.tensors[&format!("{}.position_ids", case.name)];
            let want: Vec<i32> = t
                .bytes
                .chunks_exact(4)
                .map(|b| i32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            let got: Vec<i32> = (0..3)
                .flat_map(|a| got.iter().map(move |p| p[a] as i32))
                .collect();
            assert_eq!(got, want, "{}", case.name);
            assert_eq!(
                delta,
                case.json["rope_delta"].as_i64().unwrap(),
                "{}",
                case.name
            );
        }
    }
}

/// Embeddings of `visuals`, one behind the other, the whole wave at once.
fn embed(model: &MemoryModel, visuals: &[Arc<Visual>], threads: usize) -> Vec<f32> {
    let spec = model.spec.vision.as_ref().unwrap();
    let parts: Vec<(usize, usize)> = visuals
        .iter()
        .enumerate()
        .flat_map(|(i, v)| (0..v.grid.t).map(move |t| (i, t)))
        .collect();
    let slices: Vec<Slice> = parts
        .iter()
        .map(|(i, _)| Slice {
            h: visuals[*i].grid.h,
            w: visuals[*i].grid.w,
        })
        .collect();
    let limits = Limits {
        wave: slices.iter().map(Slice::patches).sum(),
        slice: slices.iter().map(Slice::patches).max().unwrap(),
    };
    let device = Device::cpu(Some(threads), None).unwrap();
    let units: Vec<_> = model.units.iter().map(|u| (u.id, u.kind)).collect();
    let mut tower = Tower::new(&device, spec, &units, limits).unwrap();
    let mut out = Vec::new();
    let mut source = model;
    tower
        .run(
            &device,
            &mut source,
            &slices,
            &mut |s, first, rows| {
                let (i, t) = parts[s];
                visuals[i].write_patches(t * visuals[i].grid.slice() + first, rows);
            },
            &mut |_, rows| {
                out.extend_from_slice(rows);
                Ok(())
            },
        )
        .unwrap();
    out
}

#[test]
fn embeddings_lose_less_than_transformers_own_16_bit_run() {
    for r in references() {
        let model = MemoryModel::load(&r.dir);
        for case in r.cases.iter().filter(|c| !c.media.is_empty()) {
            let want = r.tensors[&format!("{}.vision_embeds", case.name)].f32s();
            let got = embed(&model, &by_kind(case), 2);
            assert_eq!(got.len(), want.len());
            let error = nmse(&got, &want);
            // The larger fixture has no such figure; transformers 5.17 in bfloat16 loses 5.44e-5 to 5.47e-5 on it.
            let bar = case.json["half_embeds_error"]["nmse"]
                .as_f64()
                .unwrap_or(5.4e-5);
            println!(
                "{} {}: nmse {error:.2e}, bar {bar:.2e}",
                r.dir.display(),
                case.name
            );
            assert!(error < bar, "{}: {error:e} against {bar:e}", case.name);
        }
    }
}

#[test]
fn a_picture_does_not_depend_on_the_others_nor_on_threads() {
    let r = own();
    let model = MemoryModel::load(&r.dir);
    let all: Vec<Arc<Visual>> = r.cases.iter().flat_map(|c| c.media.clone()).collect();
    let together = embed(&model, &all, 3);
    let alone: Vec<f32> = all
        .iter()
        .flat_map(|v| embed(&model, std::slice::from_ref(v), 1))
        .collect();
    assert_eq!(together.len(), alone.len());
    assert!(
        together
            .iter()
            .zip(&alone)
            .all(|(a, b)| a.to_bits() == b.to_bits())
    );
}

fn in_place(dir: &Path) -> Store {
    let ckpt = Checkpoint::open(&dir.display().to_string(), &OpenOptions::default()).unwrap();
    Store::open_in_place(&ckpt).unwrap()
}

fn open(store: &Store, room: VisionRoom, more: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut options = EngineOptions {
        placement: Placement::Disk,
        context: 1024,
        max_sequences: 8,
        pass_tokens: 64,
        logits_rows: 64,
        threads: Some(2),
        page_bytes: Some(64 << 10),
        vision: Some(room),
        ..EngineOptions::default()
    };
    more(&mut options);
    Engine::open(
        store,
        &options,
        Arc::new(AtomicBool::new(false)),
        &mut |_, _| {},
    )
    .unwrap()
}

fn room_of(cases: &[Case]) -> VisionRoom {
    VisionRoom::for_all(cases.iter().flat_map(|c| &c.media).map(|v| &**v))
}

fn inputs(r: &Reference) -> Vec<ScoreInput> {
    let input = |c: &Case| ScoreInput {
        tokens: c.ids.clone(),
        media: c.media.clone(),
    };
    r.cases.iter().map(input).collect()
}

/// Logits of all inputs, `[tokens, vocab]` each.
fn score(engine: &mut Engine, inputs: &[ScoreInput]) -> Vec<Vec<f32>> {
    let vocab = engine.spec().vocab;
    let mut out: Vec<Vec<f32>> = inputs
        .iter()
        .map(|i| vec![f32::NAN; i.tokens.len() * vocab])
        .collect();
    engine
        .score_inputs(inputs, &mut |b| {
            for (i, row) in b.values.chunks_exact(b.ids).enumerate() {
                let at = (b.first_row + i) * vocab + b.first_id;
                out[b.input][at..at + b.ids].copy_from_slice(row);
            }
            Ok(())
        })
        .unwrap();
    out
}

#[test]
fn logits_lose_less_than_transformers_own_16_bit_run() {
    for r in references() {
        let mut engine = open(&in_place(&r.dir), room_of(&r.cases), |_| {});
        let vocab = engine.spec().vocab;
        let got = score(&mut engine, &inputs(&r));
        for (case, got) in r.cases.iter().zip(&got) {
            let want = r.tensors[&format!("{}.logits", case.name)].f32s();
            let kept: Vec<usize> = match case.json.get("positions") {
                Some(p) => numbers(p).into_iter().map(|p| p as usize).collect(),
                None => (0..case.ids.len()).collect(),
            };
            let got: Vec<f32> = kept
                .iter()
                .flat_map(|p| got[p * vocab..(p + 1) * vocab].iter().copied())
                .collect();
            let error = nmse(&got, &want);
            let bar = case.json["half_error"]["nmse"].as_f64().unwrap();
            println!(
                "{} {}: nmse {error:.2e}, bar {bar:.2e}",
                r.dir.display(),
                case.name
            );
            assert!(error < bar, "{}: {error:e} against {bar:e}", case.name);
        }
    }
}

fn job(case: &Case, max_tokens: usize) -> Job {
    Job {
        prompt: case.ids.clone(),
        media: case.media.clone(),
        max_tokens,
        sampling: SamplingParams::greedy(),
        choice: 0,
        stop_tokens: Vec::new(),
        ..Job::default()
    }
}

fn generate(engine: &mut Engine, cases: &[&Case], tokens: usize) -> Vec<Vec<u32>> {
    let ids: Vec<_> = cases
        .iter()
        .map(|c| engine.submit(job(c, tokens)).unwrap())
        .collect();
    let mut out = vec![Vec::new(); cases.len()];
    let mut events = Vec::new();
    while engine.pending() > 0 {
        events.clear();
        engine.step(&mut events).unwrap();
        for e in &events {
            if let Event::Token { job, token, .. } = e {
                out[ids.iter().position(|i| i == job).unwrap()].push(*token);
            }
        }
    }
    out
}

#[test]
fn greedy_tokens_agree_while_the_margin_allows() {
    for r in references() {
        let mut engine = open(&in_place(&r.dir), room_of(&r.cases), |_| {});
        let all: Vec<&Case> = r.cases.iter().collect();
        let got = generate(&mut engine, &all, 12);
        let mut compared = 0;
        for (case, got) in r.cases.iter().zip(&got) {
            let greedy = numbers(&case.json["greedy_ids"]);
            let margins = case.json["margins"].as_array().unwrap();
            // As in tests/forward.rs: a margin within half of what a 16-bit run loses says nothing.
            let least = (case.json["half_error"]["max_abs"].as_f64().unwrap() / 2.0).max(0.02);
            for ((got, want), margin) in got.iter().zip(&greedy).zip(margins) {
                if margin.as_f64().unwrap() < least {
                    break;
                }
                assert_eq!(got, want, "{}", case.name);
                compared += 1;
            }
        }
        assert!(compared >= 5, "only {compared} tokens were compared");
        assert_eq!(engine.vision_stats().waves, 1, "one wave for all prompts");
    }
}

#[test]
fn prompts_together_in_any_pieces_give_the_same_bits() {
    let r = own();
    let store = in_place(&r.dir);
    let all = inputs(&r);
    let want = score(&mut open(&store, room_of(&r.cases), |_| {}), &all);
    let bits = |v: &[Vec<f32>]| -> Vec<u32> { v.iter().flatten().map(|x| x.to_bits()).collect() };
    // Room for the pictures of one prompt at a time, the tower in pieces of one slice.
    let most = |f: fn(&Visual) -> usize| {
        let of = |c: &Case| c.media.iter().map(|v| f(v)).sum::<usize>();
        r.cases.iter().map(of).max().unwrap()
    };
    let slice = room_of(&r.cases).slice;
    let tight = VisionRoom {
        patches: slice,
        slice,
        tokens: most(Visual::tokens),
        ..VisionRoom::default()
    };
    let mut engine = open(&store, tight, |o| {
        o.pass_tokens = 16;
        o.logits_rows = 16;
        o.threads = Some(1);
    });
    assert_eq!(bits(&score(&mut engine, &all)), bits(&want));
    assert!(engine.vision_stats().waves > 3);
    // Packed, through other page sizes and depths.
    let dir = tempfile::tempdir().unwrap();
    let ckpt = Checkpoint::open(&r.dir.display().to_string(), &OpenOptions::default()).unwrap();
    let packed = Store::pack(&ckpt, &PackOptions::new(dir.path()), &mut |_| {})
        .unwrap()
        .store;
    let mut engine = open(&packed, room_of(&r.cases), |o| {
        o.prefetch_depth = Some(3);
        o.page_bytes = Some(256 << 10);
    });
    assert_eq!(bits(&score(&mut engine, &all)), bits(&want));
    assert!(Processor::load(&packed.text_dir, packed.spec.vision.as_ref().unwrap()).is_ok());
}

#[test]
fn running_out_of_kv_and_of_embeddings_changes_nothing() {
    let r = own();
    let store = in_place(&r.dir);
    // Every prompt twice over: those behind one that is set back hold embeddings while it waits for its own.
    let cases: Vec<&Case> = r.cases.iter().chain(&r.cases).collect();
    let alone: Vec<Vec<u32>> = cases
        .iter()
        .map(|c| {
            let mut engine = open(&store, room_of(&r.cases), |_| {});
            generate(&mut engine, &[*c], 24).remove(0)
        })
        .collect();
    let most = |c: &&Case| c.media.iter().map(|v| v.tokens()).sum::<usize>();
    let largest = cases.iter().map(most).max().unwrap();
    let (mut set_back, mut waves) = (0, 0);
    for tokens in [largest, largest + 12, 2 * largest] {
        let room = VisionRoom {
            tokens,
            ..room_of(&r.cases)
        };
        let mut engine = open(&store, room, |o| {
            o.max_sequences = 5;
            o.kv_tokens = Some(96);
            o.context = 96;
        });
        assert_eq!(
            generate(&mut engine, &cases, 24),
            alone,
            "room for {tokens}"
        );
        set_back += engine.schedule_stats().preemptions;
        waves = waves.max(engine.vision_stats().waves);
    }
    assert!(set_back > 0 && waves > 4, "{set_back} {waves}");
}

#[test]
fn a_repeated_picture_is_looked_at_once() {
    let r = own();
    let store = in_place(&r.dir);
    let mut engine = open(&store, room_of(&r.cases), |o| o.max_sequences = 1);
    let one = &r.cases[0];
    let first = generate(&mut engine, &[one, one], 3);
    assert_eq!(first[0], first[1]);
    let again = generate(&mut engine, &[one], 3);
    assert_eq!(first[0], again[0]);
    let stats = engine.vision_stats();
    assert_eq!((stats.waves, stats.pictures), (1, 1));
}

/// Who waits hears of every unit of the tower, over all its pieces, and then of the layers'.
#[test]
fn the_tower_is_watched_unit_by_unit() {
    let r = own();
    let store = in_place(&r.dir);
    let case = &r.cases[0];
    let mut engine = open(&store, room_of(&r.cases), |_| ());
    engine.submit(job(case, 1)).unwrap();
    let mut told = Vec::new();
    while engine.pending() > 0 {
        engine
            .step_watched(&mut Vec::new(), &mut |stage, done, units| {
                told.push((stage, done, units));
            })
            .unwrap();
    }
    let tower = told.iter().take_while(|t| t.0 == Stage::Pictures);
    let seen: Vec<_> = tower.map(|&(_, done, units)| (done, units)).collect();
    let waves = engine.vision_stats().waves as usize;
    let vision = store.units.iter().filter(|u| is_vision(u.kind)).count();
    let all = waves * vision;
    let expected: Vec<_> = (1..=all).map(|done| (done, all)).collect();
    assert_eq!(seen, expected);
    assert!(told.len() > all && told[all..].iter().all(|t| t.0 == Stage::Layers));
}

#[test]
fn the_same_tokens_with_another_picture_share_nothing() {
    let r = own();
    let store = in_place(&r.dir);
    let one = &r.cases[0];
    let spec = store.spec.vision.clone().unwrap();
    let turned = {
        let mut rgb = tensorpager::media::read_image(&r.dir.join("image0.png")).unwrap();
        rgb.data.reverse();
        let processor = Processor::load(&r.dir, &spec).unwrap();
        Arc::new(
            processor
                .image(&rgb, "turned", &Options::default())
                .unwrap(),
        )
    };
    let other = Case {
        name: "turned".into(),
        ids: one.ids.clone(),
        media: vec![turned],
        json: one.json.clone(),
    };
    let room = || VisionRoom {
        tokens: 100,
        ..room_of(&r.cases)
    };
    let alone = |case: &Case| generate(&mut open(&store, room(), |_| {}), &[case], 8);
    let both = generate(&mut open(&store, room(), |_| {}), &[one, &other, one], 8);
    assert_eq!(both[0], alone(one)[0]);
    assert_eq!(both[1], alone(&other)[0]);
    assert_eq!(both[2], both[0]);
    assert_ne!(both[0], both[1]);
}

#[test]
fn text_never_reads_a_vision_byte() {
    let r = own();
    let store = in_place(&r.dir);
    let text = r.cases.iter().find(|c| c.media.is_empty()).unwrap();
    let image = &r.cases[0];
    let mut engine = open(&store, room_of(&r.cases), |_| {});
    let plain = generate(&mut engine, &[text], 4);
    assert_eq!(engine.vision_stats().disk_bytes, 0);
    let vision = |u: &&tensorpager::store::UnitLayout| {
        let name = u.kind.to_string();
        name.starts_with("vision")
    };
    let tower: u64 = store.units.iter().filter(vision).map(|u| u.bytes).sum();
    let streamed = engine.plan().streamed_bytes;
    // In place, units are read as whole blocks: a bound below both would not hold; the tower must simply not be among them.
    assert!(tower > 0 && engine.plan().tiers.len() == store.units.len());
    let before = engine.stats();
    generate(&mut engine, &[image], 4);
    let during = engine.stats().since(&before);
    assert!(engine.vision_stats().disk_bytes >= tower);
    let gathers = 8 * during.paging.passes * 65536;
    assert!(during.paging.used_bytes <= during.paging.passes * streamed + gathers);
    // And text beside pictures is what it is alone.
    let mut engine = open(&store, room_of(&r.cases), |_| {});
    assert_eq!(generate(&mut engine, &[image, text], 4)[1], plain[0]);
}

#[test]
fn pictures_that_cannot_be_are_refused_with_the_numbers() {
    let r = own();
    let store = in_place(&r.dir);
    let case = &r.cases[0];
    let mut none = open(&store, VisionRoom::default(), |o| o.vision = None);
    assert_eq!(none.submit(job(case, 1)).unwrap_err().code(), Code::Usage);
    let small = VisionRoom {
        patches: 4,
        slice: 4,
        tokens: 1,
        ..VisionRoom::default()
    };
    let e = open(&store, small, |_| {})
        .submit(job(case, 1))
        .unwrap_err();
    assert_eq!(e.code(), Code::Memory);
    assert!(
        e.what().contains("15 tokens") && e.fix().contains("--max-pixels"),
        "{e}"
    );
    let mut engine = open(&store, room_of(&r.cases), |_| {});
    for (prompt, media) in [
        (case.ids.clone(), Vec::new()),
        (case.ids[..20].to_vec(), case.media.clone()),
        (vec![1, 2, 3], case.media.clone()),
        (
            case.ids.clone(),
            [case.media.clone(), case.media.clone()].concat(),
        ),
        (case.ids.clone(), r.cases[2].media.clone()),
    ] {
        let wrong = Job {
            prompt,
            media,
            ..job(case, 1)
        };
        assert_eq!(engine.submit(wrong).unwrap_err().code(), Code::Usage);
    }
    let options = EngineOptions {
        cpu_memory: Some(48 << 20),
        vision: Some(VisionRoom {
            patches: 1 << 20,
            slice: 1 << 20,
            tokens: 1 << 18,
            ..VisionRoom::default()
        }),
        ..EngineOptions::default()
    };
    let e = Engine::open(
        &store,
        &options,
        Arc::new(AtomicBool::new(false)),
        &mut |_, _| {},
    );
    let e = e.err().unwrap();
    assert_eq!(e.code(), Code::Memory);
    assert!(
        e.cause().contains("pictures") && e.fix().contains("--max-pixels"),
        "{e}"
    );
}

#[test]
fn the_tower_asks_for_its_units_in_the_order_they_are_streamed() {
    // The tower asks for its own units only, in order: what its pager streams.
    let model = MemoryModel::load(&own().dir);
    let device = Device::cpu(Some(1), None).unwrap();
    let units: Vec<_> = model.units.iter().map(|u| (u.id, u.kind)).collect();
    let limits = Limits { wave: 4, slice: 4 };
    let tower = Tower::new(&device, model.spec.vision.as_ref().unwrap(), &units, limits).unwrap();
    let first = model
        .units
        .iter()
        .position(|u| u.kind.to_string().starts_with("vision"))
        .unwrap();
    let want: Vec<UnitId> = (first..units.len()).map(|i| UnitId(i as u32)).collect();
    assert_eq!(tower.order(), want);
}
