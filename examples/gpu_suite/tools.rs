//! Running other programs: with a time limit, and their last JSON line read.

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use super::{Outcome, Suite, TIME_IS_UP};

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

/// How often the one that waits is asked to look at something.
const LOOKS: Duration = Duration::from_millis(20);
/// For what a program said to arrive when it has ended, though somebody it started may still hold its pipes.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Runs to the end, or kills it after `limit`, with all that it started.
pub fn run(command: &mut Command, limit: Duration) -> Outcome<Ran> {
    run_watching(command, limit, &mut || ())
}

/// The same, and calls `look` again and again meanwhile.
pub fn run_watching(
    command: &mut Command,
    limit: Duration,
    look: &mut dyn FnMut(),
) -> Outcome<Ran> {
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
    let mut looked = started;
    let mut late = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > limit && !late {
            late = true;
            kill_group(number);
        }
        if looked.elapsed() >= LOOKS {
            looked = Instant::now();
            look();
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    RUNNING.store(0, Relaxed);
    let said = |pipe: Receiver<String>| pipe.recv_timeout(LAST_WORDS).unwrap_or_default();
    let (stdout, mut stderr) = (said(stdout), said(stderr));
    if late {
        stderr += &format!("\nstopped after {:.0} s", limit.as_secs_f64());
    }
    Ok(Ran {
        ok: status.success() && !late,
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

/// Ctrl-C reaches only the terminal's own group: what runs then is ended too.
pub fn end_together() -> Outcome<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
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
                .args(["--smoke", "--only", "ops", "--scratch"])
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

/// A Python that has the packages accelerate's offload needs, found in the time left; `TENSORPAGER_PYTHON` names one.
pub fn python(left: Duration) -> Option<PathBuf> {
    let named = std::env::var_os("TENSORPAGER_PYTHON").map(PathBuf::from);
    let candidates = [named, find("python3"), find("python")];
    candidates.into_iter().flatten().find(|python| {
        let check = "import torch, transformers, accelerate; assert torch.cuda.is_available()";
        run(
            Command::new(python).args(["-c", check]),
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
    fn a_program_is_looked_at_and_its_words_are_kept() {
        let mut looks = 0;
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo out; echo err >&2; sleep 0.2"]);
        let ran = run_watching(&mut shell, Duration::from_secs(20), &mut || looks += 1).unwrap();
        assert!(ran.ok && looks > 2, "{looks}");
        assert_eq!((ran.stdout.trim(), ran.stderr.trim()), ("out", "err"));
    }
}
