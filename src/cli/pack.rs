//! `pack`: write a model's weights into the offload folder now rather than on first use.

use std::time::Duration;

use clap::Args;

use super::model::{open_checkpoint, pack_options, prepare};
use super::options::SourceOptions;
use super::signals;
use crate::error::{Code, Error, Result};
use crate::store::{PackOptions, Store};

#[derive(Args)]
#[command(after_help = "Examples:
  tensorpager pack ./Qwen2.5-7B-Instruct
  tensorpager pack ./Llama-3.1-70B --dtype bfloat16 --offload-folder /mnt/nvme/offload")]
pub struct PackArgs {
    #[command(flatten)]
    source: SourceOptions,
    /// Pack anew even if a good pack is there
    #[arg(long)]
    repack: bool,
    /// Refuse weights with NaN or infinite values instead of counting them
    #[arg(long)]
    refuse_nonfinite: bool,
    /// Fail at once if somebody else packs this model, instead of waiting
    #[arg(long)]
    no_wait: bool,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
    /// Nothing on stderr but errors
    #[arg(long, short)]
    quiet: bool,
}

pub fn run(args: PackArgs) -> Result<u8> {
    if args.source.in_place {
        return Err(Error::new(
            Code::Usage,
            "--in-place has nothing to pack",
            "it streams from the checkpoint's own files",
            "drop --in-place, or `run` the model with it",
        ));
    }
    let cancel = signals::cancel_flag()?;
    let ckpt = open_checkpoint(&args.source, &cancel, args.quiet || args.json)?;
    let mut options = PackOptions {
        repack: args.repack,
        refuse_nonfinite: args.refuse_nonfinite,
        ..pack_options(&args.source, &cancel)?
    };
    if args.no_wait {
        options.wait = Duration::ZERO;
    }
    let prepared = prepare(&ckpt, &options, args.quiet || args.json, Store::pack)?;
    let dir = prepared.store.dir.display().to_string();
    if args.json {
        let object = serde_json::json!({
            "model": prepared.store.label, "dir": dir, "dtype": prepared.store.dtype.to_string(),
            "packed": prepared.packed, "notes": prepared.notes,
        });
        super::run::print(&format!("{object}\n"))?;
    } else {
        if prepared.packed.is_none() && !args.quiet {
            eprintln!("already packed");
        }
        super::run::print(&format!("{dir}\n"))?;
    }
    Ok(0)
}
