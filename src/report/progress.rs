//! Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing when asked for quiet.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::units::human_bytes;

/// Progress of something counted in bytes, with rate and ETA.
pub struct ByteProgress {
    bar: Option<ProgressBar>,
    label: String,
    started: Instant,
    last: Instant,
    quiet: bool,
}

/// Between two plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(5);

impl ByteProgress {
    pub fn new(label: &str, quiet: bool) -> ByteProgress {
        let bar = (!quiet && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(8));
            if let Ok(style) = ProgressStyle::with_template(
                "{prefix} {wide_bar} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} ETA {eta}",
            ) {
                bar.set_style(style);
            }
            bar.set_prefix(label.to_string());
            bar
        });
        let now = Instant::now();
        ByteProgress {
            bar,
            label: label.to_string(),
            started: now,
            last: now,
            quiet,
        }
    }

    pub fn update(&mut self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        } else if !self.quiet && self.last.elapsed() >= PLAIN_EVERY {
            self.last = Instant::now();
            let s = self.started.elapsed().as_secs_f64();
            let eta = s * (total.saturating_sub(done)) as f64 / done.max(1) as f64;
            eprintln!(
                "{}: {} of {}, {:.2} GB/s, {eta:.0} s left",
                self.label,
                human_bytes(done),
                human_bytes(total),
                done as f64 / s / 1e9
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
