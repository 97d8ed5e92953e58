//! exp((score − best) / temperature) in float32 by additions and products alone, which compilers turn into vector code: a row of a large
//! vocabulary asks for a hundred thousand of them a token. The same bits on every machine.

use super::STRIDE;

/// Below this e^x is no normal float32 any more and counts as zero.
const LEAST: f32 = -87.0;
/// 1.5 · 2²³: adding and taking it away again rounds to a whole number, which stands in the lowest bits in between.
const ROUND: f32 = 12_582_912.0;
/// ln 2 in two parts, the first with few enough bits that its multiples up to 127 are exact (Cody and Waite 1980).
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// Relative to the best, so that a tiny temperature overflows nothing: the best weighs 1 whatever it is. `score` ≤ `best`, both finite;
/// relative error below 2⁻²² (1 + |x|) with x the exponent.
#[inline(always)]
pub(super) fn weight(score: f32, best: f32, temperature: f32) -> f32 {
    let x = (score - best) / temperature;
    let inside = x.max(LEAST);
    let shifted = inside * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (inside - n * LN2_HIGH) - n * LN2_LOW;
    // e^r on |r| ≤ ln 2 / 2: Taylor's series, its first term left out below 2⁻²⁴.
    let tail = 1.0 / 720.0 + r * (1.0 / 5040.0);
    let tail = 1.0 / 120.0 + r * tail;
    let tail = 1.0 / 24.0 + r * tail;
    let tail = 1.0 / 6.0 + r * tail;
    let tail = 0.5 + r * tail;
    let e = 1.0 + (r + r * r * tail);
    // 2ⁿ by its exponent bits: n lies in the lowest bits of `shifted`.
    let power = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    if x < LEAST { 0.0 } else { e * power }
}

/// Of up to [`STRIDE`] scores; zeros after them.
#[inline]
pub(super) fn weights(scores: &[f32], best: f32, temperature: f32) -> [f32; STRIDE] {
    let mut found = [0.0; STRIDE];
    for (to, &score) in found.iter_mut().zip(scores) {
        *to = weight(score, best, temperature);
    }
    found
}

/// Sixteen running sums side by side: one would be a chain of dependent steps.
#[inline]
pub(super) fn sum(weights: &[f32; STRIDE]) -> f32 {
    let mut lanes = [0f32; 16];
    for part in weights.as_chunks::<16>().0 {
        for (lane, w) in lanes.iter_mut().zip(part) {
            *lane += w;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_the_library_s_exp() {
        for i in 0..200_000 {
            let x = -(i as f32) * 87.0 / 200_000.0;
            let want = f64::from(x).exp();
            let error = (f64::from(weight(x, 0.0, 1.0)) / want - 1.0).abs();
            assert!(error < 2.4e-7 * f64::from(1.0 - x), "x {x}: {error:e}");
        }
        assert_eq!(weight(3.5, 3.5, f32::MIN_POSITIVE), 1.0);
        assert_eq!(weight(3.0, 3.5, f32::MIN_POSITIVE), 0.0);
        assert_eq!(weight(-100.0, 0.0, 1.0), 0.0);
        assert_eq!(weight(f32::MIN, f32::MAX, 1.0), 0.0);
    }

    #[test]
    fn a_part_ends_where_its_scores_end() {
        let found = weights(&[0.0, -1.0, -2.0], 0.0, f32::MAX);
        assert_eq!(found.iter().filter(|w| **w > 0.0).count(), 3);
        assert_eq!(sum(&found), 3.0);
    }
}
