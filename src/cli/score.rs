//! `score`: log-likelihoods of given tokens, and their logits.

use std::cell::OnceCell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::advice::{self, Ran, Work};
use super::found::Found;
use super::media::{LookOptions, Renderer};
use super::model::OpenFor;
use super::options::{MachineOptions, SourceOptions};
use super::signals;
use crate::engine::{ScoreBlock, ScoreInput, VisionRoom};
use crate::error::{Code, Error, Result};
use crate::report::summary::PagingReport;
use crate::text::{ChatTemplate, Message, Tokenizer};
use crate::units::human_bytes;

/// Tokens of pictures kept at once where there are more: a few dozen images.
const WAVE_TOKENS: usize = 16384;
/// Rows scored a pass: wide enough for the arithmetic, small enough that their logits by blocks stay a few megabytes.
const SCORE_ROWS: usize = 512;

#[derive(Args)]
#[command(after_help = "Example:
  echo '{\"input_ids\": [40, 1079, 264]}' | tensorpager score ./model --input - --output logits.safetensors")]
pub struct ScoreArgs {
    #[command(flatten)]
    source: SourceOptions,
    /// JSONL: {"input_ids": [...]} or {"messages": [...]} a line; - is standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    input: PathBuf,
    /// Also write logits.N (f32, [tokens, vocab]) and input_ids.N (i32)
    #[arg(long, value_name = "FILE.safetensors")]
    output: Option<PathBuf>,
    #[command(flatten)]
    look: LookOptions,
    #[command(flatten)]
    machine: MachineOptions,
    /// Nothing on stderr but errors
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    input_ids: Option<Vec<u32>>,
    messages: Option<Vec<Message>>,
    /// Carried by job files; accepted, not needed.
    #[allow(dead_code)]
    custom_id: Option<String>,
}

/// One line of output.
#[derive(Serialize)]
struct Scored<'a> {
    index: usize,
    tokens: usize,
    /// Natural logarithm of the probability of all tokens but the first, given those before.
    log_likelihood: f64,
    /// exp(−log_likelihood / (tokens − 1)); null for a single token.
    perplexity: Option<f64>,
    /// One a token from the second on.
    token_logprobs: &'a [f64],
}

pub fn run(args: ScoreArgs) -> Result<u8> {
    args.machine.check()?;
    // Before Ctrl-C is heeded by us: they may come from a pipe that nobody writes to.
    let lines = read_lines(&args.input)?;
    let cancel = signals::cancel_flag()?;
    let found = Found::open(&args.source, &cancel, args.quiet)?;
    let inputs = read_inputs(&args, &found, lines)?;
    let longest = inputs.iter().map(|i| i.tokens.len()).max().unwrap_or(0);
    if longest == 0 {
        return Err(Error::new(
            Code::Usage,
            "there is nothing to score",
            match args.input == Path::new("-") {
                true => "standard input has no inputs".to_string(),
                false => format!("{} has no inputs", args.input.display()),
            },
            "give lines like {\"input_ids\": [1, 2, 3]}",
        ));
    }
    let open_for = OpenFor {
        context: args.machine.context.unwrap_or(longest.max(2)),
        prompt_tokens: SCORE_ROWS,
        logits_rows: SCORE_ROWS,
        kv_tokens: Some(longest.max(2) + SCORE_ROWS + 16 * SCORE_ROWS.min(inputs.len())),
        keep_logits: false,
        vision: vision_room(&inputs),
        ..OpenFor::default()
    };
    found.expect_room(&args.machine, &open_for, args.quiet)?;
    if let Some(path) = &args.output {
        expect_space(path, &inputs, found.spec().vocab)?;
    }
    let budget = args.machine.cpu_budget()?;
    let model = found.prepare(budget, &args.source, &cancel, args.quiet)?;
    let advisor = model.advisor(&args.machine, &open_for)?;
    let mut engine = model.engine(&args.machine, &open_for, &cancel, args.quiet)?;
    let vocab = engine.spec().vocab;
    let file = match &args.output {
        Some(path) => Some(LogitsFile::create(path, &inputs, vocab)?),
        None => None,
    };
    let mut rows: Vec<Vec<LogSum>> = inputs
        .iter()
        .map(|i| vec![LogSum::default(); i.tokens.len() - 1])
        .collect();
    let mut printed = 0;
    engine.score_inputs(&inputs, &mut |block| {
        if let Some(file) = &file {
            file.write(block)?;
        }
        accumulate(&mut rows[block.input], block, &inputs[block.input].tokens);
        let complete = block.first_id + block.ids == vocab
            && block.first_row + block.rows == inputs[block.input].tokens.len();
        if complete {
            print_scored(block.input, &rows[block.input])?;
            rows[block.input] = Vec::new();
            printed += 1;
        }
        Ok(())
    })?;
    if let Some(file) = file {
        file.finish()?;
    }
    debug_assert_eq!(printed, inputs.len());
    if !args.quiet {
        let during = engine.stats();
        let settings = model.read_settings(&args.machine, &during, &engine);
        let advice = advisor.faster(&Ran {
            report: &PagingReport::new(&engine, &during, &settings),
            during: &during,
            device: engine.device(),
            work: Work::Full,
        });
        if let Some(advice) = advice::told(&advice) {
            eprintln!("{advice}");
        }
    }
    Ok(0)
}

/// Room for the pictures of a few inputs at once: those of the largest, and of as many more as make a wave worth its while.
fn vision_room(inputs: &[ScoreInput]) -> Option<VisionRoom> {
    let rooms = inputs
        .iter()
        .map(|i| VisionRoom::for_all(i.media.iter().map(|v| &**v)));
    let most = rooms.clone().map(|r| r.tokens).max().unwrap_or(0);
    let all = rooms.fold(VisionRoom::default(), |a, b| VisionRoom {
        patches: a.patches + b.patches,
        slice: a.slice.max(b.slice),
        tokens: a.tokens + b.tokens,
        ..a
    });
    Some(VisionRoom {
        tokens: all.tokens.min(most.max(WAVE_TOKENS)),
        ..all
    })
}

/// The lines that are not blank, with their numbers from 1.
fn read_lines(path: &Path) -> Result<Vec<(usize, String)>> {
    let reader: Box<dyn BufRead> = if path == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let file = std::fs::File::open(path)
            .map_err(|e| Error::io(format!("{} cannot be opened", path.display()), &e))?;
        Box::new(BufReader::new(file))
    };
    let mut lines = Vec::new();
    for (i, line) in reader.lines().enumerate() {
        let line = line.map_err(|e| match e.kind() {
            std::io::ErrorKind::InvalidData => Error::new(
                Code::Usage,
                format!("line {} of {} cannot be scored", i + 1, path.display()),
                "it is not UTF-8 text",
                "convert it (iconv -t UTF-8) and try again",
            ),
            _ => Error::io(
                format!("line {} of {} cannot be read", i + 1, path.display()),
                &e,
            ),
        })?;
        if !line.trim().is_empty() {
            lines.push((i + 1, line));
        }
    }
    Ok(lines)
}

fn read_inputs(
    args: &ScoreArgs,
    found: &Found,
    lines: Vec<(usize, String)>,
) -> Result<Vec<ScoreInput>> {
    let path = args.input.as_path();
    let (dir, spec) = (found.text_dir(), found.spec());
    let budget = args.machine.cpu_budget()?;
    let mut inputs = Vec::new();
    let text = OnceCell::new();
    let mut renderer: Option<Renderer<'_>> = None;
    for (number, line) in lines {
        let bad = |cause: String| {
            Error::new(
                Code::Usage,
                format!("line {number} of {} cannot be scored", path.display()),
                cause,
                "write {\"input_ids\": [1, 2, 3]} or {\"messages\": [{\"role\": \"user\", \"content\": \"…\"}]}",
            )
        };
        let parsed: Line = serde_json::from_str(&line).map_err(|e| bad(e.to_string()))?;
        let mut looked = None;
        let input = match (parsed.input_ids, parsed.messages) {
            (Some(tokens), None) => ScoreInput {
                tokens,
                media: Vec::new(),
            },
            (None, Some(messages)) => {
                if text.get().is_none() {
                    let _ = text.set((Tokenizer::load(dir)?, ChatTemplate::load(dir)?));
                }
                let Some((tokenizer, Some(template))) = text.get() else {
                    return Err(bad("this model comes without a chat template".into()));
                };
                let renderer = renderer.get_or_insert_with(|| {
                    let tower = spec.vision.as_ref();
                    Renderer::new(dir, tower, tokenizer, Some(template), args.look, budget)
                });
                let rendered = renderer
                    .messages(&messages, Path::new(""))
                    .map_err(|e| in_line(&e, number))?;
                looked = rendered.looked;
                ScoreInput {
                    tokens: rendered.ids,
                    media: rendered.media,
                }
            }
            _ => return Err(bad("exactly one of input_ids and messages is needed".into())),
        };
        let ids = &input.tokens;
        if ids.is_empty() {
            return Err(bad("it has no tokens".into()));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= spec.vocab) {
            return Err(bad(format!(
                "token id {id} is outside the vocabulary of {}",
                spec.vocab
            )));
        }
        if ids.len() > spec.max_positions {
            if let Some(looked) = &looked {
                let text = ids.len().saturating_sub(looked.need().tokens);
                let e = advice::too_long(looked, text, None, spec.max_positions);
                return Err(in_line(&e, number));
            }
            return Err(bad(format!(
                "it has {} tokens, the model takes {}",
                ids.len(),
                spec.max_positions
            )));
        }
        inputs.push(input);
    }
    Ok(inputs)
}

/// The same error, saying which line it is about.
fn in_line(e: &Error, line: usize) -> Error {
    Error::new(
        e.code(),
        format!("line {line}: {}", e.what()),
        e.cause(),
        e.fix(),
    )
}

/// log Σ exp over ids that arrive in blocks, and the logit of the one that came true.
#[derive(Clone, Copy)]
struct LogSum {
    max: f32,
    sum: f64,
    target: f32,
}

impl Default for LogSum {
    fn default() -> LogSum {
        LogSum {
            max: f32::NEG_INFINITY,
            sum: 0.0,
            target: f32::NEG_INFINITY,
        }
    }
}

impl LogSum {
    fn add(&mut self, values: &[f32]) {
        let max = values.iter().copied().fold(self.max, f32::max);
        let sum: f64 = values.iter().map(|v| f64::from((v - max).exp())).sum();
        self.sum = self.sum * f64::from(self.max - max).exp() + sum;
        self.max = max;
    }

    fn logprob(&self) -> f64 {
        f64::from(self.target) - f64::from(self.max) - self.sum.ln()
    }
}

/// Row r predicts token r + 1; the last row predicts what nobody gave.
fn accumulate(rows: &mut [LogSum], block: &ScoreBlock<'_>, tokens: &[u32]) {
    for (i, values) in block.values.chunks_exact(block.ids).enumerate() {
        let row = block.first_row + i;
        let Some(state) = rows.get_mut(row) else {
            continue;
        };
        state.add(values);
        let target = tokens[row + 1] as usize;
        if let Some(v) = target
            .checked_sub(block.first_id)
            .and_then(|t| values.get(t))
        {
            state.target = *v;
        }
    }
}

fn print_scored(index: usize, rows: &[LogSum]) -> Result<()> {
    let token_logprobs: Vec<f64> = rows.iter().map(LogSum::logprob).collect();
    // An empty sum is -0.
    let log_likelihood = token_logprobs.iter().sum::<f64>() + 0.0;
    let n = token_logprobs.len();
    let scored = Scored {
        index,
        tokens: n + 1,
        log_likelihood,
        perplexity: (n > 0).then(|| (-log_likelihood / n as f64).exp()),
        token_logprobs: &token_logprobs,
    };
    let line = serde_json::to_string(&scored)
        .map_err(|e| Error::internal(format!("a score cannot be written: {e}")))?;
    super::run::print(&format!("{line}\n"))
}

/// The logits are written as they come, over hours: whether the disk has room for all of them is known before.
fn expect_space(path: &Path, inputs: &[ScoreInput], vocab: usize) -> Result<()> {
    let tokens: u64 = inputs.iter().map(|i| i.tokens.len() as u64).sum();
    let needed = tokens.saturating_mul(4 * (vocab as u64 + 1));
    let folder = super::machine::folder_of(path);
    if !folder.is_dir() {
        // Creating the file says so.
        return Ok(());
    }
    let free = crate::store::free_bytes(folder)?;
    if needed <= free {
        return Ok(());
    }
    Err(Error::new(
        Code::Space,
        format!("no room for the logits in {}", path.display()),
        format!(
            "{tokens} tokens of {vocab} logits take {}, and {} are free there",
            human_bytes(needed),
            human_bytes(free)
        ),
        "free some space, give an --output on another disk, or score fewer inputs at a time",
    ))
}

/// A safetensors file whose header is written first and whose logits arrive piece by piece, each at its place.
///
/// It is written beside its place and renamed when it is whole: a run that ends early leaves no file that looks like one.
struct LogitsFile {
    file: std::fs::File,
    path: PathBuf,
    partial: PathBuf,
    /// Where `logits.N` begins, from the start of the file.
    starts: Vec<u64>,
    vocab: usize,
}

impl LogitsFile {
    fn create(path: &Path, inputs: &[ScoreInput], vocab: usize) -> Result<LogitsFile> {
        let wrap =
            |e: std::io::Error| Error::io(format!("{} cannot be written", path.display()), &e);
        let mut header = serde_json::Map::new();
        let mut at = 0u64;
        let mut starts = Vec::with_capacity(inputs.len());
        let mut entry = |name: String, dtype: &str, shape: &[usize]| {
            let bytes = shape.iter().product::<usize>() as u64 * 4;
            header.insert(
                name,
                serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes]}),
            );
            at += bytes;
            at - bytes
        };
        for (i, input) in inputs.iter().enumerate() {
            starts.push(entry(
                format!("logits.{i}"),
                "F32",
                &[input.tokens.len(), vocab],
            ));
        }
        let ids_start = entry_ids(&mut entry, inputs);
        let mut head = serde_json::to_vec(&header)
            .map_err(|e| Error::internal(format!("the header cannot be written: {e}")))?;
        // Data begins at a multiple of 8, as safetensors' own writer has it.
        head.resize(head.len().div_ceil(8) * 8, b' ');
        let base = 8 + head.len() as u64;
        let mut name = path.file_name().unwrap_or_default().to_os_string();
        name.push(format!(".{}.partial", std::process::id()));
        let partial = path.with_file_name(name);
        // Written before it is known to be whole, so it must not be a folder, and it need not exist.
        if path.is_dir() {
            return Err(wrap(std::io::Error::from_raw_os_error(libc::EISDIR)));
        }
        let file = std::fs::File::create(&partial).map_err(wrap)?;
        let mut made = LogitsFile {
            file,
            path: path.to_path_buf(),
            partial,
            starts: starts.iter().map(|s| s + base).collect(),
            vocab,
        };
        let file = &mut made.file;
        file.write_all(&(head.len() as u64).to_le_bytes())
            .map_err(wrap)?;
        file.write_all(&head).map_err(wrap)?;
        file.set_len(base + at).map_err(wrap)?;
        let ids: Vec<u8> = inputs
            .iter()
            .flat_map(|input| &input.tokens)
            .flat_map(|id| (*id as i32).to_le_bytes())
            .collect();
        file.write_all_at(&ids, base + ids_start).map_err(wrap)?;
        Ok(made)
    }

    fn write(&self, block: &ScoreBlock<'_>) -> Result<()> {
        for (i, values) in block.values.chunks_exact(block.ids).enumerate() {
            let element = (block.first_row + i) * self.vocab + block.first_id;
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            self.file
                .write_all_at(&bytes, self.starts[block.input] + element as u64 * 4)
                .map_err(|e| Error::io(format!("{} cannot be written", self.path.display()), &e))?;
        }
        Ok(())
    }

    fn finish(self) -> Result<()> {
        self.file
            .sync_all()
            .and_then(|()| std::fs::rename(&self.partial, &self.path))
            .map_err(|e| Error::io(format!("{} cannot be finished", self.path.display()), &e))
    }
}

impl Drop for LogitsFile {
    /// After [`LogitsFile::finish`] there is nothing of that name any more.
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.partial);
    }
}

/// The ids come behind all logits, one tensor an input; answers where the first begins.
fn entry_ids(entry: &mut dyn FnMut(String, &str, &[usize]) -> u64, inputs: &[ScoreInput]) -> u64 {
    let mut first = None;
    for (i, input) in inputs.iter().enumerate() {
        let at = entry(format!("input_ids.{i}"), "I32", &[input.tokens.len()]);
        first.get_or_insert(at);
    }
    first.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_does_not_depend_on_the_blocks() {
        let values: Vec<f32> = (0..1000)
            .map(|i| ((i * 37) % 101) as f32 * 0.3 - 9.0)
            .collect();
        let exact: f64 = values.iter().map(|v| f64::from(*v).exp()).sum::<f64>().ln();
        for block in [1, 7, 64, 1000] {
            let mut s = LogSum::default();
            values.chunks(block).for_each(|c| s.add(c));
            s.target = values[5];
            let got = f64::from(values[5]) - s.logprob();
            assert!((got - exact).abs() < 1e-5, "{got} {exact}");
        }
    }
}
