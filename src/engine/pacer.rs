//! How many tokens a pass should carry: twice as many as compute while the stream is under way.
//!
//! A pass takes max(stream, compute); compute is `fixed + per_row · rows`. Both are measured from the passes themselves, the
//! recent ones counting most, so that a slower disk or a busier machine is followed within a few passes. Nothing that is
//! computed depends on this, only when it is computed.

/// Weight of the past after each pass.
const DECAY: f64 = 0.9;
/// Rows beyond the estimate. Where compute equals the stream each waits for the other in turn; a pass that is twice as full
/// hides the stream whole, shares what reading and checking take of the cores among more rows, and costs nothing but KV room.
const GENEROUS: f64 = 2.0;
/// Where compute is bound by its fixed cost (weights through memory) rows are nearly free up to a multiple of it.
const FIXED_SHARES: f64 = 4.0;
/// Never fewer: below this the fixed cost of anything rules.
pub const LEAST_ROWS: usize = 64;

/// Exponentially weighted sums for a straight line through (rows, compute seconds).
#[derive(Clone, Copy, Debug, Default)]
pub struct Pacer {
    weight: f64,
    rows: f64,
    seconds: f64,
    rows_rows: f64,
    rows_seconds: f64,
    stream: f64,
}

impl Pacer {
    /// A pass of `rows` rows computed for `compute` seconds while the disk was busy for `stream` seconds.
    pub fn record(&mut self, rows: usize, compute: f64, stream: f64) {
        let x = rows as f64;
        for (sum, new) in [
            (&mut self.weight, 1.0),
            (&mut self.rows, x),
            (&mut self.seconds, compute),
            (&mut self.rows_rows, x * x),
            (&mut self.rows_seconds, x * compute),
            (&mut self.stream, stream),
        ] {
            *sum = *sum * DECAY + new;
        }
    }

    /// Rows the next pass should carry, `most` until something is known.
    pub fn budget(&self, most: usize) -> usize {
        if self.weight == 0.0 {
            return most;
        }
        let stream = self.stream / self.weight;
        let (fixed, per_row) = self.line();
        if per_row <= 0.0 || stream <= 0.0 {
            return most;
        }
        let hidden = GENEROUS * (stream - fixed) / per_row;
        let worthwhile = FIXED_SHARES * fixed / per_row;
        let rows = hidden.max(worthwhile).min(most as f64) as usize;
        rows.max(LEAST_ROWS).min(most)
    }

    /// (fixed, per row) of compute. Without passes of different sizes nothing is known of the fixed part.
    fn line(&self) -> (f64, f64) {
        let (mean_rows, mean_seconds) = (self.rows / self.weight, self.seconds / self.weight);
        let variance = self.rows_rows / self.weight - mean_rows * mean_rows;
        if variance > 0.01 * mean_rows * mean_rows {
            let covariance = self.rows_seconds / self.weight - mean_rows * mean_seconds;
            let slope = covariance / variance;
            let fixed = mean_seconds - slope * mean_rows;
            if slope > 0.0 && fixed >= 0.0 {
                return (fixed, slope);
            }
        }
        (0.0, mean_seconds / mean_rows.max(1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settles_where_compute_hides_the_stream() {
        let mut pacer = Pacer::default();
        assert_eq!(pacer.budget(4096), 4096, "nothing is known yet");
        // 1 s of stream; 0.05 s and 2 ms a row of compute: 475 rows hide behind the stream, twice as many hide it.
        let mut rows = 4096;
        for _ in 0..40 {
            pacer.record(rows, 0.05 + 0.002 * rows as f64, 1.0);
            rows = pacer.budget(4096);
        }
        assert!((760..=1024).contains(&rows), "{rows}");
        // The disk becomes four times as fast.
        for _ in 0..60 {
            pacer.record(rows, 0.05 + 0.002 * rows as f64, 0.25);
            rows = pacer.budget(4096);
        }
        assert!((160..=224).contains(&rows), "{rows}");
    }

    #[test]
    fn grows_from_small_passes() {
        let mut pacer = Pacer::default();
        let mut rows = 1;
        for _ in 0..30 {
            pacer.record(rows, 0.2 + 0.001 * rows as f64, 1.0);
            rows = pacer.budget(2048);
        }
        assert!(rows >= 800, "{rows}");
    }

    #[test]
    fn without_a_stream_passes_are_as_large_as_they_may_be() {
        let mut pacer = Pacer::default();
        pacer.record(10, 0.1, 0.0);
        assert_eq!(pacer.budget(2048), 2048);
    }

    #[test]
    fn a_fixed_cost_beyond_the_stream_wants_large_passes() {
        let mut pacer = Pacer::default();
        for rows in [100, 200, 400, 100, 300] {
            pacer.record(rows, 1.0 + 0.001 * rows as f64, 0.5);
        }
        assert_eq!(pacer.budget(2048), 2048);
    }
}
