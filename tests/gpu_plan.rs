//! What `plan` and `tune` say of a GPU, against the emulated driver: rates asked of it and kept, budgets that hold, what it takes where none
//! is here, and frames in flight.
//!
//! How fast the emulated GPU is says nothing of a real one; that what was measured is what is used does.

mod common;
mod emulated;
#[path = "emulated/run.rs"]
mod run;

use std::fs;
use std::path::{Path, PathBuf};

use common::program::program_within;
use emulated::driver;
use run::{Run, deep, layered, synthetic};
use serde_json::{Value, json};

const MODEL: &str = "gpu-qwen2-bf16";

/// Rates are kept under `kept`; those of the disk are given, for the disk is not what is looked at.
fn plan(driver: &Path, kept: &Path, device: &str) -> Run {
    let run = Run::on(device, driver, "plan", MODEL).args([
        "--in-place",
        "--disk-gb-per-s",
        "2",
        "--sequences",
        "1,8",
    ]);
    run.env("XDG_CACHE_HOME", kept.to_str().unwrap())
}

/// The only record whose name begins so.
fn record(kept: &Path, name: &str) -> PathBuf {
    let of_name = |p: &PathBuf| p.file_name().unwrap().to_str().unwrap().starts_with(name);
    let dir = fs::read_dir(kept.join("tensorpager")).unwrap();
    let mut found: Vec<PathBuf> = dir.map(|e| e.unwrap().path()).filter(of_name).collect();
    assert_eq!(found.len(), 1, "{name}: {found:?}");
    found.remove(0)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_gpu_is_asked_once_and_what_it_gave_is_kept() {
    let Some(driver) = driver() else { return };
    let kept = tempfile::tempdir().unwrap();
    let kept = kept.path();
    let first = plan(driver, kept, "cuda").json();
    assert_eq!(first["device"], "cuda:0");
    let rates = &first["rates"];
    assert!(rates["h2d_gb_per_s"].as_f64().unwrap() > 0.0, "{rates}");
    assert_eq!(rates["compute"]["points"].as_array().unwrap().len(), 4);
    let (compute, copies) = (record(kept, "compute-bfloat16"), record(kept, "rates"));
    assert_eq!(read(&copies)["h2d"]["gb_per_s"], rates["h2d_gb_per_s"]);

    // What is on record is used as it stands, by `--device auto` too.
    let mut known = read(&compute);
    assert!(
        known["device"].as_str().unwrap().contains("driver CUDA"),
        "{known}"
    );
    known["rates"] = json!({"memory_gb_per_s": 400.0, "gflops": 5e4, "element_bytes": 2.0,
        "points": [[1, 0.0025], [8, 0.0025], [64, 0.004], [256, 0.01]]});
    fs::write(&compute, known.to_string()).unwrap();
    for device in ["cuda", "auto"] {
        let plan = plan(driver, kept, device).json();
        assert_eq!(plan["device"], "cuda:0");
        assert_eq!(plan["rates"]["compute"], known["rates"]);
        assert_eq!(plan["rates"]["h2d_gb_per_s"], rates["h2d_gb_per_s"]);
    }
    // A run's one row stands before the measured one.
    known["ran_ns_per_byte"] = json!(0.005);
    fs::write(&compute, known.to_string()).unwrap();
    let after = plan(driver, kept, "cuda").json();
    assert_eq!(after["rates"]["compute"]["memory_gb_per_s"], 400.0);
    assert_eq!(after["rates"]["compute"]["points"][0][1], 0.005);

    // What the user says comes first.
    let by_hand = plan(driver, kept, "cuda").args(["--gpu-gb-per-s", "123"]);
    let by_hand = by_hand.json()["rates"].clone();
    assert_eq!(by_hand["compute"]["memory_gb_per_s"], 123.0);
    assert_eq!(by_hand["compute"]["gflops"], 5e4);
    let by_hand = plan(driver, kept, "cuda")
        .args(["--h2d-gb-per-s", "7"])
        .json();
    assert_eq!(by_hand["rates"]["h2d_gb_per_s"], 7.0);

    // Opening a GPU for a run keeps what its copies reach.
    let fast = json!({"gpu": known["device"], "gb_per_s": 1e6});
    let mut copied = read(&copies);
    copied["h2d"] = json!({"gpu": known["device"], "gb_per_s": 1e-9});
    fs::write(&copies, copied.to_string()).unwrap();
    let ran = Run::new(driver, "run", MODEL)
        .args([
            "--raw",
            "--prompt",
            "Layer 7",
            "--max-tokens",
            "3",
            "--in-place",
        ])
        .env("XDG_CACHE_HOME", kept.to_str().unwrap())
        .json();
    let reached = read(&copies)["h2d"]["gb_per_s"].clone();
    assert_eq!(ran["paging"]["probed_h2d_gb_per_s"], reached);
    let now = plan(driver, kept, "cuda").json();
    assert_eq!(now["rates"]["h2d_gb_per_s"], reached);
    // And never lowers it.
    copied["h2d"] = fast;
    fs::write(&copies, copied.to_string()).unwrap();
    let now = plan(driver, kept, "cuda").json();
    assert_eq!(now["rates"]["h2d_gb_per_s"], 1e6);
}

/// Layers a little larger than a mebibyte take two each on the GPU: counted so, as many stay there as there is room for, and not one more.
#[test]
fn what_the_driver_rounds_up_to_is_counted() {
    let Some(driver) = driver() else { return };
    let dir = tempfile::tempdir().unwrap();
    let shape = json!({
        "hidden_size": 256, "intermediate_size": 608, "num_hidden_layers": 100,
        "num_attention_heads": 2, "vocab_size": 288, "tie_word_embeddings": true,
    });
    let model = synthetic(dir.path(), &shape);
    let memory = (192u64 << 20).to_string();
    let run = Run::new(driver, "run", &model)
        .args(["--raw", "--prompt", "T", "--max-tokens", "2"])
        .args(["--gpu-memory", &memory])
        .env("EMUCUDA_MEMORY", &memory);
    // Without that count all 100 would be given 110 MB and take 210. What the slack, slots, keys and values leave holds at least 50. What is
    // reported is their weights, not the pages.
    let layer = 2 * (2 * 256 * 128 + 2 * 256 * 64 + 3 * 256 * 608 + 2 * 256);
    let on_gpu = run.json()["paging"]["resident_gpu_bytes"].as_u64().unwrap();
    assert!(on_gpu > 50 * layer && on_gpu < 64 * layer, "{on_gpu}");
}

#[test]
fn the_budgets_named_are_those_that_run() {
    let Some(driver) = driver() else { return };
    let kept = tempfile::tempdir().unwrap();
    let small = |run: Run| run.env("EMUCUDA_CONTEXT", "100000000");
    let plan = small(plan(driver, kept.path(), "cuda")).json();
    let smallest = plan["smallest_gpu_memory"].as_u64().unwrap();
    assert!(plan["gpu_memory"].as_u64().unwrap() > smallest, "{plan}");
    let run = |bytes: u64| {
        let run = Run::new(driver, "run", MODEL);
        let memory = bytes.to_string();
        small(run.args([
            "--raw",
            "--prompt",
            "T",
            "--max-tokens",
            "2",
            "--gpu-memory",
            &memory,
        ]))
    };
    // A run of one prompt has smaller passes than the plan has room for.
    run(smallest).json();
    run(smallest - (8 << 20)).fails();
}

/// The advice of a refusal, followed.
#[test]
fn a_gpu_that_is_too_small_is_told_a_context_that_fits() {
    let Some(driver) = driver() else { return };
    let kept = tempfile::tempdir().unwrap();
    // Keys and values of so many layers are most of what a run takes.
    let model = layered(kept.path(), 100);
    let small = |run: Run| run.env("EMUCUDA_CONTEXT", "1000000");
    let plan = Run::on("cuda", driver, "plan", &model).args(["--in-place", "--sequences", "1"]);
    let plan = small(plan.args(["--disk-gb-per-s", "2"])).json();
    let smallest = plan["smallest_gpu_memory"].as_u64().unwrap();
    let run = |context: &str, memory: &str| {
        program_within(kept.path())
            .args(["run", &model, "--device", "cuda", "--threads", "2", "--raw"])
            .args(["--prompt", "T", "--max-tokens", "2", "--in-place"])
            .args(["--context", context, "--gpu-memory", memory])
            .env("LD_LIBRARY_PATH", driver)
            .env("EMUCUDA_CONTEXT", "1000000")
            .output()
            .unwrap()
    };
    let refused = run("512", &(smallest - (8 << 20)).to_string());
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    let named = said.split("with --context 256 ").nth(1);
    let named = named.unwrap_or_else(|| panic!("{said}"));
    let named = named.split(' ').next().unwrap();
    assert!(said.contains(&format!("{named} are enough")), "{said}");
    let fits = run("256", named);
    let told = String::from_utf8_lossy(&fits.stderr).into_owned();
    assert_eq!(fits.status.code(), Some(0), "{said}{told}");
    assert_eq!(run("512", named).status.code(), Some(1), "{said}");
}

#[test]
fn what_is_not_here_is_asked_for() {
    let Some(driver) = driver() else { return };
    let kept = tempfile::tempdir().unwrap();
    let none = |device: &str| plan(driver, kept.path(), device).env("EMUCUDA_DEVICES", "0");
    let said = none("cuda").fails();
    assert!(
        said.contains("no such GPU") && said.contains("--gpu-gflops"),
        "{said}"
    );
    let done = none("auto").args(["--gpu-memory", "8GiB"]).output();
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(2), "{said}");
    assert!(said.contains("--h2d-gb-per-s"), "{said}");
    let by_hand = ["--gpu-memory", "8GiB", "--h2d-gb-per-s", "20"];
    let more = ["--gpu-gb-per-s", "500", "--gpu-gflops", "5e4"];
    let plan = none("auto").args(by_hand).args(more).json();
    assert_eq!(plan["gpu_memory"], 8u64 << 30);
    assert!(plan["resident_gpu_bytes"].as_u64().unwrap() > 0);
    // Nobody spoke of a GPU, and none is there.
    let cpu = none("auto").args(["--memory-gb-per-s", "10", "--cpu-gflops", "100"]);
    let cpu = cpu.json();
    assert_eq!(
        (&cpu["device"], &cpu["gpu_memory"]),
        (&json!("cpu"), &Value::Null)
    );
}

/// The advice of a run that waited for copies, followed.
#[test]
fn a_run_that_waits_for_copies_is_told_what_would_be_faster() {
    let Some(driver) = driver() else { return };
    let kept = tempfile::tempdir().unwrap();
    let model = layered(kept.path(), 100);
    let here = |run: Run| {
        let run = run.args(["--in-place"]).env("EMUCUDA_CONTEXT", "1000000");
        run.env("XDG_CACHE_HOME", kept.path().to_str().unwrap())
    };
    // What products take is on record from here on.
    let plan = Run::on("cuda", driver, "plan", &model).args(["--sequences", "1"]);
    let plan = here(plan.args(["--disk-gb-per-s", "2"])).json();
    let smallest = plan["smallest_gpu_memory"].as_u64().unwrap();
    let run = |memory: &str, map: &str| {
        let run = Run::on("cuda", driver, "run", &model).args(["--raw", "--prompt", "T"]);
        let run = run.args(["--max-tokens", "5", "--ignore-eos", "--gpu-memory", memory]);
        let run = run.args(["--device-map", map]);
        let run = here(run.env("EMUCUDA_COPY_US", "3000")).json();
        let advice = run["advice"].as_array().cloned().unwrap_or_default();
        let advice: Vec<String> = advice.iter().map(|a| a.as_str().unwrap().into()).collect();
        let copied = run["paging"]["h2d_bytes"].as_u64().unwrap();
        let rate = run["timings"]["output_tokens_per_s"].as_f64().unwrap();
        (advice, copied, rate)
    };
    let (advice, copied, slow) = run(&smallest.to_string(), "auto");
    let own = advice.iter().find(|a| a.starts_with("--gpu-memory "));
    let own = own.unwrap_or_else(|| panic!("{advice:?}"));
    assert!(
        own.contains(" (free now) would copy 0 B a pass to the GPU instead of "),
        "{own}"
    );
    let number = |text: &str, before: &str| -> f64 {
        let rest = text.split(before).nth(1).unwrap();
        rest.split(' ').next().unwrap().parse().unwrap()
    };
    let promised = number(own, "about ");
    assert!(promised > 1.5 * slow, "{own} after {slow}");
    // Nothing is read from the disk: no other is any better.
    assert!(
        !advice.iter().any(|a| a.contains("on another disk")),
        "{advice:?}"
    );
    let memory = own.split(' ').nth(1).unwrap();
    let (advice, left, fast) = run(memory, "auto");
    assert!(left < copied / 10, "{left} of {copied}");
    assert!(fast > 1.5 * slow, "{fast} after {slow}");
    assert!(
        !advice.iter().any(|a| a.contains("--gpu-memory")),
        "{advice:?}"
    );
    // Where keys and values of more sequences have room, the copies are theirs all together.
    let (advice, _, slow) = run("512MiB", "cpu");
    let batch = advice
        .iter()
        .find(|a| a.contains("8 prompts at once (`batch`)"));
    let batch = batch.unwrap_or_else(|| panic!("{advice:?}"));
    assert!(number(batch, "about ") > 1.5 * slow, "{batch} after {slow}");
}

/// Where the GPU has no room for keys and values they are planned in host memory, and their copies are counted.
#[test]
fn keys_and_values_without_room_on_the_gpu_are_copied() {
    let Some(driver) = driver() else { return };
    let kept = tempfile::tempdir().unwrap();
    let model = deep(kept.path());
    let with_pinned = |memory: &str, pinned: &str| {
        let by_hand = [
            "--gpu-memory",
            memory,
            "--h2d-gb-per-s",
            "0.1",
            "--pinned-memory",
            pinned,
        ];
        let more = ["--gpu-gb-per-s", "500", "--gpu-gflops", "5e4"];
        let run = Run::on("auto", driver, "plan", &model).args(["--disk-gb-per-s", "2"]);
        let run = run.env("XDG_CACHE_HOME", kept.path().to_str().unwrap());
        let run = run.args(["--in-place", "--sequences", "1"]);
        run.args(by_hand).args(more).json()
    };
    let with = |memory: &str| with_pinned(memory, "1GiB");
    let much = with("8GiB");
    assert_eq!(much["rows"][0]["kv_tier"], "gpu");
    assert_eq!(much["rows"][0]["copied_bytes_per_pass"], 0);
    // A little less than the least that does has room for two layers of them at a time, not for twelve.
    let least = much["smallest_gpu_memory"].as_u64().unwrap();
    let little = with(&(least - (1 << 20)).to_string());
    let row = &little["rows"][0];
    assert_eq!(row["kv_tier"], "cpu", "{little}");
    let count = |name: &str| row[name].as_u64().unwrap();
    let token = count("kv_bytes") / count("kv_tokens");
    let through_slots = |u: &&Value| {
        let name = u["unit"].as_str().unwrap();
        u["tier"] != "gpu" && (name.starts_with("layer") || name.starts_with("head"))
    };
    let units = little["units"].as_array().unwrap();
    let sizes = units.iter().filter(through_slots);
    let weights: u64 = sizes.map(|u| u["bytes"].as_u64().unwrap()).sum();
    // Keys and values in host memory are pinned, in any case and first; units of the pass that rest there while the bound has room.
    let pinned = |plan: &Value| {
        let frames = plan["ring_bytes"].as_u64().unwrap();
        plan["pinned_bytes"].as_u64().unwrap()
            - frames
            - plan["rows"][0]["kv_bytes"].as_u64().unwrap()
    };
    let in_memory = units
        .iter()
        .filter(|u| u["tier"] == "cpu" && through_slots(u));
    let in_memory: u64 = in_memory.map(|u| u["bytes"].as_u64().unwrap()).sum();
    assert!(in_memory > 0 && pinned(&little) >= in_memory, "{little}");
    let bound = row["kv_bytes"].to_string();
    let bounded = with_pinned(&(least - (1 << 20)).to_string(), &bound);
    assert_eq!(pinned(&bounded), 0, "{bounded}");
    // Half a context; a block.
    assert_eq!(count("copied_bytes_per_pass"), weights + 256 * token);
    assert_eq!(count("copied_back_bytes_per_pass"), 16 * token);
    let pass_s = row["pass_s"].as_f64().unwrap();
    assert!(
        pass_s >= 0.999 * count("copied_bytes_per_pass") as f64 / 1e8,
        "{row}"
    );
}

/// Layers of nearly 8 parts, head blocks of 7 and of 3: a GPU with room for 10 takes both head blocks where the bus is slow; where the disk is,
/// it takes a layer, and host memory the small block. A part is a little less than one of the pages of 2 MiB that the GPU's memory is counted in.
fn three_sizes(dir: &Path) -> (String, u64) {
    const HIDDEN: u64 = 16_384 - 256;
    let shape = json!({
        "hidden_size": HIDDEN, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 1,
        "vocab_size": 64 * 10, "tie_word_embeddings": false,
    });
    (synthetic(dir, &shape), 64 * HIDDEN * 2)
}

#[test]
fn kept_rates_place_units_for_plan_and_run_alike() {
    let Some(driver) = driver() else { return };
    let kept = tempfile::tempdir().unwrap();
    let kept = kept.path();
    let (model, part) = three_sizes(kept);
    let on = |command: &str, cpu: u64, gpu: u64| {
        // A prompt of nearly the context: passes and their buffers are as large as those planned for.
        let run = Run::within("16", "cuda", driver, command, &model);
        let run = run.args(["--in-place", "--page-size", "64KiB", "--ring-size", "4"]);
        let run = run.args(["--cpu-memory", &cpu.to_string()]);
        let run = run.args(["--gpu-memory", &gpu.to_string()]);
        run.env("XDG_CACHE_HOME", kept.to_str().unwrap())
    };
    let plan = |cpu, gpu| on("plan", cpu, gpu).args(["--sequences", "1"]);
    let much = plan(1 << 30, 1000 << 20)
        .args(["--disk-gb-per-s", "2"])
        .json();
    let least = |name: &str| much[name].as_u64().unwrap();
    let cpu = least("smallest_cpu_memory") + 5 * part;
    let known = read(&record(kept, "rates"));
    let keep = |disk: f64, h2d: f64| {
        let mut rates = known.clone();
        rates["disk_gb_per_s"] = json!(disk);
        rates["h2d"]["gb_per_s"] = json!(h2d);
        fs::write(record(kept, "rates"), rates.to_string()).unwrap();
    };
    let placed = |of: &Value| {
        ["resident_gpu_bytes", "resident_cpu_bytes"].map(|name| of[name].as_u64().unwrap())
    };
    let both = |gpu: u64| {
        [(1.0, 1e3), (1e3, 1.0)].map(|(disk, h2d)| {
            keep(disk, h2d);
            placed(&plan(cpu, gpu).json())
        })
    };
    // The budget named is to a MiB; the room that is looked for is a part wide.
    let from = least("smallest_gpu_memory") + 9 * part - (1 << 20);
    let mut rooms = (0..80).map(|step| from + step * part / 8);
    let differ = |gpu: &u64| {
        let [slow_disk, slow_bus] = both(*gpu);
        slow_disk != slow_bus
    };
    let gpu = rooms.find(differ).expect("a room that rates decide") + part / 8;
    let planned = both(gpu);
    assert!(
        planned[0][0] < planned[1][0] && planned[0][1] > planned[1][1],
        "{planned:?}"
    );
    let ran = [(1.0, 1e3), (1e3, 1.0)].map(|(disk, h2d)| {
        keep(disk, h2d);
        let run = on("run", cpu, gpu).args(["--raw", "--prompt", "abcdefghijklmno"]);
        run.args(["--max-tokens", "1", "--ignore-eos"]).json()
    });
    assert_eq!(ran.each_ref().map(|r| placed(&r["paging"])), planned);
    assert_eq!(ran[0]["token_ids"], ran[1]["token_ids"]);
}

#[test]
fn frames_in_flight_are_tuned_kept_and_used() {
    let Some(driver) = driver() else { return };
    let kept = tempfile::tempdir().unwrap();
    let kept = kept.path();
    let here = |run: Run| {
        run.args(["--in-place"])
            .env("XDG_CACHE_HOME", kept.to_str().unwrap())
    };
    let tune = |device: &str| {
        let run = Run::on(device, driver, "tune", MODEL).args(["--seconds", "0.001", "--quiet"]);
        let run = run.args(["--page-sizes", "64KiB", "--queue-depths", "4,16"]);
        let run = run.args(["--readers", "auto", "--prefetch-depths", "1"]);
        here(run.args(["--ring-sizes", "auto,8"])).json()
    };
    let curve = tune("cuda")["curve"].clone();
    let rings = |queue: u64| {
        let rows = curve.as_array().unwrap().iter();
        let of_queue = rows.filter(|r| r["page_size"] == 65_536 && r["queue_depth"] == queue);
        of_queue
            .map(|r| r["ring_frames"].clone())
            .collect::<Vec<_>>()
    };
    assert!(
        rings(4).contains(&json!(8)) && rings(4).contains(&Value::Null),
        "{curve}"
    );
    // 16 reads have no room in 8 frames: these are 8 reads.
    assert_eq!((rings(8), rings(16)), (vec![json!(8)], vec![Value::Null]));
    let record_path = record(kept, "tune");
    let mut found = read(&record_path);
    assert!(
        found["device"].as_str().unwrap().contains("driver CUDA"),
        "{found}"
    );
    let in_record = found["curve"].as_array().unwrap().iter();
    assert!(in_record.filter(|r| r["ring_frames"] == 8).count() >= 2);

    found["best"] = json!({"io": "io_uring", "page_size": 65_536, "queue_depth": 4, "prefetch_depth": 1, "ring_frames": 3});
    fs::write(&record_path, found.to_string()).unwrap();
    let run = |more: &[&str]| {
        let mut run = Run::new(driver, "run", MODEL).args(["--raw", "--prompt", "Layer 7"]);
        run.command
            .args(["--max-tokens", "3", "--device-map", "disk"])
            .args(more);
        let report = here(run).json();
        (
            report["paging"]["ring_frames"].as_u64().unwrap(),
            report["token_ids"].clone(),
        )
    };
    let (tuned, said, plain) = (run(&[]), run(&["--ring-size", "5"]), run(&["--no-tune"]));
    assert_eq!((tuned.0, said.0), (3, 5));
    assert!(plain.0 > 1 && plain.0 != 3, "{plain:?}");
    assert!(
        tuned.1 == said.1 && said.1 == plain.1,
        "frames change no token"
    );
    // A CPU has none.
    let cpu = tune("cpu");
    assert!(
        cpu["curve"]
            .as_array()
            .unwrap()
            .iter()
            .all(|r| r.get("ring_frames").is_none())
    );
}
