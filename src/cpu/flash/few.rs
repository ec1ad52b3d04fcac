//! Few query rows against many keys: bound by reading the keys and values once.
//!
//! The same online softmax as in `tile`, with the head dimension across the vectors: keys and values are read where they
//! lie, converted in registers, and serve all rows of their KV head at once. All rows see the same keys.

use super::piece::{Operands, Piece, Source};
use super::rows::pack_words;
use super::workspace::Scratch;
use crate::cpu::simd::{Product, Simd, load, prefetch, store};
use crate::tensor::sealed::AnySlice;
use half::{bf16, f16};
use std::ops::Range;

/// Query rows at most: beyond, `tile` does less work per row.
pub(super) const ROWS: usize = 16;
/// Keys between two updates of the running maximum: their values stay in L1.
const KEYS: usize = 32;
/// Keys that are worked on at a time.
const BLOCK: usize = 4;
/// From the scores of one row to the next's: the last block of a tile may reach beyond it.
const STRIDE: usize = KEYS + BLOCK;
/// Keys by which reading runs ahead of computing where rows lie apart.
const AHEAD: usize = 8;
/// Heads are padded to whole blocks of so many vectors.
const WIDTH: usize = 8;
/// The widest vector of any instruction set.
const WIDEST: usize = 16;

/// Elements of workspace for one thread.
pub(super) fn scratch_len(head_dim: usize) -> usize {
    ROWS * (2 * padded::<WIDEST>(head_dim) + STRIDE)
}

fn padded<const LANES: usize>(head_dim: usize) -> usize {
    head_dim.next_multiple_of(WIDTH * LANES)
}

/// An element that loads as a vector of f32.
trait Load: Copy + Default {
    fn rows<'a>(row: AnySlice<'a>) -> &'a [Self];
    /// # Safety
    /// `S::LANES` elements must be readable at `from`.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::V;
}

impl Load for f32 {
    #[inline(always)]
    fn rows(row: AnySlice<'_>) -> &[f32] {
        if let AnySlice::F32(row) = row { row } else { &[] }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load(from) }
    }
}

impl Load for f16 {
    #[inline(always)]
    fn rows(row: AnySlice<'_>) -> &[f16] {
        if let AnySlice::F16(row) = row { row } else { &[] }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_f16(from) }
    }
}

impl Load for bf16 {
    #[inline(always)]
    fn rows(row: AnySlice<'_>) -> &[bf16] {
        if let AnySlice::BF16(row) = row { row } else { &[] }
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const bf16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bf16(from) }
    }
}

/// Consecutive rows of keys or values of one head.
#[derive(Clone, Copy)]
struct Run<'a, T> {
    data: &'a [T],
    stride: usize,
    /// The entries whose rows these are.
    start: usize,
    end: usize,
}

impl<'a, T: Load> Run<'a, T> {
    /// The rows of the entries from `start` on, to the next gap in the list of keys or the end of the page.
    #[inline(always)]
    fn new(source: &Source<'a>, piece: &Piece<'_>, start: usize) -> Self {
        let (rows, place) = piece.key_place(source, start);
        let end = piece.run(start, piece.entries.end).end;
        Self { data: T::rows(rows.rows_from(place)), stride: rows.seq_stride(), start, end }
    }

    #[inline(always)]
    fn row(&self, index: usize, head_dim: usize) -> &'a [T] {
        &self.data[index * self.stride..][..head_dim]
    }

    /// Asks for the rows of the block that comes [`AHEAD`] of the one at `first`. Where rows are
    /// contiguous the hardware foresees them, and better; it does not foresee the next page.
    #[inline(always)]
    fn prefetch(&self, source: &Source<'a>, piece: &Piece<'_>, first: usize, head_dim: usize) {
        let foreseen = self.stride < 2 * head_dim;
        for entry in self.start + first + AHEAD..self.start + first + AHEAD + BLOCK {
            if entry < self.end {
                let start = (entry - self.start) * self.stride;
                if !foreseen && start + head_dim <= self.data.len() {
                    prefetch(&self.data[start..start + head_dim]);
                }
            } else if entry < piece.entries.end {
                prefetch(&T::rows(piece.key_row(source, entry))[..head_dim]);
            }
        }
    }
}

/// Computes one piece of at most [`ROWS`] rows that all see `piece.entries`. `write(row, out, lse)` gets each row's result.
#[inline(always)]
pub(super) fn attend<S: Simd, P: Product<S>>(
    simd: S,
    product: P,
    inputs: &Operands<'_>,
    piece: &Piece<'_>,
    scratch: &mut Scratch<'_>,
    write: impl FnMut(usize, &[f32], f32),
) {
    match inputs.key.rows.elements() {
        AnySlice::F32(_) => attend_as::<S, P, f32>(simd, product, inputs, piece, scratch, write),
        AnySlice::F16(_) => attend_as::<S, P, f16>(simd, product, inputs, piece, scratch, write),
        AnySlice::BF16(_) => attend_as::<S, P, bf16>(simd, product, inputs, piece, scratch, write),
    }
}

#[inline(always)]
fn attend_as<S: Simd, P: Product<S>, T: Load>(
    simd: S,
    product: P,
    inputs: &Operands<'_>,
    piece: &Piece<'_>,
    scratch: &mut Scratch<'_>,
    mut write: impl FnMut(usize, &[f32], f32),
) {
    let width = inputs.head_dim.next_multiple_of(WIDTH * S::LANES);
    let rows = piece.rows();
    let scratch = scratch.first(ROWS * (2 * width + STRIDE));
    let (query, scratch) = scratch.split_at_mut(ROWS * width);
    let (out, scratch) = scratch.split_at_mut(ROWS * width);
    let scores = &mut scratch[..ROWS * STRIDE];
    let (factor, softcap) = inputs.factors;
    let (mut max, mut sum) = ([f32::NEG_INFINITY; ROWS], [0f32; ROWS]);

    query.fill(0.0);
    out.fill(0.0);
    for (row, query) in query.chunks_exact_mut(width).take(rows).enumerate() {
        let row = inputs.query.row(piece.place(row));
        if P::ELEMENTS == 1 { pack_words::<1>(row, query) } else { pack_words::<2>(row, query) }
    }

    let block = Block::<S, P, T> {
        simd,
        product,
        head_dim: inputs.head_dim,
        width,
        element: std::marker::PhantomData,
    };
    for start in piece.entries.clone().step_by(KEYS) {
        let end = piece.entries.end.min(start + KEYS);
        for run in runs(piece, start, end) {
            let keys = Run::<T>::new(&inputs.key, piece, run.start);
            let values = Run::<T>::new(&inputs.value, piece, run.start);
            for first in (0..run.len()).step_by(BLOCK) {
                let mut block_keys = [keys.row(first, inputs.head_dim); BLOCK];
                for (i, row) in block_keys.iter_mut().enumerate() {
                    *row = keys.row((first + i).min(run.len() - 1), inputs.head_dim);
                }
                keys.prefetch(&inputs.key, piece, first, inputs.head_dim);
                values.prefetch(&inputs.value, piece, first, inputs.head_dim);
                // Loops and no closures: those are compiled without the vector instructions unless they are inlined.
                let mut row = 0;
                while row < rows {
                    let (query, scores) =
                        (&query[row * width..], &mut scores[row * STRIDE + run.start - start + first..]);
                    match block_rows(rows - row) {
                        1 => block.scores::<1>(query, block_keys, scores),
                        2 => block.scores::<2>(query, block_keys, scores),
                        _ => block.scores::<4>(query, block_keys, scores),
                    }
                    row += block_rows(rows - row);
                }
            }
        }
        let mut alpha = [0f32; ROWS];
        for row in 0..rows {
            let scores = &mut scores[row * STRIDE..][..KEYS];
            alpha[row] = softmax(simd, factor, softcap, scores, end - start, &mut max[row], &mut sum[row]);
        }
        // Sixteen sums fill the registers. f32 values of longer heads go through two rows by eight vectors, so that they too
        // are read in order; halves through four by four, so that they are converted once.
        let wide = inputs.head_dim > BLOCK * S::LANES && size_of::<T>() == size_of::<f32>();
        for run in runs(piece, start, end) {
            let values = Run::<T>::new(&inputs.value, piece, run.start);
            let mut row = 0;
            while row < rows {
                let probabilities = &scores[row * STRIDE + run.start - start..];
                let (out, alpha, count) = (&mut out[row * width..], &alpha[row..], run.len());
                let taken = match rows - row {
                    1 if wide => {
                        block.accumulate::<1, 8>(alpha, probabilities, values, count, out);
                        1
                    }
                    1 => {
                        block.accumulate::<1, 4>(alpha, probabilities, values, count, out);
                        1
                    }
                    _ if wide => {
                        block.accumulate::<2, 8>(alpha, probabilities, values, count, out);
                        2
                    }
                    2 => {
                        block.accumulate::<2, 4>(alpha, probabilities, values, count, out);
                        2
                    }
                    _ => {
                        block.accumulate::<4, 4>(alpha, probabilities, values, count, out);
                        4
                    }
                };
                row += taken;
            }
            // The other runs of this tile add to what it has.
            alpha = [1.0; ROWS];
        }
    }

    for (row, out) in out.chunks_exact_mut(width).take(rows).enumerate() {
        let scale = if sum[row] == 0.0 { 0.0 } else { 1.0 / sum[row] };
        let out = &mut out[..inputs.head_dim];
        out.iter_mut().for_each(|x| *x *= scale);
        write(row, out, (max[row] + sum[row].log2()) * std::f32::consts::LN_2);
    }
}

/// The entries `start..end` in parts whose keys are consecutive in memory.
#[inline(always)]
fn runs(piece: &Piece<'_>, start: usize, end: usize) -> impl Iterator<Item = Range<usize>> {
    let mut at = start;
    std::iter::from_fn(move || {
        (at < end).then(|| {
            let run = piece.run(at, end);
            at = run.end;
            run
        })
    })
}

/// Rows of the next register block: 4, 2 or 1; three that are left over make a block of 4 with a row of zeros.
#[inline(always)]
fn block_rows(left: usize) -> usize {
    if left >= 3 { 4 } else { left }
}

/// The first `count` scores of one row to probabilities, in place, and the rest to 0; returns the factor on what was summed before.
#[inline(always)]
fn softmax<S: Simd>(
    simd: S,
    factor: f32,
    softcap: Option<f32>,
    scores: &mut [f32],
    count: usize,
    max: &mut f32,
    sum: &mut f32,
) -> f32 {
    let mut largest = simd.splat(f32::NEG_INFINITY);
    for scores in scores.chunks_exact_mut(S::LANES) {
        let mut score = simd.mul(load(simd, scores), simd.splat(factor));
        if let Some(cap) = softcap {
            score = simd.mul(simd.splat(cap), simd.tanh(score));
        }
        store(simd, score, scores);
    }
    scores[count..].fill(f32::NEG_INFINITY);
    for scores in scores.chunks_exact(S::LANES) {
        largest = simd.max(load(simd, scores), largest);
    }
    let before = *max;
    let largest = simd.max_lanes(largest);
    *max = if largest > before { largest } else { before };
    let shift = if *max == f32::NEG_INFINITY { 0.0 } else { *max };
    let mut total = simd.splat(0.0);
    for scores in scores.chunks_exact_mut(S::LANES) {
        let p = simd.exp2(simd.sub(load(simd, scores), simd.splat(shift)));
        store(simd, p, scores);
        total = simd.add(total, p);
    }
    let alpha = (before - shift).exp2();
    *sum = *sum * alpha + simd.sum_lanes(total);
    alpha
}

/// The register blocks: up to four rows by four keys, or by four vectors of columns.
#[derive(Clone, Copy)]
struct Block<S, P, T> {
    simd: S,
    product: P,
    head_dim: usize,
    width: usize,
    element: std::marker::PhantomData<T>,
}

// Register blocks are arrays that are indexed by constants once the loops are unrolled.
#[allow(clippy::needless_range_loop)]
impl<S: Simd, P: Product<S>, T: Load> Block<S, P, T> {
    /// The vector of elements from `at` on, zero past the head's end.
    #[inline(always)]
    fn load<const FULL: bool>(&self, row: &[T], at: usize) -> S::V {
        if FULL {
            let row = &row[at..at + S::LANES];
            // SAFETY: `row` holds a vector.
            return unsafe { T::load(self.simd, row.as_ptr()) };
        }
        let mut tail = [T::default(); WIDEST];
        let rest = &row[at.min(self.head_dim)..self.head_dim.min(at + S::LANES)];
        tail[..rest.len()].copy_from_slice(rest);
        // SAFETY: `tail` holds the widest vector.
        unsafe { T::load(self.simd, tail.as_ptr()) }
    }

    /// A vector of words of the product: elements as f32, or pairs of elements as they lie.
    ///
    /// # Safety
    /// `P::ELEMENTS * S::LANES` elements must be readable at `from`.
    #[inline(always)]
    unsafe fn load_words(&self, from: *const T) -> S::V {
        // SAFETY: the caller's promise; pairs are of two bytes each.
        unsafe { if P::ELEMENTS == 1 { T::load(self.simd, from) } else { self.simd.load(from.cast()) } }
    }

    /// `scores[r][i] = query[r] · keys[i]`, one key after the other, so that they stream from memory in order.
    #[inline(always)]
    fn scores<const R: usize>(&self, query: &[f32], keys: [&[T]; BLOCK], scores: &mut [f32]) {
        let simd = self.simd;
        let elements = P::ELEMENTS * S::LANES;
        let whole = self.head_dim - self.head_dim % elements;
        let mut sums = [[simd.splat(0.0); BLOCK]; R];
        assert!(query.len() >= R * self.width && keys.iter().all(|key| key.len() >= whole));
        for (i, key) in keys.into_iter().enumerate() {
            let mut products = [simd.splat(0.0); R];
            for at in (0..whole).step_by(elements) {
                // SAFETY: `key` holds `whole` elements and `query` R rows of `width`, as asserted above.
                unsafe {
                    let key = self.load_words(key.as_ptr().add(at));
                    for r in 0..R {
                        let query = simd.load(query.as_ptr().add(r * self.width + at / P::ELEMENTS));
                        products[r] = self.product.fma(query, key, products[r]);
                    }
                }
            }
            if whole < self.head_dim {
                let mut tail = [T::default(); 2 * WIDEST];
                tail[..self.head_dim - whole].copy_from_slice(&key[whole..self.head_dim]);
                // SAFETY: `tail` holds the longest vector of words.
                let key = unsafe { self.load_words(tail.as_ptr()) };
                for r in 0..R {
                    let query = load(simd, &query[r * self.width + whole / P::ELEMENTS..]);
                    products[r] = self.product.fma(query, key, products[r]);
                }
            }
            for r in 0..R {
                sums[r][i] = products[r];
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            scores[r * STRIDE..][..BLOCK].copy_from_slice(&self.simd.sum_lanes_of(*sums));
        }
    }

    /// `out[r] = alpha[r] · out[r] + Σ_i probabilities[r][i] · values[i]`, `C` vectors of columns at a time.
    #[inline(always)]
    fn accumulate<const R: usize, const C: usize>(
        &self,
        alpha: &[f32],
        probabilities: &[f32],
        values: Run<'_, T>,
        count: usize,
        out: &mut [f32],
    ) {
        let columns = C * S::LANES;
        let whole = self.head_dim - self.head_dim % columns;
        for at in (0..whole).step_by(columns) {
            self.accumulate_columns::<R, C, true>(alpha, probabilities, values, count, at, out);
        }
        if whole < self.head_dim {
            self.accumulate_columns::<R, C, false>(alpha, probabilities, values, count, whole, out);
        }
    }

    #[inline(always)]
    fn accumulate_columns<const R: usize, const C: usize, const FULL: bool>(
        &self,
        alpha: &[f32],
        probabilities: &[f32],
        values: Run<'_, T>,
        count: usize,
        at: usize,
        out: &mut [f32],
    ) {
        let simd = self.simd;
        let mut sums = [[simd.splat(0.0); C]; R];
        for r in 0..R {
            for i in 0..C {
                let out = &out[r * self.width + at + i * S::LANES..];
                sums[r][i] = simd.mul(simd.splat(alpha[r]), load(simd, out));
            }
        }
        for key in 0..count {
            let row = values.row(key, self.head_dim);
            let mut p = [simd.splat(0.0); R];
            for r in 0..R {
                p[r] = simd.splat(probabilities[r * STRIDE + key]);
            }
            for i in 0..C {
                let column = self.load::<FULL>(row, at + i * S::LANES);
                for r in 0..R {
                    sums[r][i] = simd.fma(p[r], column, sums[r][i]);
                }
            }
        }
        for r in 0..R {
            for i in 0..C {
                store(simd, sums[r][i], &mut out[r * self.width + at + i * S::LANES..]);
            }
        }
    }
}
