//! Decoding a checkpoint of a 7B model's geometry (random weights) under a bound on GPU memory: from RAM and from disk, beside accelerate's
//! offload of the same files, and for more and more sequences.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tensorpager::engine::HostMemory;
use tensorpager::error::{Code, Error};

use super::goals::Goal;
use super::tools::{Ran, python, python_command, run};
use super::watch::{Watch, within};
use super::weights::{Checkpoint, checkpoint};
use super::{Outcome, Suite, TIME_IS_UP};

/// Host memory of a run, beyond the weights that rest there.
const LEAST_RAM: u64 = 2 << 30;
/// Time in which writing and running a checkpoint says anything.
const LEAST_TIME: Duration = Duration::from_secs(20);

/// The checkpoint, or `None` where there is no time to write it: that is said, and no error.
fn checkpoint_in_time(suite: &mut Suite, table: &str) -> Outcome<Option<Checkpoint>> {
    let why = match suite.left() < LEAST_TIME && !suite.smoke {
        true => TIME_IS_UP.to_string(),
        false => match checkpoint(suite) {
            Ok(made) => return Ok(Some(made)),
            Err(e) => match e.downcast_ref::<Error>() {
                Some(slow) if slow.code() == Code::Stalled => slow.cause().to_string(),
                _ if suite.up() => TIME_IS_UP.to_string(),
                _ => return Err(e),
            },
        },
    };
    suite.report.table(table, &COLUMNS);
    suite.report.not_run("all of it", &why);
    Ok(None)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn gpu_budget(smoke: bool) -> u64 {
    match smoke {
        true => 512 << 20,
        false => 8 << 30,
    }
}

fn tensorpager(suite: &Suite, arguments: &[String], packs: &Path) -> Outcome<Ran> {
    let mut command = Command::new(suite.binary());
    command.args(arguments).arg("--offload-folder").arg(packs);
    run(&mut command, suite.left().min(Duration::from_secs(180)))
}

/// Asks the kernel to forget a folder's files; then the share of their bytes that it still holds.
fn evict(folder: &Path) -> Outcome<f64> {
    for entry in walk(folder)? {
        let file = std::fs::File::open(&entry)?;
        file.sync_all()?;
        // SAFETY: advice about a file that is open.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
    in_page_cache(folder)
}

/// The share of a folder's bytes that the page cache holds.
fn in_page_cache(folder: &Path) -> Outcome<f64> {
    let (mut held, mut all) = (0u64, 0u64);
    for entry in walk(folder)? {
        let file = std::fs::File::open(&entry)?;
        let bytes = file.metadata()?.len() as usize;
        if bytes == 0 {
            continue;
        }
        // SAFETY: nothing of the mapping is read; it only asks which pages are in memory.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        let mut pages = vec![0u8; bytes.div_ceil(4096)];
        // SAFETY: the mapping has as many pages as the vector has bytes.
        let asked =
            unsafe { libc::mincore(map.as_ptr() as *mut _, bytes, pages.as_mut_ptr().cast()) };
        if asked == 0 {
            held += pages.iter().filter(|p| **p & 1 == 1).count() as u64 * 4096;
        }
        all += bytes as u64;
    }
    Ok(held as f64 / all.max(1) as f64)
}

fn walk(folder: &Path) -> Outcome<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => files.extend(walk(&path)?),
            false => files.push(path),
        }
    }
    Ok(files)
}

/// `batch --bench`: its closing object.
fn bench(
    suite: &Suite,
    made: &Checkpoint,
    sequences: usize,
    memory: u64,
    output: usize,
) -> Outcome<Value> {
    let cpu_memory = &format!("{}MiB", memory >> 20);
    let gpu = &format!("{}MiB", gpu_budget(suite.smoke) >> 20);
    let folder = text(&made.folder);
    let (n, out) = (sequences.to_string(), output.to_string());
    let arguments = [
        "batch",
        &folder,
        "--in-place",
        "--bench",
        &n,
        "--max-sequences",
        &n,
        "--input-len",
        "8",
        "--output-len",
        &out,
        "--device",
        "cuda",
        "--gpu-memory",
        gpu,
        "--cpu-memory",
        cpu_memory,
        "--json",
        "--quiet",
    ];
    let arguments: Vec<String> = arguments.iter().map(|a| a.to_string()).collect();
    let ran = tensorpager(suite, &arguments, &made.packs)?;
    match ran.ok {
        true => ran.json(),
        false => Err(ran.why().into()),
    }
}

/// Runs it and says how it went; what there is no memory or time for, or was stopped when the time was up, is said and no error.
fn measure(
    suite: &mut Suite,
    made: &Checkpoint,
    what: &str,
    sequences: usize,
    memory: Result<u64, String>,
) {
    let Some(memory) = can_run(suite, what, memory) else {
        return;
    };
    let output = if suite.smoke { 3 } else { 8 };
    match bench(suite, made, sequences, memory, output) {
        Ok(report) => row(suite, what, &report),
        Err(_) if suite.up() => suite.report.not_run(what, TIME_IS_UP),
        Err(e) => suite.report.failed(&format!("{what}: {e}")),
    }
}

fn can_run(suite: &mut Suite, what: &str, memory: Result<u64, String>) -> Option<u64> {
    let late = suite.left() < LEAST_TIME && !suite.smoke;
    match memory {
        Ok(_) if late => suite.report.not_run(what, TIME_IS_UP),
        Ok(memory) => return Some(memory),
        Err(why) => suite.report.not_run(what, &why),
    }
    None
}

/// One more run, short and not timed, whose GPU memory is watched from outside: whether it keeps to its budget.
fn watched(suite: &mut Suite, made: &Checkpoint, sequences: usize, memory: Result<u64, String>) {
    let columns = ["run", "budget GiB", "taken GiB", ""];
    let name = "GPU memory of a run, by what the driver said was free";
    suite.report.table(name, &columns);
    let what = format!("{sequences} sequences, two tokens");
    let Some(memory) = can_run(suite, &what, memory) else {
        return;
    };
    let watch = Watch::begin();
    let ran = match watch.is_some() {
        true => bench(suite, made, sequences, memory, 2),
        false => Ok(Value::Null),
    };
    let taken = watch.and_then(Watch::end);
    match ran {
        Ok(_) => {}
        Err(_) if suite.up() => {
            suite.report.not_run(&what, TIME_IS_UP);
            return;
        }
        Err(e) => {
            suite.report.failed(&format!("{what}: {e}"));
            return;
        }
    }
    let budget = gpu_budget(suite.smoke);
    let text = |bytes: Option<u64>| bytes.map_or("-".into(), |b| format!("{:.2}", gib(b)));
    let cells = [what, text(Some(budget)), text(taken)];
    let [what, wanted, seen] = cells.each_ref().map(String::as_str);
    match taken.map(|t| within(t, budget)) {
        Some(Some(holds)) => suite.report.checked(holds, &[what, wanted, seen, ""]),
        // The emulated driver tells a process its own memory alone.
        Some(None) => {
            let said = "not told here: it never fell";
            suite.report.row(&[what, wanted, seen, said]);
        }
        None => {
            let said = "not told: the driver does not answer this process";
            suite.report.row(&[what, wanted, seen, said]);
        }
    }
    suite.report.note(
        "Asked every 20 ms, the run's own context included; what other programs take of the card meanwhile counts too. The watcher's context is \
         there before: the run counts it as its own and takes so much less. No timed run has a watcher.",
    );
}

fn row(suite: &mut Suite, what: &str, report: &Value) {
    let p = &report["paging"];
    let n = |v: &Value| v.as_f64().unwrap_or(0.0);
    let seconds = n(&report["timings"]["decode_s"]);
    let passes = n(&p["passes"]).max(1.0);
    let largest = n(&p["disk_s"]).max(n(&p["h2d_s"])).max(n(&p["compute_s"]));
    let ratio = (largest > 0.0).then(|| seconds / largest);
    let copies = n(&p["h2d_gb_per_s"]);
    let of_pinned = suite.pinned_gb_per_s.filter(|_| copies > 0.0);
    let of_pinned = of_pinned.map(|peak| copies / peak);
    if let Some(ratio) = ratio {
        suite.goals.seen(Goal::Pass, ratio);
    }
    if let Some(share) = of_pinned {
        suite.goals.seen(Goal::Copies, share);
    }
    suite.report.row(&[
        what,
        &format!("{:.2}", n(&report["timings"]["output_tokens_per_s"])),
        &format!("{:.3}", seconds / passes),
        &format!("{:.2}", n(&p["resident_gpu_bytes"]) / 1e9),
        &format!("{:.2}", n(&p["disk_bytes_per_pass"]) / 1e9),
        &format!("{:.2}", n(&p["disk_gb_per_s"])),
        &format!("{copies:.2}"),
        &of_pinned.map_or("-".into(), |s| format!("{:.0} %", 100.0 * s)),
        &format!("{:.3}", n(&p["compute_s"]) / passes),
        &ratio.map_or("-".into(), |r| format!("{r:.2}")),
        &match p["percent_of_bound"].as_f64() {
            Some(percent) => format!("{percent:.0} %"),
            None => "-".into(),
        },
    ]);
}

const COLUMNS: [&str; 11] = [
    "how",
    "tokens/s",
    "s a pass",
    "GB on GPU",
    "GB disk",
    "disk GB/s",
    "copy GB/s",
    "of pinned",
    "compute s",
    "to largest",
    "of bound",
];

/// A bound on host memory, for what needs `least` and is given `most`: never more than the machine has to spare; else what is missing.
fn bounded(available: u64, least: u64, most: u64) -> Result<u64, String> {
    let spare = available.saturating_sub(KEPT_FREE);
    match spare >= least {
        true => Ok(most.min(spare)),
        false => Err(format!(
            "needs {:.1} GiB of RAM, {:.1} GiB are available",
            gib(least + KEPT_FREE),
            gib(available)
        )),
    }
}

/// For the rest of the machine.
const KEPT_FREE: u64 = 1 << 30;

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

/// Host memory: room for all of it, and for little.
fn budgets(suite: &Suite, made: &Checkpoint) -> [Result<u64, String>; 2] {
    if suite.smoke {
        return [Ok(1 << 30), Ok(1 << 30)];
    }
    let available = HostMemory::read().available;
    [
        bounded(available, made.bytes + LEAST_RAM, made.bytes + (12 << 30)),
        bounded(available, LEAST_RAM, 4 << 30),
    ]
}

pub fn section(suite: &mut Suite) -> Outcome<()> {
    let Some(made) = checkpoint_in_time(suite, "Decode, one sequence")? else {
        return Ok(());
    };
    let name = format!(
        "Decode, one sequence: {} layers of a 7B model, {:.1} GB, GPU memory {}",
        made.layers,
        made.bytes as f64 / 1e9,
        if suite.smoke { "512 MiB" } else { "8 GiB" }
    );
    suite.report.table(&name, &COLUMNS);
    let [much, little] = budgets(suite, &made);
    measure(suite, &made, "from RAM", 1, much);
    let warm = evict(&made.folder)?;
    measure(suite, &made, "from disk", 1, little.clone());
    suite.report.note(&format!(
        "Before the run from disk the page cache held {:.1} % of the files, after asking the kernel to forget them; after it {:.1} %.",
        100.0 * warm,
        100.0 * in_page_cache(&made.folder)?
    ));
    watched(suite, &made, 1, little);
    accelerate(suite, &made)
}

fn accelerate(suite: &mut Suite, made: &Checkpoint) -> Outcome<()> {
    if suite.smoke {
        suite.report.note("accelerate: not in a smoke run");
        return Ok(());
    }
    if suite.left() < LEAST_TIME {
        suite
            .report
            .note(&format!("accelerate: not run, {TIME_IS_UP}"));
        return Ok(());
    }
    let Some(python) = python(suite.left()) else {
        suite.report.note("accelerate: no Python with torch (and its CUDA), transformers and accelerate here; TENSORPAGER_PYTHON names one");
        return Ok(());
    };
    suite.report.table(
        "accelerate's offload of the same files, the same bound",
        &[
            "how",
            "tokens/s",
            "load s",
            "in the page cache: before loading",
            "when timed",
            "after",
        ],
    );
    for mode in ["cpu", "disk"] {
        if suite.left() < LEAST_TIME {
            suite.report.not_run(&format!("{mode} offload"), TIME_IS_UP);
            continue;
        }
        let warm = evict(&made.folder)?;
        let ran = run(
            python_command(&python)
                .arg(suite.home.join("accelerate_decode.py"))
                .args([
                    &text(&made.folder),
                    mode,
                    &text(&suite.scratch.join("accelerate")),
                ]),
            (suite.left() / 3).min(Duration::from_secs(120)),
        )?;
        if !ran.ok {
            suite
                .report
                .note(&format!("accelerate, {mode} offload: {}", ran.why()));
            continue;
        }
        let report = ran.json()?;
        let n = |key: &str| format!("{:.2}", report[key].as_f64().unwrap_or(0.0));
        let held = |share: Option<f64>| share.map_or("-".into(), |s| format!("{:.1} %", 100.0 * s));
        suite.report.row(&[
            &format!("{mode} offload"),
            &n("tokens_per_s"),
            &n("load_s"),
            &held(Some(warm)),
            &held(report["in_page_cache"].as_f64()),
            &held(report["in_page_cache_after"].as_f64()),
        ]);
    }
    suite.report.note(
        "Loading and the first passes, which are not timed, read the files: what the page cache held when the timed passes began is theirs. \
         tensorpager's run from disk reads past it, where its reader says direct.",
    );
    let _ = std::fs::remove_dir_all(suite.scratch.join("accelerate"));
    Ok(())
}

/// The same pass for more and more sequences, from RAM.
pub fn throughput(suite: &mut Suite) -> Outcome<()> {
    let name = "Throughput, from RAM, by sequences";
    let Some(made) = checkpoint_in_time(suite, name)? else {
        return Ok(());
    };
    suite.report.table(name, &COLUMNS);
    let [much, _] = budgets(suite, &made);
    let counts: &[usize] = if suite.smoke {
        &[1, 4]
    } else {
        &[1, 8, 64, 256]
    };
    for sequences in counts {
        let what = format!("{sequences} sequences");
        measure(suite, &made, &what, *sequences, much.clone());
    }
    watched(suite, &made, counts[counts.len() - 1], much);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_budget_is_never_more_than_the_machine_has_to_spare() {
        assert_eq!(bounded(64 * GIB, 17 * GIB, 27 * GIB), Ok(27 * GIB));
        assert_eq!(bounded(20 * GIB, 17 * GIB, 27 * GIB), Ok(19 * GIB));
        assert_eq!(bounded(18 * GIB, 17 * GIB, 27 * GIB), Ok(17 * GIB));
        let missing = bounded(12 * GIB, 17 * GIB, 27 * GIB).unwrap_err();
        assert_eq!(missing, "needs 18.0 GiB of RAM, 12.0 GiB are available");
        assert!(bounded(0, 2 * GIB, 4 * GIB).is_err());
    }
}
