//! The engine as a library: submit, step, cancel. No process-global state; `cli` is one client of it.
//!
//! Each [`Engine::step`] is one pass over all units. It carries the next token of every running sequence and chunks of
//! the prompts that are not in the KV cache yet, as many as the pass may hold, first come first served.

mod memory;
mod open;
mod pictures;
mod schedule;
mod score;
mod sequence;
mod source;
mod vision;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub use memory::{Charges, HostMemory, SLACK_BYTES, peak_bytes};
pub use open::{DEFAULT_PAGE_BYTES, DEFAULT_PASS_TOKENS, EngineOptions, OpenProgress};
pub use pictures::expand_pictures;
pub use score::{ScoreBlock, ScoreInput};
pub use sequence::{Event, FinishReason, Job, JobId};
pub use vision::{VisionRoom, VisionStats};

use crate::device::{Device, Kv};
use crate::error::{Code, Error, Result};
use crate::model::forward::{Forward, LogitsSink};
use crate::model::kv::KvPool;
use crate::model::pass::Pass;
use crate::paging::{Pager, PagingStats, Plan};
use crate::spec::ModelSpec;
use crate::text::Sampler;
use crate::units::Dtype;
use schedule::Scheduled;
use sequence::Sequence;
use vision::Vision;
use source::Paged;

/// What the passes so far cost, as a snapshot; the difference of two is what happened between them.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineStats {
    pub paging: PagingStats,
    /// Time in the ops of the forward pass, waits left out.
    pub compute: Duration,
    /// Time inside passes.
    pub pass: Duration,
    /// Rows (tokens) that went through the layers.
    pub rows: u64,
}

impl EngineStats {
    pub fn since(&self, earlier: &EngineStats) -> EngineStats {
        EngineStats {
            paging: self.paging.since(&earlier.paging),
            compute: self.compute - earlier.compute,
            pass: self.pass - earlier.pass,
            rows: self.rows - earlier.rows,
        }
    }
}

/// A model ready to run under its budget. See [`Engine::open`].
pub struct Engine {
    spec: ModelSpec,
    dtype: Dtype,
    device: Device,
    forward: Forward,
    pager: Pager,
    kv: Kv,
    pool: KvPool,
    context: usize,
    max_sequences: usize,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    next_id: u64,
    pass: Pass,
    scheduled: Vec<Scheduled>,
    logits: Vec<f32>,
    sampler: Sampler,
    pass_time: Duration,
    rows: u64,
    cancel: Arc<AtomicBool>,
    vision: Option<Vision>,
}

impl Engine {
    /// Queues a job. Refused when it could never run: an empty prompt, or one longer than the context.
    pub fn submit(&mut self, job: Job) -> Result<JobId> {
        if job.prompt.is_empty() {
            return Err(Error::new(
                Code::Usage,
                "there is nothing to continue",
                "the prompt has no tokens",
                "give a prompt",
            ));
        }
        if job.prompt.len() >= self.context {
            return Err(Error::new(
                Code::Usage,
                format!("the prompt of {} tokens is too long", job.prompt.len()),
                format!("the context holds {} tokens, and one must be left for the answer", self.context),
                "shorten the prompt or raise --context (it takes KV memory)",
            ));
        }
        job.sampling.validate()?;
        let id = JobId(self.next_id);
        self.next_id += 1;
        let sequence = Sequence::new(id, job, self.spec.vision.as_ref())?;
        if let Some(pictures) = &sequence.pictures {
            self.vision()?.check(pictures)?;
        }
        self.waiting.push_back(sequence);
        Ok(id)
    }

    /// Forgets a job at once and gives back its KV. Unknown ids are ignored: it may just have finished.
    pub fn cancel(&mut self, id: JobId) {
        self.waiting.retain(|s| s.id != id);
        if let Some(i) = self.running.iter().position(|s| s.id == id) {
            let mut gone = self.running.remove(i);
            self.pool.release(&mut gone.table);
        }
    }

    /// Jobs that are not finished.
    pub fn pending(&self) -> usize {
        self.waiting.len() + self.running.len()
    }

    /// One pass. Appends what happened to `events`. Does nothing when no job is pending.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<()> {
        if self.cancel.load(Relaxed) {
            return Err(crate::paging::interrupted());
        }
        self.look()?;
        self.schedule()?;
        if self.pass.rows() == 0 {
            return Ok(());
        }
        let vocab = self.spec.vocab;
        let mut logits = std::mem::take(&mut self.logits);
        let ran = self.run_pass(&mut |first, n, block| {
            for (row, values) in block.chunks_exact(n).enumerate() {
                logits[row * vocab + first..][..n].copy_from_slice(values);
            }
            Ok(())
        });
        self.logits = logits;
        ran?;
        self.choose(events)
    }

    /// Sends the pictures of the prompts that are about to begin through the tower.
    fn look(&mut self) -> Result<()> {
        let admitted = self.max_sequences.saturating_sub(self.running.len());
        if !self.waiting.iter().take(admitted).any(Sequence::waits_for_pictures) {
            return Ok(());
        }
        let Some(vision) = &mut self.vision else {
            return Err(no_vision_room());
        };
        let next = || self.waiting.iter().take(admitted);
        let wave = vision.wave(next().map(|s| s.job.media.as_slice()));
        vision.encode(&self.device, &self.cancel, &wave)?;
        for s in self.waiting.iter_mut().take(admitted) {
            if let Some(pictures) = &mut s.pictures {
                vision.fill(pictures);
            }
        }
        Ok(())
    }

    fn vision(&self) -> Result<&Vision> {
        self.vision.as_ref().ok_or_else(no_vision_room)
    }

    /// What looking at pictures cost.
    pub fn vision_stats(&self) -> VisionStats {
        self.vision.as_ref().map(|v| v.stats).unwrap_or_default()
    }

    /// Runs `self.pass`, streaming its logits into `sink`.
    fn run_pass(&mut self, sink: &mut LogitsSink<'_>) -> Result<()> {
        let started = Instant::now();
        self.pager.begin_pass()?;
        let mut source = Paged(&mut self.pager);
        self.forward
            .run(&self.device, &mut self.kv, &mut source, &self.pass, sink)?;
        self.pass_time += started.elapsed();
        self.rows += self.pass.rows() as u64;
        Ok(())
    }

    pub fn stats(&self) -> EngineStats {
        EngineStats {
            paging: self.pager.stats(),
            compute: self.forward.computed(),
            pass: self.pass_time,
            rows: self.rows,
        }
    }

    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The weights' type; float32 where types are mixed.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    pub fn plan(&self) -> &Plan {
        self.pager.plan()
    }

    pub fn pager(&self) -> &Pager {
        &self.pager
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn context(&self) -> usize {
        self.context
    }

    /// Rows a pass may hold.
    pub fn max_pass_tokens(&self) -> usize {
        self.forward.max_tokens()
    }
}

fn no_vision_room() -> Error {
    Error::new(
        Code::Usage,
        "pictures cannot be looked at",
        "the engine was opened without room for them",
        "open it with `EngineOptions::vision`",
    )
}

fn no_kv_room(missing: usize) -> Error {
    Error::new(
        Code::Memory,
        "the KV cache is full",
        format!("{missing} more blocks of 16 tokens are needed"),
        "raise --context or --cpu-memory, or shorten the input",
    )
}
