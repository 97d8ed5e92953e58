//! `run`: generate from a prompt, or chat.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::advice::{self, Looked, Ran, Work};
use super::found::Found;
use super::generate::{Answer, DEFAULT_MAX_TOKENS, generate, warn_of_unheeded};
use super::media::{LookOptions, PictureOptions, Renderer};
use super::model::{OpenFor, stop_tokens};
use super::options::{MachineOptions, SamplingOptions, SourceOptions};
use super::prompt::{Prompt, PromptOptions};
use super::{repl, signals};
use crate::engine::{Engine, Job};
use crate::error::{Code, Error, Result};
use crate::report::progress::PrefillProgress;
use crate::report::summary::{
    PagingReport, Timings, VisionReport, closing_lines, paging_line, tokens_per_s,
};
use crate::spec::ModelSpec;
use crate::text::{AnswerLength, ChatTemplate, GenerationConfig, StopStrings, Tokenizer};

#[derive(Args)]
#[command(after_help = "Examples:
  tensorpager run ./Qwen2.5-7B-Instruct --prompt 'Why is the sky blue?'
  tensorpager run ./Qwen2.5-7B-Instruct --cpu-memory 4GiB --greedy --json < question.txt
  tensorpager run ./Qwen2.5-7B-Instruct            (a chat)")]
pub struct RunArgs {
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    prompt: PromptOptions,
    #[command(flatten)]
    pictures: PictureOptions,
    #[command(flatten)]
    look: LookOptions,
    #[command(flatten)]
    sampling: SamplingOptions,
    #[command(flatten)]
    machine: MachineOptions,
    /// Print one JSON object on stdout instead of the text
    #[arg(long)]
    json: bool,
    /// Nothing on stderr but errors
    #[arg(long, short)]
    quiet: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct RunReport<'a> {
    model: &'a str,
    device: &'a str,
    dtype: &'a str,
    prompt_tokens: usize,
    prompt_token_ids: &'a [u32],
    token_ids: &'a [u32],
    text: &'a str,
    finish_reason: &'a str,
    timings: Timings,
    paging: PagingReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    vision: Option<VisionReport>,
    /// What would be faster on this machine.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    advice: &'a [String],
}

pub fn run(args: RunArgs) -> Result<u8> {
    let started = Instant::now();
    // Before Ctrl-C is heeded by us: a prompt may come from a pipe that nobody writes to.
    let prompt = args.prompt.read()?;
    let signals = signals::two_stage()?;
    let cancel = signals.cancel.clone();
    if matches!(prompt, Prompt::Chat) && args.json {
        return Err(Error::new(
            Code::Usage,
            "--json needs a prompt",
            "without one this is a chat",
            "give --prompt, --prompt-file, --messages or text on standard input",
        ));
    }
    // What cannot be is refused before hours of packing.
    args.machine.check()?;
    args.sampling.over(&GenerationConfig::default())?;
    StopStrings::new(args.sampling.stop.iter().map(String::as_str))?;
    let found = Found::open_with_text(&args.source, &cancel, args.quiet)?;
    let tokenizer = Tokenizer::load(found.text_dir())?;
    let template = if args.prompt.raw {
        None
    } else {
        ChatTemplate::load(found.text_dir())?
    };
    let budget = args.machine.cpu_budget()?;
    let generation = GenerationConfig::load(found.text_dir())?;
    warn_of_unheeded(&generation, args.quiet);
    let length = AnswerLength::new(args.sampling.max_tokens, &generation, DEFAULT_MAX_TOKENS);
    let advise = |looked: Looked, tokens: usize| {
        let max_tokens = length.after(tokens).ok()?;
        let want = for_prompt(&args, tokens, max_tokens, Some(looked));
        found.fewer_pixels(&args.machine, &want)
    };
    let (dir, tower) = (found.text_dir(), found.spec().vision.as_ref());
    let rendered = Renderer::new(dir, tower, &tokenizer, template.as_ref(), args.look, budget)
        .with_advice(&advise)
        .prompt(&prompt, &args.prompt, &args.pictures)?;
    let stops = StopStrings::new(match args.sampling.stop.is_empty() {
        true => &generation.stop_strings,
        false => &args.sampling.stop,
    })?;
    let max_tokens = match prompt {
        // Each turn asks for itself.
        Prompt::Chat => 1,
        _ => length.after(rendered.ids.len())?,
    };
    let job = Job {
        max_tokens,
        sampling: args.sampling.over(&generation)?,
        choice: 0,
        stop_tokens: if args.sampling.ignore_eos {
            Vec::new()
        } else {
            stop_tokens(&generation, &tokenizer)
        },
        prompt: rendered.ids,
        media: rendered.media,
        ..Job::default()
    };
    let open_for = OpenFor {
        sample_limit: Some(tokenizer.id_limit()),
        ..match prompt {
            Prompt::Chat => for_chat(args.machine.context),
            _ => for_prompt(&args, job.prompt.len(), max_tokens, rendered.looked),
        }
    };
    expect_context(&open_for, job.prompt.len(), max_tokens, found.spec())?;
    found.expect_room(&args.machine, &open_for, args.quiet)?;
    let model = found.prepare(budget, &args.source, &cancel, args.quiet)?;
    let load = Instant::now();
    let advisor = model.advisor(&args.machine, &open_for)?;
    let mut engine = model.engine(&args.machine, &open_for, &cancel, args.quiet)?;
    let load_s = load.elapsed().as_secs_f64();
    if matches!(prompt, Prompt::Chat) {
        let chat = repl::Chat {
            tokenizer: &tokenizer,
            template: template.as_ref(),
            like: job,
            length,
            stops,
            system: args.prompt.system.as_deref(),
            quiet: args.quiet,
        };
        let code = repl::chat(&mut engine, &chat, &signals.into_chat()?)?;
        let settings = model.read_settings(&args.machine, &engine.stats(), &engine);
        let paging = PagingReport::new(&engine, &engine.stats(), &settings);
        if !args.quiet && engine.stats().paging.passes > 0 {
            eprintln!("{}", paging_line(&paging, &engine.stats(), &engine));
        }
        model.write_records(&args.machine, &engine, &Timings::default(), &paging)?;
        return Ok(code);
    }
    let prompt_ids = job.prompt.clone();
    let answer = answer(&mut engine, &tokenizer, job, stops, &args, &cancel)?;
    let settings = model.read_settings(&args.machine, &answer.during_decode, &engine);
    let paging = PagingReport::new(&engine, &answer.during_decode, &settings);
    let timings = Timings {
        pack_s: model.pack_s,
        load_s,
        time_to_first_token_s: answer.to_first_token.as_secs_f64(),
        decode_s: answer.decode.as_secs_f64(),
        output_tokens_per_s: tokens_per_s(answer.tokens.len(), answer.decode),
        total_s: started.elapsed().as_secs_f64(),
    };
    model.write_records(&args.machine, &engine, &timings, &paging)?;
    let advice = advisor.faster(&Ran {
        report: &paging,
        during: &answer.during_decode,
        device: engine.device(),
        work: Work::Answer,
    });
    if args.json {
        let report = RunReport {
            model: &model.label,
            device: engine.device().name(),
            dtype: &model.dtype(),
            prompt_tokens: prompt_ids.len(),
            prompt_token_ids: &prompt_ids,
            token_ids: &answer.tokens,
            text: &answer.text,
            finish_reason: answer.reason.name(),
            timings,
            paging,
            vision: VisionReport::new(&engine.vision_stats()),
            advice: &advice,
        };
        let text = serde_json::to_string(&report)
            .map_err(|e| Error::internal(format!("the report cannot be written: {e}")))?;
        print(&format!("{text}\n"))?;
    } else if !args.quiet {
        let n = answer.tokens.len();
        if let Some(vision) = VisionReport::new(&engine.vision_stats()) {
            eprintln!("{}", vision.line());
        }
        eprintln!(
            "{}",
            closing_lines(
                prompt_ids.len(),
                n,
                &timings,
                &paging,
                &answer.during_decode,
                &engine
            )
        );
        if let Some(advice) = advice::told(&advice) {
            eprintln!("{advice}");
        }
    }
    Ok(0)
}

fn for_chat(context: Option<usize>) -> OpenFor {
    let context = context.unwrap_or(repl::DEFAULT_CONTEXT);
    OpenFor {
        context,
        // Every turn brings the conversation so far.
        prompt_tokens: context,
        ..OpenFor::default()
    }
}

/// For one prompt of `tokens` and its answer.
fn for_prompt(args: &RunArgs, tokens: usize, max_tokens: usize, looked: Option<Looked>) -> OpenFor {
    let given = args.machine.context;
    let looked = looked.map(|mut looked| {
        looked.context_follows = given.is_none();
        looked.text_tokens = tokens.saturating_sub(looked.need().tokens);
        looked
    });
    OpenFor {
        context: given.unwrap_or(tokens.saturating_add(max_tokens)),
        prompt_tokens: tokens,
        vision: looked.as_ref().map(|looked| looked.need().room),
        looked,
        ..OpenFor::default()
    }
}

/// Refuses a prompt that its pictures make too long, before anything is packed. Without pictures the engine says it.
fn expect_context(
    want: &OpenFor,
    prompt: usize,
    max_tokens: usize,
    spec: &ModelSpec,
) -> Result<()> {
    let context = want.context.min(spec.max_positions);
    match &want.looked {
        Some(looked) if prompt >= context => Err(advice::too_long(
            looked,
            looked.text_tokens,
            Some(max_tokens),
            context,
        )),
        _ => Ok(()),
    }
}

/// Streams the answer to stdout (unless it is to be JSON), with prefill progress on stderr before the first token.
fn answer(
    engine: &mut Engine,
    tokenizer: &crate::text::Tokenizer,
    job: Job,
    stops: StopStrings,
    args: &RunArgs,
    cancel: &Arc<AtomicBool>,
) -> Result<Answer> {
    let mut progress = PrefillProgress::new(args.quiet);
    let mut failed = None;
    let mut said = false;
    let answer = generate(
        engine,
        tokenizer,
        job,
        stops,
        &mut |at| progress.update(at),
        &mut |text| {
            said |= !text.is_empty();
            if !args.json
                && failed.is_none()
                && let Err(e) = print(text)
            {
                // A closed pipe (| head) is the reader's way to say enough.
                cancel.store(true, std::sync::atomic::Ordering::Relaxed);
                failed = Some(e);
            }
        },
    );
    drop(progress);
    match (answer, failed) {
        (_, Some(e)) => Err(e),
        (answer, None) => {
            // A refusal before the first word prints no empty line.
            if !args.json && (said || answer.is_ok()) {
                print("\n")?;
            }
            answer
        }
    }
}

/// To stdout, at once.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| {
            let error = Error::io("standard output cannot be written", &e);
            match e.kind() {
                std::io::ErrorKind::StorageFull => {
                    error.with_fix("free some space where the output goes")
                }
                std::io::ErrorKind::BrokenPipe => {
                    error.with_fix("keep whatever reads the output open until the end")
                }
                _ => error,
            }
        })
}
