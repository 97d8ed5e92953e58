//! Running other programs: with a time limit, and their last JSON line read.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

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

/// Runs to the end, or kills it after `limit`.
pub fn run(command: &mut Command, limit: Duration) -> Outcome<Ran> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{:?}: {e}", command.get_program()))?;
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                let _ = pipe.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = read(child.stdout.take().map(|p| Box::new(p) as _));
    let stderr = read(child.stderr.take().map(|p| Box::new(p) as _));
    let mut late = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > limit && !late {
            late = true;
            child.kill()?;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut stderr = stderr.join().unwrap_or_default();
    if late {
        stderr += &format!("\nstopped after {:.0} s", limit.as_secs_f64());
    }
    Ok(Ran {
        ok: status.success(),
        stdout: stdout.join().unwrap_or_default(),
        stderr,
        seconds: started.elapsed().as_secs_f64(),
    })
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
