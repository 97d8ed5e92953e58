//! A model that was found, before anything is packed: what must be refused is refused here, not after hours.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::advice::Advisor;
use super::machine::Weights;
use super::model::{Model, OpenFor, open_checkpoint};
use super::options::{GemmArg, MachineOptions, SourceOptions};
use crate::checkpoint::Checkpoint;
use crate::engine::{DeviceChoice, HostMemory, refuse_for_gpu};
use crate::error::Result;
use crate::spec::ModelSpec;
use crate::store::{DtypePolicy, Outline, outline};
use crate::text::Tokenizer;

/// A checkpoint, and what its pack is or would be made of.
pub struct Found {
    ckpt: Checkpoint,
    outline: Outline,
}

impl Found {
    /// Finds it, downloaded first where it is a hub id that the local cache lacks.
    pub fn open(source: &SourceOptions, cancel: &Arc<AtomicBool>, quiet: bool) -> Result<Found> {
        let ckpt = open_checkpoint(source, cancel, quiet)?;
        Found::of(ckpt, source)
    }

    /// [`Found::open`] for what cannot do without a tokenizer.
    pub fn open_with_text(
        source: &SourceOptions,
        cancel: &Arc<AtomicBool>,
        quiet: bool,
    ) -> Result<Found> {
        let ckpt = open_checkpoint(source, cancel, quiet)?;
        Tokenizer::expect_in(&ckpt.config_dir)?;
        Found::of(ckpt, source)
    }

    fn of(ckpt: Checkpoint, source: &SourceOptions) -> Result<Found> {
        let dtype = DtypePolicy::parse(&source.dtype)?;
        let outline = outline(&ckpt, &dtype, &source.offload_folder, source.in_place)?;
        Ok(Found { ckpt, outline })
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.outline.spec
    }

    /// Where tokenizer and chat template lie.
    pub fn text_dir(&self) -> &Path {
        &self.outline.text_dir
    }

    /// Refuses what cannot be run under the user's budget, naming the smallest that can. `want` may ask for less than the run
    /// will, then only what fails in any case is found.
    pub fn expect_room(&self, machine: &MachineOptions, want: &OpenFor, quiet: bool) -> Result<()> {
        machine.note_context(self.spec(), quiet);
        let weights = Weights::from(&self.outline);
        let machine = &MachineOptions {
            // What only a run takes or tells.
            trace: None,
            report: None,
            gemm: GemmArg::Own,
            ..machine.clone()
        };
        let options = |want| weights.engine_options(machine, want, true);
        let least = options(want)?;
        if least.device == DeviceChoice::Cpu {
            let mut host = HostMemory::read();
            host.resident += self.outline.opening_bytes();
            return Advisor::new(&weights, &least, host).expect_room();
        }
        if self.outline.ready {
            // Opening it comes next, and says the same.
            return Ok(());
        }
        // Where `want` is less than the run will ask for, the budget named is to be enough for it as a rule.
        let usual = OpenFor {
            context: want.context.max(OpenFor::default().context),
            kv_tokens: None,
            ..want.clone()
        };
        refuse_for_gpu(&self.outline, &least, &options(&usual)?)
    }

    /// Packs it on first use, within `budget` bytes of memory.
    pub fn prepare(
        self,
        budget: Option<u64>,
        source: &SourceOptions,
        cancel: &Arc<AtomicBool>,
        quiet: bool,
    ) -> Result<Model> {
        Model::prepared(budget, &self.ckpt, source, cancel, quiet)
    }
}
