//! `plan`: what goes where under a budget, and how fast that will be, without loading anything.

use clap::Args;
use serde::Serialize;

use super::gpu::check_device;
use super::machine::{placement, reading};
use super::model::{open_checkpoint, pack_options};
use super::options::{MachineOptions, SourceOptions};
use crate::device::Device;
use crate::engine::{
    DEFAULT_PASS_TOKENS, EngineOptions, Fitted, GpuRoom, HostMemory, PictureCost, fit_on, kv_dtype,
    picture_costs,
};
use crate::error::{Code, Error, Result};
use crate::model::kv::{BLOCK_TOKENS, block_bytes};
use crate::paging::{
    ComputeRates, DiskRates, KeptCompute, MachineRates, PassCost, PassWork, SlotLayout, Tier,
    UnitSize, best_concurrency, is_streamed, is_vision, predict, rows_that_hide_the_disk,
};
use crate::spec::UnitKind;
use crate::store::{Outline, free_for_pack, outline};
use crate::text::Tokenizer;
use crate::units::{Dtype, flag_size, human_bytes};

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
    /// The disk's direct reading rate, 10^9 bytes a second [default: measured, and kept]
    #[arg(long, value_name = "RATE", help_heading = "Rates")]
    disk_gb_per_s: Option<f64>,
    /// Weights a product of one row reads, 10^9 bytes a second [default: measured, and kept]
    #[arg(long, value_name = "RATE", help_heading = "Rates")]
    memory_gb_per_s: Option<f64>,
    /// 10^9 floating point operations a second of a product of many rows [default: measured, and kept]
    #[arg(long, value_name = "RATE", help_heading = "Rates")]
    cpu_gflops: Option<f64>,
    /// Host memory to the GPU, 10^9 bytes a second (with --gpu-memory) [default: what a run measured, and kept]
    #[arg(long, value_name = "RATE", help_heading = "Rates")]
    h2d_gb_per_s: Option<f64>,
    /// Weights the GPU reads from its own memory, 10^9 bytes a second (with --gpu-memory)
    #[arg(long, value_name = "RATE", help_heading = "Rates")]
    gpu_gb_per_s: Option<f64>,
    /// The GPU's 10^9 floating point operations a second (with --gpu-memory)
    #[arg(long, value_name = "RATE", help_heading = "Rates")]
    gpu_gflops: Option<f64>,
    /// One JSON object instead of the table
    #[arg(long)]
    json: bool,
}

/// More than any machine has: what needs more than this needs something else.
const MOST_MEMORY: u64 = 1 << 46;
/// What a driver's context, kernels and slack take of a GPU's memory.
const GPU_BASE_BYTES: u64 = 700 << 20;

/// One queue length.
#[derive(Serialize)]
struct Row {
    sequences: usize,
    /// Run at once: the number with the most tokens a second.
    at_once: usize,
    kv_bytes: u64,
    kv_tokens: usize,
    cpu_bytes_per_pass: u64,
    disk_bytes_per_pass: u64,
    /// To the GPU.
    copied_bytes_per_pass: u64,
    pass_s: f64,
    bound_s: f64,
    compute_s: f64,
    tokens_per_s: f64,
}

/// What more memory would bring one sequence.
#[derive(Serialize)]
struct Gain {
    cpu_memory: u64,
    disk_bytes_per_pass: u64,
    pass_s: f64,
    tokens_per_s: f64,
}

#[derive(Serialize)]
struct UnitRow {
    unit: String,
    tier: &'static str,
    bytes: u64,
}

#[derive(Serialize)]
struct Report {
    model: String,
    dtype: String,
    cpu_memory: u64,
    gpu_memory: Option<u64>,
    context: usize,
    rates: MachineRates,
    prefetch_depth: usize,
    slots: usize,
    slot_bytes: u64,
    resident_cpu_bytes: u64,
    resident_gpu_bytes: u64,
    disk_bytes_per_pass: u64,
    process_bytes: u64,
    activation_bytes: u64,
    pass_tokens: usize,
    /// Units as placed for one sequence.
    units: Vec<UnitRow>,
    rows: Vec<Row>,
    /// Tokens a pass from which on computing takes longer than the disk.
    tokens_that_hide_the_disk: Option<usize>,
    /// For one sequence.
    smallest_cpu_memory: u64,
    /// None where the placement asked for leaves some on disk whatever it is given.
    cpu_memory_for_everything: Option<u64>,
    more_memory: Vec<Gain>,
    /// What packing would still write, and what is free there.
    pack_bytes: u64,
    disk_free_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pictures: Option<Pictures>,
}

/// What looking at pictures costs, where the model can.
#[derive(Serialize)]
struct Pictures {
    /// The vision tower, streamed once for all pictures that are looked at together; decoder passes never touch it.
    tower_bytes: u64,
    tower_s: f64,
    /// What one more of each takes.
    each: Vec<PictureCost>,
    /// Seconds of computing, at the rate of a product of many rows.
    each_s: Vec<f64>,
}

/// A model under a machine's rates, ready to be asked.
struct Planned {
    outline: Outline,
    sizes: Vec<UnitSize>,
    dtype: Dtype,
    rates: MachineRates,
    host: HostMemory,
    gpu: Option<GpuRoom>,
    options: EngineOptions,
}

pub fn run(args: PlanArgs) -> Result<u8> {
    check_device(&args.machine.device)?;
    if args.machine.device.starts_with("cuda") {
        return Err(Error::new(
            Code::Unsupported,
            "plan does not know GPUs yet",
            "it predicts what the CPU would do",
            "leave --device out; `run --device cuda` refuses a --gpu-memory that is too small, with the smallest that would do",
        ));
    }
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

fn usage(flag: &str, value: f64, why: &str) -> Error {
    Error::new(
        Code::Usage,
        format!("{flag} {value} makes no sense"),
        why,
        format!("give {flag} a value in that range"),
    )
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
        let reading = reading(
            &args.machine,
            &outline.dir,
            outline.ready && !outline.in_place,
        );
        let page_bytes = reading.page_bytes;
        let gpu = args.machine.gpu_budget()?.map(|limit| GpuRoom {
            limit,
            base: GPU_BASE_BYTES,
        });
        let size: fn(&SlotLayout) -> UnitSize = match gpu {
            Some(_) => UnitSize::on_gpu,
            None => UnitSize::of,
        };
        let sizes = outline
            .units
            .iter()
            .map(|u| size(&SlotLayout::new(u, &outline.file_bytes, page_bytes)))
            .collect();
        // What a run holds before it plans: the tokenizer and the checksums.
        let tokenizer = Tokenizer::load(&outline.text_dir).ok();
        let mut host = HostMemory::read();
        host.resident += outline.opening_bytes();
        drop(tokenizer);
        let kinds: Vec<UnitKind> = outline.units.iter().map(|u| u.kind).collect();
        let dtype = kv_dtype(&outline.units);
        let rates = rates(args, &outline, dtype)?;
        Ok(Planned {
            options: EngineOptions {
                // The default is fixed now: measuring must not shrink it.
                cpu_memory: Some(
                    args.machine
                        .cpu_budget()?
                        .unwrap_or_else(|| host.default_budget()),
                ),
                placement: placement(&args.machine.device_map, &kinds)?,
                prefetch_depth: Some(reading.prefetch_depth),
                page_bytes: Some(page_bytes),
                threads: args.machine.threads,
                context: args.machine.context.unwrap_or(2048),
                ..EngineOptions::default()
            },
            outline,
            sizes,
            dtype,
            rates,
            host,
            gpu,
        })
    }

    /// `n` sequences at once under `budget`.
    fn fitted(&self, n: usize, budget: u64) -> Result<Fitted> {
        let options = EngineOptions {
            cpu_memory: Some(budget),
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
            self.gpu,
        )
    }

    fn cost(&self, n: usize, fitted: &Fitted) -> PassCost {
        let spec = &self.outline.spec;
        // A sequence that is on average half its context long is read whole by every token.
        let kv_token = self.kv_block() / BLOCK_TOKENS as u64;
        let work = PassWork {
            rows: n,
            wanted: n,
            kv_bytes: kv_token * (n * fitted.context.min(spec.max_positions) / 2) as u64,
            element_bytes: self.dtype.bytes() as f64,
        };
        predict(&self.sizes, &fitted.plan, &self.rates, &work)
    }

    fn kv_block(&self) -> u64 {
        let s = &self.outline.spec;
        block_bytes(s.layers, s.kv_heads, s.head_size, self.dtype.bytes())
    }

    fn row(&self, sequences: usize, budget: u64) -> Option<Row> {
        let (at_once, cost, fitted) = best_concurrency(sequences, &mut |n| {
            let fitted = self.fitted(n, budget).ok()?;
            Some((self.cost(n, &fitted), fitted))
        })?;
        Some(Row {
            sequences,
            at_once,
            kv_bytes: fitted.kv_blocks as u64 * self.kv_block(),
            kv_tokens: fitted.kv_blocks * BLOCK_TOKENS,
            cpu_bytes_per_pass: fitted.plan.resident_bytes,
            disk_bytes_per_pass: cost.disk_bytes,
            copied_bytes_per_pass: cost.copied_bytes,
            pass_s: cost.pass_s,
            bound_s: cost.bound_s,
            compute_s: cost.compute_s,
            tokens_per_s: at_once as f64 / cost.pass_s,
        })
    }

    /// The smallest budget, to a MiB, for which `good` holds, given that more is never worse.
    fn smallest(&self, good: impl Fn(&Fitted) -> bool) -> u64 {
        let holds = |budget: u64| self.fitted(1, budget).is_ok_and(|f| good(&f));
        let (mut low, mut high) = (0u64, MOST_MEMORY);
        while high - low > 1 << 20 {
            let middle = low + (high - low) / 2;
            match holds(middle) {
                true => high = middle,
                false => low = middle,
            }
        }
        high
    }

    fn pictures(&self) -> Option<Pictures> {
        let each = picture_costs(&self.outline.spec, self.dtype.bytes())?;
        let tower = self.sizes.iter().filter(|u| is_vision(u.kind));
        let tower_bytes = tower.map(|u| u.read_bytes).sum();
        Some(Pictures {
            tower_bytes,
            tower_s: tower_bytes as f64 / (self.rates.disk_gb_per_s * 1e9),
            each_s: each
                .iter()
                .map(|c| c.flops / (self.rates.compute.gflops * 1e9))
                .collect(),
            each: each.to_vec(),
        })
    }

    fn report(&self, args: &PlanArgs) -> Result<Report> {
        let budget = self.options.cpu_memory.unwrap_or_default();
        let one = self.fitted(1, budget)?;
        let everything = self.smallest(|f| f.plan.streamed_bytes == 0);
        let gain = |budget: u64| {
            let fitted = self.fitted(1, budget).ok()?;
            let cost = self.cost(1, &fitted);
            Some(Gain {
                cpu_memory: budget,
                disk_bytes_per_pass: cost.disk_bytes,
                pass_s: cost.pass_s,
                tokens_per_s: 1.0 / cost.pass_s,
            })
        };
        let steps: &[u64] = match everything < MOST_MEMORY {
            true => &[1, 2, 4, 8, 16, 32, 64],
            false => &[],
        };
        let more = steps
            .iter()
            .map(|gib| budget + (gib << 30))
            .take_while(|b| *b < everything)
            .chain((budget < everything && everything < MOST_MEMORY).then_some(everything));
        let units = self
            .outline
            .units
            .iter()
            .zip(&one.plan.tiers)
            .zip(&self.sizes);
        Ok(Report {
            model: self.outline.label.clone(),
            dtype: self.outline.dtype.to_string(),
            cpu_memory: budget,
            gpu_memory: self.gpu.map(|g| g.limit),
            context: one.context,
            rates: self.rates.clone(),
            prefetch_depth: one.plan.depth,
            slots: one.plan.slots,
            slot_bytes: one.plan.slot_bytes,
            resident_cpu_bytes: one.plan.resident_bytes,
            resident_gpu_bytes: one.plan.gpu.map_or(0, |g| g.resident_bytes),
            disk_bytes_per_pass: one.plan.streamed_bytes,
            process_bytes: one.charges.base,
            activation_bytes: one.charges.scratch + one.charges.logits,
            pass_tokens: one.pass_tokens,
            units: units
                .map(|((u, tier), size)| UnitRow {
                    unit: crate::paging::unit_name(u.kind),
                    tier: match (tier, is_streamed(u.kind)) {
                        (Tier::Disk, false) => "disk, by rows",
                        (tier, _) => tier.name(),
                    },
                    bytes: size.read_bytes,
                })
                .collect(),
            rows: args
                .sequences
                .iter()
                .filter_map(|n| self.row(*n, budget))
                .collect(),
            tokens_that_hide_the_disk: rows_that_hide_the_disk(
                &self.sizes,
                &one.plan,
                &self.rates,
                self.dtype.bytes() as f64,
                1 << 20,
            ),
            smallest_cpu_memory: self.smallest(|_| true),
            cpu_memory_for_everything: (everything < MOST_MEMORY).then_some(everything),
            more_memory: more.filter_map(gain).collect(),
            pack_bytes: self.outline.pack_bytes,
            disk_free_bytes: free_for_pack(&args.source.offload_folder),
            pictures: self.pictures(),
        })
    }
}

/// Rates given by hand, else those on record, else measured now.
fn rates(args: &PlanArgs, outline: &Outline, dtype: Dtype) -> Result<MachineRates> {
    for (flag, value) in [
        ("--disk-gb-per-s", args.disk_gb_per_s),
        ("--memory-gb-per-s", args.memory_gb_per_s),
        ("--cpu-gflops", args.cpu_gflops),
        ("--h2d-gb-per-s", args.h2d_gb_per_s),
        ("--gpu-gb-per-s", args.gpu_gb_per_s),
        ("--gpu-gflops", args.gpu_gflops),
    ] {
        if let Some(v) = value.filter(|v| !(*v > 0.0 && *v < 1e9)) {
            return Err(usage(flag, v, "a rate is above 0"));
        }
    }
    let disk_gb_per_s = match args.disk_gb_per_s {
        Some(rate) => rate,
        None => known_disk_rate(outline)?.ok_or_else(|| {
            Error::new(
                Code::Unsupported,
                "the disk's rate cannot be measured",
                "its file system does not read past the page cache",
                "give --disk-gb-per-s",
            )
        })?,
    };
    let by_hand = |memory_gb_per_s, gflops| ComputeRates {
        memory_gb_per_s,
        gflops,
        element_bytes: dtype.bytes() as f64,
        points: Vec::new(),
    };
    if args.machine.gpu_budget()?.is_some() {
        let measured = DiskRates::of(&outline.dir, outline.ready && !outline.in_place).h2d();
        let h2d = args.h2d_gb_per_s.or(measured);
        let (Some(h2d), Some(memory), Some(gflops)) = (h2d, args.gpu_gb_per_s, args.gpu_gflops)
        else {
            return Err(Error::new(
                Code::Usage,
                "a GPU cannot be planned for without its rates",
                "--gpu-memory is given and what the GPU does a second is not",
                "give --h2d-gb-per-s, --gpu-gb-per-s and --gpu-gflops too",
            ));
        };
        return Ok(MachineRates {
            disk_gb_per_s,
            h2d_gb_per_s: Some(h2d),
            compute: by_hand(memory, gflops),
        });
    }
    let compute = match (args.memory_gb_per_s, args.cpu_gflops) {
        (Some(memory), Some(gflops)) => by_hand(memory, gflops),
        (memory, gflops) => {
            let device = Device::cpu(args.machine.threads, None)?;
            let measured = KeptCompute::of(&device, dtype).known_or_measured(&device)?;
            match (memory, gflops) {
                (None, None) => measured,
                _ => by_hand(
                    memory.unwrap_or(measured.memory_gb_per_s),
                    gflops.unwrap_or(measured.gflops),
                ),
            }
        }
    };
    Ok(MachineRates {
        disk_gb_per_s,
        h2d_gb_per_s: None,
        compute,
    })
}

/// What runs of this model read at, else the best the disk is known to give, else that measured now.
fn known_disk_rate(outline: &Outline) -> Result<Option<f64>> {
    let rates = DiskRates::of(&outline.dir, outline.ready && !outline.in_place);
    match rates.streamed() {
        Some(rate) => Ok(Some(rate)),
        None => rates.best_or_probe(&outline.files, u64::MAX),
    }
}

fn table(r: &Report) -> String {
    let placed = |tier: &str| r.units.iter().filter(|u| u.tier == tier).count();
    let mut t = format!(
        "{} ({}), {} of memory, context {}\n\
         rates: disk {:.2} GB/s, memory {:.1} GB/s, {:.0} GFLOP/s\n\n\
         in RAM     {:>10}  {} units\n\
         from disk  {:>10}  {} units a pass\n\
         slots      {:>10}  {} of {} (prefetch depth {})\n\
         process    {:>10}, activations {} for passes of {} tokens\n\n",
        r.model,
        r.dtype,
        flag_size(r.cpu_memory),
        r.context,
        r.rates.disk_gb_per_s,
        r.rates.compute.memory_gb_per_s,
        r.rates.compute.gflops,
        human_bytes(r.resident_cpu_bytes),
        placed("cpu"),
        human_bytes(r.disk_bytes_per_pass),
        placed("disk"),
        human_bytes(r.slots as u64 * r.slot_bytes),
        r.slots,
        human_bytes(r.slot_bytes),
        r.prefetch_depth,
        human_bytes(r.process_bytes),
        human_bytes(r.activation_bytes),
        r.pass_tokens,
    );
    if let Some(limit) = r.gpu_memory {
        t += &format!(
            "on the GPU {:>10}  {} units of the {} given; {} copied to it a pass\n\n",
            human_bytes(r.resident_gpu_bytes),
            placed("gpu"),
            flag_size(limit),
            human_bytes(r.rows.first().map_or(0, |row| row.copied_bytes_per_pass)),
        );
    }
    t += "sequences  at once    KV room    from RAM   from disk  s a pass  tokens/s\n";
    for row in &r.rows {
        t += &format!(
            "{:>9}  {:>7}  {:>9}  {:>10}  {:>10}  {:>8.3}  {:>8.2}\n",
            row.sequences,
            row.at_once,
            human_bytes(row.kv_bytes),
            human_bytes(row.cpu_bytes_per_pass),
            human_bytes(row.disk_bytes_per_pass),
            row.pass_s,
            row.tokens_per_s
        );
    }
    t += &match (r.disk_bytes_per_pass, r.tokens_that_hide_the_disk) {
        (0, _) => "\nnothing comes from disk\n".to_string(),
        (_, Some(n)) => format!("\nthe disk is hidden from {n} tokens a pass on\n"),
        (_, None) => "\nno number of tokens hides the disk\n".to_string(),
    };
    t += &format!(
        "smallest --cpu-memory {}; {}\n",
        flag_size(r.smallest_cpu_memory),
        match r.cpu_memory_for_everything {
            Some(bytes) => format!("nothing from disk from {} on", flag_size(bytes)),
            None => "the placement asked for leaves some on disk".into(),
        }
    );
    if let Some(now) = r.rows.first().filter(|row| row.sequences == 1) {
        for g in &r.more_memory {
            t += &format!(
                "with {} more: {} from disk, {:.3} s a pass, {:.2} tokens/s ({:+.0} %)\n",
                flag_size(g.cpu_memory - r.cpu_memory),
                human_bytes(g.disk_bytes_per_pass),
                g.pass_s,
                g.tokens_per_s,
                100.0 * (g.tokens_per_s / now.tokens_per_s - 1.0)
            );
        }
    }
    if let Some(p) = &r.pictures {
        t += &format!(
            "pictures: the tower's {} once for all that are looked at together ({:.2} s), never by a pass over text\n",
            human_bytes(p.tower_bytes),
            p.tower_s
        );
        for (c, s) in p.each.iter().zip(&p.each_s) {
            t += &format!(
                "{:>22} more ({} pixels): {} tokens, {} of KV, {} while it is looked at, {s:.1} s of computing\n",
                c.what,
                c.pixels,
                c.tokens,
                human_bytes(c.kv_bytes),
                human_bytes(c.memory_bytes)
            );
        }
    }
    let free = r
        .disk_free_bytes
        .map_or("an unknown amount".into(), human_bytes);
    t + &match r.pack_bytes {
        0 => "no disk space needed\n".to_string(),
        bytes => format!(
            "packing takes {} of disk space, {free} are free\n",
            human_bytes(bytes)
        ),
    }
}
