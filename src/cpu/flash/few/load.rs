//! Elements of keys and values as vectors of f32.

use crate::cpu::simd::Simd;
use crate::tensor::sealed::AnySlice;
use half::{bf16, f16};

/// An element that loads as a vector of f32.
pub(super) trait Load: Copy + Default {
    /// The elements of rows that hold this type.
    fn rows<'a>(rows: AnySlice<'a>) -> &'a [Self];
    /// # Safety
    /// `S::LANES` elements must be readable at `from`.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::V;
}

impl Load for f32 {
    #[inline(always)]
    fn rows(rows: AnySlice<'_>) -> &[f32] {
        let AnySlice::F32(rows) = rows else { unreachable!("one type was chosen for all") };
        rows
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load(from) }
    }
}

impl Load for f16 {
    #[inline(always)]
    fn rows(rows: AnySlice<'_>) -> &[f16] {
        let AnySlice::F16(rows) = rows else { unreachable!("one type was chosen for all") };
        rows
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_f16(from) }
    }
}

impl Load for bf16 {
    #[inline(always)]
    fn rows(rows: AnySlice<'_>) -> &[bf16] {
        let AnySlice::BF16(rows) = rows else { unreachable!("one type was chosen for all") };
        rows
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const bf16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bf16(from) }
    }
}
