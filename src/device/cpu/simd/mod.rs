//! SIMD as capability types. A value of [`Avx2`], [`Avx512`] or [`Avx512Bf16`] exists only on a CPU that has those
//! instructions, so the arithmetic methods of [`Simd`] are safe; only what touches memory is `unsafe`.
//!
//! Each kernel is written once, generic over `S: Simd`, and entered through [`Isa::run`], which puts the whole inlined
//! kernel inside one function with the right `#[target_feature]`. Every function below it must be `#[inline(always)]`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
#[cfg(test)]
mod tests;

pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use {
    avx2::Avx2,
    avx512::{Avx512, Avx512Bf16},
};

use crate::units::Dtype;

/// The largest number of lanes any [`Simd`] has; rows of scratch are padded to multiples of it.
pub(crate) const MAX_LANES: usize = 16;

/// Arithmetic on `LANES` float32 at a time. The same method order on the same values gives the same bits on one instruction set.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// `LANES` float32.
    type V: Copy;
    /// How bfloat16 weights are multiplied.
    type Bf16: Product<Self>;
    const LANES: usize;
    /// Rows of a product's tile, as many as the registers hold beside four weight rows: 4 of 32 registers, 3 of 16.
    const TILE_ROWS: usize;

    fn splat(self, x: f32) -> Self::V;
    /// # Safety
    /// `LANES` float32 are readable at `p`; any alignment.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// # Safety
    /// `LANES` bfloat16 are readable at `p`; any alignment.
    unsafe fn load_bf16(self, p: *const u8) -> Self::V;
    /// The elements with an even index of 2·`LANES` bfloat16: lower halves of 32-bit words, so no lane moves.
    /// # Safety
    /// 2·`LANES` bfloat16 are readable at `p`; any alignment.
    unsafe fn load_bf16_even(self, p: *const u8) -> Self::V;
    /// Those with an odd index: upper halves.
    /// # Safety
    /// 2·`LANES` bfloat16 are readable at `p`; any alignment.
    unsafe fn load_bf16_odd(self, p: *const u8) -> Self::V;
    /// # Safety
    /// `LANES` float16 are readable at `p`; any alignment.
    unsafe fn load_f16(self, p: *const u8) -> Self::V;
    /// # Safety
    /// `LANES` float32 are writable at `p`; any alignment.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Stores the lanes with an even index at `even`, those with an odd one at `odd`.
    /// # Safety
    /// `LANES / 2` float32 are writable at each; any alignment.
    unsafe fn store_split(self, even: *mut f32, odd: *mut f32, v: Self::V);
    /// Stores the upper halves: exact when `v` holds bfloat16 values (see [`Simd::round_bf16`]).
    /// # Safety
    /// `LANES` u16 are writable at `p`; any alignment.
    unsafe fn store_bf16(self, p: *mut u16, v: Self::V);

    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a·b + c`: fused where the instruction set has it.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` when either is NaN (so a NaN in `b` stays).
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` when either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The nearest whole number, ties to even, for |x| < 2^22.
    fn nearest(self, x: Self::V) -> Self::V;
    /// 2^n for whole n in -126..=127.
    fn exp2_whole(self, n: Self::V) -> Self::V;
    /// Lane by lane: `neg` where `x` has its sign bit set, else `pos`.
    fn by_sign(self, x: Self::V, neg: Self::V, pos: Self::V) -> Self::V;
    fn abs(self, x: Self::V) -> Self::V;
    /// Rounded once to bfloat16 (to nearest even; NaN stays NaN), still as float32.
    fn round_bf16(self, x: Self::V) -> Self::V;
    /// The sum of the lanes, neighbours first: ((0+1)+(2+3))+((4+5)+(6+7)) and so on.
    fn sum(self, x: Self::V) -> f32;
    /// Four sums at once, each bit-identical to [`Simd::sum`].
    fn sum4(self, x: [Self::V; 4]) -> [f32; 4];
    fn largest(self, x: Self::V) -> f32;
    /// Asks for the cache line of `p`, which need not be mapped, to come into the second-level cache: asked into the first, the
    /// lines on their way occupy what the loads of the present need (a product with four rows then takes half as long again).
    fn prefetch(self, p: *const u8);

    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// # Safety
    /// `n < LANES` float32 are readable at `p`. The other lanes are zero.
    #[inline(always)]
    unsafe fn load_some(self, p: *const f32, n: usize) -> Self::V {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: the caller lends n floats, n < LANES <= MAX_LANES.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }

    /// # Safety
    /// `n < LANES` float32 are writable at `p`.
    #[inline(always)]
    unsafe fn store_some(self, p: *mut f32, v: Self::V, n: usize) {
        let mut lanes = [0f32; MAX_LANES];
        // SAFETY: the caller lends n floats, n < LANES <= MAX_LANES.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }

    /// # Safety
    /// `n <= LANES` float32 are readable at `p`. The other lanes are zero.
    #[inline(always)]
    unsafe fn load_upto(self, p: *const f32, n: usize) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe {
            if n == Self::LANES {
                self.load(p)
            } else {
                self.load_some(p, n)
            }
        }
    }

    /// # Safety
    /// `n <= LANES` float32 are writable at `p`.
    #[inline(always)]
    unsafe fn store_upto(self, p: *mut f32, v: Self::V, n: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            if n == Self::LANES {
                self.store(p, v);
            } else {
                self.store_some(p, v, n);
            }
        }
    }
}

/// A type weights are stored in.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    const BYTES: usize;
    /// # Safety
    /// `S::LANES` elements are readable at `p`; any alignment.
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V;
}

#[derive(Clone, Copy)]
pub(crate) struct F32;
#[derive(Clone, Copy)]
pub(crate) struct F16;
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

impl Element for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe { s.load(p.cast()) }
    }
}
impl Element for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe { s.load_f16(p) }
    }
}
impl Element for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, p: *const u8) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe { s.load_bf16(p) }
    }
}

/// `n <= S::LANES` elements of `dtype` as float32, the other lanes zero.
///
/// # Safety
/// `n` elements are readable at `p`; any alignment.
#[inline(always)]
pub(crate) unsafe fn load_dtype<S: Simd>(s: S, dtype: Dtype, p: *const u8, n: usize) -> S::V {
    let mut bytes = [0u8; MAX_LANES * 4];
    // SAFETY: n elements are readable at p; a partial vector goes through a buffer large enough for any element.
    unsafe {
        let p = if n < S::LANES {
            std::ptr::copy_nonoverlapping(p, bytes.as_mut_ptr(), n * dtype.bytes());
            bytes.as_ptr()
        } else {
            p
        };
        match dtype {
            Dtype::F32 => s.load(p.cast()),
            Dtype::F16 => s.load_f16(p),
            Dtype::BF16 => s.load_bf16(p),
        }
    }
}

/// The inner step of a matrix product: which activations and weights, `STEP` of each in `PHASES` vectors, and how they enter the
/// accumulator.
pub(crate) trait Product<S: Simd>: Copy + 'static {
    type Operand: Copy;
    /// Elements of K a step takes.
    const STEP: usize;
    /// Vectors a step takes, one after the other.
    const PHASES: usize;
    const ACT_BYTES: usize;
    const WEIGHT_BYTES: usize;
    /// # Safety
    /// `STEP` activations are readable at `p`.
    unsafe fn act(s: S, p: *const u8, phase: usize) -> Self::Operand;
    /// # Safety
    /// `STEP` weights are readable at `p`; any alignment.
    unsafe fn weight(s: S, p: *const u8, phase: usize) -> Self::Operand;
    fn accumulate(s: S, a: Self::Operand, w: Self::Operand, acc: S::V) -> S::V;
}

/// Weights widened to float32, fused multiply-add with float32 activations.
impl<S: Simd, E: Element> Product<S> for E {
    type Operand = S::V;
    const STEP: usize = S::LANES;
    const PHASES: usize = 1;
    const ACT_BYTES: usize = 4;
    const WEIGHT_BYTES: usize = E::BYTES;
    #[inline(always)]
    unsafe fn act(s: S, p: *const u8, _phase: usize) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe { s.load(p.cast()) }
    }
    #[inline(always)]
    unsafe fn weight(s: S, p: *const u8, _phase: usize) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe { E::load(s, p) }
    }
    #[inline(always)]
    fn accumulate(s: S, a: S::V, w: S::V, acc: S::V) -> S::V {
        s.fma(a, w, acc)
    }
}

/// Bfloat16 weights in their 32-bit words: first the even ones, widened by a shift, then the odd ones, by a mask. Activations lie
/// accordingly ([`Format::Split`]): the even elements of 2·`LANES`, then the odd ones.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Split;

impl<S: Simd> Product<S> for Bf16Split {
    type Operand = S::V;
    const STEP: usize = 2 * S::LANES;
    const PHASES: usize = 2;
    const ACT_BYTES: usize = 4;
    const WEIGHT_BYTES: usize = 2;
    #[inline(always)]
    unsafe fn act(s: S, p: *const u8, phase: usize) -> S::V {
        // SAFETY: the caller lends 2·LANES activations.
        unsafe { s.load(p.cast::<f32>().add(phase * S::LANES)) }
    }
    #[inline(always)]
    unsafe fn weight(s: S, p: *const u8, phase: usize) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe {
            if phase == 0 {
                s.load_bf16_even(p)
            } else {
                s.load_bf16_odd(p)
            }
        }
    }
    #[inline(always)]
    fn accumulate(s: S, a: S::V, w: S::V, acc: S::V) -> S::V {
        s.fma(a, w, acc)
    }
}

/// How products want activations of a dtype to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Float32, in order.
    Plain,
    /// Float32, in groups of 2·lanes: the even elements, then the odd ones.
    Split { lanes: usize },
    /// Bfloat16, in order.
    Packed,
}

/// Work written for any instruction set. `run` must be `#[inline(always)]`, and so must all it calls.
pub(crate) trait Op {
    fn run<S: Simd>(self, s: S);
}

/// The instruction set chosen at start.
#[derive(Clone, Copy)]
pub(crate) enum Isa {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512Bf16),
}

/// Every name [`Isa::named`] knows, best first.
pub(crate) const ISA_NAMES: [&str; 4] = ["avx512-bf16", "avx512", "avx2", "portable"];

impl Isa {
    /// The best this CPU has.
    pub(crate) fn best() -> Isa {
        ISA_NAMES
            .iter()
            .find_map(|name| Isa::named(name))
            .unwrap_or(Isa::Portable(Portable))
    }

    /// `None` when the CPU lacks it or the name is unknown.
    pub(crate) fn named(name: &str) -> Option<Isa> {
        match name {
            "portable" => Some(Isa::Portable(Portable)),
            #[cfg(target_arch = "x86_64")]
            "avx2" => Avx2::detect().map(Isa::Avx2),
            #[cfg(target_arch = "x86_64")]
            "avx512" => Avx512::detect().map(Isa::Avx512),
            #[cfg(target_arch = "x86_64")]
            "avx512-bf16" => Avx512Bf16::detect().map(Isa::Avx512Bf16),
            _ => None,
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Isa::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(_) => "avx512-bf16",
        }
    }

    /// How activations for products with weights of this dtype lie.
    pub(crate) fn format(self, dtype: Dtype) -> Format {
        match (self, dtype) {
            (_, Dtype::F16 | Dtype::F32) => Format::Plain,
            (Isa::Portable(_), _) => Format::Split {
                lanes: Portable::LANES,
            },
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2(_), _) => Format::Split { lanes: Avx2::LANES },
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512(_), _) => Format::Split {
                lanes: Avx512::LANES,
            },
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Bf16(_), _) => Format::Packed,
        }
    }

    /// As [`Isa::format`], for activations that stay float32.
    pub(crate) fn exact_format(self, dtype: Dtype) -> Format {
        match self.format(dtype) {
            Format::Packed => Format::Split { lanes: MAX_LANES },
            other => other,
        }
    }

    #[inline]
    pub(crate) fn run<O: Op>(self, op: O) {
        match self {
            Isa::Portable(s) => op.run(s),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2(s) => s.enter(op),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512(s) => s.enter(op),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16(s) => s.enter(op),
        }
    }
}
