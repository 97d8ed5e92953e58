//! Running other programs: with a time limit, and their last JSON line read.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use tensorpager::units::Dtype;

use super::{Outcome, Suite, TIME_IS_UP, machine, ops};

pub struct Ran {
    pub ok: bool,
    pub stdout: String,
    pub stderr: String,
    pub seconds: f64,
}

impl Ran {
    /// The last line of stdout that is a JSON object.
    pub fn json(&self) -> Outcome<Value> {
        let line = self.stdout.lines().rev().find(|l| l.starts_with('{'));
        Ok(serde_json::from_str(line.ok_or("no JSON was printed")?)?)
    }

    /// Why it failed, in one line.
    pub fn why(&self) -> String {
        let lines: Vec<&str> = self.stderr.lines().rev().take(3).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("; ")
    }
}

/// For what a program said to arrive when it has ended, though somebody it started may still hold its pipes.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// For a program to end when it is killed: one inside a driver call that never returns does not.
const DYING: Duration = Duration::from_secs(10);

/// Runs to the end, or kills it after `limit`, with all that it started; one that does not end even then is left behind.
pub fn run(command: &mut Command, limit: Duration) -> Outcome<Ran> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A group of its own: some programs (compute-sanitizer) start the one that does the work.
        .process_group(0)
        .spawn()
        .map_err(|e| format!("{:?}: {e}", command.get_program()))?;
    let number = i32::try_from(child.id()).unwrap_or(0);
    RUNNING.store(number, Relaxed);
    let stdout = all_of(child.stdout.take());
    let stderr = all_of(child.stderr.take());
    let mut killed: Option<Instant> = None;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        match killed {
            None if started.elapsed() > limit => {
                killed = Some(Instant::now());
                kill_group(number);
            }
            Some(at) if at.elapsed() > DYING => break None,
            _ => {}
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    RUNNING.store(0, Relaxed);
    let said = |pipe: Receiver<String>| pipe.recv_timeout(LAST_WORDS).unwrap_or_default();
    let (stdout, mut stderr) = (said(stdout), said(stderr));
    if killed.is_some() {
        stderr += &format!("\nstopped after {:.0} s", limit.as_secs_f64());
    }
    if status.is_none() {
        let waited = DYING.as_secs();
        stderr += &format!(
            "; killed, and it did not end within {waited} s: process {number} is left behind"
        );
    }
    Ok(Ran {
        ok: status.is_some_and(|s| s.success()) && killed.is_none(),
        stdout,
        stderr,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// What comes out of a pipe, once it is closed.
fn all_of(pipe: Option<impl Read + Send + 'static>) -> Receiver<String> {
    let (told, hears) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = told.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    hears
}

/// The group that runs now; 0: none.
static RUNNING: AtomicI32 = AtomicI32::new(0);

/// The number of a child that has not been waited for: it is still its own, and its group's.
fn kill_group(number: i32) {
    if let Some(pid) = Pid::from_raw(number) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}

/// Ctrl-C, and a terminal that goes away, reach only the terminal's own group: what runs then is ended too.
pub fn end_together() -> Outcome<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGQUIT])?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            kill_group(RUNNING.load(Relaxed));
            let _ = emulate_default_handler(signal);
        }
    });
    Ok(())
}

/// A program of the path, or of the toolkit's usual places.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.push("/usr/local/cuda/bin".into());
    folders.push("/opt/cuda/bin".into());
    folders
        .into_iter()
        .map(|f| f.join(name))
        .find(|p| p.is_file())
}

/// NVIDIA's checker over every op at small shapes, where it is installed.
pub fn sanitizer(suite: &mut Suite) -> Outcome<()> {
    let Some(sanitizer) = find("compute-sanitizer") else {
        suite.report.table("compute-sanitizer", &["tool", "result"]);
        suite
            .report
            .note("not here: it comes with the CUDA toolkit");
        return Ok(());
    };
    suite
        .report
        .table("compute-sanitizer", &["tool", "seconds", ""]);
    for tool in ["memcheck", "racecheck", "synccheck", "initcheck"] {
        if suite.up() {
            suite.report.not_run(tool, TIME_IS_UP);
            continue;
        }
        let limit = Duration::from_secs(60).min(suite.left());
        let ran = run(
            Command::new(&sanitizer)
                .args(["--tool", tool, "--error-exitcode", "9"])
                .arg(std::env::current_exe()?)
                // NVIDIA's own products are not what is checked.
                .args(["--smoke", "--no-cublaslt", "--only", "ops", "--scratch"])
                .arg(suite.scratch.join("sanitizer")),
            limit,
        )?;
        let seconds = format!("{:.1}", ran.seconds);
        match ran.stderr.contains("stopped after") {
            true => suite
                .report
                .row(&[tool, &seconds, "no result: too slow here"]),
            false => suite.report.checked(ran.ok, &[tool, &seconds, ""]),
        }
    }
    Ok(())
}

/// The committed PTX, which the bundle's machine code hides from every other section: all ops again, compiled by the driver.
pub fn ptx(suite: &mut Suite) -> Outcome<()> {
    let columns = ["what", "image", "seconds", ""];
    suite
        .report
        .table("The committed PTX, compiled by the driver", &columns);
    if suite.smoke {
        suite.report.not_run("all ops", "a smoke run");
        return Ok(());
    }
    let image = machine::image(&ops::open(Dtype::BF16, 64, None)?.device);
    if image == machine::FROM_PTX {
        suite.report.not_run(
            "all ops",
            "every section ran what the driver compiled from PTX",
        );
        return Ok(());
    }
    let ran = run(
        Command::new(std::env::current_exe()?)
            .env("CUDA_FORCE_PTX_JIT", "1")
            .args(["--smoke", "--no-cublaslt", "--only", "ops", "--scratch"])
            .arg(suite.scratch.join("ptx")),
        Duration::from_secs(120).min(suite.left()),
    )?;
    let took = format!("{:.1}", ran.seconds);
    if ran.stderr.contains("stopped after") {
        let row = [
            "all ops, small shapes",
            "-",
            &took,
            "no result: too slow here",
        ];
        suite.report.row(&row);
        return Ok(());
    }
    let loaded = ran.stdout.contains(machine::FROM_PTX);
    let image = if loaded { machine::FROM_PTX } else { "not PTX" };
    suite.report.checked(
        ran.ok && loaded,
        &["all ops, small shapes", image, &took, ""],
    );
    if !ran.ok {
        suite.report.note(&format!("It said: {}", ran.why()));
    }
    Ok(())
}

/// What run.sh was given as `LD_LIBRARY_PATH`, before it put the toolkit's folder behind it.
const CALLERS_PATH: &str = "TENSORPAGER_CALLERS_LIBRARY_PATH";

/// A Python, with the caller's libraries: the toolkit's would take the place of those that torch brings.
pub fn python_command(python: &Path) -> Command {
    let mut command = Command::new(python);
    restore(&mut command, std::env::var_os(CALLERS_PATH));
    command
}

/// Nothing is changed where run.sh did not.
fn restore(command: &mut Command, callers: Option<OsString>) {
    const PATH: &str = "LD_LIBRARY_PATH";
    match callers {
        None => {}
        Some(path) if path.is_empty() => drop(command.env_remove(PATH)),
        Some(path) => drop(command.env(PATH, path)),
    }
}

/// A Python that has the packages accelerate's offload needs, found in the time left; `TENSORPAGER_PYTHON` names one.
pub fn python(left: Duration) -> Option<PathBuf> {
    let named = std::env::var_os("TENSORPAGER_PYTHON").map(PathBuf::from);
    let candidates = [named, find("python3"), find("python")];
    candidates.into_iter().flatten().find(|python| {
        let check = "import torch, transformers, accelerate; assert torch.cuda.is_available()";
        run(
            python_command(python).args(["-c", check]),
            Duration::from_secs(60).min(left / 3),
        )
        .is_ok_and(|ran| ran.ok)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As compute-sanitizer does: what holds the pipes is not the one that was started.
    #[test]
    fn what_a_program_started_ends_with_it_when_the_time_is_up() {
        let started = Instant::now();
        let mut shell = Command::new("sh");
        shell.args(["-c", "sleep 50 & echo $!; wait"]);
        let ran = run(&mut shell, Duration::from_millis(300)).unwrap();
        assert!(started.elapsed() < Duration::from_secs(10));
        assert!(!ran.ok && ran.stderr.contains("stopped after"));
        let grandchild = ran.stdout.trim();
        assert!(grandchild.parse::<u32>().is_ok(), "{grandchild}");
        let state = std::fs::read_to_string(format!("/proc/{grandchild}/stat"));
        // Gone, or dead and not yet waited for.
        assert!(state.map_or(true, |s| s.contains(") Z")));
    }

    #[test]
    fn a_programs_words_are_kept() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo out; echo err >&2"]);
        let ran = run(&mut shell, Duration::from_secs(20)).unwrap();
        assert!(ran.ok);
        assert_eq!((ran.stdout.trim(), ran.stderr.trim()), ("out", "err"));
    }

    #[test]
    fn a_python_has_the_callers_libraries() {
        let path = |callers: Option<&str>| {
            let mut shell = Command::new("sh");
            shell.env("LD_LIBRARY_PATH", "/toolkit");
            shell.args(["-c", "echo ${LD_LIBRARY_PATH-none}"]);
            restore(&mut shell, callers.map(OsString::from));
            run(&mut shell, Duration::from_secs(20)).unwrap().stdout
        };
        assert_eq!(path(None).trim(), "/toolkit");
        assert_eq!(path(Some("")).trim(), "none");
        assert_eq!(path(Some("/wheels")).trim(), "/wheels");
    }
}
