//! Options shared by every command that runs a model, read once and checked before anything is opened.

use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};

use crate::error::Result;
use crate::text::{GenerationConfig, SamplingParams};
use crate::units::parse_size;

/// A size flag: `8GiB`, `512MiB`, `25.6k`.
pub fn size(text: &str) -> std::result::Result<u64, String> {
    parse_size(text).map_err(|e| format!("{}; {}", e.cause(), e.fix()))
}

/// `auto` or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrAuto<T> {
    Auto,
    Is(T),
}

impl<T: Copy> OrAuto<T> {
    pub fn or(self, default: T) -> T {
        match self {
            OrAuto::Auto => default,
            OrAuto::Is(t) => t,
        }
    }

    /// What was given.
    pub fn given(self) -> Option<T> {
        match self {
            OrAuto::Auto => None,
            OrAuto::Is(t) => Some(t),
        }
    }
}

fn size_or_auto(text: &str) -> std::result::Result<OrAuto<u64>, String> {
    match text {
        "auto" => Ok(OrAuto::Auto),
        _ => size(text).map(OrAuto::Is),
    }
}

fn page_or_auto(text: &str) -> std::result::Result<OrAuto<u64>, String> {
    let page = size_or_auto(text)?;
    match page {
        OrAuto::Is(b) if !b.is_power_of_two() || !(64 << 10..=1 << 30).contains(&b) => {
            Err("a page is a power of two from 64KiB to 1GiB".into())
        }
        _ => Ok(page),
    }
}

fn count_or_auto(text: &str) -> std::result::Result<OrAuto<usize>, String> {
    match text {
        "auto" => Ok(OrAuto::Auto),
        _ => text
            .parse()
            .ok()
            .filter(|n| *n <= MOST_READ_AHEAD)
            .map(OrAuto::Is)
            .ok_or_else(|| format!("give a number up to {MOST_READ_AHEAD} or `auto`")),
    }
}

/// Frames of a ring: at least two, one to fill and one to copy from.
pub fn ring(text: &str) -> std::result::Result<OrAuto<usize>, String> {
    match count_or_auto(text) {
        Ok(OrAuto::Is(0 | 1)) | Err(_) => Err(format!(
            "give a number from 2 to {MOST_READ_AHEAD} or `auto`"
        )),
        given => given,
    }
}

/// Beyond any drive's queue and any model's units: a larger number is a slip of the finger.
const MOST_READ_AHEAD: usize = 1 << 16;
/// Each thread has a stack and scratch of its own.
const MOST_THREADS: usize = 1024;

pub fn threads(text: &str) -> std::result::Result<usize, String> {
    up_to(MOST_THREADS, text)
}

/// A number from 1 to `most`.
pub fn up_to(most: usize, text: &str) -> std::result::Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=most).contains(n))
        .ok_or_else(|| format!("give a number from 1 to {most}"))
}

pub fn at_least_one(text: &str) -> std::result::Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| *n > 0)
        .ok_or_else(|| "give a number from 1".to_string())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IoArg {
    Auto,
    #[value(name = "io_uring", alias = "uring")]
    IoUring,
    Threads,
    Mmap,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VerifyArg {
    Always,
    First,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum GemmArg {
    Own,
    #[value(name = "cublaslt")]
    CublasLt,
}

/// For commands that look at packs and at no model.
#[derive(Args, Clone, Debug)]
pub struct KeptIn {
    /// Where packed weights are kept
    #[arg(
        long,
        value_name = "DIR",
        default_value = "./offload_folder",
        env = "TENSORPAGER_OFFLOAD_FOLDER"
    )]
    pub offload_folder: PathBuf,
}

/// Where the weights come from and where they are kept.
#[derive(Args, Clone, Debug)]
pub struct SourceOptions {
    /// A folder as the hub delivers it, a packed folder, accelerate's offload folder, or a hub id (org/name, downloaded if need be)
    pub model: String,
    /// Where packed weights are kept
    #[arg(
        long,
        value_name = "DIR",
        default_value = "./offload_folder",
        env = "TENSORPAGER_OFFLOAD_FOLDER",
        help_heading = "Weights"
    )]
    pub offload_folder: PathBuf,
    /// Stream from the checkpoint's own files: no second copy
    #[arg(long, env = "TENSORPAGER_IN_PLACE", value_parser = BoolishValueParser::new(), help_heading = "Weights")]
    pub in_place: bool,
    /// auto, float16, bfloat16, float32, or a FILE.json of module → type
    #[arg(
        long,
        value_name = "TYPE",
        default_value = "auto",
        env = "TENSORPAGER_DTYPE",
        help_heading = "Weights"
    )]
    pub dtype: String,
    /// Pack even where float16 cannot hold some bfloat16 values (they become infinite)
    #[arg(long, help_heading = "Weights")]
    pub allow_overflow: bool,
    /// config.json and tokenizer for an accelerate folder that lacks them
    #[arg(
        long,
        value_name = "DIR",
        env = "TENSORPAGER_CONFIG_FROM",
        help_heading = "Weights"
    )]
    pub config_from: Option<PathBuf>,
    /// Let an accelerate index name files outside its folder
    #[arg(long, help_heading = "Weights")]
    pub allow_external: bool,
    /// Remove the packs unused for longest until the offload folder is below SIZE
    #[arg(long, value_name = "SIZE", value_parser = size, env = "TENSORPAGER_OFFLOAD_LIMIT", help_heading = "Weights")]
    pub offload_limit: Option<u64>,
}

/// What the run may take and how it reads.
#[derive(Args, Clone, Debug)]
pub struct MachineOptions {
    /// auto, cpu, cuda or cuda:N
    #[arg(
        long,
        default_value = "auto",
        env = "TENSORPAGER_DEVICE",
        help_heading = "Machine"
    )]
    pub device: String,
    /// auto, gpu, cpu, disk, or a FILE.json of module → tier
    #[arg(
        long,
        value_name = "MAP",
        default_value = "auto",
        env = "TENSORPAGER_DEVICE_MAP",
        help_heading = "Machine"
    )]
    pub device_map: String,
    /// Bound on this process's peak memory [default: 90 % of what is free]
    #[arg(long, value_name = "SIZE", value_parser = size, env = "TENSORPAGER_CPU_MEMORY", help_heading = "Machine")]
    pub cpu_memory: Option<u64>,
    /// Bound on this process's GPU memory, the driver's context included [default: 90 % of what is free]
    #[arg(long, value_name = "SIZE", value_parser = size, env = "TENSORPAGER_GPU_MEMORY", help_heading = "Machine")]
    pub gpu_memory: Option<u64>,
    /// Host memory pinned for the GPU at most: frames, keys and values, then weights; others go through the frames [default: half of it]
    #[arg(long, value_name = "SIZE", value_parser = size, env = "TENSORPAGER_PINNED_MEMORY", help_heading = "Machine")]
    pub pinned_memory: Option<u64>,
    /// Whose matrix products on a GPU; cublaslt is there to compare with, and its results depend on what else is in the pass
    #[arg(
        long,
        value_enum,
        default_value = "own",
        env = "TENSORPAGER_GEMM",
        help_heading = "Machine"
    )]
    pub gemm: GemmArg,
    /// 0=8GiB,cpu=16GiB: the same as --gpu-memory and --cpu-memory
    #[arg(
        long,
        value_name = "MAP",
        env = "TENSORPAGER_MAX_MEMORY",
        help_heading = "Machine"
    )]
    pub max_memory: Option<String>,
    /// Units that may be read ahead of the one computing
    #[arg(long, value_name = "N", value_parser = count_or_auto, default_value = "auto", env = "TENSORPAGER_PREFETCH_DEPTH", help_heading = "Machine")]
    pub prefetch_depth: OrAuto<usize>,
    /// Bytes a read: a power of two from 64KiB
    #[arg(long, value_name = "SIZE", value_parser = page_or_auto, default_value = "auto", env = "TENSORPAGER_PAGE_SIZE", help_heading = "Machine")]
    pub page_size: OrAuto<u64>,
    /// Reads in flight
    #[arg(long, value_name = "N", value_parser = count_or_auto, default_value = "auto", env = "TENSORPAGER_QUEUE_DEPTH", help_heading = "Machine")]
    pub queue_depth: OrAuto<usize>,
    /// Pinned frames, a page each, between disk and GPU [default: as many as 256 MiB hold]
    #[arg(long, value_name = "N", value_parser = ring, default_value = "auto", env = "TENSORPAGER_RING_SIZE", help_heading = "Machine")]
    pub ring_size: OrAuto<usize>,
    /// How files are read
    #[arg(
        long,
        value_enum,
        default_value = "auto",
        env = "TENSORPAGER_IO",
        help_heading = "Machine"
    )]
    pub io: IoArg,
    /// Read with the defaults, whatever `tune` found on this machine
    #[arg(long, env = "TENSORPAGER_NO_TUNE", value_parser = BoolishValueParser::new(), help_heading = "Machine")]
    pub no_tune: bool,
    /// Compare every byte read with its checksum: always, on first read, never
    #[arg(
        long,
        value_enum,
        default_value = "always",
        env = "TENSORPAGER_VERIFY",
        help_heading = "Machine"
    )]
    pub verify: VerifyArg,
    /// Computing threads [default: one a core]
    #[arg(long, value_name = "N", value_parser = threads, env = "TENSORPAGER_THREADS", help_heading = "Machine")]
    pub threads: Option<usize>,
    /// Longest sequence, prompt and answer together
    #[arg(long, value_name = "N", value_parser = at_least_one, env = "TENSORPAGER_CONTEXT", help_heading = "Machine")]
    pub context: Option<usize>,
    /// Write what happened when, unit by unit, for Perfetto or chrome://tracing
    #[arg(long, value_name = "FILE.json", help_heading = "Machine")]
    pub trace: Option<PathBuf>,
    /// Write one page about the run, readable offline: passes over time, waits by unit, tiers, the tuning curve
    #[arg(long, value_name = "FILE.html", help_heading = "Machine")]
    pub report: Option<PathBuf>,
}

/// How tokens are chosen and when to stop. What is not given comes from the model's generation_config.json.
#[derive(Args, Clone, Debug)]
pub struct SamplingOptions {
    /// Most tokens to generate
    #[arg(long, short = 'n', value_name = "N", value_parser = at_least_one, env = "TENSORPAGER_MAX_TOKENS", help_heading = "Sampling")]
    pub max_tokens: Option<usize>,
    /// Always take the likeliest token
    #[arg(long, env = "TENSORPAGER_GREEDY", value_parser = BoolishValueParser::new(), help_heading = "Sampling")]
    pub greedy: bool,
    /// 0 is greedy; higher is more random
    #[arg(
        long,
        value_name = "T",
        env = "TENSORPAGER_TEMPERATURE",
        help_heading = "Sampling"
    )]
    pub temperature: Option<f32>,
    /// Sample among the K likeliest tokens
    #[arg(
        long,
        value_name = "K",
        env = "TENSORPAGER_TOP_K",
        help_heading = "Sampling"
    )]
    pub top_k: Option<usize>,
    /// Sample among the likeliest tokens that make up P of the probability
    #[arg(
        long,
        value_name = "P",
        env = "TENSORPAGER_TOP_P",
        help_heading = "Sampling"
    )]
    pub top_p: Option<f32>,
    /// Leave out tokens less likely than P times the likeliest
    #[arg(
        long,
        value_name = "P",
        env = "TENSORPAGER_MIN_P",
        help_heading = "Sampling"
    )]
    pub min_p: Option<f32>,
    /// Above 1: tokens that were there before become less likely
    #[arg(
        long,
        value_name = "X",
        env = "TENSORPAGER_REPETITION_PENALTY",
        help_heading = "Sampling"
    )]
    pub repetition_penalty: Option<f32>,
    /// The same seed gives the same text [default: 0]
    #[arg(
        long,
        value_name = "N",
        env = "TENSORPAGER_SEED",
        help_heading = "Sampling"
    )]
    pub seed: Option<u64>,
    /// Stop before this text appears (may be given more than once)
    #[arg(long, value_name = "TEXT", help_heading = "Sampling")]
    pub stop: Vec<String>,
    /// Go on past the end-of-text token
    #[arg(long, env = "TENSORPAGER_IGNORE_EOS", value_parser = BoolishValueParser::new(), help_heading = "Sampling")]
    pub ignore_eos: bool,
}

impl SamplingOptions {
    /// The model's recommendation, with what the user says laid over it. A sampling flag without a temperature means that
    /// the user wants to sample.
    pub fn over(&self, generation: &GenerationConfig) -> Result<SamplingParams> {
        let mut params = generation.sampling();
        if params.is_greedy()
            && (self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some())
        {
            params.temperature = 1.0;
        }
        if let Some(t) = self.temperature {
            params.temperature = t;
        }
        if let Some(k) = self.top_k {
            params.top_k = k;
        }
        if let Some(p) = self.top_p {
            params.top_p = p;
        }
        if let Some(p) = self.min_p {
            params.min_p = p;
        }
        if let Some(r) = self.repetition_penalty {
            params.repetition_penalty = r;
        }
        if self.greedy {
            params.temperature = 0.0;
        }
        params.seed = self.seed.unwrap_or(0);
        params.validate()?;
        Ok(params)
    }
}
