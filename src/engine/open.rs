//! From a store and a budget to an engine: every byte is placed before the first one is read.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::gpu::{GpuRoom, gpu_pass, open_device};
use super::memory::{Charges, HostMemory, SLACK_BYTES, default_pinned};
use super::pacer::Pacer;
use super::sample::Samplers;
use super::schedule::{Limits, Scheduler};
use super::vision::{Vision, VisionNeed, VisionRoom};
use super::{Engine, no_kv_room};
use crate::device::cuda::Gemm;
use crate::device::{CudaDevice, DeviceKind, KvShape};
use crate::error::{Code, Error, Result};
use crate::model::forward::{Forward, PassLimits};
use crate::model::kv::KvPool;
use crate::paging::{
    Budget, Frames, KnownRates, Origin, Pager, PagerOptions, Placement, Plan, RING_BYTES,
    SlotLayout, UnitSize,
};
use crate::spec::{ModelSpec, UnitKind};
use crate::store::{Store, UnitLayout};
use crate::units::{Dtype, UnitId, flag_size, human_bytes};

/// Rows a pass holds when nobody says otherwise: enough that a prompt costs few passes, little enough to fit anywhere.
pub const DEFAULT_PASS_TOKENS: usize = 2048;
pub const DEFAULT_PAGE_BYTES: u64 = 4 << 20;
pub const DEFAULT_PREFETCH_DEPTH: usize = 1;

/// Where an engine computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    #[default]
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

/// Where keys and values lie while a GPU computes; on a CPU they lie in host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvPlace {
    #[default]
    Gpu,
    /// In host memory where the GPU has no room for them: the bus has time for them while weights come from disk.
    GpuOrHost,
    Host,
}

#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Bound on the process's peak resident set; by default 90 % of what is free.
    pub cpu_memory: Option<u64>,
    /// Of it, what the caller itself takes at its peak beside what the process holds when the engine is opened.
    pub reserve_bytes: u64,
    pub placement: Placement,
    /// By which [`Placement::Auto`] weighs bytes read against bytes copied to a GPU; copies to it are measured where their rate is not known.
    /// What is computed does not depend on where weights lie.
    pub rates: KnownRates,
    pub prefetch_depth: Option<usize>,
    pub page_bytes: Option<u64>,
    /// Pinned frames of a page each, where a GPU computes; by default as many as 256 MiB hold.
    pub ring_frames: Option<usize>,
    pub pager: PagerOptions,
    pub threads: Option<usize>,
    /// Longest sequence, prompt and answer together.
    pub context: usize,
    /// Sequences that may run at once.
    pub max_sequences: usize,
    /// KV room in tokens; by default every sequence may reach the context. With less, a sequence that no longer fits even
    /// alone fails.
    pub kv_tokens: Option<usize>,
    pub kv_place: KvPlace,
    /// Rows a pass may hold; shrinks to fit the budget.
    pub pass_tokens: usize,
    /// Rows whose logits a pass may give (scoring wants them all).
    pub logits_rows: usize,
    /// Whole rows of logits are kept for the sampler; scoring streams them instead.
    pub keep_logits: bool,
    /// Ids from here on are never sampled (the tokenizer's size).
    pub sample_limit: Option<usize>,
    /// Room for pictures; without it prompts with pictures are refused, and nothing of the tower is touched.
    pub vision: Option<VisionRoom>,
    pub device: DeviceChoice,
    /// Bound on the GPU memory of this process; by default 90 % of what is free.
    pub gpu_memory: Option<u64>,
    /// Bound on host memory pinned for the GPU, by default half of the machine's. Frames and keys and values come first and are pinned in any
    /// case; weights beyond it go through the frames.
    pub pinned_memory: Option<u64>,
    pub gemm: Gemm,
    /// Forces an instruction set (tests): `portable`, `avx2`, `avx512`, `avx512bf16`.
    pub isa: Option<String>,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            cpu_memory: None,
            reserve_bytes: 0,
            placement: Placement::Auto,
            rates: KnownRates::default(),
            prefetch_depth: None,
            page_bytes: None,
            ring_frames: None,
            pager: PagerOptions::default(),
            threads: None,
            context: 2048,
            max_sequences: 1,
            kv_tokens: None,
            kv_place: KvPlace::Gpu,
            pass_tokens: DEFAULT_PASS_TOKENS,
            logits_rows: 1,
            keep_logits: true,
            sample_limit: None,
            vision: None,
            device: DeviceChoice::Cpu,
            gpu_memory: None,
            pinned_memory: None,
            gemm: Gemm::Own,
            isa: None,
        }
    }
}

impl EngineOptions {
    /// How the ring between disk and GPU is cut.
    pub(super) fn frames(&self) -> Frames {
        let page_bytes = self.page_bytes.unwrap_or(DEFAULT_PAGE_BYTES);
        let within = |bytes: u64| (bytes.min(RING_BYTES) / page_bytes).max(2) as usize;
        Frames {
            page_bytes,
            count: self.ring_frames.or(self.pinned_memory.map(within)),
        }
    }
}

/// Called while resident units load: bytes so far, bytes in all.
pub type OpenProgress<'a> = &'a mut dyn FnMut(u64, u64);

impl Engine {
    /// Plans, allocates, starts the reader and loads the resident units.
    pub fn open(
        store: &Store,
        options: &EngineOptions,
        cancel: Arc<AtomicBool>,
        progress: OpenProgress<'_>,
    ) -> Result<Engine> {
        let spec = store.spec.clone();
        let dtype = kv_dtype(&store.units);
        let page_bytes = options.page_bytes.unwrap_or(DEFAULT_PAGE_BYTES);
        let file_bytes: Vec<u64> = store.files.iter().map(|f| f.bytes).collect();
        let layouts: Vec<SlotLayout> = store
            .units
            .iter()
            .map(|u| SlotLayout::new(u, &file_bytes, page_bytes))
            .collect();
        let device = open_device(&store.spec, &store.units, options)?;
        let gpu = GpuRoom::of(&device);
        // Now, while nothing of the model is there: later there is no room for it.
        let h2d_gb_per_s = match device.as_cuda() {
            Some(gpu) => gpu.measure_copies()?,
            None => None,
        };
        let options = &EngineOptions {
            rates: options.rates.on(&device.describe(), h2d_gb_per_s),
            ..options.clone()
        };
        let size = match gpu {
            None => UnitSize::of,
            Some(_) => UnitSize::on_gpu,
        };
        let sizes: Vec<UnitSize> = layouts.iter().map(size).collect();
        let Fitted {
            plan,
            pass_tokens,
            kv_blocks,
            kv_in_host,
            context,
            vision,
            ..
        } = fit_on(&spec, dtype, &sizes, options, &HostMemory::read(), gpu)?;
        let vision = vision
            .map(|need| Vision::new(store, &layouts, &options.pager, need))
            .transpose()?;
        let wanted = options.logits_rows.max(1);

        let units: Vec<(UnitId, UnitKind, usize)> = store
            .units
            .iter()
            .map(|u| (u.id, u.kind, u.places.first().map_or(0, |p| p.rows)))
            .collect();
        let forward = Forward::new(
            &device,
            &spec,
            &units,
            head_dtype(store),
            &pass_limits(options, pass_tokens, kv_blocks, context),
        )?;
        let shape = kv_shape(&spec, kv_blocks, dtype);
        let kv = match kv_in_host {
            false => device.kv(&shape)?,
            true => device.kv_in_host(&shape)?,
        };
        let pager = Pager::start_from(
            &Origin::of(store)?,
            layouts,
            plan,
            &options.pager,
            device.as_cuda().map(CudaDevice::compute),
            cancel.clone(),
            progress,
        )?;
        if KvPool::blocks_for(2) > kv_blocks {
            return Err(no_kv_room(1));
        }
        let sample_limit = options.sample_limit.unwrap_or(spec.vocab).min(spec.vocab);
        let limits = Limits {
            context,
            sequences: options.max_sequences,
            rows: pass_tokens,
            wanted,
            kv_blocks,
        };
        Ok(Engine {
            logits: if options.keep_logits {
                vec![0.0; wanted * spec.vocab]
            } else {
                Vec::new()
            },
            candidates: Vec::new(),
            samplers: Samplers::new(sample_limit, device.threads()),
            scheduler: Scheduler::new(limits),
            pacer: Pacer::default(),
            streams: pager.plan().streamed_bytes > 0,
            context,
            pass_time: Duration::ZERO,
            h2d_gb_per_s,
            rows: 0,
            cancel,
            pause: None,
            vision,
            spec,
            dtype,
            device,
            forward,
            pager,
            kv,
        })
    }
}

/// How an engine divides its budget, before anything is allocated.
#[derive(Clone, Debug)]
pub struct Fitted {
    pub plan: Plan,
    /// Rows a pass may hold.
    pub pass_tokens: usize,
    pub kv_blocks: usize,
    /// On a GPU: keys and values lie in host memory.
    pub kv_in_host: bool,
    /// Longest sequence.
    pub context: usize,
    pub budget: u64,
    pub charges: Charges,
    /// On a GPU: what of its memory is not the pager's.
    pub device_charges: u64,
    /// What pictures take, where there is room for any.
    pub vision: Option<VisionNeed>,
}

impl Fitted {
    /// What is pinned of host memory for a GPU: frames, keys and values that lie there, the tower's frames, and units copied as they lie.
    /// The first three are pinned in any case; units only while the bound has room for them too.
    pub fn pinned_bytes(&self, units: &[UnitSize]) -> u64 {
        if self.plan.gpu.is_none() {
            return 0;
        }
        self.plan.pinned_bytes(units) + pinned_besides(self.charges.kv, self.vision.as_ref())
    }
}

/// What is pinned beside the pager's own: a GPU's keys and values in host memory, and the ring of a tower that looks at pictures.
fn pinned_besides(kv_in_host: u64, vision: Option<&VisionNeed>) -> u64 {
    kv_in_host + vision.map_or(0, |v| v.plan.ring().bytes())
}

/// [`fit_on`] a CPU.
pub fn fit(
    spec: &ModelSpec,
    dtype: Dtype,
    units: &[UnitSize],
    options: &EngineOptions,
    host: &HostMemory,
) -> Result<Fitted> {
    fit_on(spec, dtype, units, options, host, None)
}

/// Divides the budget between weights, slots, KV and activations. Pure but for `host`, which says what is taken already.
///
/// # Errors
/// `Memory`: it cannot be done; the fix names the smallest budget that can.
pub fn fit_on(
    spec: &ModelSpec,
    dtype: Dtype,
    units: &[UnitSize],
    options: &EngineOptions,
    host: &HostMemory,
    gpu: Option<GpuRoom>,
) -> Result<Fitted> {
    let fit = |in_host| fit_kv(spec, dtype, units, options, host, gpu, in_host);
    match (options.kv_place, gpu) {
        (_, None) | (KvPlace::Gpu, _) => fit(false),
        (KvPlace::Host, _) => fit(true),
        (KvPlace::GpuOrHost, _) => match fit(false) {
            Err(e) if e.code() == Code::Memory => fit(true),
            fitted => fitted,
        },
    }
}

/// [`fit_on`] with keys and values in one place.
fn fit_kv(
    spec: &ModelSpec,
    dtype: Dtype,
    units: &[UnitSize],
    options: &EngineOptions,
    host: &HostMemory,
    gpu: Option<GpuRoom>,
    kv_in_host: bool,
) -> Result<Fitted> {
    let kind = match gpu {
        None => DeviceKind::Cpu,
        Some(_) => DeviceKind::Cuda,
    };
    let budget = options.cpu_memory.unwrap_or_else(|| host.default_budget());
    let context = options.context.min(spec.max_positions).max(2);
    // All sequences' tokens together are the largest pass there can be.
    let most = context.saturating_mul(options.max_sequences);
    let options = &EngineOptions {
        pass_tokens: options.pass_tokens.min(most),
        ..options.clone()
    };
    let kv_tokens = options.kv_tokens.unwrap_or(most);
    // One block more a sequence: each ends somewhere inside its last one.
    let kv_blocks = KvPool::blocks_for(kv_tokens) + options.max_sequences;
    let shape = kv_shape(spec, kv_blocks, dtype);
    let kv = match kv_in_host {
        false => kind.kv_room(&shape),
        true => kind.kv_in_host_room(&shape),
    };
    let wanted = options.logits_rows.max(1);
    let depth = options.prefetch_depth.unwrap_or(DEFAULT_PREFETCH_DEPTH);
    let vision = VisionNeed::of(spec, units, options, kind, gpu.map_or(budget, |g| g.limit))?;
    let scratch = |tokens| {
        Forward::room(
            kind,
            spec,
            &pass_limits(options, tokens, kv_blocks, context),
        )
    };
    let charges = |tokens: usize| Charges {
        base: host.resident,
        reserve: options.reserve_bytes,
        kv: kv.host,
        scratch: scratch(tokens).host,
        logits: if options.keep_logits {
            (wanted * spec.vocab * 4) as u64
        } else {
            0
        },
        vision: vision.as_ref().map_or(0, VisionNeed::bytes),
    };
    let device_charges = |tokens: usize| {
        let tower = vision.as_ref().map_or(0, VisionNeed::device_bytes);
        gpu.map_or(0, |g| g.base) + kv.device + scratch(tokens).device + tower
    };
    let (pass_tokens, plan) = match gpu {
        None => largest_pass(options, budget, wanted, &charges, |left| {
            Plan::of_sizes(units, left, depth, &options.placement, spec.tied_head)
        })?,
        Some(gpu) => {
            let (frames, rates) = (options.frames(), options.rates.tiers());
            let plan = |cpu_bytes, gpu_bytes| {
                let budget = Budget {
                    cpu_bytes,
                    gpu_bytes: Some(gpu_bytes),
                };
                let placement = &options.placement;
                let tied = spec.tied_head;
                Plan::on_gpu(units, budget, depth, placement, tied, frames, rates)
            };
            let tokens = gpu_pass(options, gpu.limit, wanted, &device_charges, &|left| {
                plan(1 << 46, left)
            })?;
            let left = gpu.limit.saturating_sub(device_charges(tokens));
            let c = charges(tokens);
            let with = |cpu| plan(cpu, left);
            let fitted = c.left_of(budget).and_then(with);
            let mut plan = fitted.map_err(|e| name_the_budget(e, budget, &c, &with))?;
            let bound = options
                .pinned_memory
                .unwrap_or_else(|| default_pinned(budget));
            let besides = pinned_besides(kv.host, vision.as_ref());
            plan.pin_within(units, bound.saturating_sub(besides));
            (tokens, plan)
        }
    };
    Ok(Fitted {
        plan,
        pass_tokens,
        kv_blocks,
        kv_in_host,
        context,
        budget,
        charges: charges(pass_tokens),
        device_charges: device_charges(pass_tokens),
        vision,
    })
}

fn kv_shape(spec: &ModelSpec, blocks: usize, dtype: Dtype) -> KvShape {
    KvShape {
        layers: spec.layers,
        blocks,
        kv_heads: spec.kv_heads,
        head_size: spec.head_size,
        dtype,
    }
}

fn pass_limits(
    options: &EngineOptions,
    tokens: usize,
    kv_blocks: usize,
    context: usize,
) -> PassLimits {
    PassLimits {
        tokens,
        wanted: options.logits_rows.max(1),
        segments: tokens,
        // Sequences share blocks, so their tables may have more entries than there are blocks.
        table: kv_blocks.max(options.max_sequences * (KvPool::blocks_for(context) + 1)),
        context,
        select: options.keep_logits,
    }
}

/// The largest pass (halving from what was asked) under which the smallest placement still fits, and its plan. A large
/// pass may take at most an eighth of the budget from the weights.
fn largest_pass(
    options: &EngineOptions,
    budget: u64,
    wanted: usize,
    charges: &dyn Fn(usize) -> Charges,
    plan: impl Fn(u64) -> Result<Plan>,
) -> Result<(usize, Plan)> {
    let least = wanted.max(16).min(options.pass_tokens.max(1)).max(wanted);
    let mut tokens = options.pass_tokens.max(least);
    loop {
        let c = charges(tokens);
        let modest = c.scratch <= budget / 8 || tokens == least;
        let fitted = if modest {
            Some(c.left_of(budget).and_then(&plan))
        } else {
            None
        };
        match fitted {
            Some(Ok(plan)) => return Ok((tokens, plan)),
            Some(Err(e)) if tokens == least => return Err(name_the_budget(e, budget, &c, &plan)),
            _ => tokens = (tokens / 2).max(least),
        }
    }
}

/// Turns "too little" into the smallest budget that would do.
fn name_the_budget(
    e: Error,
    budget: u64,
    charges: &Charges,
    plan: &impl Fn(u64) -> Result<Plan>,
) -> Error {
    if e.code() != Code::Memory {
        return e;
    }
    let (mut low, mut high) = (0u64, 1u64 << 46);
    while high - low > 1 << 20 {
        let middle = low + (high - low) / 2;
        match plan(middle) {
            Ok(_) => high = middle,
            Err(_) => low = middle,
        }
    }
    // What the process itself holds differs from run to run by less than the last term.
    let smallest = high + charges.total() + (1 << 20);
    Error::new(
        Code::Memory,
        format!("the model does not fit in {}", human_bytes(budget)),
        format!(
            "the smallest plan takes {}: slots and residents {}, {}KV {}, activations and logits {}, pictures {}, the process itself {}",
            human_bytes(smallest),
            human_bytes(high),
            charges.reserve_told(),
            human_bytes(charges.kv),
            human_bytes(charges.scratch + charges.logits),
            human_bytes(charges.vision),
            human_bytes(charges.base + SLACK_BYTES)
        ),
        format!(
            "give --cpu-memory {} or more, {}",
            flag_size(smallest),
            charges.smaller()
        ),
    )
}

/// The type of keys and values: the one all matrices share, or float32 where they differ.
pub fn kv_dtype(units: &[UnitLayout]) -> Dtype {
    let mut matrices = units
        .iter()
        .filter(|u| matches!(u.kind, UnitKind::Layer(_) | UnitKind::Head(_)))
        .flat_map(|u| &u.places)
        .filter(|p| p.rows > 1)
        .map(|p| p.dtype);
    let first = matrices.next().unwrap_or(Dtype::F32);
    if matrices.all(|d| d == first) {
        first
    } else {
        Dtype::F32
    }
}

fn head_dtype(store: &Store) -> Dtype {
    store
        .units
        .iter()
        .find(|u| matches!(u.kind, UnitKind::Head(_)))
        .and_then(|u| u.places.first())
        .map_or(Dtype::F32, |p| p.dtype)
}
