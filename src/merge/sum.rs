//! Weighted sums of rows, in vectors.
//!
//! Products and sums are rounded one by one, in the order of the rows, so that the bits are the
//! same with all instructions and however the rows are grouped.

use crate::element::sealed::{AnySlice, Sealed};
use crate::simd::{InstructionSet, Load, Product, Simd, Task, dispatch, load, prefetch, store};
use crate::{Element, F8E4M3};
use half::{bf16, f16};

/// Rows that are added in one pass over the sum: enough that reading and writing the sum hardly
/// counts, few enough streams for a CPU's prefetcher.
pub(super) const GROUP: usize = 4;

/// Rows of one type that are added at once, with their weights.
pub(super) struct Group<'a> {
    rows: [AnySlice<'a>; GROUP],
    weights: [f32; GROUP],
    len: usize,
}

impl Default for Group<'_> {
    fn default() -> Self {
        Self { rows: [AnySlice::F32(&[]); GROUP], weights: [0.0; GROUP], len: 0 }
    }
}

impl<'a> Group<'a> {
    #[inline(always)]
    pub fn push<T: Element>(&mut self, row: &'a [T], weight: f32) {
        (self.rows[self.len], self.weights[self.len]) = (Sealed::erase(row), weight);
        self.len += 1;
    }

    #[inline(always)]
    fn prefetch(&self) {
        for row in &self.rows[..self.len] {
            match row {
                AnySlice::F32(row) => prefetch(row),
                AnySlice::F16(row) => prefetch(row),
                AnySlice::BF16(row) => prefetch(row),
                AnySlice::F8E4M3(row) => prefetch(row),
            }
        }
    }
}

/// Adds to each total, of `dim` elements, the rows of its group; the `first` ones to 0. Not
/// generic, so that it is compiled with this crate.
pub(super) fn add<'a>(
    instructions: InstructionSet,
    first: bool,
    dim: usize,
    totals: &mut [f32],
    group: &dyn Fn(usize) -> Group<'a>,
) {
    dispatch(instructions, false, AddAll { first, dim, totals, group });
}

struct AddAll<'a, 'b> {
    first: bool,
    dim: usize,
    totals: &'b mut [f32],
    group: &'b dyn Fn(usize) -> Group<'a>,
}

impl Task for AddAll<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd, P: Product<S>>(self, simd: S, _: P) {
        let rows = self.totals.len() / self.dim;
        let mut group = (self.group)(0);
        for (row, total) in self.totals.chunks_exact_mut(self.dim).enumerate() {
            // The CPU finds the next rows on its own only if they follow in memory.
            let next = (self.group)((row + 1).min(rows - 1));
            next.prefetch();
            let add = Add { rows: &group.rows[..group.len], weights: &group.weights[..group.len], total };
            if self.first {
                add.add_any::<S, true>(simd)
            } else {
                add.add_any::<S, false>(simd)
            }
            group = next;
        }
    }
}

struct Add<'a> {
    rows: &'a [AnySlice<'a>],
    weights: &'a [f32],
    total: &'a mut [f32],
}

impl Add<'_> {
    /// Adds the rows to the total, or to 0 if they are the `FIRST`.
    #[inline(always)]
    fn add_any<S: Simd, const FIRST: bool>(self, simd: S) {
        if FIRST && self.rows.is_empty() {
            self.total.fill(0.0);
            return;
        }
        match self.rows.first() {
            None => {}
            Some(AnySlice::F32(_)) => self.add::<S, f32, FIRST>(simd),
            Some(AnySlice::F16(_)) => self.add::<S, f16, FIRST>(simd),
            Some(AnySlice::BF16(_)) => self.add::<S, bf16, FIRST>(simd),
            Some(AnySlice::F8E4M3(_)) => self.add_elements::<F8E4M3, FIRST>(0),
        }
    }

    #[inline(always)]
    fn add<S: Simd, T: Load, const FIRST: bool>(mut self, simd: S) {
        let whole = self.total.len() - self.total.len() % S::LANES;
        match self.rows.len() {
            1 => self.add_vectors::<S, T, 1, FIRST>(simd, whole),
            2 => self.add_vectors::<S, T, 2, FIRST>(simd, whole),
            3 => self.add_vectors::<S, T, 3, FIRST>(simd, whole),
            _ => self.add_vectors::<S, T, GROUP, FIRST>(simd, whole),
        }
        self.add_elements::<T, FIRST>(whole);
    }

    /// The columns before `whole`, a multiple of a vector's.
    // Loops and no closures: those are compiled without the vector instructions unless they are
    // inlined.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    fn add_vectors<S: Simd, T: Load, const N: usize, const FIRST: bool>(&mut self, simd: S, whole: usize) {
        let (mut rows, mut weights) = ([&[] as &[T]; N], [simd.splat(0.0); N]);
        for i in 0..N {
            rows[i] = &T::rows(self.rows[i])[..whole];
            weights[i] = simd.splat(self.weights[i]);
        }
        for at in (0..whole).step_by(S::LANES) {
            let total = &mut self.total[at..at + S::LANES];
            let mut sum = if FIRST { simd.splat(0.0) } else { load(simd, total) };
            for i in 0..N {
                // SAFETY: each row holds `whole` elements, of which a vector is left at `at`.
                let x = unsafe { T::load(simd, rows[i].as_ptr().add(at)) };
                // A fused product would be rounded otherwise than by instructions without one.
                sum = simd.add(sum, simd.mul(weights[i], x));
            }
            store(simd, sum, total);
        }
    }

    /// The columns from `first` on.
    #[inline(always)]
    fn add_elements<T: Load, const FIRST: bool>(self, first: usize) {
        let total = &mut self.total[first..];
        if FIRST {
            total.fill(0.0);
        }
        for (&row, weight) in self.rows.iter().zip(self.weights) {
            let row = &T::rows(row)[first..];
            total.iter_mut().zip(row).for_each(|(total, x)| *total += weight * x.to_f32());
        }
    }
}
