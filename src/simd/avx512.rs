//! AVX-512: 16 lanes, and products of bf16 pairs where the CPU has them.

use super::matrix::NoUnit;
use super::{F32Product, Product, Simd, Task};
use crate::F8E4M3;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// A CPU with AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn new() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Self(()))
    }
}

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
    const TILE_ROWS: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    unsafe fn load_f8e4m3(self, from: *const F8E4M3) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe {
            // The sign comes to two places, of which the lower one is the exponent's highest bit.
            let words = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())));
            _mm512_cvtph_ps(_mm256_and_si256(words, _mm256_set1_epi16(!0x4000)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, x: __m512, to: *mut f32) {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe { _mm512_storeu_ps(to, x) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn if_greater(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe { _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x) }
    }

    #[inline(always)]
    fn split_exponent(self, x: __m512) -> (__m512, __m512) {
        // SAFETY: `self` proves that the CPU has the instruction.
        let whole = unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) };
        (self.sub(x, whole), whole)
    }

    #[inline(always)]
    fn scale_exponent(self, y: __m512, r: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_scalef_ps(y, r) }
    }

    #[inline(always)]
    fn exp2_of_terms<const TERMS: usize>(self, x: __m512) -> __m512 {
        // 2^f on [0, 1], least maximum of the relative error (9e-8 and 7e-9) at these degrees.
        const FIVE: [f32; 6] =
            [0.999_999_94, 0.693_153_1, 0.240_153_61, 0.055_826_318, 0.008_989_34, 0.001_877_576_7];
        #[allow(clippy::approx_constant)] // near ln 2, and not it
        const SIX: [f32; 7] =
            [1.0, 0.693_147, 0.240_229_83, 0.055_483_34, 0.009_678_841, 0.001_243_968_7, 0.000_217_022_55];
        // SAFETY: `self` proves that the CPU has the instructions.
        let fraction = unsafe { _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(x) };
        let power = if TERMS < 3 { self.polynomial(FIVE, fraction) } else { self.polynomial(SIX, fraction) };
        // A result below the normal range would take 100 cycles, so it is 0. SAFETY: as above.
        unsafe {
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
            _mm512_maskz_scalef_ps(normal, power, x)
        }
    }

    #[inline(always)]
    fn sum_lanes(self, x: __m512) -> f32 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_reduce_add_ps(x) }
    }

    #[inline(always)]
    fn fold_two(self, a: __m512, b: __m512) -> __m512 {
        // Each 128-bit part holds a b a b. SAFETY: `self` proves that the CPU has the instructions.
        unsafe { _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)) }
    }

    #[inline(always)]
    fn sum_folded(self, [ab, cd]: [__m512; 2]) -> [f32; 4] {
        // SAFETY: `self` proves that the CPU has the instructions; the transmute renames four f32.
        unsafe {
            // Each 128-bit part holds a b c d after one more round; then the parts are added.
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
            let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
            let sums = _mm512_add_ps(low, high);
            let sums = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps::<1>(sums));
            let sums = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps::<1>(sums));
            std::mem::transmute::<__m128, [f32; 4]>(sums)
        }
    }

    #[inline(always)]
    fn max_lanes(self, x: __m512) -> f32 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { _mm512_reduce_max_ps(x) }
    }

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
        fn enter<T: Task>(simd: Avx512, task: T) -> T::Output {
            task.run(simd, F32Product(simd))
        }
        // SAFETY: `self` proves that the CPU has the features that `enter` is compiled with.
        unsafe { enter(self, task) }
    }
}

/// Words of the bf16 nearest to `first` (in the low halves) and `second`.
///
/// # Safety
/// The CPU must have AVX-512 BW and BF16.
#[inline(always)]
pub(super) unsafe fn round_pair(first: __m512, second: __m512) -> __m512 {
    /// Lane `2i` from the low half's `i`, lane `2i + 1` from the high half's.
    const LANES: [u16; 32] = {
        let mut lanes = [0; 32];
        let mut i = 0;
        while i < 16 {
            lanes[2 * i] = i as u16;
            lanes[2 * i + 1] = i as u16 + 16;
            i += 1;
        }
        lanes
    };
    // SAFETY: the caller's promise; 32 lanes are 512 bits.
    unsafe {
        let interleave = _mm512_loadu_si512(LANES.as_ptr().cast());
        let halves = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(second, first));
        _mm512_castsi512_ps(_mm512_permutexvar_epi16(interleave, halves))
    }
}

/// A CPU with AVX-512 BF16: words of two bf16, the first in the low half.
#[derive(Clone, Copy)]
pub(crate) struct Bf16Product(Avx512);

impl Avx512 {
    /// Writes the transpose of 16 rows of as many words.
    ///
    /// # Safety
    /// The rows, which lie so many words apart, must be readable or writable.
    #[inline(always)]
    pub(crate) unsafe fn transpose(self, from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: `self` proves that the CPU has the instructions; the rows are the caller's
        // promise.
        unsafe {
            let mut rows = [_mm512_setzero_ps(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(from.add(i * stride));
            }
            // Within each quarter, the transposes of 4 x 4 blocks: `fours[4b + j]` holds column j
            // (of each quarter) of the rows 4b..4b + 4.
            let mut fours = [_mm512_setzero_ps(); 16];
            for b in 0..4 {
                let [r0, r1, r2, r3] = [rows[4 * b], rows[4 * b + 1], rows[4 * b + 2], rows[4 * b + 3]];
                let low = _mm512_castps_pd(_mm512_unpacklo_ps(r0, r1));
                let low_next = _mm512_castps_pd(_mm512_unpacklo_ps(r2, r3));
                let high = _mm512_castps_pd(_mm512_unpackhi_ps(r0, r1));
                let high_next = _mm512_castps_pd(_mm512_unpackhi_ps(r2, r3));
                fours[4 * b] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, low_next));
                fours[4 * b + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, low_next));
                fours[4 * b + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, high_next));
                fours[4 * b + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, high_next));
            }
            // Then the quarters: column 4q + j of all rows is quarter q of `fours[j]`, `[4 + j]`,
            // ...
            for j in 0..4 {
                let [a, b, c, d] = [fours[j], fours[4 + j], fours[8 + j], fours[12 + j]];
                let even = [
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(c, d),
                ];
                let odd = [
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(c, d),
                ];
                for (q, row) in [
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(even[0], even[1]),
                    _mm512_shuffle_f32x4::<0b10_00_10_00>(odd[0], odd[1]),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(even[0], even[1]),
                    _mm512_shuffle_f32x4::<0b11_01_11_01>(odd[0], odd[1]),
                ]
                .into_iter()
                .enumerate()
                {
                    _mm512_storeu_ps(to.add((4 * q + j) * to_stride), row);
                }
            }
        }
    }
}

impl Bf16Product {
    pub(crate) fn new() -> Option<Self> {
        Avx512::new().filter(|_| is_x86_feature_detected!("avx512bf16")).map(Self)
    }

    /// As [`Simd::run`], with products of bf16 pairs.
    pub(crate) fn run<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
        fn enter<T: Task>(product: Bf16Product, task: T) -> T::Output {
            task.run(product.0, product)
        }
        // SAFETY: `self` proves that the CPU has these instructions.
        unsafe { enter(self, task) }
    }
}

impl Product<Avx512> for Bf16Product {
    type Unit = NoUnit;
    const ELEMENTS: usize = 2;

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: `self` proves that the CPU has the instruction; the casts only rename the 512
        // bits.
        unsafe {
            let (a, b) =
                (std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b));
            _mm512_dpbf16_ps(sum, a, b)
        }
    }

    #[inline(always)]
    unsafe fn store_pair(self, first: __m512, second: __m512, to: *mut f32, _next: usize) {
        // SAFETY: `self` proves that the CPU has the instructions; 16 words at `to` are the
        // caller's promise.
        unsafe { _mm512_storeu_ps(to, round_pair(first, second)) }
    }

    #[inline(always)]
    fn unit(self) -> Option<NoUnit> {
        None
    }
}
