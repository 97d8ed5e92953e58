use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use super::super::tests::{host, options, outlined};
use super::super::{Short, in_16_bits};
use super::*;
use crate::checkpoint::{Checkpoint, OpenOptions, outline_synthetic};
use crate::cli::machine::Weights;
use crate::engine::DeviceChoice;
use crate::store::{DtypePolicy, outline};
use crate::units::Dtype;

/// A run that read everything at 1 GB/s and waited for nearly all of it.
fn ran<'a>(report: &'a PagingReport, during: &'a EngineStats, device: &'a Device) -> Ran<'a> {
    Ran {
        report,
        during,
        device,
        work: Work::Full,
    }
}

fn figures(bytes: u64, stall: f64) -> (PagingReport, EngineStats) {
    let pass_s = bytes as f64 / 1e9;
    let report = PagingReport {
        passes: 1,
        stall_s: stall * pass_s,
        stall_disk_s: stall * pass_s,
        compute_s: 0.1 * pass_s,
        disk_gb_per_s: 1.0,
        ..PagingReport::default()
    };
    let during = EngineStats {
        pass: Duration::from_secs_f64(pass_s),
        rows: 1,
        ..EngineStats::default()
    };
    (report, during)
}

/// A checkpoint of so many small layers, its weights never written.
fn llama(layers: usize) -> (tempfile::TempDir, Checkpoint) {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 288,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": true, "torch_dtype": "bfloat16"
    });
    outline_synthetic(dir.path(), &config).unwrap();
    let path = dir.path().display().to_string();
    let ckpt = Checkpoint::open(&path, &OpenOptions::default()).unwrap();
    (dir, ckpt)
}

#[test]
fn a_run_that_waited_is_told_what_it_would_gain() {
    let (_dir, ckpt) = llama(12);
    let nowhere = Path::new("/nowhere");
    let outline = outline(&ckpt, &DtypePolicy::One(Dtype::F32), nowhere, false).unwrap();
    let weights = Weights::from(&outline);
    let half = in_16_bits(&ckpt, outline.dtype, nowhere);
    let mut options = options(DeviceChoice::Cpu);
    (options.max_sequences, options.logits_rows) = (1, 1);
    let all = Advisor::new(&weights, &options, host());
    let least = all.smallest(&all.asked(), Short::Host).unwrap();
    options.cpu_memory = Some(least);
    let advisor = Advisor::new(&weights, &options, host());
    let bytes = all.weights.sizes.iter().map(|u| u.read_bytes).sum();
    let device = Device::cpu(Some(1), Some("portable")).unwrap();
    let (report, during) = figures(bytes, 0.9);
    let plain = advisor.faster(&ran(&report, &during, &device));
    let said = plain.join("\n");
    assert!(said.contains("--cpu-memory 7"), "{said}");
    assert!(said.contains("would read 0 B a pass instead of "), "{said}");
    assert!(!said.contains("--dtype"), "{said}");
    let advisor = advisor.with_half(half.as_ref());
    let said = advisor.faster(&ran(&report, &during, &device)).join("\n");
    assert!(
        said.contains("--dtype bfloat16 (weights rounded to 16 bits) would read "),
        "{said}"
    );
    // Another disk: what is known of it, and no more.
    let m = advisor
        .measured(None, &ran(&report, &during, &device))
        .unwrap();
    let folder = Folder {
        path: PathBuf::from("/data/offload_folder"),
        free: 9_000_000_000,
        disk: "sdb".into(),
    };
    let at = |rate| advisor.disk_told(&folder, rate, &m);
    let said = at(Some(4.0)).unwrap();
    assert!(
        said.starts_with("--offload-folder /data/offload_folder has 9.00 GB free"),
        "{said}"
    );
    let gain: f64 = said
        .split("(+")
        .nth(1)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        (150.0..=300.0).contains(&gain),
        "four times the rate: {said}"
    );
    assert_eq!(at(Some(0.9)), None, "a slower one is not worth a word");
    let unknown = at(None).unwrap();
    assert!(
        unknown.contains("whose rate is not known (`tensorpager doctor --offload-folder /data/"),
        "{unknown}"
    );
    assert!(!unknown.contains("tokens/s"), "{unknown}");
    // It hardly waited.
    let (report, during) = figures(bytes, 0.1);
    assert!(advisor.faster(&ran(&report, &during, &device)).is_empty());
}

#[test]
fn more_places_are_worth_it_while_the_disk_is_waited_for() {
    let outline = outlined("qwen2-bf16");
    let weights = Weights::from(&outline);
    let mut options = options(DeviceChoice::Cpu);
    (options.max_sequences, options.logits_rows) = (2, 2);
    options.placement = crate::paging::Placement::Disk;
    options.kv_tokens = Some(256);
    let advisor = Advisor::new(&weights, &options, host());
    let bytes = advisor.weights.sizes.iter().map(|u| u.read_bytes).sum();
    let device = Device::cpu(Some(1), Some("portable")).unwrap();
    let (report, during) = figures(bytes, 0.9);
    let with = |rows, kv_bytes| {
        let work = Work::Queue(Queue {
            rows,
            kv_bytes,
            tokens_per_s: 10.0,
        });
        let ran = Ran {
            work,
            ..ran(&report, &during, &device)
        };
        advisor.faster(&ran).join("\n")
    };
    let said = with(100, None);
    assert!(
        said.contains("--max-sequences 32 instead of 2 at once: about "),
        "{said}"
    );
    // No more than there are rows.
    let said = with(9, None);
    assert!(said.contains("--max-sequences 8 instead"), "{said}");
    assert!(!with(3, None).contains("--max-sequences"));
    // Room that was given grows with them.
    let said = with(4, Some(8 << 20));
    assert!(
        said.contains("--max-sequences 4 --kv-memory 16MiB"),
        "{said}"
    );
}

#[test]
fn more_rows_take_no_less_than_few_and_no_more_than_in_proportion() {
    let kept = ComputeRates {
        memory_gb_per_s: 10.0,
        gflops: 100.0,
        element_bytes: 2.0,
        points: vec![(1, 0.1), (2, 0.08), (8, 0.4), (16, 4.0)],
    };
    let longer = |rows, times| super::longer(Some(&kept), rows, times);
    assert_eq!((longer(1, 2), longer(8, 2)), (1.0, 2.0));
    assert!((longer(1, 8) - 4.0).abs() < 1e-9);
    assert_eq!(super::longer(None, 1, 8), 8.0);
}

/// The number between `before` and `after`.
#[track_caller]
fn between(text: &str, before: &str, after: &str) -> f64 {
    let rest = text
        .split(before)
        .nth(1)
        .unwrap_or_else(|| panic!("{text}"));
    rest.split(after).next().unwrap().parse().unwrap()
}

#[test]
fn on_a_gpu_its_own_memory_and_the_hosts_are_weighed() {
    let (_dir, ckpt) = llama(24);
    let auto = DtypePolicy::parse("auto").unwrap();
    let outline = outline(&ckpt, &auto, Path::new("/nowhere"), false).unwrap();
    let weights = Weights::from(&outline);
    let mut options = options(DeviceChoice::Cuda(0));
    (options.max_sequences, options.logits_rows) = (1, 1);
    let room = |limit| GpuRoom {
        limit,
        base: 8 << 20,
    };
    let all = Advisor::new(&weights, &options, host()).with_gpu(Some(room(4 << 30)));
    let gpu = all.smallest(&all.asked(), Short::Gpu).unwrap();
    let small = Advisor::new(&weights, &options, host()).with_gpu(Some(room(gpu)));
    let cpu = small.smallest(&small.asked(), Short::Host).unwrap();
    (options.cpu_memory, options.gpu_memory) = (Some(cpu), Some(gpu));
    let advisor = Advisor::new(&weights, &options, host());
    let bytes: u64 = advisor.weights.sizes.iter().map(|u| u.read_bytes).sum();
    let device = Device::cpu(Some(1), Some("portable")).unwrap();
    let (mut report, during) = figures(bytes, 0.9);
    report.h2d_gb_per_s = 4.0;
    let card = |free| {
        Some(Card {
            room: room(gpu),
            free,
        })
    };
    let with = |free| advisor.faster_on(card(free), &ran(&report, &during, &device));
    let said = with(4 << 30);
    let of = |flag: &str| {
        let found = said.iter().find(|s| s.starts_with(flag));
        found.unwrap_or_else(|| panic!("{flag}: {said:?}"))
    };
    // All of it on the GPU: only a row of the embedding moves, and computing is what is left, a tenth of the pass.
    let own = of("--gpu-memory 4096MiB (free now) would read ");
    assert!(
        own.contains(" and copy 0 B a pass to the GPU instead of "),
        "{own}"
    );
    let gain = between(own, "(+", " %");
    assert!((700.0..1000.0).contains(&gain), "{own}");
    // In host memory it is still to be copied, at four times the disk's rate.
    let hosts = of("--cpu-memory ");
    assert!(
        hosts.contains("would read 0 B a pass instead of "),
        "{hosts}"
    );
    assert!(!hosts.contains("copy"), "as much as before: {hosts}");
    let gain = between(hosts, "(+", " %");
    assert!((200.0..=310.0).contains(&gain), "{hosts}");
    // The card has no more.
    let said = with(gpu);
    assert!(!said.iter().any(|s| s.contains("--gpu-memory")), "{said:?}");
    // A run that hardly waited, and one whose card is not known.
    let (report, during) = figures(bytes, 0.1);
    let ran = ran(&report, &during, &device);
    assert!(advisor.faster_on(card(4 << 30), &ran).is_empty());
    let (report, during) = figures(bytes, 0.9);
    let ran = self::ran(&report, &during, &device);
    assert!(advisor.faster_on(None, &ran).is_empty());
}
