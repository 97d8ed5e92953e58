//! A model that was found, before anything is packed: what must be refused is refused here, not after hours.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::advice::{Advisor, gpu_room, in_16_bits};
use super::machine::Weights;
use super::model::{Model, OpenFor, open_checkpoint};
use super::options::{MachineOptions, SourceOptions};
use crate::checkpoint::Checkpoint;
use crate::engine::{DeviceChoice, EngineOptions, HostMemory, refuse_for_gpu};
use crate::error::Result;
use crate::spec::ModelSpec;
use crate::store::{DtypePolicy, Outline, outline};
use crate::text::Tokenizer;

/// A checkpoint, and what its pack is or would be made of.
pub struct Found {
    ckpt: Checkpoint,
    outline: Outline,
    /// The same in 16 bits, where it has 32.
    half: Option<Outline>,
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
        let half = in_16_bits(&ckpt, outline.dtype, &source.offload_folder);
        Ok(Found {
            ckpt,
            outline,
            half,
        })
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
        let least = self.options(machine, want)?;
        if least.device == DeviceChoice::Cpu {
            return self.advisor(&least, want).expect_room();
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
        let usual_options = self.options(machine, &usual)?;
        refuse_for_gpu(&self.outline, &least, &usual_options).map_err(|e| {
            let room = gpu_room(&Weights::from(&self.outline), &usual_options);
            let advisor = self.advisor(&usual_options, &usual);
            advisor.with_gpu(room).too_little(e)
        })
    }

    fn options(&self, machine: &MachineOptions, want: &OpenFor) -> Result<EngineOptions> {
        Weights::from(&self.outline).planned_options(machine, want)
    }

    fn advisor(&self, options: &EngineOptions, want: &OpenFor) -> Advisor {
        let mut host = HostMemory::read();
        host.resident += self.outline.opening_bytes();
        Advisor::new(&Weights::from(&self.outline), options, host)
            .with_half(self.half.as_ref())
            .with_pictures(want.looked.as_ref())
    }

    /// Limits on pixels and frames under which the pictures of `want` fit, as the end of a sentence, on a CPU.
    pub fn fewer_pixels(&self, machine: &MachineOptions, want: &OpenFor) -> Option<String> {
        let options = self.options(machine, want).ok()?;
        let on_cpu = options.device == DeviceChoice::Cpu;
        on_cpu.then(|| self.advisor(&options, want).fewer_pixels())?
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
