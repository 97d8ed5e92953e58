//! `plan`: what goes where under a budget, and how fast that will be, without loading anything.

mod report;

use clap::Args;

use super::gpu::check_device;
use super::machine::Weights;
use super::model::{OpenFor, open_checkpoint, pack_options};
use super::options::{MachineOptions, SourceOptions};
use super::rates::{AskedRates, Computer, RateArgs, pass_work, usage};
use crate::engine::{
    DEFAULT_PAGE_BYTES, DEFAULT_PASS_TOKENS, EngineOptions, Fitted, GpuRoom, HostMemory, KvPlace,
    PictureCost, fit_on, kv_dtype, picture_costs,
};
use crate::error::{Error, Result};
use crate::model::kv::{BLOCK_TOKENS, block_bytes};
use crate::paging::{
    MachineRates, PassCost, Tier, UnitSize, best_concurrency, is_streamed, is_vision, predict,
    rows_that_hide_the_disk, unit_name,
};
use crate::store::{Outline, free_for_pack, outline};
use crate::text::Tokenizer;
use crate::units::Dtype;
use report::{Gain, Pictures, Report, Row, UnitRow, table};

#[derive(Args)]
#[command(after_help = "Examples:
  tensorpager plan ./Qwen2.5-7B-Instruct --cpu-memory 8GiB
  tensorpager plan ./Llama-3.1-70B --cpu-memory 64GiB --disk-gb-per-s 6 --memory-gb-per-s 80 --cpu-gflops 1500
      (for a machine you do not have)")]
pub struct PlanArgs {
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    machine: MachineOptions,
    /// Queues of this many sequences
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_value = "1,8,64,256"
    )]
    sequences: Vec<usize>,
    #[command(flatten)]
    rates: RateArgs,
    /// One JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// More than any machine has: what needs more than this needs something else.
const MOST_MEMORY: u64 = 1 << 46;

/// A model under a machine's rates, ready to be asked.
struct Planned {
    outline: Outline,
    sizes: Vec<UnitSize>,
    dtype: Dtype,
    computer: String,
    rates: MachineRates,
    /// The part of the time that their measurement waited for a core, where that was too much.
    lost: Option<f64>,
    host: HostMemory,
    memory: Memory,
    options: EngineOptions,
}

/// What a plan may take.
#[derive(Clone, Copy)]
struct Memory {
    cpu: u64,
    gpu: Option<GpuRoom>,
}

pub fn run(args: PlanArgs) -> Result<u8> {
    check_device(&args.machine.device)?;
    args.rates.check()?;
    for n in &args.sequences {
        if *n == 0 || *n > 65_536 {
            return Err(usage(
                "--sequences",
                *n as f64,
                "a queue has 1 to 65536 sequences",
            ));
        }
    }
    let planned = Planned::new(&args)?;
    let report = planned.report(&args)?;
    if args.json {
        let text = serde_json::to_string(&report).map_err(|e| Error::internal(e.to_string()))?;
        super::run::print(&format!("{text}\n"))?;
    } else {
        super::run::print(&table(&report))?;
    }
    Ok(0)
}

impl Planned {
    fn new(args: &PlanArgs) -> Result<Planned> {
        args.machine.refuse_records("plan")?;
        let cancel = super::signals::cancel_flag()?;
        let ckpt = open_checkpoint(&args.source, &cancel, args.json)?;
        let policy = pack_options(&args.source, &cancel)?.dtype;
        let outline = outline(
            &ckpt,
            &policy,
            &args.source.offload_folder,
            args.source.in_place,
        )?;
        args.machine.note_context(&outline.spec, args.json);
        let computer = Computer::of(&args.rates, &args.machine, &outline, args.json)?;
        let machine = computer.machine(&args.machine);
        let gpu = computer.gpu_room(&machine)?;
        // What a run holds before it plans: the tokenizer, the checksums, and what a GPU's driver took.
        let tokenizer = Tokenizer::load(&outline.text_dir).ok();
        let mut host = HostMemory::read();
        host.resident += outline.opening_bytes();
        drop(tokenizer);
        let want = OpenFor {
            context: machine.context.unwrap_or(OpenFor::default().context),
            ..OpenFor::default()
        };
        let weights = Weights::from(&outline);
        let options = weights.engine_options(&machine, &want, true)?;
        let page_bytes = options.page_bytes.unwrap_or(DEFAULT_PAGE_BYTES);
        // The default is fixed now: measuring must not shrink it.
        let cpu = options.cpu_memory.unwrap_or_else(|| host.default_budget());
        let dtype = kv_dtype(&outline.units);
        let AskedRates { rates, lost } = args.rates.rates(&computer, &machine, &outline, dtype)?;
        let options = EngineOptions {
            rates: computer.known(&rates),
            ..options
        };
        Ok(Planned {
            sizes: weights.sizes(page_bytes, gpu.is_some()),
            rates,
            lost,
            memory: Memory { cpu, gpu },
            computer: computer.name(),
            outline,
            dtype,
            host,
            options,
        })
    }

    /// `n` sequences at once, with keys and values where there is room, as `batch --kv-memory` has them.
    fn fitted(&self, n: usize, memory: Memory) -> Result<Fitted> {
        self.fitted_with(n, memory, KvPlace::GpuOrHost)
    }

    fn fitted_with(&self, n: usize, memory: Memory, kv_place: KvPlace) -> Result<Fitted> {
        let options = EngineOptions {
            kv_place,
            cpu_memory: Some(memory.cpu),
            max_sequences: n,
            logits_rows: n,
            pass_tokens: DEFAULT_PASS_TOKENS.max(n),
            ..self.options.clone()
        };
        fit_on(
            &self.outline.spec,
            self.dtype,
            &self.sizes,
            &options,
            &self.host,
            memory.gpu,
        )
    }

    fn cost(&self, n: usize, fitted: &Fitted) -> PassCost {
        let spec = &self.outline.spec;
        // A sequence that is on average half its context long is read whole by every token.
        let kv_tokens = n * fitted.context.min(spec.max_positions) / 2;
        let work = pass_work(spec, self.dtype, fitted, n, n, kv_tokens as u64);
        predict(&self.sizes, &fitted.plan, &self.rates, &work)
    }

    fn kv_block(&self) -> u64 {
        let s = &self.outline.spec;
        block_bytes(s.layers, s.kv_heads, s.head_size, self.dtype.bytes())
    }

    fn row(&self, sequences: usize) -> Option<Row> {
        let (at_once, cost, fitted) = best_concurrency(sequences, &mut |n| {
            let fitted = self.fitted(n, self.memory).ok()?;
            Some((self.cost(n, &fitted), fitted))
        })?;
        let kv_tier = match fitted.kv_in_host || self.memory.gpu.is_none() {
            true => Tier::Cpu,
            false => Tier::Gpu,
        };
        Some(Row {
            sequences,
            at_once,
            kv_bytes: fitted.kv_blocks as u64 * self.kv_block(),
            kv_tokens: fitted.kv_blocks * BLOCK_TOKENS,
            kv_tier: kv_tier.name(),
            cpu_bytes_per_pass: fitted.plan.resident_bytes,
            disk_bytes_per_pass: cost.disk_bytes,
            copied_bytes_per_pass: cost.copied_bytes,
            copied_back_bytes_per_pass: cost.copied_back_bytes,
            pass_s: cost.pass_s,
            bound_s: cost.bound_s,
            compute_s: cost.compute_s,
            tokens_per_s: at_once as f64 / cost.pass_s,
        })
    }

    /// What one sequence would gain from so much host memory.
    fn gain(&self, cpu: u64) -> Option<Gain> {
        let fitted = self.fitted(1, Memory { cpu, ..self.memory }).ok()?;
        let cost = self.cost(1, &fitted);
        Some(Gain {
            cpu_memory: cpu,
            disk_bytes_per_pass: cost.disk_bytes,
            pass_s: cost.pass_s,
            tokens_per_s: 1.0 / cost.pass_s,
        })
    }

    /// More host memory, step by step, up to what holds `everything`.
    fn more_memory(&self, everything: u64) -> Vec<Gain> {
        let now = self.memory.cpu;
        if everything >= MOST_MEMORY || now >= everything {
            return Vec::new();
        }
        [1, 2, 4, 8, 16, 32, 64]
            .iter()
            .map(|gib| now + (gib << 30))
            .take_while(|more| *more < everything)
            .chain([everything])
            .filter_map(|more| self.gain(more))
            .collect()
    }

    fn pictures(&self) -> Option<Pictures> {
        let each = picture_costs(&self.outline.spec, self.dtype.bytes())?;
        let tower = self.sizes.iter().filter(|u| is_vision(u.kind));
        let tower_bytes = tower.map(|u| u.read_bytes).sum();
        let seconds = |c: &PictureCost| c.flops / (self.rates.compute.gflops * 1e9);
        Some(Pictures {
            tower_bytes,
            tower_s: tower_bytes as f64 / (self.rates.disk_gb_per_s * 1e9),
            each_s: each.iter().map(seconds).collect(),
            each: each.to_vec(),
        })
    }

    /// Where each unit rests.
    fn units(&self, fitted: &Fitted) -> Vec<UnitRow> {
        let tiers = self.outline.units.iter().zip(&fitted.plan.tiers);
        tiers
            .zip(&self.sizes)
            .map(|((u, tier), size)| UnitRow {
                unit: unit_name(u.kind),
                tier: match (tier, is_streamed(u.kind)) {
                    (Tier::Disk, false) => "disk, by rows",
                    (tier, _) => tier.name(),
                },
                bytes: size.read_bytes,
            })
            .collect()
    }

    fn report(&self, args: &PlanArgs) -> Result<Report> {
        let memory = self.memory;
        let one = self.fitted(1, memory)?;
        let with_cpu = |cpu| self.fitted(1, Memory { cpu, ..memory });
        let everything = smallest(&|cpu| with_cpu(cpu).is_ok_and(|f| f.plan.streamed_bytes == 0));
        let smallest_gpu = |room: GpuRoom| {
            let with = |limit| Memory {
                gpu: Some(GpuRoom { limit, ..room }),
                ..memory
            };
            // As every command runs there.
            smallest(&|limit| self.fitted_with(1, with(limit), KvPlace::Gpu).is_ok())
        };
        let element_bytes = self.dtype.bytes() as f64;
        Ok(Report {
            model: self.outline.label.clone(),
            dtype: self.outline.dtype.to_string(),
            device: self.computer.clone(),
            cpu_memory: memory.cpu,
            gpu_memory: memory.gpu.map(|g| g.limit),
            context: one.context,
            rates: self.rates.clone(),
            busy: self.lost,
            prefetch_depth: one.plan.depth,
            slots: one.plan.slots,
            slot_bytes: one.plan.slot_bytes,
            ring_bytes: one.plan.ring().bytes(),
            pinned_bytes: one.pinned_bytes(&self.sizes),
            resident_cpu_bytes: one.plan.resident_bytes,
            resident_gpu_bytes: one.plan.gpu.map_or(0, |g| g.resident_bytes),
            disk_bytes_per_pass: one.plan.streamed_bytes,
            process_bytes: one.charges.base,
            activation_bytes: one.charges.scratch + one.charges.logits,
            pass_tokens: one.pass_tokens,
            units: self.units(&one),
            rows: args.sequences.iter().filter_map(|n| self.row(*n)).collect(),
            tokens_that_hide_the_disk: rows_that_hide_the_disk(
                &self.sizes,
                &one.plan,
                &self.rates,
                element_bytes,
                1 << 20,
            ),
            smallest_cpu_memory: smallest(&|cpu| with_cpu(cpu).is_ok()),
            smallest_gpu_memory: memory.gpu.map(smallest_gpu),
            cpu_memory_for_everything: (everything < MOST_MEMORY).then_some(everything),
            more_memory: self.more_memory(everything),
            pack_bytes: self.outline.pack_bytes,
            disk_free_bytes: free_for_pack(&args.source.offload_folder),
            pictures: self.pictures(),
        })
    }
}

/// The smallest budget, to a MiB, that is `enough`, given that more is never worse.
fn smallest(enough: &dyn Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (0u64, MOST_MEMORY);
    while high - low > 1 << 20 {
        let middle = low + (high - low) / 2;
        match enough(middle) {
            true => high = middle,
            false => low = middle,
        }
    }
    high
}
