//! AVX2 + FMA + F16C: eight lanes, sixteen registers.

use std::arch::x86_64::*;

use super::{Bf16Split, Op, Simd};

/// The upper halves of 32-bit words: an `and` with a constant in memory. As an intrinsic it becomes a blend with a register of zeros,
/// one more than the 3 × 4 tile of a product leaves free.
#[inline]
#[target_feature(enable = "avx2")]
fn upper_halves(words: __m256i) -> __m256i {
    static MASK: [u32; 8] = [0xffff_0000; 8];
    let halves;
    // SAFETY: reads the 32 bytes of MASK, at any alignment.
    unsafe {
        std::arch::asm!(
            "vpand {halves}, {words}, ymmword ptr [rip + {mask}]",
            halves = lateout(ymm_reg) halves,
            words = in(ymm_reg) words,
            mask = sym MASK,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    halves
}

/// Proof that this CPU has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Avx2> {
        (is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Avx2(()))
    }

    #[inline]
    pub(crate) fn enter<O: Op>(self, op: O) {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn inner<O: Op>(s: Avx2, op: O) {
            op.run(s)
        }
        // SAFETY: `self` exists only where `detect` saw these features.
        unsafe { inner(self, op) }
    }
}

// SAFETY of every block below: `self` exists only where `detect` saw AVX2, FMA and F16C; memory is lent by the caller, and
// every access is an unaligned one.
impl Simd for Avx2 {
    type V = __m256;
    type Bf16 = Bf16Split;
    const LANES: usize = 8;
    const TILE_ROWS: usize = 3;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m256 {
        // SAFETY: see above. A bfloat16 is the upper half of a float32.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_even(self, p: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_odd(self, p: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_castsi256_ps(upper_halves(_mm256_loadu_si256(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_split(self, even: *mut f32, odd: *mut f32, v: __m256) {
        // SAFETY: see above.
        unsafe {
            let order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
            let split = _mm256_permutevar8x32_ps(v, order);
            _mm_storeu_ps(even, _mm256_castps256_ps128(split));
            _mm_storeu_ps(odd, _mm256_extractf128_ps::<1>(split));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, v: __m256) {
        // SAFETY: see above. packus keeps 16-bit values as they are but works in 128-bit halves: the permute joins them.
        unsafe {
            let high = _mm256_srli_epi32::<16>(_mm256_castps_si256(v));
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(high, high));
            _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    fn nearest(self, x: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    fn exp2_whole(self, n: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }
    #[inline(always)]
    fn by_sign(self, x: __m256, neg: __m256, pos: __m256) -> __m256 {
        // SAFETY: see above. blendv looks at the sign bit alone.
        unsafe { _mm256_blendv_ps(pos, neg, x) }
    }
    #[inline(always)]
    fn abs(self, x: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), x) }
    }
    #[inline(always)]
    fn round_bf16(self, x: __m256) -> __m256 {
        // SAFETY: see above. Adding 0x7fff plus the last kept bit carries upwards exactly when to-nearest-even rounds up.
        unsafe {
            let bits = _mm256_castps_si256(x);
            let last = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let carry = _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_castsi256_ps(_mm256_add_epi32(bits, carry));
            let quiet = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000)));
            let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x);
            let upper = _mm256_castsi256_ps(_mm256_set1_epi32(0xffff_0000_u32 as i32));
            _mm256_and_ps(_mm256_blendv_ps(rounded, quiet, nan), upper)
        }
    }
    #[inline(always)]
    fn sum(self, x: __m256) -> f32 {
        self.sum4([x, x, x, x])[0]
    }
    #[inline(always)]
    fn sum4(self, x: [__m256; 4]) -> [f32; 4] {
        // SAFETY: see above. hadd adds neighbours within 128-bit halves.
        unsafe {
            let ab = _mm256_hadd_ps(x[0], x[1]);
            let cd = _mm256_hadd_ps(x[2], x[3]);
            let abcd = _mm256_hadd_ps(ab, cd);
            let sums = _mm_add_ps(
                _mm256_castps256_ps128(abcd),
                _mm256_extractf128_ps::<1>(abcd),
            );
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        }
    }
    #[inline(always)]
    fn largest(self, x: __m256) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
}
