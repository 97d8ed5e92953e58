//! AVX-512 (F, BW, DQ, VL): sixteen lanes, thirty-two registers; and AVX512-BF16, whose `vdpbf16ps` multiplies pairs of
//! bfloat16 without widening them.

use std::arch::x86_64::*;

use super::{Bf16Split, Op, Product, Simd};

/// Proof that this CPU has AVX-512 F, BW, DQ and VL (which imply AVX2, FMA and F16C).
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Proof that this CPU has AVX512-BF16 besides.
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Avx512> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Avx512(()))
    }

    #[inline]
    pub(crate) fn enter<O: Op>(self, op: O) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn inner<O: Op>(s: Avx512, op: O) {
            op.run(s)
        }
        // SAFETY: `self` exists only where `detect` saw these features.
        unsafe { inner(self, op) }
    }
}

impl Avx512Bf16 {
    pub(crate) fn detect() -> Option<Avx512Bf16> {
        (Avx512::detect().is_some() && is_x86_feature_detected!("avx512bf16"))
            .then_some(Avx512Bf16(()))
    }

    #[inline]
    pub(crate) fn enter<O: Op>(self, op: O) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
        fn inner<O: Op>(s: Avx512Bf16, op: O) {
            op.run(s)
        }
        // SAFETY: `self` exists only where `detect` saw these features.
        unsafe { inner(self, op) }
    }
}

/// Pairs of bfloat16: acc[i] += a[2i]·w[2i] + a[2i+1]·w[2i+1], 32 elements a step (`vdpbf16ps`; denormals count as zero).
#[derive(Clone, Copy)]
pub(crate) struct Bf16Pairs;

// SAFETY of every block below: the `Avx512Bf16` passed in exists only where `detect` saw the features; the caller lends memory.
impl Product<Avx512Bf16> for Bf16Pairs {
    type Operand = __m512i;
    const STEP: usize = 32;
    const PHASES: usize = 1;
    const ACT_BYTES: usize = 2;
    const WEIGHT_BYTES: usize = 2;
    #[inline(always)]
    unsafe fn act(_s: Avx512Bf16, p: *const u8, _phase: usize) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn weight(_s: Avx512Bf16, p: *const u8, _phase: usize) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    fn accumulate(_s: Avx512Bf16, a: __m512i, w: __m512i, acc: __m512) -> __m512 {
        // SAFETY: see above. Both types are 64 bytes of bfloat16 bits.
        unsafe {
            let a = std::mem::transmute::<__m512i, __m512bh>(a);
            let w = std::mem::transmute::<__m512i, __m512bh>(w);
            _mm512_dpbf16_ps(acc, a, w)
        }
    }
}

/// a0+a1, a2+a3, b0+b1, b2+b3 in each 128-bit quarter: what `hadd` does in AVX.
///
/// # Safety
/// The CPU has AVX-512 F.
#[inline(always)]
unsafe fn neighbours(a: __m512, b: __m512) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        _mm512_add_ps(
            _mm512_shuffle_ps::<0b10_00_10_00>(a, b),
            _mm512_shuffle_ps::<0b11_01_11_01>(a, b),
        )
    }
}

// SAFETY of every block inside: `self` exists only where `detect` saw the features; memory is lent by the caller, and every
// access is an unaligned one.
macro_rules! simd_with_512_bits {
    ($isa:ty, $bf16:ty) => {
        impl Simd for $isa {
            type V = __m512;
            type Bf16 = $bf16;
            const LANES: usize = 16;
            const TILE_ROWS: usize = 4;

            #[inline(always)]
            fn splat(self, x: f32) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_set1_ps(x) }
            }
            #[inline(always)]
            unsafe fn load(self, p: *const f32) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_loadu_ps(p) }
            }
            #[inline(always)]
            unsafe fn load_bf16(self, p: *const u8) -> __m512 {
                // SAFETY: see above. A bfloat16 is the upper half of a float32.
                unsafe {
                    let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
                }
            }
            #[inline(always)]
            unsafe fn load_bf16_even(self, p: *const u8) -> __m512 {
                // SAFETY: see above.
                unsafe {
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_si512(p.cast())))
                }
            }
            #[inline(always)]
            unsafe fn load_bf16_odd(self, p: *const u8) -> __m512 {
                // SAFETY: see above.
                unsafe {
                    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                    _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p.cast()), upper))
                }
            }
            #[inline(always)]
            unsafe fn load_f16(self, p: *const u8) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut f32, v: __m512) {
                // SAFETY: see above.
                unsafe { _mm512_storeu_ps(p, v) }
            }
            #[inline(always)]
            unsafe fn store_split(self, even: *mut f32, odd: *mut f32, v: __m512) {
                // SAFETY: see above.
                unsafe {
                    let order =
                        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
                    let split = _mm512_permutexvar_ps(order, v);
                    _mm256_storeu_ps(even, _mm512_castps512_ps256(split));
                    _mm256_storeu_ps(odd, _mm512_extractf32x8_ps::<1>(split));
                }
            }
            #[inline(always)]
            unsafe fn store_bf16(self, p: *mut u16, v: __m512) {
                // SAFETY: see above. cvtepi32_epi16 keeps the lower 16 bits of each lane.
                unsafe {
                    let high = _mm512_srli_epi32::<16>(_mm512_castps_si512(v));
                    _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(high));
                }
            }
            #[inline(always)]
            fn add(self, a: __m512, b: __m512) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_add_ps(a, b) }
            }
            #[inline(always)]
            fn sub(self, a: __m512, b: __m512) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_sub_ps(a, b) }
            }
            #[inline(always)]
            fn mul(self, a: __m512, b: __m512) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_mul_ps(a, b) }
            }
            #[inline(always)]
            fn div(self, a: __m512, b: __m512) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_div_ps(a, b) }
            }
            #[inline(always)]
            fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_fmadd_ps(a, b, c) }
            }
            #[inline(always)]
            fn max(self, a: __m512, b: __m512) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_max_ps(a, b) }
            }
            #[inline(always)]
            fn min(self, a: __m512, b: __m512) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_min_ps(a, b) }
            }
            #[inline(always)]
            fn nearest(self, x: __m512) -> __m512 {
                // SAFETY: see above. The upper four bits of the immediate (fraction bits kept) are zero.
                unsafe {
                    _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
                }
            }
            #[inline(always)]
            fn exp2_whole(self, n: __m512) -> __m512 {
                // SAFETY: see above.
                unsafe {
                    let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
                }
            }
            #[inline(always)]
            fn by_sign(self, x: __m512, neg: __m512, pos: __m512) -> __m512 {
                // SAFETY: see above. movepi32_mask gathers the sign bits; a set bit takes the second operand.
                unsafe {
                    let negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
                    _mm512_mask_blend_ps(negative, pos, neg)
                }
            }
            #[inline(always)]
            fn abs(self, x: __m512) -> __m512 {
                // SAFETY: see above.
                unsafe { _mm512_abs_ps(x) }
            }
            #[inline(always)]
            fn round_bf16(self, x: __m512) -> __m512 {
                // SAFETY: see above. Adding 0x7fff plus the last kept bit carries upwards exactly when to-nearest-even
                // rounds up. Not vcvtneps2bf16, which drops denormals.
                unsafe {
                    let bits = _mm512_castps_si512(x);
                    let last =
                        _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                    let carry = _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff));
                    let rounded = _mm512_add_epi32(bits, carry);
                    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
                    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
                    let chosen = _mm512_mask_blend_epi32(nan, rounded, quiet);
                    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                    _mm512_castsi512_ps(_mm512_and_si512(chosen, upper))
                }
            }
            #[inline(always)]
            fn sum(self, x: __m512) -> f32 {
                self.sum4([x, x, x, x])[0]
            }
            #[inline(always)]
            fn sum4(self, x: [__m512; 4]) -> [f32; 4] {
                // SAFETY: see above. Two levels of neighbours within 128-bit quarters for four vectors at once, then
                // quarters 0+1 and 2+3, then those.
                unsafe {
                    let abcd = neighbours(neighbours(x[0], x[1]), neighbours(x[2], x[3]));
                    let low = _mm_add_ps(
                        _mm512_extractf32x4_ps::<0>(abcd),
                        _mm512_extractf32x4_ps::<1>(abcd),
                    );
                    let high = _mm_add_ps(
                        _mm512_extractf32x4_ps::<2>(abcd),
                        _mm512_extractf32x4_ps::<3>(abcd),
                    );
                    std::mem::transmute::<__m128, [f32; 4]>(_mm_add_ps(low, high))
                }
            }
            #[inline(always)]
            fn largest(self, x: __m512) -> f32 {
                // SAFETY: see above.
                unsafe { _mm512_reduce_max_ps(x) }
            }
            #[inline(always)]
            fn prefetch(self, p: *const u8) {
                // SAFETY: a prefetch never faults, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
            }
        }
    };
}

simd_with_512_bits!(Avx512, Bf16Split);
simd_with_512_bits!(Avx512Bf16, Bf16Pairs);
