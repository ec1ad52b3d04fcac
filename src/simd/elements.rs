//! Elements of every type as vectors of f32.

use super::{Simd, store};
use crate::element::sealed::AnySlice;
use crate::{Element, F8E4M3};
use half::{bf16, f16};

/// An element that loads as a vector of f32.
pub(crate) trait Load: Element {
    /// What loaded elements are to be multiplied by.
    const FACTOR: f32 = 1.0;
    /// The elements of rows that hold this type.
    fn rows<'a>(rows: AnySlice<'a>) -> &'a [Self];
    /// # Safety
    /// `S::LANES` elements must be readable at `from`.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::V;
    /// Whether an element is NaN that does not load as NaN.
    #[inline(always)]
    fn is_hidden_nan(self) -> bool {
        false
    }
}

/// Whether a row has a NaN that does not load as NaN.
#[inline(always)]
pub(crate) fn has_hidden_nan<T: Load>(row: &[T]) -> bool {
    // Without a way out, so that it is a loop of vectors.
    row.iter().fold(false, |found, x| found | x.is_hidden_nan())
}

/// Writes the elements of a row as f32.
#[inline(always)]
pub(crate) fn widen<S: Simd, T: Load>(simd: S, row: &[T], to: &mut [f32]) {
    let to = &mut to[..row.len()];
    for (from, to) in row.chunks_exact(S::LANES).zip(to.chunks_exact_mut(S::LANES)) {
        // SAFETY: `from` holds a vector.
        let x = unsafe { T::load(simd, from.as_ptr()) };
        store(simd, if T::FACTOR == 1.0 { x } else { simd.mul(x, simd.splat(T::FACTOR)) }, to);
    }
    let whole = row.len() - row.len() % S::LANES;
    for (x, to) in row[whole..].iter().zip(&mut to[whole..]) {
        *to = x.to_f32();
    }
    if has_hidden_nan(row) {
        row.iter().zip(to).filter(|(x, _)| x.is_hidden_nan()).for_each(|(_, to)| *to = f32::NAN);
    }
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

impl Load for F8E4M3 {
    const FACTOR: f32 = 256.0;
    #[inline(always)]
    fn rows(rows: AnySlice<'_>) -> &[F8E4M3] {
        let AnySlice::F8E4M3(rows) = rows else { unreachable!("one type was chosen for all") };
        rows
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const F8E4M3) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_f8e4m3(from) }
    }
    #[inline(always)]
    fn is_hidden_nan(self) -> bool {
        self.to_bits() & 0x7f == F8E4M3::NAN.to_bits()
    }
}
