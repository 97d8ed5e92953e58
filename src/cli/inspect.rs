//! `inspect`: what the offload folder holds, or what a model is made of.

use std::path::PathBuf;

use clap::Args;

use super::options::KeptIn;
use crate::checkpoint::{Checkpoint, OpenOptions};
use crate::error::{Error, Result};
use crate::store::{ModelInfo, PackInfo, PackState, describe, list_packs};
use crate::units::{counted, human_bytes};

#[derive(Args)]
pub struct InspectArgs {
    /// A model; the offload folder's packs are listed when left out
    model: Option<String>,
    #[command(flatten)]
    kept: KeptIn,
    /// config.json for an accelerate folder that lacks it
    #[arg(long, value_name = "DIR")]
    config_from: Option<PathBuf>,
    /// Let an accelerate index name files outside its folder
    #[arg(long)]
    allow_external: bool,
    /// List every unit and the names of its tensors
    #[arg(long)]
    units: bool,
    /// One JSON object on stdout
    #[arg(long)]
    json: bool,
}

pub fn run(args: InspectArgs) -> Result<u8> {
    match &args.model {
        Some(model) => {
            let ckpt = Checkpoint::open(
                model,
                &OpenOptions {
                    config_from: args.config_from.clone(),
                    allow_external: args.allow_external,
                },
            )?;
            let info = describe(&ckpt)?;
            if args.json {
                json(&info)?;
            } else {
                super::run::print(&model_lines(&info, args.units))?;
            }
        }
        None => {
            let packs = list_packs(&args.kept.offload_folder)?;
            if args.json {
                json(&serde_json::json!({"packs": packs}))?;
            } else if packs.is_empty() {
                super::run::print(&format!(
                    "no packs in {}\n",
                    args.kept.offload_folder.display()
                ))?;
            } else {
                for pack in &packs {
                    super::run::print(&format!("{}\n", pack_line(pack)))?;
                }
            }
        }
    }
    Ok(0)
}

fn json<T: serde::Serialize>(value: &T) -> Result<()> {
    let text = serde_json::to_string(value).map_err(|e| Error::internal(e.to_string()))?;
    super::run::print(&format!("{text}\n"))
}

fn model_lines(m: &ModelInfo, units: bool) -> String {
    let by_dtype: Vec<String> = m
        .bytes_by_dtype
        .iter()
        .map(|(dtype, bytes)| format!("{dtype} {}", human_bytes(*bytes)))
        .collect();
    let mut text = format!(
        "{}\n  {} ({}), {} layers, hidden {}, vocabulary {}{}\n  {} parameters, {} in {}: {}\n",
        m.model,
        m.model_type,
        m.kind,
        m.layers,
        m.hidden,
        m.vocab,
        if m.tied_head { ", tied head" } else { "" },
        m.parameters,
        human_bytes(m.bytes),
        counted(m.files as u64, "file"),
        by_dtype.join(", ")
    );
    for note in &m.notes {
        text += &format!("  {note}\n");
    }
    if units {
        for u in &m.units {
            text += &format!(
                "  {:>4}  {:<20} {:>10}  {} in {}\n",
                u.id,
                u.unit,
                human_bytes(u.bytes),
                counted(u.tensors as u64, "tensor"),
                counted(u.extents as u64, "extent")
            );
            for name in &u.tensor_names {
                text += &format!("          {name}\n");
            }
        }
    }
    text
}

fn pack_line(p: &PackInfo) -> String {
    let state = match &p.state {
        PackState::Ready => "ready".to_string(),
        PackState::SourceGone => "ready; its checkpoint is gone".into(),
        PackState::SourceChanged => "stale: its checkpoint has changed".into(),
        PackState::Packing => match &p.holder {
            Some(holder) => format!("being packed by {holder}"),
            None => "being packed".into(),
        },
        PackState::Unfinished => "unfinished".into(),
        PackState::OtherFormat => "of another version".into(),
        PackState::Damaged(why) => format!("damaged: {why}"),
        PackState::Abandoned => "left behind by a demo that was killed".into(),
        PackState::Foreign => "not made by tensorpager".into(),
    };
    format!("{:<48} {:>10}  {state}", p.name, human_bytes(p.bytes))
}
