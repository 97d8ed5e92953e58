//! The program, started away from the user's own folders: what it measures and keeps while it is tested is nobody's.
#![allow(dead_code)] // each test file uses a part

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Named nowhere else in the tests, and where it is not started by [`program`] its environment is [`apart`]: `tests/architecture.rs` looks.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_tensorpager");

/// Settings of whoever runs the tests that would be the program's too.
const SETTINGS: [&str; 3] = ["TENSORPAGER_", "SLURM_", "JOB_"];

/// Records are kept in a folder that this test process makes anew.
pub fn program() -> Command {
    program_within(own_cache())
}

/// Records are kept under `cache`.
pub fn program_within(cache: impl AsRef<Path>) -> Command {
    let mut command = Command::new(PROGRAM);
    apart(&mut command, cache);
    command
}

/// For a command that starts the program in its turn.
pub fn apart(command: &mut Command, cache: impl AsRef<Path>) -> &mut Command {
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if SETTINGS.iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(&name);
        }
    }
    command.env("XDG_CACHE_HOME", cache.as_ref())
}

/// Beside what cargo builds, one for each test file.
pub fn own_cache() -> &'static Path {
    static CACHE: OnceLock<PathBuf> = OnceLock::new();
    CACHE.get_or_init(|| {
        let caches = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
        let cache = caches.join(env!("CARGO_CRATE_NAME"));
        // A first run has none.
        let _ = std::fs::remove_dir_all(&cache);
        std::fs::create_dir_all(&cache).unwrap();
        cache
    })
}

/// The word behind `before` in what the program said.
#[track_caller]
pub fn word(text: &str, before: &str) -> String {
    let rest = text.split(before).nth(1);
    let rest = rest.unwrap_or_else(|| panic!("`{before}` is not in: {text}"));
    let word = rest.split_whitespace().next().unwrap();
    word.trim_end_matches([';', ',']).to_string()
}
