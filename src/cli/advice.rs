//! Advice where it hurts: what to change and what that would bring, in this machine's numbers. The planner is asked again
//! with something changed; nothing here is a rule of thumb.

mod folders;
mod pictures;
mod slow;

use std::path::{Path, PathBuf};

use super::machine::Weights;
use crate::checkpoint::{Checkpoint, SourceKind};
use crate::engine::jobs::PictureSample;
use crate::engine::{
    DEFAULT_PAGE_BYTES, DeviceChoice, EngineOptions, Fitted, GpuRoom, HostMemory, SLACK_BYTES,
    fit_on, kv_dtype, open_device,
};
use crate::error::{Code, Error, Result};
use crate::paging::UnitSize;
use crate::spec::ModelSpec;
use crate::store::{DtypeLabel, DtypePolicy, Outline, free_bytes, list_packs, outline};
use crate::units::{Dtype, flag_size, human_bytes};
use pictures::{Limit, Need};

pub(super) use pictures::Looked;
pub(super) use slow::{Queue, Ran, Work, told};

/// Advice for less than this is noise.
const LEAST_GAIN: f64 = 1.05;
/// What the process itself takes is not quite the same at each start: what is said to fit must at the next one.
const STARTS_DIFFER: u64 = 4 << 20;
/// A budget that is no budget.
const ENDLESS: u64 = 1 << 46;

/// A model under the options it was opened with, ready to be asked what else would do.
pub(super) struct Advisor {
    spec: ModelSpec,
    weights: Typed,
    /// Weights of 32 bits as they would be in 16.
    half: Option<Typed>,
    options: EngineOptions,
    /// As it was before the engine took anything.
    host: HostMemory,
    /// Where a GPU computes.
    gpu: Option<GpuRoom>,
    pictures: Option<Looked>,
    /// Where weights are read from, and whether they are the checkpoint's own.
    dir: PathBuf,
    in_place: bool,
}

/// Weights of one type.
struct Typed {
    dtype: Dtype,
    sizes: Vec<UnitSize>,
}

impl Typed {
    fn of(weights: &Weights<'_>, options: &EngineOptions) -> Typed {
        let page = options.page_bytes.unwrap_or(DEFAULT_PAGE_BYTES);
        Typed {
            dtype: kv_dtype(weights.units),
            sizes: weights.sizes(page, options.device != DeviceChoice::Cpu),
        }
    }
}

/// The model with one thing changed.
struct Asked<'a> {
    weights: &'a Typed,
    options: EngineOptions,
    /// What the process holds before the engine takes anything.
    resident: u64,
}

/// Which memory is too little.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Short {
    Host,
    Gpu,
}

impl Advisor {
    pub(super) fn new(of: &Weights<'_>, options: &EngineOptions, host: HostMemory) -> Advisor {
        Advisor {
            spec: of.spec.clone(),
            weights: Typed::of(of, options),
            half: None,
            options: options.clone(),
            host,
            gpu: None,
            pictures: None,
            dir: of.dir.to_path_buf(),
            in_place: of.in_place,
        }
    }

    /// `half`: what [`in_16_bits`] makes of the weights.
    pub(super) fn with_half(mut self, half: Option<&Outline>) -> Advisor {
        self.half = half.map(|outline| Typed::of(&outline.into(), &self.options));
        self
    }

    pub(super) fn with_pictures(mut self, pictures: Option<&Looked>) -> Advisor {
        self.pictures = pictures.cloned();
        self
    }

    /// On a GPU that was opened for the model (or is one by hand).
    pub(super) fn with_gpu(mut self, gpu: Option<GpuRoom>) -> Advisor {
        self.gpu = gpu;
        self
    }

    fn on_cpu(&self) -> bool {
        matches!(self.options.device, DeviceChoice::Cpu)
    }

    /// Of host memory.
    fn budget(&self) -> u64 {
        let given = self.options.cpu_memory;
        given.unwrap_or_else(|| self.host.default_budget())
    }

    /// That the options' own budget is enough for an engine on a CPU.
    pub(super) fn expect_room(&self) -> Result<()> {
        self.fitted(&self.asked(), self.budget())
            .map(|_| ())
            .map_err(|e| self.too_little(e))
    }

    fn asked(&self) -> Asked<'_> {
        self.with(self.options.clone())
    }

    fn with(&self, options: EngineOptions) -> Asked<'_> {
        Asked {
            weights: &self.weights,
            options,
            resident: self.host.resident,
        }
    }

    fn fitted(&self, asked: &Asked<'_>, budget: u64) -> Result<Fitted> {
        self.fitted_on(asked, budget, self.gpu)
    }

    fn fitted_on(&self, asked: &Asked<'_>, budget: u64, gpu: Option<GpuRoom>) -> Result<Fitted> {
        let options = EngineOptions {
            cpu_memory: Some(budget),
            ..asked.options.clone()
        };
        let host = HostMemory {
            resident: asked.resident,
            ..self.host
        };
        let Typed { dtype, sizes } = asked.weights;
        fit_on(&self.spec, *dtype, sizes, &options, &host, gpu)
    }

    /// As it was asked for.
    pub(super) fn fits_as_asked(&self) -> bool {
        self.fits(&self.asked())
    }

    /// Within the budgets that were given, and a little less of the host's.
    fn fits(&self, asked: &Asked<'_>) -> bool {
        let budget = self.budget().saturating_sub(STARTS_DIFFER);
        self.fitted(asked, budget).is_ok()
    }

    /// The smallest budget that `asked` can be run in, to a MiB.
    fn smallest(&self, asked: &Asked<'_>, short: Short) -> Option<u64> {
        let enough = |bytes| match (short, self.gpu) {
            (Short::Gpu, Some(gpu)) => {
                let gpu = GpuRoom {
                    limit: bytes,
                    ..gpu
                };
                self.fitted_on(asked, ENDLESS, Some(gpu)).is_ok()
            }
            _ => self.fitted(asked, bytes).is_ok(),
        };
        let (mut low, mut high) = (0u64, ENDLESS);
        if !enough(high) {
            return None;
        }
        while high - low > 1 << 20 {
            let middle = low + (high - low) / 2;
            match enough(middle) {
                true => high = middle,
                false => low = middle,
            }
        }
        Some(high)
    }

    /// A GPU whose memory would be too little whatever the host had; else it is the host's.
    fn short(&self) -> Short {
        let endless = self.fitted(&self.asked(), ENDLESS);
        match (self.gpu, endless) {
            (Some(_), Err(_)) => Short::Gpu,
            _ => Short::Host,
        }
    }

    /// What the machine has of it.
    fn free(&self, short: Short) -> (u64, &'static str) {
        match short {
            Short::Host => (self.host.default_budget(), "this machine"),
            Short::Gpu => {
                let gpu = self.gpu.map_or(0, |gpu| gpu.limit);
                // Where no budget was given, the limit is what is free.
                (gpu, "this GPU")
            }
        }
    }

    /// Where memory was too little: the budget that would do, whether this machine has it, and what takes less.
    pub(super) fn too_little(&self, error: Error) -> Error {
        if error.code() != Code::Memory || (!self.on_cpu() && self.gpu.is_none()) {
            return error;
        }
        let short = self.short();
        let Some(needed) = self.smallest(&self.asked(), short) else {
            return error;
        };
        // What the engine said stands: it knows to the page what it holds.
        let mut fix = error.fix().to_string();
        let (free, of) = self.free(short);
        // A budget that was given for a GPU says nothing of what there is.
        if short == Short::Host || self.options.gpu_memory.is_none() {
            fix += &format!("; {of} has {} for it", human_bytes(free));
            if needed > free {
                fix += ": end other programs";
            }
        }
        for (what, asked) in self.smaller() {
            match self.smallest(&asked, short) {
                Some(n) if (n as f64) * LEAST_GAIN < needed as f64 => {
                    fix += &format!("; with {what} {} are enough", named(n));
                }
                _ => {}
            }
        }
        for (what, n) in self.smaller_pictures(short) {
            match n {
                None => fix += &format!("; with {what} it fits"),
                Some(n) if (n as f64) * LEAST_GAIN < needed as f64 => {
                    fix += &format!("; with {what} {} are enough", named(n));
                }
                Some(_) => {}
            }
        }
        error.with_fix(fix)
    }

    /// What a user can ask less of.
    fn smaller(&self) -> Vec<(String, Asked<'_>)> {
        let o = &self.options;
        let mut less = Vec::new();
        let context = o.context.min(self.spec.max_positions);
        for part in [2, 8] {
            if context / part >= 64 {
                let options = EngineOptions {
                    context: context / part,
                    kv_tokens: o.kv_tokens.map(|t| t / part),
                    ..o.clone()
                };
                less.push((format!("--context {}", context / part), self.with(options)));
            }
        }
        if o.max_sequences > 1 {
            let half = o.max_sequences / 2;
            let options = EngineOptions {
                max_sequences: half,
                logits_rows: o.logits_rows.min(half),
                kv_tokens: o.kv_tokens.map(|t| t / 2),
                ..o.clone()
            };
            less.push((format!("{half} sequences at once"), self.with(options)));
        }
        if let Some(half) = &self.half {
            let asked = Asked {
                weights: half,
                ..self.asked()
            };
            less.push((self.in_half(half), asked));
        }
        if o.vision.is_some_and(|room| room.patches > 0) {
            let options = EngineOptions {
                vision: None,
                ..o.clone()
            };
            less.push(("no pictures".to_string(), self.with(options)));
        }
        less
    }

    /// The option that casts the weights.
    fn in_half(&self, half: &Typed) -> String {
        let instead = match self.in_place {
            true => " instead of --in-place",
            false => "",
        };
        format!(
            "--dtype {}{instead} (weights rounded to 16 bits)",
            half.dtype.name()
        )
    }

    /// With pictures that take `need`.
    fn with_need(&self, looked: &Looked, need: &Need) -> Asked<'_> {
        let now = looked.need();
        let fewer = now.tokens.saturating_sub(need.tokens);
        let o = &self.options;
        let mut options = EngineOptions {
            vision: Some(need.room),
            ..o.clone()
        };
        if looked.context_follows {
            options.context = o.context.saturating_sub(fewer).max(2);
            options.pass_tokens = o.pass_tokens.min(options.context);
        }
        Asked {
            weights: &self.weights,
            options,
            resident: self.host.resident.saturating_sub(looked.held_bytes) + need.pixel_bytes,
        }
    }

    /// Limits on pixels and frames: those that are enough, or, where none is, what a few of them would need.
    fn smaller_pictures(&self, short: Short) -> Vec<(String, Option<u64>)> {
        let Some(looked) = &self.pictures else {
            return Vec::new();
        };
        let enough = looked.loosest(&|need| self.pictures_fit(looked, need));
        if !enough.is_empty() {
            let told = enough.iter().map(|(limit, _)| (looked.told(*limit), None));
            return told.collect();
        }
        let needed = |(limit, need): (Limit, Need)| {
            let bytes = self.smallest(&self.with_need(looked, &need), short)?;
            Some((looked.told(limit), Some(bytes)))
        };
        looked.steps().into_iter().filter_map(needed).collect()
    }

    fn pictures_fit(&self, looked: &Looked, need: &Need) -> bool {
        let asked = self.with_need(looked, need);
        // They are decoded before anything else is there.
        let decoding = asked.resident + need.decode_bytes + SLACK_BYTES + STARTS_DIFFER;
        let context = asked.options.context.min(self.spec.max_positions);
        let shorter = looked.text_tokens + need.tokens < context;
        shorter && decoding <= self.budget() && self.fits(&asked)
    }

    /// Limits under which the pictures fit, as the end of a sentence. `None` where there is none.
    pub(super) fn fewer_pixels(&self) -> Option<String> {
        let looked = self.pictures.as_ref()?;
        let enough = looked.loosest(&|need| self.pictures_fit(looked, need));
        let told = enough.iter().map(|(limit, _)| looked.told(*limit));
        let told: Vec<String> = told.collect();
        (!told.is_empty()).then(|| format!("{} fits", told.join(" or ")))
    }
}

/// What a job of pictures that does not fit is told besides: the limits under which they do, as far as `fits` knows.
pub(super) fn with_smaller_pictures(
    error: Error,
    looked: &Looked,
    fits: &dyn Fn(&PictureSample) -> bool,
) -> Error {
    let mut fix = error.fix().to_string();
    for (limit, _) in looked.loosest(&|need| fits(&need.sample)) {
        fix += &format!("; with {} it fits", looked.told(limit));
    }
    error.with_fix(fix)
}

fn named(bytes: u64) -> String {
    flag_size(bytes + STARTS_DIFFER)
}

/// A prompt that pictures make longer than the context: the limits under which it would not be. `text`: its other tokens; `answer`: those that
/// are to follow, where any are.
pub(super) fn too_long(
    looked: &Looked,
    text: usize,
    answer: Option<usize>,
    context: usize,
) -> Error {
    let now = looked.need().tokens;
    let leaving = |room: usize| looked.loosest(&|need| text + need.tokens + room <= context);
    // The whole answer is worth some pixels; half the context is not.
    let least = usize::from(answer.is_some());
    let found = match leaving(answer.unwrap_or(0).min(context / 2).max(least)) {
        none if none.is_empty() => leaving(least),
        found => found,
    };
    let told = found
        .iter()
        .map(|(limit, need)| format!("with {} they take {}", looked.told(*limit), need.tokens));
    let told: Vec<String> = told.collect();
    let fewer = match told.is_empty() {
        true => "give fewer pictures".to_string(),
        false => told.join(", "),
    };
    Error::new(
        Code::Usage,
        format!("the prompt of {} tokens is too long", text + now),
        match answer {
            Some(_) => format!(
                "its pictures take {now} tokens, the context holds {context}, and one must be left for the answer"
            ),
            None => format!("its pictures take {now} tokens, the model takes {context} in all"),
        },
        match answer {
            Some(_) => {
                format!(
                    "{fewer}; or raise --context where the model goes further (it takes KV memory)"
                )
            }
            None => fewer,
        },
    )
}

/// The GPU that the options ask for, as it is now. It was opened before; where that fails there is nothing to advise.
pub(super) fn gpu_room(of: &Weights<'_>, options: &EngineOptions) -> Option<GpuRoom> {
    match options.device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Cuda(_) => GpuRoom::of(&open_device(of.spec, of.units, options).ok()?),
    }
}

/// What the pack would be in 16 bits, where the weights are float32 as they are run. bfloat16: it has float32's range, so no weight overflows.
pub(super) fn in_16_bits(
    ckpt: &Checkpoint,
    dtype: DtypeLabel,
    offload_folder: &Path,
) -> Option<Outline> {
    if dtype != DtypeLabel::Uniform(Dtype::F32) || ckpt.kind == SourceKind::Packed {
        return None;
    }
    let policy = DtypePolicy::One(Dtype::BF16);
    outline(ckpt, &policy, offload_folder, false).ok()
}

/// A pack that the disk has no room for.
pub(super) struct NoSpace<'a> {
    pub offload_folder: &'a Path,
    /// Bytes of the pack.
    pub needed: u64,
    /// Of one in 16 bits.
    pub half: Option<u64>,
    /// Weights are cast, so the checkpoint's own files will not do.
    pub casts: bool,
}

impl NoSpace<'_> {
    /// Where the disk is too small for a pack: what cleaning would give back, what takes less, and what needs none.
    pub(super) fn explain(&self, error: Error) -> Error {
        // A limit of the user's own is not the disk's: its error says what to raise.
        if error.code() != Code::Space || error.fix().contains("--offload-limit") {
            return error;
        }
        let stale: u64 = list_packs(self.offload_folder)
            .unwrap_or_default()
            .iter()
            .filter(|p| p.state.is_stale())
            .map(|p| p.bytes)
            .sum();
        let mut ways = vec![match stale {
            0 => "nothing there is stale".to_string(),
            n => format!("`tensorpager clean --stale` would free {}", human_bytes(n)),
        }];
        if !self.casts {
            ways.push("--in-place streams from the checkpoint and needs no space".to_string());
        }
        ways.extend(self.less());
        error.with_fix(ways.join("; "))
    }

    /// A smaller pack, and places with room.
    pub(super) fn less(&self) -> Vec<String> {
        let mut ways = Vec::new();
        if let Some(half) = self.half {
            let there = self.offload_folder.ancestors().find(|p| p.is_dir());
            let free = there.and_then(|p| free_bytes(p).ok()).unwrap_or(0);
            let fits = match half <= free {
                true => ", which fits",
                false => "",
            };
            ways.push(format!(
                "--dtype bfloat16 needs {} instead of {}{fits} (weights rounded to 16 bits)",
                human_bytes(half),
                human_bytes(self.needed)
            ));
        }
        let others = folders::others(self.offload_folder, self.needed);
        match others.is_empty() {
            true => ways.push(format!(
                "no other local disk that may be written to has {} free",
                human_bytes(self.needed)
            )),
            false => ways.extend(others.iter().map(folders::Folder::told)),
        }
        ways
    }
}

#[cfg(test)]
mod tests;
