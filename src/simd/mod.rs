//! Vectors of f32, chosen at run time.
//!
//! A [`Simd`] value is a proof that the CPU has its instructions: it is made by a checked
//! constructor only, so that its methods are safe to call. Generic code is written against the
//! trait, marked `#[inline(always)]`, and enters through [`dispatch`], which compiles it once per
//! instruction set.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod elements;
mod matrix;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

pub(crate) use elements::{Load, has_hidden_nan, widen};
use matrix::NoUnit;
#[cfg(test)]
pub(crate) use matrix::{FAULT, Fault};
pub(crate) use matrix::{Matrix, TILE};
#[cfg(test)]
pub(crate) use portable::Portable;

use crate::{Error, F8E4M3, Result};
use half::{bf16, f16};

/// The instructions that the CPU backend can be compiled to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InstructionSet {
    /// Plain Rust, on any CPU.
    Portable,
    /// AArch64 NEON.
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with BF16 dot products, for bf16 inputs; as `Avx512` for others.
    Avx512Bf16,
    /// AMX, the matrix unit, for more than a few rows: f16 and f32 as sums of bf16 terms. As
    /// `Avx512` for few rows.
    Amx,
    /// What `Avx512Bf16` computes in plain Rust, on any CPU: slow, to test the code that runs on
    /// it.
    Avx512Bf16Model,
    /// What `Amx` computes in plain Rust, on any CPU: slow, to test the code that runs on it.
    AmxModel,
}

impl InstructionSet {
    /// All of them, the models first and then from the least to the most.
    pub const ALL: &[Self] = &[
        Self::AmxModel,
        Self::Avx512Bf16Model,
        Self::Portable,
        Self::Neon,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
    ];

    /// Those that this CPU can run.
    pub fn available() -> Vec<Self> {
        Self::ALL.iter().copied().filter(|set| set.is_available()).collect()
    }

    /// The fastest of this CPU. AMD's dot products of bf16 pairs do twice the work of multiply-adds
    /// of f32 in the same time; Intel's do no more, and round probabilities.
    pub fn best() -> Self {
        let all = [Self::Amx, Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Neon];
        let fast = |set: &Self| set.is_available() && (*set != Self::Avx512Bf16 || !is_intel());
        all.into_iter().find(fast).unwrap_or(Self::Portable)
    }

    fn is_available(self) -> bool {
        match self {
            Self::Portable | Self::Avx512Bf16Model | Self::AmxModel => true,
            #[cfg(target_arch = "aarch64")]
            Self::Neon => neon::Neon::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2::Avx2::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512::Avx512::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => avx512::Bf16Product::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => amx::Amx::is_available(),
            #[allow(unreachable_patterns)]
            _ => false,
        }
    }

    /// Whether a matrix unit (or its model) computes more than a few rows.
    pub(crate) fn has_matrix_unit(self) -> bool {
        matches!(self, Self::Amx | Self::AmxModel)
    }

    pub(crate) fn check(self) -> Result<()> {
        if self.is_available() {
            return Ok(());
        }
        Err(Error::value("instructions", format!("one of {:?}", Self::available()), format!("{self:?}")))
    }
}

/// Whether Intel made this CPU.
fn is_intel() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let vendor = std::arch::x86_64::__cpuid(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        name.as_flattened() == b"GenuineIntel"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Operations on vectors of [`LANES`](Self::LANES) f32.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// A vector.
    type V: Copy;
    /// f32 per vector.
    const LANES: usize;
    /// Rows of the register tile of a product, two vectors wide: enough independent sums to hide
    /// the latency of a multiply-add, few enough to stay in registers. Divides `2 * LANES`.
    const TILE_ROWS: usize;
    /// Whether a multiply-add takes one lane of a vector for all lanes: products then read words
    /// four at a time, by [`splat_four`](Self::splat_four), and broadcast none.
    const LANE_OPERANDS: bool = false;
    /// Whether a register block of few rows takes its keys together. One key after the other is
    /// read from memory in order. Together they share the loads of the queries, which are
    /// instructions of their own on some CPUs, and have more sums under way.
    const KEYS_TOGETHER: bool = false;

    fn splat(self, x: f32) -> Self::V;
    /// Four words, each in all lanes.
    ///
    /// # Safety
    /// 4 f32 must be readable at `from`, of any alignment.
    #[inline(always)]
    unsafe fn splat_four(self, from: *const f32) -> [Self::V; 4] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }.map(|x| self.splat(x))
    }
    /// # Safety
    /// `LANES` f32 must be readable at `from`, of any alignment.
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// # Safety
    /// `LANES` f16 must be readable at `from`, of any alignment.
    unsafe fn load_f16(self, from: *const f16) -> Self::V;
    /// # Safety
    /// `LANES` bf16 must be readable at `from`, of any alignment.
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V;
    /// The elements times 2⁻⁸, and NaN as if it were 480: codes moved to the fields of f16.
    ///
    /// # Safety
    /// `LANES` elements must be readable at `from`, of any alignment.
    unsafe fn load_f8e4m3(self, from: *const F8E4M3) -> Self::V;
    /// # Safety
    /// `LANES` f32 must be writable at `to`, of any alignment.
    unsafe fn store(self, x: Self::V, to: *mut f32);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the CPU can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`, so `b` if either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a > b ? x : y`
    fn if_greater(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// `x` without its fraction, `r`, and `2^r` times `y`: `(x - r, y ↦ y · 2^r)` for the
    /// exponential. `-200 <= x <= 127` or NaN; below the normal range the power is 0.
    fn split_exponent(self, x: Self::V) -> (Self::V, Self::V);
    /// `y · 2^r` with `r` from [`split_exponent`](Self::split_exponent).
    fn scale_exponent(self, y: Self::V, r: Self::V) -> Self::V;
    /// The sum of the lanes.
    fn sum_lanes(self, x: Self::V) -> f32;
    /// One vector whose lanes are sums of two lanes of `a`, and of two lanes of `b`.
    fn fold_two(self, a: Self::V, b: Self::V) -> Self::V;
    /// The sums of the lanes of the four vectors that were folded into two.
    fn sum_folded(self, folded: [Self::V; 2]) -> [f32; 4];
    /// The largest lane.
    fn max_lanes(self, x: Self::V) -> f32;
    /// Runs `task` compiled for this instruction set.
    fn run<T: Task>(self, task: T) -> T::Output;

    /// `Σ_i terms[i] · x^i`
    #[inline(always)]
    fn polynomial<const N: usize>(self, terms: [f32; N], x: Self::V) -> Self::V {
        let mut y = self.splat(terms[N - 1]);
        for i in (0..N - 1).rev() {
            y = self.fma(y, x, self.splat(terms[i]));
        }
        y
    }

    /// `2^x` for `x <= 127` (`0` for `x < -126`), within 2 units in the last place; NaN stays.
    #[inline(always)]
    fn exp2(self, x: Self::V) -> Self::V {
        // 2^f on [-1/2, 1/2], least maximum of the relative error (2e-9) at this degree.
        const POLYNOMIAL: [f32; 7] = [
            1.0,
            std::f32::consts::LN_2,
            0.240_226_46,
            0.055_503_286,
            0.009_618_489,
            0.001_339_993_1,
            0.000_153_458_12,
        ];
        let (fraction, exponent) = self.split_exponent(self.max(self.splat(-200.0), x));
        self.scale_exponent(self.polynomial(POLYNOMIAL, fraction), exponent)
    }

    /// `2^x` for any `x` (`0` for `x < -126`, some number above 2^126 for `x > 127`), as exact as
    /// its `TERMS` bf16 terms need it: within 2e-7 of its magnitude, or of three terms as
    /// [`exp2`](Self::exp2). NaN stays.
    #[inline(always)]
    fn exp2_of_terms<const TERMS: usize>(self, x: Self::V) -> Self::V {
        let most = self.splat(127.0);
        self.exp2(self.if_greater(x, most, most, x))
    }

    /// `tanh(x)`, within 4e-7 of its magnitude; NaN stays.
    #[inline(always)]
    fn tanh(self, x: Self::V) -> Self::V {
        let (one, two) = (self.splat(1.0), self.splat(2.0));
        let magnitude = self.max(x, self.sub(self.splat(0.0), x));
        // 1 - 2 / (e^2x + 1); beyond 20 it is 1 in f32.
        let bounded = self.if_greater(magnitude, self.splat(20.0), self.splat(20.0), magnitude);
        let power = self.exp2(self.mul(bounded, self.splat(2.0 * std::f32::consts::LOG2_E)));
        let far = self.sub(one, self.div(two, self.add(power, one)));
        let far = self.if_greater(self.splat(0.0), x, self.sub(self.splat(0.0), far), far);
        // Near 0 that difference cancels; the series does not.
        let square = self.mul(x, x);
        let mut near = self.splat(-1382.0 / 155_925.0);
        for term in [62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
            near = self.fma(near, square, self.splat(term));
        }
        self.if_greater(self.splat(0.3), magnitude, self.mul(near, x), far)
    }
}

/// A piece of generic code to be compiled for each instruction set. Mark `run` `#[inline(always)]`.
pub(crate) trait Task {
    type Output;
    fn run<S: Simd, P: Product<S>>(self, simd: S, product: P) -> Self::Output;
}

/// A product of 32-bit words into f32 sums: one f32 each, or two bf16.
pub(crate) trait Product<S: Simd>: Copy + Send + Sync + 'static {
    /// The matrix unit that may come with it.
    type Unit: Matrix<S>;
    /// Whether there is one, so that many rows never go through vectors.
    const HAS_UNIT: bool = false;
    /// Elements of a word.
    const ELEMENTS: usize;
    /// `sum + a · b`, word by word.
    fn fma(self, a: S::V, b: S::V, sum: S::V) -> S::V;
    /// Stores the words that hold `first` and `second` for each lane: one after the other at `to`
    /// and `to + next` if a word holds one element, together at `to` if it holds two.
    ///
    /// # Safety
    /// `S::LANES` words must be writable at both (if a word holds one element) or at `to`.
    unsafe fn store_pair(self, first: S::V, second: S::V, to: *mut f32, next: usize);
    /// The matrix unit for products of many rows, with the tiles of this thread set up.
    fn unit(self) -> Option<Self::Unit>;
}

/// Words of one f32.
#[derive(Clone, Copy)]
pub(crate) struct F32Product<S>(pub S);

impl<S: Simd> Product<S> for F32Product<S> {
    type Unit = NoUnit;
    const ELEMENTS: usize = 1;

    #[inline(always)]
    fn fma(self, a: S::V, b: S::V, sum: S::V) -> S::V {
        self.0.fma(a, b, sum)
    }

    #[inline(always)]
    unsafe fn store_pair(self, first: S::V, second: S::V, to: *mut f32, next: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            self.0.store(first, to);
            self.0.store(second, to.add(next));
        }
    }

    #[inline(always)]
    fn unit(self) -> Option<NoUnit> {
        None
    }
}

/// Runs `task` with the instructions of `set`, or plainly where the CPU lacks them; `bf16` asks for
/// products of bf16 pairs.
pub(crate) fn dispatch<T: Task>(set: InstructionSet, bf16: bool, task: T) -> T::Output {
    match set {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx512 | InstructionSet::Avx512Bf16 | InstructionSet::Amx => {
            if let Some(product) = amx::AmxProduct::new().filter(|_| set == InstructionSet::Amx) {
                return product.run(task);
            }
            let pairs = bf16 && set == InstructionSet::Avx512Bf16;
            if let Some(product) = avx512::Bf16Product::new().filter(|_| pairs) {
                return product.run(task);
            }
            if let Some(simd) = avx512::Avx512::new() {
                return simd.run(task);
            }
        }
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2 => {
            if let Some(simd) = avx2::Avx2::new() {
                return simd.run(task);
            }
        }
        #[cfg(target_arch = "aarch64")]
        InstructionSet::Neon => {
            if let Some(simd) = neon::Neon::new() {
                return simd.run(task);
            }
        }
        InstructionSet::Avx512Bf16Model if bf16 => return portable::PortablePairs::run(task),
        InstructionSet::AmxModel => return portable::PortableUnit::run(task),
        _ => {}
    }
    portable::Portable::<8>.run(task)
}

/// The first vector of a slice.
#[inline(always)]
pub(crate) fn load<S: Simd>(simd: S, from: &[f32]) -> S::V {
    assert!(from.len() >= S::LANES);
    // SAFETY: as just asserted.
    unsafe { simd.load(from.as_ptr()) }
}

/// Writes the first vector of a slice.
#[inline(always)]
pub(crate) fn store<S: Simd>(simd: S, x: S::V, to: &mut [f32]) {
    assert!(to.len() >= S::LANES);
    // SAFETY: as just asserted.
    unsafe { simd.store(x, to.as_mut_ptr()) }
}

/// Asks for the cache lines of a slice; only a hint.
#[inline(always)]
pub(crate) fn prefetch<T>(data: &[T]) {
    prefetch_to::<true, T>(data);
}

/// Asks for the cache lines of a slice that is needed later: L2 is near enough.
#[inline(always)]
pub(crate) fn prefetch_early<T>(data: &[T]) {
    prefetch_to::<false, T>(data);
}

#[inline(always)]
fn prefetch_to<const L1: bool, T>(data: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(data)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads nothing, and the line lies inside `data`.
        unsafe {
            let line = data.as_ptr().cast::<i8>().add(line);
            if L1 { _mm_prefetch::<_MM_HINT_T0>(line) } else { _mm_prefetch::<_MM_HINT_T1>(line) }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = data;
}
