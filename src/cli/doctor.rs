//! `doctor`: can this machine do it? Looks at what the engine depends on and says, for each thing that is not right, what
//! to do. It changes nothing: where only a file can tell (the disk's rate without a pack to read), it makes one without a
//! name, which is gone when it is closed.

mod kernel;
mod machine;
mod storage;

use clap::Args;
use serde::Serialize;
use serde_json::{Map, Value};

use super::options::KeptIn;
use crate::error::{Error, Result};

#[derive(Args)]
#[command(after_help = "Examples:
  tensorpager doctor
  tensorpager doctor --offload-folder /mnt/nvme/offload
  tensorpager doctor --json | jq '.checks[] | select(.status != \"pass\")'

Exit code 1 where something fails; warnings cost speed or comfort only.")]
pub struct DoctorArgs {
    #[command(flatten)]
    kept: KeptIn,
    /// Do not measure the disk
    #[arg(long)]
    no_measure: bool,
    /// One JSON object instead of the table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Status {
    Pass,
    /// It works, but slower or with less than it could.
    Warn,
    /// It does not work.
    Fail,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Status::Pass => "pass",
            Status::Warn => "warn",
            Status::Fail => "FAIL",
        }
    }
}

/// One thing looked at.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Check {
    name: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// What to do; empty when it passes.
    #[serde(skip_serializing_if = "String::is_empty")]
    fix: String,
    /// The figures behind it, for programs.
    #[serde(flatten)]
    figures: Map<String, Value>,
}

impl Check {
    fn pass(name: &'static str, found: impl Into<String>) -> Check {
        Check {
            name,
            status: Status::Pass,
            found: found.into(),
            fix: String::new(),
            figures: Map::new(),
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Check {
        Check {
            status: Status::Warn,
            fix: fix.into(),
            ..Check::pass(name, found)
        }
    }

    fn fail(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Check {
        Check {
            status: Status::Fail,
            ..Check::warn(name, found, fix)
        }
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Check {
        self.figures.insert(key.to_string(), value.into());
        self
    }

    fn lines(&self) -> String {
        let head = format!("{}  {:<14} {}\n", self.status.name(), self.name, self.found);
        match self.fix.is_empty() {
            true => head,
            false => format!("{head}{:<21}fix: {}\n", "", self.fix),
        }
    }
}

pub fn run(args: DoctorArgs) -> Result<u8> {
    let mut checks = Vec::new();
    // Each line as it comes: measuring the disk takes a few seconds.
    let mut closed = Ok(());
    let mut say = |check: Check| {
        if !args.json && closed.is_ok() {
            closed = super::run::print(&check.lines());
        }
        checks.push(check);
    };
    kernel::check(&mut say);
    storage::check(&args.kept.offload_folder, !args.no_measure, &mut say);
    machine::check(&mut say);
    closed?;
    let count = |status| checks.iter().filter(|c| c.status == status).count();
    let (warned, failed) = (count(Status::Warn), count(Status::Fail));
    if args.json {
        let object = serde_json::json!({
            "ok": failed == 0, "warned": warned, "failed": failed, "checks": checks,
        });
        let text = serde_json::to_string(&object).map_err(|e| Error::internal(e.to_string()))?;
        super::run::print(&format!("{text}\n"))?;
    } else {
        let verdict = match (failed, warned) {
            (0, 0) => "everything is as it should be".to_string(),
            (0, n) => format!("it works; {n} to look at"),
            (f, n) => format!("{f} must be mended first; {n} more to look at"),
        };
        super::run::print(&format!("\n{verdict}\n"))?;
    }
    Ok(u8::from(failed > 0))
}
