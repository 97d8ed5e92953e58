//! What `plan` answers, as JSON and as a table.

use std::fmt::Write;

use serde::Serialize;

use crate::cli::rates::busy_told;
use crate::engine::PictureCost;
use crate::paging::MachineRates;
use crate::units::{flag_size, human_bytes};

/// One queue length.
#[derive(Serialize)]
pub(super) struct Row {
    pub sequences: usize,
    /// Run at once: the number with the most tokens a second.
    pub at_once: usize,
    pub kv_bytes: u64,
    pub kv_tokens: usize,
    /// Where keys and values lie: `gpu` or `cpu`.
    pub kv_tier: &'static str,
    pub cpu_bytes_per_pass: u64,
    pub disk_bytes_per_pass: u64,
    /// Weights, and keys and values, to the GPU; and the latter back.
    pub copied_bytes_per_pass: u64,
    pub copied_back_bytes_per_pass: u64,
    pub pass_s: f64,
    pub bound_s: f64,
    pub compute_s: f64,
    pub tokens_per_s: f64,
}

/// What more memory would bring one sequence.
#[derive(Serialize)]
pub(super) struct Gain {
    pub cpu_memory: u64,
    pub disk_bytes_per_pass: u64,
    pub pass_s: f64,
    pub tokens_per_s: f64,
}

#[derive(Serialize)]
pub(super) struct UnitRow {
    pub unit: String,
    pub tier: &'static str,
    pub bytes: u64,
}

#[derive(Serialize)]
pub(super) struct Report {
    pub model: String,
    pub dtype: String,
    pub device: String,
    pub cpu_memory: u64,
    pub gpu_memory: Option<u64>,
    pub context: usize,
    pub rates: MachineRates,
    /// The part of the time that products waited for a core while they were measured for `rates`, where they were not kept for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub busy: Option<f64>,
    pub prefetch_depth: usize,
    pub slots: usize,
    pub slot_bytes: u64,
    /// Pinned host memory between disk and GPU.
    pub ring_bytes: u64,
    /// Of host memory for one sequence: the ring, keys and values that lie there, and units copied as they lie.
    pub pinned_bytes: u64,
    pub resident_cpu_bytes: u64,
    pub resident_gpu_bytes: u64,
    pub disk_bytes_per_pass: u64,
    pub process_bytes: u64,
    pub activation_bytes: u64,
    pub pass_tokens: usize,
    /// Units as placed for one sequence.
    pub units: Vec<UnitRow>,
    pub rows: Vec<Row>,
    /// Tokens a pass from which on computing takes longer than the disk.
    pub tokens_that_hide_the_disk: Option<usize>,
    /// For one sequence.
    pub smallest_cpu_memory: u64,
    pub smallest_gpu_memory: Option<u64>,
    /// None where the placement asked for leaves some on disk whatever it is given.
    pub cpu_memory_for_everything: Option<u64>,
    pub more_memory: Vec<Gain>,
    /// What packing would still write, and what is free there.
    pub pack_bytes: u64,
    pub disk_free_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pictures: Option<Pictures>,
}

/// What looking at pictures costs, where the model can.
#[derive(Serialize)]
pub(super) struct Pictures {
    /// The vision tower, streamed once for all pictures that are looked at together; decoder passes never touch it.
    pub tower_bytes: u64,
    pub tower_s: f64,
    /// What one more of each takes.
    pub each: Vec<PictureCost>,
    /// Seconds of computing, at the rate of a product of many rows.
    pub each_s: Vec<f64>,
}

/// For people.
pub(super) fn table(r: &Report) -> String {
    let mut t = placement(r);
    t += &r.busy.map(busy_told).unwrap_or_default();
    t += &queues(r);
    t += &memory(r);
    if let Some(p) = &r.pictures {
        t += &pictures(p);
    }
    t + &disk_space(r)
}

fn rates(r: &Report) -> String {
    let (disk, compute) = (r.rates.disk_gb_per_s, &r.rates.compute);
    match r.rates.h2d_gb_per_s {
        None => format!(
            "disk {disk:.2} GB/s, memory {:.1} GB/s, {:.0} GFLOP/s",
            compute.memory_gb_per_s, compute.gflops
        ),
        Some(h2d) => format!(
            "disk {disk:.2} GB/s, copies to the GPU {h2d:.1} GB/s, its memory {:.1} GB/s, {:.0} GFLOP/s",
            compute.memory_gb_per_s, compute.gflops
        ),
    }
}

fn placement(r: &Report) -> String {
    let placed = |tier: &str| r.units.iter().filter(|u| u.tier == tier).count();
    let gpu = match r.gpu_memory {
        None => String::new(),
        Some(limit) => format!(", {} of {}", flag_size(limit), r.device),
    };
    let mut t = format!(
        "{} ({}), {} of memory{gpu}, context {}\n\
         rates: {}\n\n\
         in RAM     {:>10}  {} units\n\
         from disk  {:>10}  {} units a pass\n\
         slots      {:>10}  {} of {} (prefetch depth {})\n\
         process    {:>10}, activations {} for passes of {} tokens\n\n",
        r.model,
        r.dtype,
        flag_size(r.cpu_memory),
        r.context,
        rates(r),
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
        let copied = r.rows.first().map_or(0, |row| row.copied_bytes_per_pass);
        let _ = writeln!(
            t,
            "on the GPU {:>10}  {} units of the {} given; {} copied to it a pass, through {} of pinned frames\n",
            human_bytes(r.resident_gpu_bytes),
            placed("gpu"),
            flag_size(limit),
            human_bytes(copied),
            human_bytes(r.ring_bytes),
        );
    }
    t
}

fn queues(r: &Report) -> String {
    let mut t =
        String::from("sequences  at once    KV room    from RAM   from disk  s a pass  tokens/s\n");
    let moved = |row: &Row| r.gpu_memory.is_some() && row.kv_tier == "cpu";
    for row in &r.rows {
        let _ = writeln!(
            t,
            "{:>9}  {:>7}  {:>9}  {:>10}  {:>10}  {:>8.3}  {:>8.2}{}",
            row.sequences,
            row.at_once,
            human_bytes(row.kv_bytes),
            human_bytes(row.cpu_bytes_per_pass),
            human_bytes(row.disk_bytes_per_pass),
            row.pass_s,
            row.tokens_per_s,
            if moved(row) { "  KV in RAM" } else { "" }
        );
    }
    if let Some(row) = r.rows.iter().find(|row| moved(row)) {
        let _ = writeln!(
            t,
            "KV in RAM: with `batch --kv-memory {}` or more, copied to the GPU layer by layer",
            flag_size(row.kv_bytes)
        );
    }
    t + &match (r.disk_bytes_per_pass, r.tokens_that_hide_the_disk) {
        (0, _) => "\nnothing comes from disk\n".to_string(),
        (_, Some(n)) => format!("\nthe disk is hidden from {n} tokens a pass on\n"),
        (_, None) => "\nno number of tokens hides the disk\n".to_string(),
    }
}

fn memory(r: &Report) -> String {
    let mut t = format!(
        "smallest --cpu-memory {}{}; {}\n",
        flag_size(r.smallest_cpu_memory),
        r.smallest_gpu_memory.map_or(String::new(), |bytes| {
            format!(", --gpu-memory {}", flag_size(bytes))
        }),
        match r.cpu_memory_for_everything {
            Some(bytes) => format!("nothing from disk from {} on", flag_size(bytes)),
            None => "the placement asked for leaves some on disk".into(),
        }
    );
    if let Some(now) = r.rows.first().filter(|row| row.sequences == 1) {
        for g in &r.more_memory {
            let _ = writeln!(
                t,
                "with {} more: {} from disk, {:.3} s a pass, {:.2} tokens/s ({:+.0} %)",
                flag_size(g.cpu_memory - r.cpu_memory),
                human_bytes(g.disk_bytes_per_pass),
                g.pass_s,
                g.tokens_per_s,
                100.0 * (g.tokens_per_s / now.tokens_per_s - 1.0)
            );
        }
    }
    t
}

fn pictures(p: &Pictures) -> String {
    let mut t = format!(
        "pictures: the tower's {} once for all that are looked at together ({:.2} s), never by a pass over text\n",
        human_bytes(p.tower_bytes),
        p.tower_s
    );
    for (c, s) in p.each.iter().zip(&p.each_s) {
        let _ = writeln!(
            t,
            "{:>22} more ({} pixels): {} tokens, {} of KV, {} while it is looked at, {s:.1} s of computing",
            c.what,
            c.pixels,
            c.tokens,
            human_bytes(c.kv_bytes),
            human_bytes(c.memory_bytes)
        );
    }
    t
}

fn disk_space(r: &Report) -> String {
    let free = r
        .disk_free_bytes
        .map_or("an unknown amount".into(), human_bytes);
    match r.pack_bytes {
        0 => "no disk space needed\n".to_string(),
        bytes => format!(
            "packing takes {} of disk space, {free} are free\n",
            human_bytes(bytes)
        ),
    }
}
