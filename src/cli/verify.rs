//! `verify`: read a packed model and compare every byte with its checksums.

use std::path::{Path, PathBuf};

use clap::Args;

use super::options::KeptIn;
use super::signals;
use crate::error::{Code, Error, Result};
use crate::report::progress::ByteProgress;
use crate::store::{PackState, VerifyReport, clean_command, list_packs, verify};
use crate::units::{counted, human_bytes};

#[derive(Args)]
pub struct VerifyArgs {
    /// A packed folder, or the name of one in the offload folder; all of them when left out
    pack: Option<String>,
    #[command(flatten)]
    kept: KeptIn,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Nothing on stderr but errors
    #[arg(long, short)]
    quiet: bool,
}

pub fn run(args: VerifyArgs) -> Result<u8> {
    let cancel = signals::cancel_flag()?;
    let dirs = match &args.pack {
        Some(name) => vec![find(name, &args.kept.offload_folder)?],
        None => list_packs(&args.kept.offload_folder)?
            .into_iter()
            .filter(|p| p.state != PackState::Foreign)
            .map(|p| p.dir)
            .collect(),
    };
    let mut reports = Vec::new();
    for dir in &dirs {
        let mut bar = ByteProgress::new("verifying", args.quiet || args.json);
        let report = verify(dir, &cancel, &mut |done, of| bar.update(done, of));
        bar.finish();
        let report = report?;
        if !args.json && !args.quiet {
            super::run::print(&format!("{}\n", lines(&report)))?;
        }
        reports.push(report);
    }
    if args.json {
        let object = serde_json::json!({"packs": reports});
        super::run::print(&format!("{object}\n"))?;
    } else if dirs.is_empty() && !args.quiet {
        super::run::print(&format!(
            "no packs in {}\n",
            args.kept.offload_folder.display()
        ))?;
    }
    let bad: Vec<&VerifyReport> = reports.iter().filter(|r| !r.is_good()).collect();
    if bad.is_empty() {
        return Ok(0);
    }
    let all: Vec<String> = bad.iter().map(|r| r.dir.display().to_string()).collect();
    let commands: Vec<String> = bad
        .iter()
        .map(|r| format!("`{}`", clean_command(&r.dir)))
        .collect();
    Err(Error::new(
        Code::Corrupt,
        format!("{} cannot be trusted", all.join(", ")),
        "bytes on disk differ from those that were packed",
        format!(
            "{} and pack again; check the drive if it happens twice",
            commands.join(", ")
        ),
    ))
}

fn find(name: &str, offload_folder: &Path) -> Result<PathBuf> {
    for dir in [PathBuf::from(name), offload_folder.join(name)] {
        if dir.is_dir() {
            return Ok(dir);
        }
    }
    Err(Error::new(
        Code::Usage,
        format!("there is no pack `{name}`"),
        format!(
            "neither it nor {} is a folder",
            offload_folder.join(name).display()
        ),
        "`tensorpager inspect` lists the packs",
    ))
}

fn lines(r: &VerifyReport) -> String {
    let mut text = format!(
        "{}: {} in {}, {} at {:.2} GB/s",
        r.dir.display(),
        if r.is_good() { "good" } else { "DAMAGED" },
        counted(r.files as u64, "file"),
        human_bytes(r.bytes),
        r.bytes as f64 / r.seconds.max(1e-9) / 1e9
    );
    for p in &r.problems {
        let block = p.block.map_or(String::new(), |b| format!(" block {b}"));
        let units = if p.units.is_empty() {
            String::new()
        } else {
            format!(" ({})", p.units.join(", "))
        };
        text += &format!("\n  {}{block}{units}: {}", p.file, p.detail);
    }
    text
}
