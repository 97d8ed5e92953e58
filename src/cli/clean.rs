//! `clean`: remove packed models. Only files that tensorpager made are ever deleted.

use std::path::PathBuf;

use clap::Args;

use crate::error::Result;
use crate::store::{CleanOptions, clean};
use crate::units::human_bytes;

#[derive(Args)]
pub struct CleanArgs {
    /// One pack by name; all of them when left out
    pack: Option<String>,
    /// Where packed weights are kept
    #[arg(
        long,
        value_name = "DIR",
        default_value = "./offload_folder",
        env = "TENSORPAGER_OFFLOAD_FOLDER"
    )]
    offload_folder: PathBuf,
    /// Only unfinished or damaged packs, and those whose checkpoint is gone or has changed
    #[arg(long)]
    stale: bool,
    /// Say what would go and leave it
    #[arg(long)]
    dry_run: bool,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: CleanArgs) -> Result<u8> {
    let cleaned = clean(
        &args.offload_folder,
        &CleanOptions {
            stale: args.stale,
            name: args.pack,
            dry_run: args.dry_run,
        },
    )?;
    if args.json {
        let text = serde_json::to_string(&cleaned)
            .map_err(|e| crate::error::Error::internal(e.to_string()))?;
        super::run::print(&format!("{text}\n"))?;
        return Ok(0);
    }
    let verb = if args.dry_run {
        "would remove"
    } else {
        "removed"
    };
    for pack in &cleaned.removed {
        super::run::print(&format!(
            "{verb} {} ({})\n",
            pack.name,
            human_bytes(pack.bytes)
        ))?;
    }
    for (name, why) in &cleaned.kept {
        super::run::print(&format!("kept {name}: {why}\n"))?;
    }
    super::run::print(&format!("{verb} {} in all\n", human_bytes(cleaned.bytes)))?;
    Ok(0)
}
