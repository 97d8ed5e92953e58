//! Plain Rust, eight lanes: what every CPU runs, and the model the intrinsics are compared with.

use super::{Bf16Split, Simd};

/// Every CPU can do this.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

const LANES: usize = 8;
type V = [f32; LANES];

#[inline(always)]
fn map(a: V, f: impl Fn(f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i]))
}

#[inline(always)]
fn zip(a: V, b: V, f: impl Fn(f32, f32) -> f32) -> V {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    type V = V;
    type Bf16 = Bf16Split;
    const LANES: usize = LANES;
    const TILE_ROWS: usize = 3;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> V {
        // SAFETY: the caller lends LANES floats; an unaligned read takes any address.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> V {
        // SAFETY: the caller lends LANES 2-byte elements; an unaligned read takes any address.
        let halves = unsafe { p.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        std::array::from_fn(|i| f32::from_bits(u32::from(u16::from_le_bytes(halves[i])) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_even(self, p: *const u8) -> V {
        // SAFETY: the caller lends 2·LANES 2-byte elements; an unaligned read takes any address.
        let words = unsafe { p.cast::<[[u8; 4]; LANES]>().read_unaligned() };
        std::array::from_fn(|i| f32::from_bits(u32::from_le_bytes(words[i]) << 16))
    }
    #[inline(always)]
    unsafe fn load_bf16_odd(self, p: *const u8) -> V {
        // SAFETY: the caller lends 2·LANES 2-byte elements; an unaligned read takes any address.
        let words = unsafe { p.cast::<[[u8; 4]; LANES]>().read_unaligned() };
        std::array::from_fn(|i| f32::from_bits(u32::from_le_bytes(words[i]) & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> V {
        // SAFETY: the caller lends LANES 2-byte elements; an unaligned read takes any address.
        let halves = unsafe { p.cast::<[[u8; 2]; LANES]>().read_unaligned() };
        std::array::from_fn(|i| half::f16::from_le_bytes(halves[i]).to_f32())
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: V) {
        // SAFETY: the caller lends LANES floats; an unaligned write takes any address.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_split(self, even: *mut f32, odd: *mut f32, v: V) {
        // SAFETY: the caller lends half a vector at each; unaligned writes take any address.
        unsafe {
            even.cast::<[f32; LANES / 2]>()
                .write_unaligned([v[0], v[2], v[4], v[6]]);
            odd.cast::<[f32; LANES / 2]>()
                .write_unaligned([v[1], v[3], v[5], v[7]]);
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: V) {
        let halves: [u16; LANES] = std::array::from_fn(|i| (v[i].to_bits() >> 16) as u16);
        // SAFETY: the caller lends LANES u16; an unaligned write takes any address.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(halves) }
    }
    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // Not `mul_add`: without the instruction that is a slow library call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn nearest(self, x: V) -> V {
        // Adding 1.5·2^23 leaves no bits for a fraction.
        const SHIFT: f32 = 12_582_912.0;
        map(x, |x| (x + SHIFT) - SHIFT)
    }
    #[inline(always)]
    fn exp2_whole(self, n: V) -> V {
        map(n, |n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    fn by_sign(self, x: V, neg: V, pos: V) -> V {
        std::array::from_fn(|i| {
            if x[i].is_sign_negative() {
                neg[i]
            } else {
                pos[i]
            }
        })
    }
    #[inline(always)]
    fn abs(self, x: V) -> V {
        map(x, f32::abs)
    }
    #[inline(always)]
    fn round_bf16(self, x: V) -> V {
        map(x, |x| half::bf16::from_f32(x).to_f32())
    }
    #[inline(always)]
    fn sum(self, x: V) -> f32 {
        ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
    }
    #[inline(always)]
    fn sum4(self, x: [V; 4]) -> [f32; 4] {
        x.map(|v| self.sum(v))
    }
    #[inline(always)]
    fn largest(self, x: V) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}
}
