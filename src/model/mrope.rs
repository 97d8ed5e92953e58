//! Positions of multimodal sequences (M-RoPE): time, height and width of every token.
//!
//! Follows `get_rope_index` of transformers 5: temporal patch t of a video lies ⌊t · tokens_per_second · seconds per patch⌋ positions after
//! the first. Release 5.17 rounds the seconds down to whole ones before; whoever makes the spans decides that.

use crate::error::{Code, Error, Result};

/// A run of picture tokens in a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PictureSpan {
    /// Index of its first token.
    pub start: usize,
    /// Tokens along time, height and width: the patch grid divided by the merge.
    pub cells: [usize; 3],
    /// Positions from one temporal patch to the next; see [`time_step`]. Fractions add up before they are dropped.
    pub step: f32,
}

impl PictureSpan {
    pub fn len(&self) -> usize {
        self.cells.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Positions between two temporal patches of a video that each span `seconds`.
pub fn time_step(tokens_per_second: f64, seconds: f64) -> f32 {
    tokens_per_second as f32 * seconds as f32
}

/// (t, h, w) of each of `len` tokens, and what is added to a later token's index to get its position (on all axes).
/// `spans` ascend and do not overlap; what lies outside them is text. Errors (Code::Usage) where a span lies outside the sequence or a
/// position does not fit.
pub fn positions(len: usize, spans: &[PictureSpan]) -> Result<(Vec<[u32; 3]>, i64)> {
    let bad = |cause: &str| {
        Error::new(
            Code::Usage,
            "the positions of a sequence with pictures cannot be laid out",
            cause,
            "give fewer frames or a higher --fps",
        )
    };
    let mut out: Vec<[u32; 3]> = Vec::with_capacity(len);
    let mut current = 0u64;
    let mut highest = 0u64;
    for span in spans {
        if span.start < out.len() || span.start + span.len() > len {
            return Err(bad("its pictures do not lie inside it"));
        }
        text(&mut out, span.start, &mut current);
        let [frames, rows, cols] = span.cells;
        for t in 0..frames as u64 {
            // In float32, as the reference counts; the cast stops at its ends.
            let t = current.saturating_add((t as f32 * span.step) as u64);
            for (r, c) in (0..rows as u64).flat_map(|r| (0..cols as u64).map(move |c| (r, c))) {
                let p = [t, current + r, current + c];
                highest = highest.max(p[0]).max(p[1]).max(p[2]);
                out.push(p.map(|p| p as u32));
            }
        }
        current += rows.max(cols) as u64;
    }
    if out.len() < len {
        text(&mut out, len, &mut current);
        highest = highest.max(current - 1);
    }
    // Generated tokens go on from the highest position; leave room for them.
    if highest > u64::from(u32::MAX / 2) {
        return Err(bad("a position is larger than 31 bits hold"));
    }
    Ok((out, highest as i64 + 1 - len as i64))
}

fn text(out: &mut Vec<[u32; 3]>, until: usize, current: &mut u64) {
    while out.len() < until {
        out.push([*current as u32; 3]);
        *current += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_counts_up() {
        let (p, delta) = positions(4, &[]).unwrap();
        assert_eq!(p, [[0; 3], [1; 3], [2; 3], [3; 3]]);
        assert_eq!(delta, 0);
    }

    #[test]
    fn a_picture_takes_as_much_as_its_longer_side() {
        let image = PictureSpan {
            start: 2,
            cells: [1, 2, 3],
            step: 1.0,
        };
        let (p, delta) = positions(10, &[image]).unwrap();
        let want = [
            [2, 2, 2],
            [2, 2, 3],
            [2, 2, 4],
            [2, 3, 2],
            [2, 3, 3],
            [2, 3, 4],
        ];
        assert_eq!(p[2..8], want);
        assert_eq!(p[8..], [[5; 3], [6; 3]]);
        assert_eq!(delta, 7 - 10);
    }

    #[test]
    fn frames_lie_a_step_apart_and_may_reach_beyond_the_text() {
        let video = PictureSpan {
            start: 0,
            cells: [3, 1, 2],
            step: 4.0,
        };
        let (p, delta) = positions(7, &[video]).unwrap();
        assert_eq!(p[4..6], [[8, 0, 0], [8, 0, 1]]);
        assert_eq!(
            p[6], [2; 3],
            "text goes on after height and width, not after time"
        );
        assert_eq!(delta, 9 - 7);
    }

    #[test]
    fn fractions_of_a_step_add_up() {
        assert_eq!(time_step(2.0, 1.0), 2.0);
        let times = |seconds| {
            let video = PictureSpan {
                start: 0,
                cells: [5, 1, 1],
                step: time_step(2.0, seconds),
            };
            let (p, _) = positions(5, &[video]).unwrap();
            p.iter().map(|p| p[0]).collect::<Vec<_>>()
        };
        assert_eq!(times(0.5), [0, 1, 2, 3, 4]);
        assert_eq!(times(2.0 / 3.3), [0, 1, 2, 3, 4]);
        assert_eq!(times(0.7), [0, 1, 2, 4, 5]);
        assert_eq!(times(0.0), [0; 5]);
    }

    #[test]
    fn spans_outside_the_sequence_are_refused() {
        let span = |start, cells| PictureSpan {
            start,
            cells,
            step: 1.0,
        };
        assert!(positions(3, &[span(0, [1, 2, 2])]).is_err());
        assert!(positions(9, &[span(0, [1, 2, 2]), span(3, [1, 1, 1])]).is_err());
        let far = PictureSpan {
            start: 0,
            cells: [9, 1, 1],
            step: (u32::MAX / 4) as f32,
        };
        assert!(positions(9, &[far]).is_err());
    }
}
