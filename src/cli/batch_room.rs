//! What a job may run at once under the user's options: one answer for `batch`, `batch --bench` and `batch-check`.

use clap::Args;

use super::model::OpenFor;
use super::options::{MachineOptions, size};
use crate::engine::jobs::{RowSample, Sizing, SizingInput};
use crate::engine::{HostMemory, KvPlace};
use crate::error::{Code, Error, Result};
use crate::spec::ModelSpec;

/// KV gets at least one part in so many of the budget before the budget is called too small.
const LEAST_KV_SHARE: u64 = 32;

#[derive(Args, Clone, Copy, Debug)]
pub struct RoomOptions {
    /// Sequences that run at once [default: up to 256]
    #[arg(
        long,
        alias = "max-num-seqs",
        value_name = "N",
        env = "TENSORPAGER_MAX_SEQUENCES",
        help_heading = "Job"
    )]
    pub max_sequences: Option<usize>,
    /// Memory for keys and values: of a GPU, or of the host where that has no room for so much [default: what rows want, at most half of where it lies]
    #[arg(long, value_name = "SIZE", value_parser = size, env = "TENSORPAGER_KV_MEMORY", help_heading = "Job")]
    pub kv_memory: Option<u64>,
}

impl RoomOptions {
    pub fn check(&self) -> Result<()> {
        match self.max_sequences {
            Some(0) => Err(Error::new(
                Code::Usage,
                "--max-sequences 0 makes no sense",
                "nothing would ever run",
                "give 1 or more",
            )),
            _ => Ok(()),
        }
    }

    /// What a job of `rows` rows is sized by. `gpu`: bytes beside context and kernels, where one computes.
    pub fn input(
        &self,
        machine: &MachineOptions,
        gpu: Option<u64>,
        element_bytes: usize,
        rows: u64,
    ) -> Result<SizingInput> {
        Ok(SizingInput {
            sequences: self.max_sequences,
            kv_bytes: self.kv_memory,
            kv_share: 1,
            context: machine.context,
            budget: budget(machine)?,
            gpu,
            element_bytes,
            rows,
        })
    }
}

/// Host memory that a job may take.
pub(super) fn budget(machine: &MachineOptions) -> Result<u64> {
    let given = machine.cpu_budget()?;
    Ok(given.unwrap_or_else(|| HostMemory::read().default_budget()))
}

/// `open` with as much KV room as the rows want, up to half of the memory that KV lies in; less where the model would not fit beside it.
pub(super) fn with_room<T>(
    spec: &ModelSpec,
    sample: &RowSample,
    input: SizingInput,
    open: &mut dyn FnMut(&Sizing, &OpenFor) -> Result<T>,
) -> Result<(T, Sizing)> {
    let mut kv_share = 2;
    loop {
        let input = SizingInput { kv_share, ..input };
        let sizing = Sizing::choose(spec, sample, &input);
        match open(&sizing, &wanted(&sizing, input.kv_bytes.is_some())) {
            Err(e)
                if e.code() == Code::Memory
                    && input.kv_bytes.is_none()
                    && kv_share < LEAST_KV_SHARE =>
            {
                kv_share *= 2;
            }
            opened => return opened.map(|t| (t, sizing)),
        }
    }
}

/// `kv_asked_for`: where the GPU has no room for so much, host memory may.
fn wanted(sizing: &Sizing, kv_asked_for: bool) -> OpenFor {
    OpenFor {
        context: sizing.context,
        logits_rows: sizing.sequences,
        max_sequences: sizing.sequences,
        kv_tokens: Some(sizing.kv_tokens),
        kv_place: match kv_asked_for {
            true => KvPlace::GpuOrHost,
            false => KvPlace::Gpu,
        },
        vision: sizing.vision,
        reserve_bytes: sizing.reading_bytes,
        ..OpenFor::default()
    }
}
