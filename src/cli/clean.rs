//! `clean`: remove packed models. Only files that tensorpager made are ever deleted.

use std::path::Path;

use clap::Args;

use super::options::KeptIn;
use crate::error::{Code, Error, Result};
use crate::store::{CleanOptions, Cleaned, clean};
use crate::units::human_bytes;

#[derive(Args)]
#[command(after_help = "Examples:
  tensorpager clean --dry-run                   what lies there; nothing is removed
  tensorpager clean Qwen--Qwen2.5-7B--bf16      this pack
  tensorpager clean --stale                     what no run would use any more")]
pub struct CleanArgs {
    /// One pack by name
    pack: Option<String>,
    /// Every pack of the folder
    #[arg(long, conflicts_with_all = ["pack", "stale"])]
    all: bool,
    /// Only unfinished or damaged packs, and those whose checkpoint is gone or has changed
    #[arg(long)]
    stale: bool,
    #[command(flatten)]
    kept: KeptIn,
    /// Say what would go and leave it
    #[arg(long)]
    dry_run: bool,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: CleanArgs) -> Result<u8> {
    // Packs are hours of work: nothing goes that nobody named.
    let unasked = args.pack.is_none() && !args.all && !args.stale && !args.dry_run;
    let dry_run = args.dry_run || unasked;
    let named = args.pack.is_some();
    let cleaned = clean(
        &args.kept.offload_folder,
        &CleanOptions {
            stale: args.stale,
            name: args.pack,
            dry_run,
        },
    )?;
    if unasked && !cleaned.removed.is_empty() {
        return Err(nothing_named(&args.kept.offload_folder, &cleaned));
    }
    // Who named it is told that it stays.
    if named
        && !dry_run
        && let Some((name, why)) = cleaned.kept.first()
    {
        return Err(Error::new(
            Code::Store,
            format!("{name} was not removed"),
            why,
            "end what uses it, or remove what is not this program's by hand, and try again",
        ));
    }
    let text = match args.json {
        true => serde_json::to_string(&cleaned).map_err(|e| Error::internal(e.to_string()))? + "\n",
        false => lines(&cleaned, dry_run),
    };
    super::run::print(&text)?;
    Ok(0)
}

fn lines(cleaned: &Cleaned, dry_run: bool) -> String {
    let verb = if dry_run { "would remove" } else { "removed" };
    let mut text = String::new();
    for pack in &cleaned.removed {
        text += &format!("{verb} {} ({})\n", pack.name, human_bytes(pack.bytes));
    }
    for (name, why) in &cleaned.kept {
        text += &format!("kept {name}: {why}\n");
    }
    text + &format!("{verb} {} in all\n", human_bytes(cleaned.bytes))
}

fn nothing_named(offload_folder: &Path, would: &Cleaned) -> Error {
    let packs = would.removed.iter();
    let packs: Vec<String> = packs
        .map(|p| format!("{} ({})", p.name, human_bytes(p.bytes)))
        .collect();
    Error::new(
        Code::Usage,
        "nothing was removed",
        format!(
            "no pack is named, and all of {} would go: {}",
            offload_folder.display(),
            packs.join(", ")
        ),
        "name one, or give --stale (what no run would use any more) or --all",
    )
}
