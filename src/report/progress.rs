//! Progress on stderr: a bar on a terminal, a line now and then elsewhere, nothing when asked for quiet.

use std::io::{IsTerminal, Write};
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

/// How far a prompt is on its way through the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefill {
    /// Tokens of the prompt, and those that earlier passes have done.
    pub tokens: usize,
    pub done: usize,
    /// Tokens in the pass under way, and how many of its units have had them.
    pub rows: usize,
    pub unit: usize,
    pub units: usize,
    /// While its pictures go through the vision tower, before all that: units done, and of how many.
    pub pictures: Option<(usize, usize)>,
}

impl Prefill {
    /// From 0 to 1. A pass costs as much for each of its units, and the prompt's passes are about alike.
    fn share(&self) -> f64 {
        if let Some((done, units)) = self.pictures {
            return done as f64 / units.max(1) as f64;
        }
        let within = self.rows as f64 * self.unit as f64 / self.units.max(1) as f64;
        ((self.done as f64 + within) / self.tokens.max(1) as f64).min(1.0)
    }
}

/// Progress towards the first token: a line that overwrites itself on a terminal, one now and then elsewhere.
pub struct PrefillProgress {
    live: bool,
    quiet: bool,
    started: Instant,
    /// When the last line came, from the start.
    told: Option<Duration>,
    /// The last state was one of the vision tower.
    pictures: bool,
}

/// Between two states of a line that overwrites itself.
const LIVE_EVERY: Duration = Duration::from_millis(100);

impl PrefillProgress {
    pub fn new(quiet: bool) -> PrefillProgress {
        PrefillProgress {
            live: !quiet && std::io::stderr().is_terminal(),
            quiet,
            started: Instant::now(),
            told: None,
            pictures: false,
        }
    }

    pub fn update(&mut self, at: &Prefill) {
        // What the tower took says nothing of the layers.
        if self.pictures != at.pictures.is_some() {
            self.pictures = at.pictures.is_some();
            self.started = Instant::now();
            self.told = self.told.map(|_| Duration::ZERO);
        }
        if at.done >= at.tokens {
            return self.clear();
        }
        match self.line(at, self.started.elapsed()) {
            Some(text) if self.live => live_line(&text),
            Some(text) => eprintln!("{text}"),
            None => {}
        }
    }

    /// What is to be said `now` after the start, if it is time to say something.
    fn line(&mut self, at: &Prefill, now: Duration) -> Option<String> {
        let due = match (self.live, self.told) {
            (true, None) => Duration::ZERO,
            (true, Some(told)) => told + LIVE_EVERY,
            (false, told) => told.unwrap_or_default() + PLAIN_EVERY,
        };
        if self.quiet || now < due {
            return None;
        }
        self.told = Some(now);
        let share = at.share();
        let left = match share > 0.0 {
            true => format!("{:.0} s left", now.as_secs_f64() * (1.0 - share) / share),
            false => "…".to_string(),
        };
        let percent = 100.0 * share;
        Some(match at.pictures {
            Some((unit, units)) => {
                format!("looking at pictures: {percent:.0} % (unit {unit} of {units}), {left}")
            }
            None => format!(
                "prefill: {percent:.0} % of {} tokens (unit {} of {}), {left}",
                at.tokens, at.unit, at.units
            ),
        })
    }

    /// Makes way for what is printed next.
    fn clear(&mut self) {
        if self.live && self.told.take().is_some() {
            live_line("");
        }
    }
}

impl Drop for PrefillProgress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Takes the place of the terminal's line; an empty one clears it.
pub fn live_line(text: &str) {
    eprint!("\r\x1b[K{text}");
    let _ = std::io::stderr().flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(unit: usize) -> Prefill {
        Prefill {
            tokens: 1236,
            done: 0,
            rows: 1236,
            unit,
            units: 30,
            pictures: None,
        }
    }

    #[test]
    fn a_prompt_of_one_pass_moves_with_its_units_and_says_how_long() {
        let mut progress = PrefillProgress {
            live: false,
            ..PrefillProgress::new(false)
        };
        let mut said = Vec::new();
        for unit in 0..=30 {
            said.extend(progress.line(&at(unit), Duration::from_secs(unit as u64 / 2)));
        }
        // Every 5 s, as packing does; a unit takes half a second.
        assert_eq!(
            said,
            [
                "prefill: 33 % of 1236 tokens (unit 10 of 30), 10 s left",
                "prefill: 67 % of 1236 tokens (unit 20 of 30), 5 s left",
                "prefill: 100 % of 1236 tokens (unit 30 of 30), 0 s left",
            ]
        );
        let mut quiet = PrefillProgress::new(true);
        assert_eq!(quiet.line(&at(20), Duration::from_secs(60)), None);
    }

    #[test]
    fn a_terminal_is_told_at_once_and_then_as_it_goes() {
        let mut progress = PrefillProgress {
            live: true,
            ..PrefillProgress::new(false)
        };
        let mut tell = |unit, ms| progress.line(&at(unit), Duration::from_millis(ms));
        let first = tell(0, 0).unwrap();
        assert_eq!(first, "prefill: 0 % of 1236 tokens (unit 0 of 30), …");
        assert_eq!(tell(1, 50), None);
        assert!(tell(2, 120).is_some());
    }

    #[test]
    fn pictures_come_first_and_the_clock_starts_again_behind_them() {
        let mut progress = PrefillProgress {
            live: false,
            ..PrefillProgress::new(false)
        };
        let looking = Prefill {
            pictures: Some((8, 34)),
            ..at(0)
        };
        assert_eq!(
            progress.line(&looking, Duration::from_secs(8)).unwrap(),
            "looking at pictures: 24 % (unit 8 of 34), 26 s left"
        );
        progress.started = Instant::now() - Duration::from_secs(30);
        progress.update(&looking);
        assert!(progress.pictures && progress.started.elapsed() < Duration::from_secs(9));
        progress.started = Instant::now() - Duration::from_secs(30);
        progress.update(&at(1));
        assert!(!progress.pictures && progress.started.elapsed() < Duration::from_secs(9));
    }

    #[test]
    fn earlier_passes_count() {
        let second = Prefill {
            tokens: 100,
            done: 40,
            rows: 40,
            unit: 5,
            units: 10,
            pictures: None,
        };
        assert!((second.share() - 0.6).abs() < 1e-9);
    }
}
