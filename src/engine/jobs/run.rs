//! Runs a job: rows into the engine as there is room, answers out as they finish.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::answer::{Answer, Answered, ErrorRow};
use super::body::Body;
use super::input::Lines;
use super::job::BatchJob;
use super::pictures::Looker;
use super::request::{Endpoint, RowError, RowIds, TextTools};
use super::scan::{State, parse_line};
use super::sizing::Sizing;
use crate::engine::{
    Engine, EngineStats, Event, FinishReason, Job, JobId, Logprobs, Stage, VisionStats,
};
use crate::error::{Code, Error, Result};
use crate::text::{StopMatcher, TokenStream};

/// How far a job is.
#[derive(Clone, Copy, Debug, Default)]
pub struct JobProgress {
    /// Rows of this job (or shard).
    pub rows: u64,
    /// Answered or failed before this start.
    pub before: u64,
    /// Answered since.
    pub done: u64,
    /// Failed since.
    pub failed: u64,
    /// Sequences in the passes now.
    pub running: usize,
    /// Of the rows taken so far.
    pub prompt_tokens: u64,
    /// Prompt tokens that came from another row's KV.
    pub shared_tokens: u64,
    pub output_tokens: u64,
    pub preemptions: u64,
    /// Since this start, up to the last pass.
    pub stats: EngineStats,
    /// Of the pass that runs now; `units` is 0 between two passes.
    pub unit: usize,
    pub units: usize,
    /// They are the vision tower's: pictures go through it before the pass.
    pub looking: bool,
    /// What this start's rows take at most, prompts and answers, from some of them.
    pub expected_tokens: u64,
    /// What looking at pictures cost, since this start.
    pub vision: VisionStats,
    pub elapsed: Duration,
    /// Asked to stop: what runs is finished, nothing new begins.
    pub stopping: bool,
}

/// A job's end.
#[derive(Clone, Copy, Debug)]
pub struct JobSummary {
    pub progress: JobProgress,
    /// Failed rows, those of earlier starts included.
    pub failed: u64,
    /// Rows left because the job was interrupted.
    pub remaining: u64,
    /// Rows whose `model` named another model.
    pub other_model: u64,
}

/// One of a row's answers on its way.
struct Choice {
    job: JobId,
    stream: TokenStream,
    matcher: StopMatcher,
    text: String,
    tokens: usize,
    logprobs: Option<Vec<(u32, Box<Logprobs>)>>,
    reason: Option<FinishReason>,
}

/// A row on its way.
struct Row {
    /// Index in the scan.
    index: usize,
    id: u128,
    custom_id: String,
    endpoint: Endpoint,
    prompt_tokens: usize,
    choices: Vec<Choice>,
    failed: Option<Error>,
}

/// The state of a run: the rows in the engine, and what has been told of them.
struct Runner<'a> {
    job: &'a mut BatchJob,
    engine: &'a mut Engine,
    text: TextTools<'a>,
    lines: Lines,
    /// Next row of the scan.
    next: usize,
    rows: HashMap<usize, Row>,
    /// Which row and choice an engine job is.
    owners: HashMap<JobId, (usize, usize)>,
    told: JobProgress,
    other_model: u64,
    /// Settled in this pass: their answers are written but not yet synced.
    settled: Vec<(usize, State)>,
}

impl BatchJob {
    /// Answers what remains. `stop` raised: nothing new begins, what runs is finished. `sizing`: what the engine was opened with.
    /// `progress` hears after every unit and every pass.
    pub fn run(
        &mut self,
        engine: &mut Engine,
        text: TextTools<'_>,
        sizing: &Sizing,
        stop: &AtomicBool,
        progress: &mut dyn FnMut(&JobProgress),
    ) -> Result<JobSummary> {
        let started = Instant::now();
        let before = engine.stats();
        let schedule = engine.schedule_stats();
        let vision = engine.vision_stats();
        let lines = self.spec.source.lines_up_to(self.spec.limits.row_bytes)?;
        let told = JobProgress {
            rows: self.rows(),
            before: self.done() + self.failed(),
            expected_tokens: self.remaining() * sizing.row_tokens as u64,
            ..JobProgress::default()
        };
        let mut r = Runner {
            job: self,
            engine,
            text,
            lines,
            next: 0,
            rows: HashMap::new(),
            owners: HashMap::new(),
            told,
            other_model: 0,
            settled: Vec::new(),
        };
        let mut events = Vec::new();
        loop {
            let stopping = stop.load(Relaxed);
            if stopping && !r.told.stopping {
                r.told.stopping = true;
                r.drop_unstarted();
            }
            if !stopping {
                r.admit(sizing)?;
            }
            if r.engine.pending() > 0 {
                events.clear();
                let mut now = r.told;
                r.engine
                    .step_watched(&mut events, &mut |stage, unit, units| {
                        (now.unit, now.units) = (unit, units);
                        now.looking = stage == Stage::Pictures;
                        now.elapsed = started.elapsed();
                        progress(&now);
                    })?;
                for event in events.drain(..) {
                    r.hear(event)?;
                }
            }
            r.flush()?;
            let now = r.engine.schedule_stats();
            r.told.running = r.engine.running();
            r.told.shared_tokens = now.shared_tokens - schedule.shared_tokens;
            r.told.preemptions = now.preemptions - schedule.preemptions;
            r.told.stats = r.engine.stats().since(&before);
            r.told.vision = r.engine.vision_stats().since(&vision);
            r.told.elapsed = started.elapsed();
            progress(&r.told);
            if r.engine.pending() == 0 && (stopping || r.next == r.job.scan.marks.len()) {
                break;
            }
        }
        let (told, other_model) = (r.told, r.other_model);
        self.finish()?;
        Ok(JobSummary {
            progress: told,
            failed: self.failed(),
            remaining: self.remaining(),
            other_model,
        })
    }
}

impl Runner<'_> {
    /// Takes rows until the engine holds as many as it should, their pictures fill the memory meant for them, or the input ends.
    fn admit(&mut self, sizing: &Sizing) -> Result<()> {
        let jobs = sizing.sequences + sizing.ahead;
        while self.engine.pending() < jobs && self.next < self.job.scan.marks.len() {
            let held = self.text.looker.map_or(0, Looker::held_bytes);
            if self.engine.pending() > 0 && held + sizing.largest_pixels > sizing.pixels {
                break;
            }
            // A long stretch of bad rows is written as it goes, not held.
            if self.settled.len() >= 1024 {
                self.flush()?;
            }
            let index = self.next;
            let line = self.lines.next_line()?;
            let mark = self.job.scan.marks[index];
            let Some(line) = line.filter(|l| l.number == u64::from(mark.line)) else {
                return Err(self.input_changed());
            };
            self.next += 1;
            if !matches!(mark.state, State::Pending | State::Duplicate) {
                continue;
            }
            let ids = RowIds {
                key: self.job.rules_key,
                pictures: self.text.looker.map(Looker::ids),
            };
            let parsed = parse_line(&self.job.spec.source, &line, ids);
            // Of a row with pictures inline there are copies enough.
            drop(line);
            if parsed.id as u64 != mark.id {
                return Err(self.input_changed());
            }
            let (custom_id, refused) = match parsed.request {
                Err((custom_id, e)) => (custom_id, e),
                Ok(request) => {
                    let custom_id = request.custom_id.clone();
                    if mark.state == State::Duplicate {
                        let first = self.job.scan.find(&custom_id).unwrap_or(index);
                        let first = self.job.scan.marks[first].line;
                        let message =
                            format!("the custom_id `{custom_id}` is already on line {first}");
                        let e = RowError::about("duplicate_custom_id", "custom_id", message);
                        (Some(custom_id), e)
                    } else {
                        let endpoint = request.endpoint;
                        match request.body(&self.job.spec.rules, &self.text) {
                            Err(e) => (Some(custom_id), e),
                            Ok(body) => {
                                match self.submit(index, parsed.id, &custom_id, endpoint, body)? {
                                    None => continue,
                                    Some(e) => (Some(custom_id), e),
                                }
                            }
                        }
                    }
                }
            };
            self.refuse(index, parsed.id, custom_id.as_deref(), &refused)?;
        }
        Ok(())
    }

    /// Hands a row's choices to the engine. A row it would never take is refused.
    fn submit(
        &mut self,
        index: usize,
        id: u128,
        custom_id: &str,
        endpoint: Endpoint,
        mut body: Body,
    ) -> Result<Option<RowError>> {
        let media = match self.text.looker.map(|l| l.load(&mut body)) {
            Some(Ok(media)) => media,
            Some(Err(e)) => return Ok(Some(e)),
            None => Vec::new(),
        };
        let prompt_tokens = body.prompt.len();
        let max_tokens = match body.max_tokens(prompt_tokens) {
            Ok(n) => n,
            Err(e) => return Ok(Some(e)),
        };
        if body
            .model
            .is_some_and(|m| !same_model(&m, &self.job.spec.rules.model))
        {
            self.other_model += 1;
        }
        let stream = TokenStream::after(self.text.tokenizer, true, &body.prompt)?;
        let mut choices = Vec::with_capacity(body.choices as usize);
        for choice in 0..body.choices {
            let job = Job {
                prompt: body.prompt.clone(),
                media: media.clone(),
                max_tokens,
                sampling: body.sampling.clone(),
                choice,
                stop_tokens: body.stop_tokens.clone(),
                logprobs: body.logprobs,
                prefix_salt: Some(0),
            };
            match self.engine.submit(job) {
                Ok(job) => choices.push(Choice {
                    job,
                    stream: stream.clone(),
                    matcher: StopMatcher::new(body.stop.clone()),
                    text: String::new(),
                    tokens: 0,
                    logprobs: body.logprobs.map(|_| Vec::new()),
                    reason: None,
                }),
                // The choices of a row differ in nothing that submit looks at: the first one is refused or none is.
                Err(e) if e.code() == Code::Usage => {
                    return Ok(Some(RowError::from_error("invalid_prompt", &e)));
                }
                Err(e) if e.code() == Code::Memory => {
                    return Ok(Some(RowError::from_error("kv_room", &e)));
                }
                Err(e) => return Err(e),
            }
        }
        self.told.prompt_tokens += prompt_tokens as u64;
        for (i, c) in choices.iter().enumerate() {
            self.owners.insert(c.job, (index, i));
        }
        let row = Row {
            index,
            id,
            custom_id: custom_id.to_owned(),
            endpoint,
            prompt_tokens,
            choices,
            failed: None,
        };
        self.rows.insert(index, row);
        Ok(None)
    }

    fn hear(&mut self, event: Event) -> Result<()> {
        let job = match &event {
            Event::Token { job, .. } | Event::Finished { job, .. } | Event::Failed { job, .. } => {
                *job
            }
        };
        // A stop string ended it in this very pass, or its row failed.
        let Some(&(index, choice)) = self.owners.get(&job) else {
            return Ok(());
        };
        let Some(row) = self.rows.get_mut(&index) else {
            return Ok(());
        };
        let c = &mut row.choices[choice];
        match event {
            Event::Token {
                token, logprobs, ..
            } => {
                self.told.output_tokens += 1;
                if !c.take(token, logprobs)? {
                    return Ok(());
                }
                self.engine.cancel(job);
                c.reason = Some(FinishReason::Stop);
            }
            Event::Finished { reason, .. } => {
                c.end()?;
                c.reason = Some(reason);
            }
            Event::Failed { error, .. } => row.failed = Some(error),
        }
        self.owners.remove(&job);
        if row.failed.is_some() || row.choices.iter().all(|c| c.reason.is_some()) {
            self.settle(index)?;
        }
        Ok(())
    }

    /// The row's last choice is finished, or one failed: writes what became of it.
    fn settle(&mut self, index: usize) -> Result<()> {
        let Some(row) = self.rows.remove(&index) else {
            return Ok(());
        };
        if let Some(e) = &row.failed {
            for c in &row.choices {
                self.engine.cancel(c.job);
                self.owners.remove(&c.job);
            }
            let code = match e.code() {
                Code::Memory => "kv_room",
                _ => "model_output",
            };
            let e = RowError::from_error(code, e);
            return self.refuse(index, row.id, Some(&row.custom_id), &e);
        }
        let answered: Vec<Answered> = row.choices.into_iter().map(Choice::answered).collect();
        let answer = Answer {
            id: row.id,
            custom_id: &row.custom_id,
            endpoint: row.endpoint,
            created: self.job.created,
            model: &self.job.spec.rules.model,
            prompt_tokens: row.prompt_tokens,
            choices: &answered,
        };
        let written = answer.row(self.text.tokenizer)?;
        self.job.output.push(&written)?;
        self.settled.push((row.index, State::Done));
        Ok(())
    }

    fn refuse(
        &mut self,
        index: usize,
        id: u128,
        custom_id: Option<&str>,
        e: &RowError,
    ) -> Result<()> {
        let line = u64::from(self.job.scan.marks[index].line);
        self.job
            .errors
            .push(&ErrorRow::new(id, custom_id, line, e))?;
        self.settled.push((index, State::Failed));
        Ok(())
    }

    /// Syncs what was settled; only then does it count.
    fn flush(&mut self) -> Result<()> {
        self.job.output.sync()?;
        self.job.errors.sync()?;
        let mut failed = false;
        for (index, state) in self.settled.drain(..) {
            self.job.scan.marks[index].state = state;
            match state {
                State::Failed => {
                    self.told.failed += 1;
                    failed = true;
                }
                _ => self.told.done += 1,
            }
        }
        match failed {
            true => self.job.check_errors(self.job.failed()),
            false => Ok(()),
        }
    }

    /// Gives back rows of which nothing has been computed; they remain for the next start.
    fn drop_unstarted(&mut self) {
        let unstarted: std::collections::HashSet<JobId> = self.engine.unstarted().collect();
        let drop: Vec<usize> = self
            .rows
            .values()
            .filter(|r| r.choices.iter().all(|c| unstarted.contains(&c.job)))
            .map(|r| r.index)
            .collect();
        for index in drop {
            for c in self.rows.remove(&index).into_iter().flat_map(|r| r.choices) {
                self.engine.cancel(c.job);
                self.owners.remove(&c.job);
            }
        }
    }

    fn input_changed(&self) -> Error {
        Error::new(
            Code::Usage,
            format!(
                "{} changed while the job ran",
                self.job.spec.source.path().display()
            ),
            format!(
                "row {} or one of its pictures is not what it was at the start",
                self.next + 1
            ),
            "leave the files alone, and give the same command again: finished rows are kept",
        )
    }
}

impl Choice {
    /// Takes the next token. True when a stop string ends the answer.
    fn take(&mut self, token: u32, logprobs: Option<Box<Logprobs>>) -> Result<bool> {
        self.tokens += 1;
        if let (Some(all), Some(l)) = (&mut self.logprobs, logprobs) {
            all.push((token, l));
        }
        let mut fresh = String::new();
        self.stream.push(token, &mut fresh)?;
        Ok(self.matcher.push(&fresh, &mut self.text))
    }

    /// The last characters, held back until now.
    fn end(&mut self) -> Result<()> {
        let mut fresh = String::new();
        self.stream.finish(&mut fresh)?;
        if !self.matcher.push(&fresh, &mut self.text) {
            self.matcher.finish(&mut self.text);
        }
        Ok(())
    }

    fn answered(self) -> Answered {
        Answered {
            reason: match self.matcher.matched() {
                Some(_) => FinishReason::Stop,
                None => self.reason.unwrap_or(FinishReason::Length),
            },
            text: self.text,
            tokens: self.tokens,
            logprobs: self.logprobs,
        }
    }
}

/// Do both names mean one model? Folders, hub names and packed folders end alike.
fn same_model(asked: &str, ours: &str) -> bool {
    let last = |name: &str| {
        let name = name.trim_end_matches('/').replace("--", "/");
        name.rsplit('/').next().unwrap_or_default().to_lowercase()
    };
    let (asked, full) = (last(asked), ours.to_lowercase());
    full.replace("--", "/").split('/').any(|part| part == asked) || last(ours) == asked
}
