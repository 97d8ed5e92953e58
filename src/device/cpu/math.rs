//! exp and erfc on vectors, the same code for every row.

use super::simd::Simd;

/// e^x: relative error below 2e-7 for x in [-87.3, 88.3]; clamped outside (1.2e-38, 2.4e38); NaN stays NaN.
///
/// x = n·ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r (Cephes `expf`), 2^n through the exponent bits.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let x = s.max(s.splat(-87.336_54), s.min(s.splat(88.376_26), x));
    let n = s.nearest(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_HIGH), x);
    let r = s.fma(n, s.splat(-LN2_LOW), r);
    let mut p = s.splat(1.987_569_1e-4);
    for c in [
        1.398_199_9e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        0.5,
    ] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.fma(s.mul(r, r), p, s.add(r, s.splat(1.0)));
    s.mul(p, s.exp2_whole(n))
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.zero(), x))))
}

/// erfc(x) for x >= 0: relative error below 2e-7 in exact arithmetic (Numerical Recipes' Chebyshev fit, `erfcc`).
#[inline(always)]
fn erfc_positive<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let t = s.div(one, s.fma(x, s.splat(0.5), one));
    let mut p = s.splat(0.170_872_77);
    for c in [
        -0.822_152_23,
        1.488_515_9,
        -1.135_204,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2_f32,
    ] {
        p = s.fma(p, t, s.splat(c));
    }
    s.mul(t, exp(s, s.sub(p, s.mul(x, x))))
}

/// x·Φ(x) = x/2·erfc(-x/√2), the exact GELU: computed from erfc so that the left tail keeps its relative precision.
#[inline(always)]
pub(crate) fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let tail = erfc_positive(s, s.mul(s.abs(x), s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    let erfc = s.by_sign(x, tail, s.sub(s.splat(2.0), tail));
    s.mul(s.mul(x, s.splat(0.5)), erfc)
}

/// x·sigmoid(x).
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::V) -> S::V {
    s.mul(x, sigmoid(s, x))
}
