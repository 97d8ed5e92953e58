//! The engine as a library: submit, step, cancel. No process-global state; `cli` is one client of it.
//!
//! Each [`Engine::step`] is one pass over all units. It carries the next token of every running sequence and chunks of
//! the prompts that are not in the KV cache yet, as many as the pass may hold, first come first served.

mod gpu;
pub mod jobs;
mod memory;
mod open;
mod pacer;
mod pictures;
mod sample;
pub mod schedule;
mod score;
mod sequence;
mod source;
mod vision;
mod vision_cost;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

pub use gpu::{GpuRoom, gpu_dtype, open_device, refuse_for_gpu};
pub use memory::{Charges, HostMemory, SLACK_BYTES, cgroup_limit, peak_bytes};
pub use open::{
    DEFAULT_PAGE_BYTES, DEFAULT_PASS_TOKENS, DEFAULT_PREFETCH_DEPTH, DeviceChoice, EngineOptions,
    Fitted, KvPlace, OpenProgress, fit, fit_on, kv_dtype,
};
pub use pictures::expand_pictures;
pub use score::{ScoreBlock, ScoreInput};
pub use sequence::{Event, FinishReason, Job, JobId, Logprobs};
pub use vision::{VisionNeed, VisionRoom, VisionStats};
pub use vision_cost::{PictureCost, picture_costs, tower_flops};

use crate::device::{Device, DeviceKind, Kv};
use crate::error::{Code, Error, Result};
use crate::model::forward::{Forward, LogitsSink};
use crate::paging::{Pager, PagingStats, Plan};
use crate::spec::ModelSpec;
use crate::units::Dtype;
use pacer::Pacer;
use pictures::Pictures;
use sample::{RowsOf, Samplers};
use schedule::{ScheduleStats, Scheduler};
use source::{Paged, Watch};
use vision::Vision;

/// What a step is at: first the pictures of the prompts that are next, if any wait for the vision tower, then the pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Pictures,
    Layers,
}

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
    scheduler: Scheduler,
    pacer: Pacer,
    /// Bytes from disk bound a pass from below; without them there is nothing to hide compute behind.
    streams: bool,
    context: usize,
    logits: Vec<f32>,
    /// Of each wanted row, where the device selects.
    candidates: Vec<Vec<(u32, f32)>>,
    samplers: Samplers,
    pass_time: Duration,
    /// What copies to the GPU took when it was opened.
    h2d_gb_per_s: Option<f64>,
    rows: u64,
    cancel: Arc<AtomicBool>,
    /// Ends the pass under way and nothing else.
    pause: Option<Arc<AtomicBool>>,
    vision: Option<Vision>,
}

impl Engine {
    /// Queues a job. Refused when it could never run: an empty prompt, one longer than the context or with ids that the model does
    /// not have, one that no KV room there is could hold, or one that asks for no token.
    pub fn submit(&mut self, job: Job) -> Result<JobId> {
        let vocab = self.spec.vocab;
        if let Some(id) = job.prompt.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::new(
                Code::Usage,
                format!("token id {id} is outside the vocabulary"),
                format!("the model's embedding has {vocab} rows"),
                "use the tokenizer that belongs to this model",
            ));
        }
        let pictures = Pictures::new(&job.prompt, &job.media, self.spec.vision.as_ref())?;
        if let Some(pictures) = &pictures {
            self.vision
                .as_ref()
                .ok_or_else(no_vision_room)?
                .check(pictures)?;
        }
        self.scheduler.submit_with(job, pictures)
    }

    /// Forgets a job at once and gives back its KV. Unknown ids are ignored: it may just have finished.
    pub fn cancel(&mut self, id: JobId) {
        self.scheduler.cancel(id);
    }

    /// While `flag` is up, a step ends at its next unit as interrupted. Once it is down the engine goes on; what was given to
    /// [`Engine::open`] ends it for good.
    pub fn pause_by(&mut self, flag: Arc<AtomicBool>) {
        self.pause = Some(flag);
    }

    /// Jobs that are not finished.
    pub fn pending(&self) -> usize {
        self.scheduler.pending()
    }

    /// Jobs in the passes now; the others wait for room.
    pub fn running(&self) -> usize {
        self.scheduler.running()
    }

    /// Jobs that wait and have generated nothing.
    pub fn unstarted(&self) -> impl Iterator<Item = JobId> + '_ {
        self.scheduler.unstarted()
    }

    /// One pass. Appends what happened to `events`. Does nothing when no job is pending. After an error nothing computed is
    /// trusted any more: a further step computes every pending job's KV anew.
    pub fn step(&mut self, events: &mut Vec<Event>) -> Result<()> {
        self.step_watched(events, &mut |_, _, _| {})
    }

    /// As [`Engine::step`]; `watch(stage, units done, units of it)` after each unit, for those who wait: a pass over a large
    /// model takes long.
    pub fn step_watched(
        &mut self,
        events: &mut Vec<Event>,
        watch: &mut dyn FnMut(Stage, usize, usize),
    ) -> Result<()> {
        if self.cancel.load(Relaxed) {
            return Err(Error::interrupted());
        }
        self.look(&mut |done, units| watch(Stage::Pictures, done, units))?;
        let watch = &mut |done, units| watch(Stage::Layers, done, units);
        self.scheduler.schedule(self.next_pass_rows(), events)?;
        if self.scheduler.pass.rows() == 0 {
            return Ok(());
        }
        let before = self.stats();
        let candidates = self.candidates_wanted();
        let ran = self.copy_blocks().and_then(|()| match candidates {
            Some(k) => self.run_for_candidates(k, watch),
            None => self.run_for_logits(watch),
        });
        if let Err(e) = ran {
            self.scheduler.set_back_all();
            return Err(e);
        }
        let took = self.stats().since(&before);
        self.pacer.record(
            took.rows as usize,
            took.compute.as_secs_f64(),
            took.paging.disk_busy.as_secs_f64(),
        );
        let rows = match candidates {
            Some(_) => RowsOf::Candidates(&self.candidates),
            None => RowsOf::Logits(&self.logits, self.spec.vocab),
        };
        self.samplers.choose(&mut self.scheduler, &rows, events);
        Ok(())
    }

    fn copy_blocks(&mut self) -> Result<()> {
        let (device, kv) = (&self.device, &mut self.kv);
        let mut copies = self.scheduler.copies().iter();
        copies.try_for_each(|copy| device.kv_copy(kv, copy.from, copy.to))
    }

    /// How many of the best logits of each row suffice for all sequences of the pass; `None` where some need all of them, or where they lie
    /// in host memory anyway.
    fn candidates_wanted(&self) -> Option<usize> {
        if !self.forward.selects() {
            return None;
        }
        let choosing = self.scheduler.choosing();
        let each = choosing.iter().map(|c| match c.job.logprobs {
            None => c.job.sampling.candidates(),
            Some(_) => None,
        });
        each.collect::<Option<Vec<usize>>>()?.into_iter().max()
    }

    fn run_for_logits(&mut self, watch: &mut Watch<'_>) -> Result<()> {
        let vocab = self.spec.vocab;
        let mut logits = std::mem::take(&mut self.logits);
        let mut keep = |first: usize, n: usize, block: &[f32]| {
            for (row, values) in block.chunks_exact(n).enumerate() {
                logits[row * vocab + first..][..n].copy_from_slice(values);
            }
            Ok(())
        };
        let ran = self.run_pass(&mut keep, watch);
        self.logits = logits;
        ran
    }

    fn run_for_candidates(&mut self, k: usize, watch: &mut Watch<'_>) -> Result<()> {
        let started = Instant::now();
        let logits = self.scheduler.pass.wanted() > 0;
        self.pager.begin_pass(logits)?;
        let units = self.forward.units(logits);
        let pause = self.pause.as_deref();
        let mut source = Paged::watched(&mut self.pager, units, watch, pause);
        let pass = &self.scheduler.pass;
        let limit = self.samplers.limit();
        let found = &mut self.candidates;
        found.clear();
        self.forward.run_best(
            &self.device,
            &mut self.kv,
            &mut source,
            pass,
            k,
            limit,
            &mut |_, best| {
                found.push(best.to_vec());
                Ok(())
            },
        )?;
        self.finish_pass(started)
    }

    /// Waits for what was given to the device, and counts.
    fn finish_pass(&mut self, started: Instant) -> Result<()> {
        self.pager.end_pass(&self.kv)?;
        self.pass_time += started.elapsed();
        self.rows += self.scheduler.pass.rows() as u64;
        Ok(())
    }

    /// Once the next prompt waits for its pictures: sends them through the tower, with those of as many prompts behind it as there is room
    /// for.
    fn look(&mut self, watch: &mut Watch<'_>) -> Result<()> {
        if !self.scheduler.next_waits_for_pictures() {
            return Ok(());
        }
        // The last pass's rows are not needed any more; its embeddings may be room for others.
        self.scheduler.pass.clear();
        let vision = self.vision.as_mut().ok_or_else(no_vision_room)?;
        let prompts: Vec<Vec<_>> = self
            .scheduler
            .waiting()
            .map(|s| s.job.media.clone())
            .collect();
        let mut wave = vision.wave(prompts.iter().map(Vec::as_slice));
        if wave.is_empty() && self.scheduler.running() == 0 {
            // Prompts behind one that was set back hold all the room; nothing else would ever give it up.
            self.scheduler
                .waiting()
                .filter_map(|s| s.pictures.as_mut())
                .for_each(|p| p.release(usize::MAX));
            wave = vision.wave(prompts.iter().map(Vec::as_slice));
        }
        vision.encode(&self.device, &self.cancel, &wave, watch)?;
        for pictures in self.scheduler.waiting().filter_map(|s| s.pictures.as_mut()) {
            vision.fill(pictures);
        }
        Ok(())
    }

    /// What looking at pictures cost.
    pub fn vision_stats(&self) -> VisionStats {
        self.vision.as_ref().map(|v| v.stats).unwrap_or_default()
    }

    /// Runs the scheduled pass, streaming its logits into `sink`.
    fn run_pass(&mut self, sink: &mut LogitsSink<'_>, watch: &mut Watch<'_>) -> Result<()> {
        let started = Instant::now();
        let logits = self.scheduler.pass.wanted() > 0;
        self.pager.begin_pass(logits)?;
        let units = self.forward.units(logits);
        let pause = self.pause.as_deref();
        let mut source = Paged::watched(&mut self.pager, units, watch, pause);
        let pass = &self.scheduler.pass;
        self.forward
            .run(&self.device, &mut self.kv, &mut source, pass, sink)?;
        self.finish_pass(started)
    }

    /// What the scheduler did so far.
    pub fn schedule_stats(&self) -> ScheduleStats {
        self.scheduler.stats()
    }

    pub fn stats(&self) -> EngineStats {
        let paging = self.pager.stats();
        EngineStats {
            // A GPU's own clock; the host only hands it work.
            compute: match self.device.kind() {
                DeviceKind::Cpu => self.forward.computed(),
                DeviceKind::Cuda => paging.gpu_compute,
            },
            paging,
            pass: self.pass_time,
            rows: self.rows,
        }
    }

    /// The rate of copies from pinned memory to the GPU, measured when it was opened, 10⁹ bytes a second.
    pub fn h2d_gb_per_s(&self) -> Option<f64> {
        self.h2d_gb_per_s
    }

    /// Whether keys and values lie in host memory.
    pub fn kv_in_host(&self) -> bool {
        self.kv.in_host()
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

    /// Rows the next pass takes at most: where it waits for the disk, as many as hide behind that.
    pub fn next_pass_rows(&self) -> usize {
        let most = self.forward.max_tokens();
        match self.streams {
            true => self.pacer.budget(most),
            false => most,
        }
    }

    /// Units of a pass that gives logits.
    pub fn units_of_a_pass(&self) -> usize {
        self.forward.units(true)
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
