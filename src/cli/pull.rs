//! `pull`, and what every command that opens a model does first: a hub id that the local cache lacks is downloaded.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::Args;

use super::signals;
use crate::error::Result;

#[derive(Args)]
#[command(after_help = "Examples:
  tensorpager pull Qwen/Qwen2.5-0.5B-Instruct
  HF_TOKEN=… tensorpager pull meta-llama/Llama-3.2-1B-Instruct
  HF_HUB_CACHE=/data/hub tensorpager pull Qwen/Qwen2.5-7B-Instruct@main")]
pub struct PullArgs {
    /// A hub id: org/name, or org/name@revision
    model: String,
    /// One JSON object on stdout instead of the folder
    #[arg(long)]
    json: bool,
    /// Nothing on stderr but errors
    #[arg(long, short)]
    quiet: bool,
}

#[cfg(feature = "hub")]
pub fn run(args: PullArgs) -> Result<u8> {
    let cancel = signals::cancel_flag()?;
    let got = download(&args.model, &cancel, args.quiet || args.json)?;
    let dir = got.dir.display().to_string();
    let line = match args.json {
        true => serde_json::json!({
            "model": args.model, "dir": dir, "commit": got.commit, "bytes": got.total,
            "downloaded_bytes": got.bytes,
        })
        .to_string(),
        false => dir,
    };
    super::run::print(&format!("{line}\n"))?;
    Ok(0)
}

/// Downloads `model` if it is a hub id whose weights or config the local cache lacks.
#[cfg(feature = "hub")]
pub fn ensure(model: &str, cancel: &Arc<AtomicBool>, quiet: bool) -> Result<()> {
    match crate::checkpoint::wants_download(model) {
        true => download(model, cancel, quiet).map(|_| ()),
        false => Ok(()),
    }
}

#[cfg(feature = "hub")]
fn download(
    model: &str,
    cancel: &Arc<AtomicBool>,
    quiet: bool,
) -> Result<crate::checkpoint::Downloaded> {
    use crate::checkpoint::{DownloadProgress, Hub};
    use crate::report::progress::ByteProgress;
    use crate::units::{counted, human_bytes};

    let hub = Hub::from_env(cancel.clone())?;
    let mut bar = ByteProgress::new("downloading", quiet);
    let mut told = String::new();
    let got = hub.download(model, &mut |progress| match progress {
        DownloadProgress::Plan {
            files,
            bytes,
            have,
            to,
        } => {
            if have < bytes {
                let files = counted(files as u64, "file");
                bar.line(&format!(
                    "downloading {model}: {} in {files}, {} to go, into {}",
                    human_bytes(bytes),
                    human_bytes(bytes - have),
                    to.display()
                ));
            }
            bar.resume_at(have, bytes);
        }
        // The text files: too small for a bar.
        DownloadProgress::Bytes { total: 0, .. } => {}
        DownloadProgress::Bytes { done, total } => bar.update(done, total),
        DownloadProgress::Retrying { file, why } => {
            // The same trouble again is not news.
            let line = format!("{file}: {why}; trying again");
            if line != told {
                bar.line(&line);
                told = line;
            }
        }
        DownloadProgress::Waiting { file } => {
            bar.line(&format!("waiting: another process downloads {file}"));
        }
    });
    bar.finish();
    got
}

#[cfg(not(feature = "hub"))]
pub fn run(args: PullArgs) -> Result<u8> {
    use crate::error::{Code, Error};
    let _ = (signals::cancel_flag as fn() -> _, args.json, args.quiet);
    Err(Error::new(
        Code::Unsupported,
        format!("`{}` cannot be downloaded", args.model),
        "this program was built without the feature `hub`",
        format!(
            "build it with its default features, or use `hf download {}`",
            args.model
        ),
    ))
}

#[cfg(not(feature = "hub"))]
pub fn ensure(_: &str, _: &Arc<AtomicBool>, _: bool) -> Result<()> {
    Ok(())
}
