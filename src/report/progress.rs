//! Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing when asked for quiet.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::units::human_bytes;

/// Progress of something counted in bytes, with rate and ETA.
pub struct ByteProgress {
    /// From the first figures on: before them there is nothing to show.
    bar: Option<ProgressBar>,
    live: bool,
    label: String,
    started: Instant,
    last: Instant,
    quiet: bool,
    /// What was done before it began: a resumed download. Rates leave it out.
    before: Option<u64>,
}

/// Between two plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

impl ByteProgress {
    pub fn new(label: &str, quiet: bool) -> ByteProgress {
        let now = Instant::now();
        ByteProgress {
            bar: None,
            live: !quiet && std::io::stderr().is_terminal(),
            label: label.to_string(),
            started: now,
            last: now,
            quiet,
            before: None,
        }
    }

    fn bar(&mut self, total: u64) -> Option<&ProgressBar> {
        if self.live && total > 0 && self.bar.is_none() {
            let target = ProgressDrawTarget::stderr_with_hz(8);
            let bar = ProgressBar::with_draw_target(Some(total), target);
            if let Ok(style) = ProgressStyle::with_template(
                "{prefix} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} ETA {eta}",
            ) {
                bar.set_style(style);
            }
            bar.set_prefix(self.label.clone());
            self.bar = Some(bar);
        }
        self.bar.as_ref()
    }

    /// A line of its own, above the bar.
    pub fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None if !self.quiet => eprintln!("{text}"),
            None => {}
        }
    }

    /// Where something begins that was cut off earlier.
    pub fn resume_at(&mut self, done: u64, total: u64) {
        self.before = Some(done);
        self.started = Instant::now();
        if let Some(bar) = self.bar(total) {
            bar.set_length(total);
            bar.set_position(done);
            bar.reset_eta();
        }
    }

    pub fn update(&mut self, done: u64, total: u64) {
        if let Some(bar) = self.bar(total) {
            bar.set_length(total);
            bar.set_position(done);
        } else if !self.live && !self.quiet && total > 0 && self.last.elapsed() >= PLAIN_EVERY {
            self.last = Instant::now();
            let s = self.started.elapsed().as_secs_f64();
            let fresh = done.saturating_sub(self.before.unwrap_or(0));
            let eta = s * (total.saturating_sub(done)) as f64 / fresh.max(1) as f64;
            eprintln!(
                "{}: {} of {}, {:.2} GB/s, {eta:.0} s left",
                self.label,
                human_bytes(done),
                human_bytes(total),
                fresh as f64 / s / 1e9
            );
        }
    }

    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Progress of something counted in steps, with an ETA and what was done last.
pub struct CountProgress {
    bar: Option<ProgressBar>,
    label: String,
    total: usize,
    done: usize,
    last: Instant,
    quiet: bool,
}

impl CountProgress {
    pub fn new(label: &str, total: usize, quiet: bool) -> CountProgress {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(
                Some(total as u64),
                ProgressDrawTarget::stderr_with_hz(8),
            );
            if let Ok(style) =
                ProgressStyle::with_template("{prefix} {wide_bar} {pos}/{len} ETA {eta}  {msg}")
            {
                bar.set_style(style);
            }
            bar.set_prefix(label.to_string());
            bar
        });
        CountProgress {
            bar,
            label: label.to_string(),
            total,
            done: 0,
            last: Instant::now(),
            quiet,
        }
    }

    /// One more, which was `what`.
    pub fn step(&mut self, what: &str) {
        self.done += 1;
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_string());
            bar.inc(1);
        } else if !self.quiet && self.last.elapsed() >= PLAIN_EVERY {
            self.last = Instant::now();
            eprintln!("{}: {} of {}, {what}", self.label, self.done, self.total);
        }
    }

    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
