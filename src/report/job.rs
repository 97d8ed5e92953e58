//! Progress of a job: a bar, plain lines, or JSON lines, on stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use crate::engine::jobs::JobProgress;

/// Between two plain lines. They come closer together at the start, when people wonder whether it works.
const PLAIN_EVERY: Duration = Duration::from_secs(10);
const FIRST_PLAIN: Duration = Duration::from_secs(1);
const JSON_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressKind {
    /// A bar on a terminal, plain lines elsewhere.
    Auto,
    Bar,
    Plain,
    Json,
    None,
}

/// Shows how far a job is.
pub struct JobView {
    kind: ProgressKind,
    bar: Option<ProgressBar>,
    started: Instant,
    last: Option<Instant>,
    /// Plain lines so far.
    lines: u32,
}

/// The figures people plan by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    pub rows: u64,
    /// Answered, before this start too.
    pub rows_done: u64,
    /// In this start.
    pub rows_failed: u64,
    pub running: usize,
    pub passes: u64,
    /// Of the pass that runs now; `units` is 0 between two passes.
    pub unit: usize,
    pub units: usize,
    /// They are the vision tower's, before the pass.
    pub looking: bool,
    pub prompt_tokens: u64,
    pub shared_prompt_tokens: u64,
    pub output_tokens: u64,
    /// Rows through the layers, prompts and answers.
    pub computed_tokens: u64,
    pub output_tokens_per_s: f64,
    pub computed_tokens_per_s: f64,
    pub disk_gb_per_s: f64,
    /// Share of the passes' time spent waiting for the disk.
    pub stall_share: f64,
    pub elapsed_s: f64,
    pub eta_s: Option<f64>,
    pub preemptions: u64,
    pub stopping: bool,
}

impl Figures {
    pub fn new(p: &JobProgress) -> Figures {
        let elapsed_s = p.elapsed.as_secs_f64();
        let pass_s = p.stats.pass.as_secs_f64();
        let per_s = |n: f64, s: f64| if s > 0.0 { n / s } else { 0.0 };
        let settled = p.done + p.failed;
        let left = p.rows.saturating_sub(p.before + settled);
        // Rows in the passes are half done on average: without them the first estimate would come late and high.
        let worth = p.done as f64 + 0.5 * p.running as f64;
        let by_rows = (p.done > 0).then(|| {
            let left = (left as f64 - 0.5 * p.running as f64).max(0.0);
            elapsed_s * left / worth
        });
        // Until then by what was computed of what there is at most: answers that end early make it too long.
        let computed = p.stats.rows + p.shared_tokens;
        let by_tokens = (computed > 0 && p.expected_tokens > computed)
            .then(|| elapsed_s * (p.expected_tokens - computed) as f64 / computed as f64);
        Figures {
            rows: p.rows,
            rows_done: p.before + settled,
            rows_failed: p.failed,
            running: p.running,
            passes: p.stats.paging.passes,
            unit: p.unit,
            units: p.units,
            looking: p.looking,
            prompt_tokens: p.prompt_tokens,
            shared_prompt_tokens: p.shared_tokens,
            output_tokens: p.output_tokens,
            computed_tokens: p.stats.rows,
            output_tokens_per_s: per_s(p.output_tokens as f64, elapsed_s),
            computed_tokens_per_s: per_s(p.stats.rows as f64, elapsed_s),
            disk_gb_per_s: per_s(p.stats.paging.disk_bytes as f64 / 1e9, elapsed_s),
            stall_share: per_s(p.stats.paging.stall_disk.as_secs_f64(), pass_s),
            elapsed_s,
            eta_s: match (by_rows, by_tokens) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
            preemptions: p.preemptions,
            stopping: p.stopping,
        }
    }

    /// One line for people; what they plan by comes first, for a terminal cuts the end off.
    pub fn line(&self) -> String {
        let mut text = match (self.stopping, self.eta_s) {
            (true, _) => "finishing what runs".to_string(),
            (false, Some(s)) => format!("{} left", span(s)),
            (false, None) => format!("{} so far", span(self.elapsed_s)),
        };
        if self.rows_failed > 0 {
            text += &format!(", {} failed", self.rows_failed);
        }
        if self.rows_done == 0 {
            // Nothing is finished yet: what moves is what was computed.
            text += &format!(", {} tokens computed", self.computed_tokens);
        }
        text += &match self.units {
            0 => format!(", pass {}", self.passes),
            units if self.looking => format!(", looking at pictures ({}/{units})", self.unit),
            units => format!(", pass {} ({}/{units})", self.passes + 1, self.unit),
        };
        text += &format!(", {:.1} tokens/s out", self.output_tokens_per_s);
        if self.disk_gb_per_s > 0.0 {
            text += &format!(
                ", {:.2} GB/s, {:.0} % waiting for the disk",
                self.disk_gb_per_s,
                100.0 * self.stall_share,
            );
        }
        text + &format!(
            ", {} running, {:.1} tokens/s through",
            self.running, self.computed_tokens_per_s
        )
    }
}

/// `1 h 02 min`, `3 min 20 s`, `12 s`.
fn span(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match (s / 3600, s / 60 % 60, s % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s:02} s"),
        (h, m, _) => format!("{h} h {m:02} min"),
    }
}

impl JobView {
    pub fn new(kind: ProgressKind) -> JobView {
        let terminal = std::io::stderr().is_terminal();
        let kind = match (kind, terminal) {
            (ProgressKind::Auto, true) => ProgressKind::Bar,
            (ProgressKind::Auto, false) => ProgressKind::Plain,
            (kind, _) => kind,
        };
        let bar = (kind == ProgressKind::Bar).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8));
            if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} rows  {wide_msg}")
            {
                bar.set_style(style);
            }
            bar
        });
        JobView {
            kind,
            bar,
            started: Instant::now(),
            last: None,
            lines: 0,
        }
    }

    pub fn update(&mut self, p: &JobProgress) {
        let due = match self.kind {
            ProgressKind::Bar => true,
            ProgressKind::Json => self.last.is_none_or(|l| l.elapsed() >= JSON_EVERY),
            ProgressKind::Plain => {
                let wait = PLAIN_EVERY.min(FIRST_PLAIN * (1 << self.lines.min(5)));
                self.last.unwrap_or(self.started).elapsed() >= wait
            }
            ProgressKind::None | ProgressKind::Auto => false,
        };
        if due {
            self.show(p);
        }
    }

    fn show(&mut self, p: &JobProgress) {
        self.last = Some(Instant::now());
        self.lines += 1;
        let figures = Figures::new(p);
        match (self.kind, &self.bar) {
            (ProgressKind::Bar, Some(bar)) => {
                bar.set_length(figures.rows);
                bar.set_position(figures.rows_done);
                bar.set_message(figures.line());
            }
            (ProgressKind::Json, _) => {
                if let Ok(text) = serde_json::to_string(&figures) {
                    eprintln!("{text}");
                }
            }
            (ProgressKind::Plain, _) => {
                eprintln!(
                    "{}/{} rows: {}",
                    figures.rows_done,
                    figures.rows,
                    figures.line()
                );
            }
            _ => {}
        }
    }

    /// The last word of a JSON stream; takes the bar away.
    pub fn finish(&mut self, p: &JobProgress) {
        match (self.kind, self.bar.take()) {
            (ProgressKind::Json, _) => self.show(p),
            (_, Some(bar)) => bar.finish_and_clear(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_counts_what_is_under_way() {
        let p = JobProgress {
            rows: 100,
            before: 20,
            done: 20,
            running: 10,
            elapsed: Duration::from_secs(50),
            ..JobProgress::default()
        };
        let f = Figures::new(&p);
        assert_eq!(f.rows_done, 40);
        // 25 rows' worth in 50 s, 55 rows' worth left.
        assert!((f.eta_s.unwrap() - 110.0).abs() < 1e-9);
        assert_eq!(Figures::new(&JobProgress::default()).eta_s, None);
        // Before a row is finished: 100 of 1000 tokens in 5 s.
        let mut early = JobProgress {
            rows: 10,
            running: 10,
            expected_tokens: 1000,
            elapsed: Duration::from_secs(5),
            ..JobProgress::default()
        };
        early.stats.rows = 100;
        assert!((Figures::new(&early).eta_s.unwrap() - 45.0).abs() < 1e-9);
    }

    #[test]
    fn spans_read_well() {
        assert_eq!(span(12.4), "12 s");
        assert_eq!(span(200.0), "3 min 20 s");
        assert_eq!(span(3725.0), "1 h 02 min");
    }
}
