//! One command line, run to its end.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use rustix::fs::{CWD, FileType, Mode};
use serde_json::Value;

use super::program::program_within;

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// A place of its own for each test: offload folder, caches and files.
pub struct Place {
    dir: tempfile::TempDir,
}

pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Place {
    pub fn new() -> Place {
        Place {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn offload(&self) -> PathBuf {
        self.path("offload")
    }

    /// Writes a file and gives its path.
    pub fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_string()
    }

    /// A copy of a fixture that the test may damage.
    pub fn copy(&self, name: &str, to: &str) -> PathBuf {
        let copy = self.path(to);
        std::fs::create_dir_all(&copy).unwrap();
        for entry in std::fs::read_dir(fixture(name)).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
        copy
    }

    /// Names of what lies here, hidden caches aside.
    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "cache")
            .collect();
        names.sort();
        names
    }

    pub fn fifo(&self, name: &str) -> String {
        let path = self.path(name);
        rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        path.to_str().unwrap().to_string()
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = program_within(self.path("cache"));
        command
            .args(args)
            .env("TENSORPAGER_OFFLOAD_FOLDER", self.offload())
            .env("HF_HOME", self.path("hf"))
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_ENDPOINT")
            .env_remove("HF_TOKEN")
            .env("HF_HUB_OFFLINE", "1")
            .env_remove("RUST_BACKTRACE")
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // The program ignores SIGHUP where it is started so, and the tests may be (`nohup`); a shell's background jobs ignore the other two.
        // SAFETY: system calls of the child on itself.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        command
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        Ran::from(self.command(args).output().unwrap())
    }

    pub fn run_with(&self, args: &[&str], stdin: impl AsRef<[u8]>) -> Ran {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        // A program that refuses its arguments does not read its input.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_ref());
        Ran::from(child.wait_with_output().unwrap())
    }

    pub fn env(&self, name: &str, value: &str, args: &[&str]) -> Ran {
        Ran::from(self.command(args).env(name, value).output().unwrap())
    }
}

impl From<Output> for Ran {
    fn from(output: Output) -> Ran {
        Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
            stderr: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
        }
    }
}

impl Ran {
    /// It went well.
    #[track_caller]
    pub fn done(self) -> Ran {
        assert_eq!(self.code, 0, "{}", self.stderr);
        self
    }

    /// stdout is one JSON object on one line and nothing else.
    #[track_caller]
    pub fn json(self) -> Value {
        let ran = self.done();
        assert_eq!(ran.stdout.lines().count(), 1, "{}", ran.stdout);
        let value: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert!(value.is_object());
        value
    }

    /// It failed with this exit code, in three lines that contain all of `words`, and printed no result.
    #[track_caller]
    pub fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{}", self.stderr);
        assert_eq!(self.stdout, "", "a failure prints no result");
        let lines: Vec<&str> = self.stderr.lines().collect();
        let at = lines
            .iter()
            .position(|l| l.starts_with("error: "))
            .unwrap_or_else(|| panic!("{}", self.stderr));
        assert_eq!(
            lines.len(),
            at + 3,
            "three lines and nothing behind them: {}",
            self.stderr
        );
        assert!(
            lines[at + 1].starts_with("cause: ") && lines[at + 1].len() > 7,
            "{}",
            self.stderr
        );
        assert!(
            lines[at + 2].starts_with("fix: ") && lines[at + 2].len() > 5,
            "{}",
            self.stderr
        );
        for word in words {
            assert!(
                self.stderr.contains(word),
                "`{word}` is not in: {}",
                self.stderr
            );
        }
    }
}

pub fn str(path: &Path) -> &str {
    path.to_str().unwrap()
}
