//! Weights from one type to another, in pieces: round to nearest, ties to even; what is lost is counted.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::units::Dtype;

/// What was met in a piece of a tensor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Not a number, in the source.
    pub nan: u64,
    /// Infinite in the source.
    pub infinite: u64,
    /// Finite in the source, infinite in the target.
    pub overflow: u64,
}

/// Elements converted at a time: the float32 copy of a piece stays in the first-level cache.
const PIECE: usize = 1024;

/// Writes the elements of `source` (little-endian, of type `from`, at any alignment) as `to` into `out`.
///
/// # Panics
/// When the two slices do not hold the same number of whole elements (an internal mistake).
pub(crate) fn cast(source: &[u8], from: Dtype, out: &mut [u8], to: Dtype) -> Counts {
    let count = source.len() / from.bytes();
    assert_eq!(count * from.bytes(), source.len());
    assert_eq!(count * to.bytes(), out.len());
    if from == to {
        out.copy_from_slice(source);
        return nonfinite(source, from);
    }
    let mut total = nonfinite(source, from);
    let mut wide = [0f32; PIECE];
    let pieces = source.chunks(PIECE * from.bytes());
    for (piece, target) in pieces.zip(out.chunks_mut(PIECE * to.bytes())) {
        let wide = &mut wide[..piece.len() / from.bytes()];
        widen(piece, from, wide);
        narrow(wide, target, to);
        total.overflow += infinite(target, to);
    }
    // Infinities of the source stay infinite: they are no overflow.
    total.overflow -= total.infinite;
    total
}

fn widen(source: &[u8], from: Dtype, out: &mut [f32]) {
    match from {
        Dtype::F32 => {
            let (values, _) = source.as_chunks::<4>();
            for (o, v) in out.iter_mut().zip(values) {
                *o = f32::from_le_bytes(*v);
            }
        }
        Dtype::BF16 => {
            let (values, _) = source.as_chunks::<2>();
            for (o, v) in out.iter_mut().zip(values) {
                *o = f32::from_bits(u32::from(u16::from_le_bytes(*v)) << 16);
            }
        }
        Dtype::F16 => {
            let (values, _) = source.as_chunks::<2>();
            let mut half = [f16::ZERO; PIECE];
            let half = &mut half[..out.len()];
            for (h, v) in half.iter_mut().zip(values) {
                *h = f16::from_le_bytes(*v);
            }
            half.convert_to_f32_slice(out);
        }
    }
}

fn narrow(wide: &[f32], out: &mut [u8], to: Dtype) {
    match to {
        Dtype::F32 => {
            let (values, _) = out.as_chunks_mut::<4>();
            for (o, v) in values.iter_mut().zip(wide) {
                *o = v.to_le_bytes();
            }
        }
        Dtype::BF16 => {
            let (values, _) = out.as_chunks_mut::<2>();
            for (o, v) in values.iter_mut().zip(wide) {
                *o = bf16_bits(*v).to_le_bytes();
            }
        }
        Dtype::F16 => {
            let (values, _) = out.as_chunks_mut::<2>();
            let mut half = [f16::ZERO; PIECE];
            let half = &mut half[..wide.len()];
            half.convert_from_f32_slice(wide);
            for (o, h) in values.iter_mut().zip(half.iter()) {
                *o = h.to_le_bytes();
            }
        }
    }
}

/// Without a branch, so that the loop over it becomes SIMD. Equal to `half::bf16::from_f32` for every input.
fn bf16_bits(value: f32) -> u16 {
    let x = value.to_bits();
    let rounded = x.wrapping_add(0x7fff + ((x >> 16) & 1)) >> 16;
    // Rounding could carry a NaN into infinity: keep its upper bits and make it quiet.
    let quiet = (x >> 16) | 0x40;
    (if x & 0x7fff_ffff > 0x7f80_0000 {
        quiet
    } else {
        rounded
    }) as u16
}

fn nonfinite(source: &[u8], dtype: Dtype) -> Counts {
    let infinite = infinite(source, dtype);
    let special = special(source, dtype);
    Counts {
        nan: special - infinite,
        infinite,
        overflow: 0,
    }
}

fn infinite(source: &[u8], dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F16 => count16(source, |x| x & 0x7fff == 0x7c00),
        Dtype::BF16 => count16(source, |x| x & 0x7fff == 0x7f80),
        Dtype::F32 => count32(source, |x| x & 0x7fff_ffff == 0x7f80_0000),
    }
}

/// NaN or infinite: the exponent is all ones.
fn special(source: &[u8], dtype: Dtype) -> u64 {
    match dtype {
        Dtype::F16 => count16(source, |x| x & 0x7c00 == 0x7c00),
        Dtype::BF16 => count16(source, |x| x & 0x7f80 == 0x7f80),
        Dtype::F32 => count32(source, |x| x & 0x7f80_0000 == 0x7f80_0000),
    }
}

fn count16(source: &[u8], is: impl Fn(u16) -> bool) -> u64 {
    let (values, _) = source.as_chunks::<2>();
    // Pieces short enough for a 16-bit count keep the loop in narrow lanes.
    values
        .chunks(32 * 1024)
        .map(|piece| {
            let hits = piece.iter().fold(0u16, |n, v| {
                n.wrapping_add(u16::from(is(u16::from_le_bytes(*v))))
            });
            u64::from(hits)
        })
        .sum()
}

fn count32(source: &[u8], is: impl Fn(u32) -> bool) -> u64 {
    let (values, _) = source.as_chunks::<4>();
    values
        .chunks(1 << 20)
        .map(|piece| {
            let hits = piece
                .iter()
                .fold(0u32, |n, v| n + u32::from(is(u32::from_le_bytes(*v))));
            u64::from(hits)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn bf16_rounds_as_half_does() {
        // Every upper half with the lower halves around which rounding decides.
        for upper in 0..=0xffffu32 {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(upper << 16 | lower);
                assert_eq!(
                    bf16_bits(value),
                    bf16::from_f32(value).to_bits(),
                    "{value:e}"
                );
            }
        }
    }

    #[test]
    fn every_16_bit_value_survives_widening_and_back() {
        let all: Vec<u8> = (0..=0xffffu16).flat_map(u16::to_le_bytes).collect();
        for dtype in [Dtype::F16, Dtype::BF16] {
            let mut wide = vec![0; all.len() * 2];
            let up = cast(&all, dtype, &mut wide, Dtype::F32);
            let mut back = vec![0; all.len()];
            let down = cast(&wide, Dtype::F32, &mut back, dtype);
            assert_eq!((up.overflow, down.overflow), (0, 0));
            assert_eq!((up.nan, up.infinite), (down.nan, down.infinite));
            let (was, is) = (all.as_chunks::<2>().0, back.as_chunks::<2>().0);
            for (w, i) in was.iter().zip(is) {
                let (w, i) = (u16::from_le_bytes(*w), u16::from_le_bytes(*i));
                let nan = match dtype {
                    Dtype::F16 => f16::from_bits(w).is_nan(),
                    _ => bf16::from_bits(w).is_nan(),
                };
                // A signalling NaN may become quiet.
                let quiet = if dtype == Dtype::F16 { 0x200 } else { 0x40 };
                assert!(w == i || nan && w | quiet == i, "{w:04x} became {i:04x}");
            }
        }
    }

    #[test]
    fn float16_is_rounded_to_nearest_even_and_overflow_is_counted() {
        let values = [
            65504.0,
            65519.0,
            65520.0,
            -1e30,
            f32::INFINITY,
            f32::NAN,
            2049.0,
            2051.0,
            0.0,
        ];
        let source: Vec<u8> = values.iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
        let mut out = vec![0; values.len() * 2];
        let counts = cast(&source, Dtype::F32, &mut out, Dtype::F16);
        let expected = Counts {
            nan: 1,
            infinite: 1,
            overflow: 2,
        };
        assert_eq!(counts, expected);
        let back: Vec<f32> = out
            .chunks(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect();
        assert_eq!(&back[..2], &[65504.0, 65504.0]);
        assert_eq!(back[2], f32::INFINITY);
        assert_eq!(back[3], f32::NEG_INFINITY);
        assert!(back[5].is_nan());
        assert_eq!(&back[6..], &[2048.0, 2052.0, 0.0]);
    }

    #[test]
    fn lengths_around_the_piece_and_odd_addresses() {
        for count in [0, 1, 7, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5] {
            let mut source = vec![0u8];
            source.extend((0..count).flat_map(|i| bf16::from_f32(i as f32 - 3.5).to_le_bytes()));
            let mut out = vec![0; count * 2];
            cast(&source[1..], Dtype::BF16, &mut out, Dtype::F16);
            for (i, o) in out.chunks(2).enumerate() {
                let expected = f16::from_f32(bf16::from_f32(i as f32 - 3.5).to_f32());
                assert_eq!(f16::from_le_bytes([o[0], o[1]]), expected);
            }
        }
    }

    #[test]
    fn counts_do_not_wrap() {
        let source = vec![0xffu8; 300_000];
        let mut out = vec![0; source.len()];
        let counts = cast(&source, Dtype::BF16, &mut out, Dtype::BF16);
        assert_eq!(counts.nan, 150_000);
    }
}
