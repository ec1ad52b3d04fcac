//! Few query rows against many keys: bound by reading the keys and values once.
//!
//! The same online softmax as in `tile`, with the head dimension across the vectors: keys and values are read where they
//! lie, converted in registers, and serve all rows of their KV head at once. All rows see the same keys.

use super::rows::pack_words;
use super::tile::{Inputs, Piece};
use crate::cpu::simd::Simd;
use crate::tensor::sealed::AnySlice;
use half::{bf16, f16};

/// Query rows at most: beyond, `tile` does less work per row.
pub(super) const ROWS: usize = 16;
/// Keys between two updates of the running maximum: their values stay in L1.
const KEYS: usize = 32;
/// Keys, and vectors of value columns, that are worked on at a time.
const BLOCK: usize = 4;
/// The widest vector of any instruction set.
const WIDEST: usize = 16;

/// Elements of workspace for one thread.
pub(super) fn scratch_len(head_dim: usize) -> usize {
    ROWS * (2 * padded::<WIDEST>(head_dim) + KEYS)
}

/// A head padded to whole blocks of vectors.
fn padded<const LANES: usize>(head_dim: usize) -> usize {
    head_dim.next_multiple_of(BLOCK * LANES)
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

/// Computes one piece of at most [`ROWS`] rows that all see `piece.entries`. `write(row, out, lse)` gets each row's result.
#[inline(always)]
pub(super) fn attend<S: Simd>(
    simd: S,
    inputs: &Inputs<'_>,
    piece: &Piece,
    scratch: &mut [f32],
    write: impl FnMut(usize, &[f32], f32),
) {
    match inputs.key.elements() {
        AnySlice::F32(_) => attend_as::<S, f32>(simd, inputs, piece, scratch, write),
        AnySlice::F16(_) => attend_as::<S, f16>(simd, inputs, piece, scratch, write),
        AnySlice::BF16(_) => attend_as::<S, bf16>(simd, inputs, piece, scratch, write),
    }
}

#[inline(always)]
fn attend_as<S: Simd, T: Load>(
    simd: S,
    inputs: &Inputs<'_>,
    piece: &Piece,
    scratch: &mut [f32],
    mut write: impl FnMut(usize, &[f32], f32),
) {
    let width = inputs.head_dim.next_multiple_of(BLOCK * S::LANES);
    let rows = piece.rows();
    let (query, scratch) = scratch.split_at_mut(ROWS * width);
    let (out, scratch) = scratch.split_at_mut(ROWS * width);
    let scores = &mut scratch[..ROWS * KEYS];
    let (factor, softcap) = inputs.factors();
    let (mut max, mut sum) = ([f32::NEG_INFINITY; ROWS], [0f32; ROWS]);

    query.fill(0.0);
    out.fill(0.0);
    for (row, query) in query.chunks_exact_mut(width).take(rows).enumerate() {
        let (token, head) = piece.place(row);
        pack_words::<1>(inputs.query.row(piece.batch, token, head), query);
    }

    for start in piece.entries.clone().step_by(KEYS) {
        let count = KEYS.min(piece.entries.end - start);
        let block =
            Block::<S, T> { simd, head_dim: inputs.head_dim, width, element: std::marker::PhantomData };
        let key = |i: usize| T::rows(piece.key_row(&inputs.key, start + i.min(count - 1)));
        let value = |i: usize| T::rows(piece.key_row(&inputs.value, start + i));
        for first in (0..count).step_by(BLOCK) {
            let keys: [&[T]; BLOCK] = std::array::from_fn(|i| key(first + i));
            for_row_blocks(rows, |row, size| {
                let (query, scores) = (&query[row * width..], &mut scores[row * KEYS + first..]);
                match size {
                    1 => block.scores::<1>(query, keys, scores),
                    2 => block.scores::<2>(query, keys, scores),
                    _ => block.scores::<4>(query, keys, scores),
                }
            });
        }
        let mut alpha = [0f32; ROWS];
        for row in 0..rows {
            let scores = &mut scores[row * KEYS..][..KEYS];
            alpha[row] = softmax(simd, factor, softcap, scores, count, &mut max[row], &mut sum[row]);
        }
        for_row_blocks(rows, |row, size| {
            let (out, scores) = (&mut out[row * width..], &scores[row * KEYS..]);
            match size {
                1 => block.accumulate::<1>(&alpha[row..], scores, count, value, out),
                2 => block.accumulate::<2>(&alpha[row..], scores, count, value, out),
                _ => block.accumulate::<4>(&alpha[row..], scores, count, value, out),
            }
        });
    }

    for (row, out) in out.chunks_exact_mut(width).take(rows).enumerate() {
        let scale = if sum[row] == 0.0 { 0.0 } else { 1.0 / sum[row] };
        let out = &mut out[..inputs.head_dim];
        out.iter_mut().for_each(|x| *x *= scale);
        write(row, out, (max[row] + sum[row].log2()) * std::f32::consts::LN_2);
    }
}

/// Cuts rows into blocks of 4, 2 and 1; three left over make a block of 4 with a row of zeros.
#[inline(always)]
fn for_row_blocks(rows: usize, mut block: impl FnMut(usize, usize)) {
    let mut row = 0;
    while row < rows {
        let size = if rows - row >= 3 { 4 } else { rows - row };
        block(row, size);
        row += size;
    }
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
        // SAFETY: `scores` holds a vector.
        unsafe {
            let mut score = simd.mul(simd.load(scores.as_ptr()), simd.splat(factor));
            if let Some(cap) = softcap {
                score = simd.mul(simd.splat(cap), simd.tanh(score));
            }
            simd.store(score, scores.as_mut_ptr());
        }
    }
    scores[count..].fill(f32::NEG_INFINITY);
    for scores in scores.chunks_exact(S::LANES) {
        // SAFETY: `scores` holds a vector.
        largest = simd.max(unsafe { simd.load(scores.as_ptr()) }, largest);
    }
    let before = *max;
    let largest = simd.max_lanes(largest);
    *max = if largest > before { largest } else { before };
    let shift = if *max == f32::NEG_INFINITY { 0.0 } else { *max };
    let mut total = simd.splat(0.0);
    for scores in scores.chunks_exact_mut(S::LANES) {
        // SAFETY: `scores` holds a vector.
        unsafe {
            let p = simd.exp2(simd.sub(simd.load(scores.as_ptr()), simd.splat(shift)));
            simd.store(p, scores.as_mut_ptr());
            total = simd.add(total, p);
        }
    }
    let alpha = (before - shift).exp2();
    *sum = *sum * alpha + simd.sum_lanes(total);
    alpha
}

/// The register blocks: up to four rows by four keys, or by four vectors of columns.
#[derive(Clone, Copy)]
struct Block<S, T> {
    simd: S,
    head_dim: usize,
    width: usize,
    element: std::marker::PhantomData<T>,
}

impl<S: Simd, T: Load> Block<S, T> {
    /// The vector of elements from `at` on, zero past the head's end.
    #[inline(always)]
    fn load(&self, row: &[T], at: usize) -> S::V {
        if at + S::LANES <= self.head_dim {
            let row = &row[at..at + S::LANES];
            // SAFETY: `row` holds a vector.
            return unsafe { T::load(self.simd, row.as_ptr()) };
        }
        let mut tail = [T::default(); WIDEST];
        let rest = &row[at.min(self.head_dim)..self.head_dim];
        tail[..rest.len()].copy_from_slice(rest);
        // SAFETY: `tail` holds the widest vector.
        unsafe { T::load(self.simd, tail.as_ptr()) }
    }

    /// `scores[r][i] = query[r] · keys[i]`
    #[inline(always)]
    fn scores<const R: usize>(&self, query: &[f32], keys: [&[T]; BLOCK], scores: &mut [f32]) {
        let simd = self.simd;
        assert!(query.len() >= R * self.width);
        let mut sums = [[simd.splat(0.0); BLOCK]; R];
        for at in (0..self.head_dim).step_by(S::LANES) {
            let keys: [S::V; BLOCK] = std::array::from_fn(|i| self.load(keys[i], at));
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `width` is a multiple of a vector's length, and `query` holds R rows of it.
                let query = unsafe { simd.load(query.as_ptr().add(r * self.width + at)) };
                for (sum, key) in sums.iter_mut().zip(keys) {
                    *sum = simd.fma(query, key, *sum);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (i, sum) in sums.iter().enumerate() {
                scores[r * KEYS + i] = simd.sum_lanes(*sum);
            }
        }
    }

    /// `out[r] = alpha[r] · out[r] + Σ_i probabilities[r][i] · value(i)`
    #[inline(always)]
    fn accumulate<'a, const R: usize>(
        &self,
        alpha: &[f32],
        probabilities: &[f32],
        count: usize,
        value: impl Fn(usize) -> &'a [T],
        out: &mut [f32],
    ) where
        T: 'a,
    {
        let simd = self.simd;
        assert!(out.len() >= R * self.width && self.width.is_multiple_of(BLOCK * S::LANES));
        for at in (0..self.head_dim).step_by(BLOCK * S::LANES) {
            let place = |r: usize, i: usize| r * self.width + at + i * S::LANES;
            let mut sums = [[simd.splat(0.0); BLOCK]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                for (i, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: `out` holds R rows of `width`, a multiple of the block's columns.
                    let out = unsafe { simd.load(out.as_ptr().add(place(r, i))) };
                    *sum = simd.mul(simd.splat(alpha[r]), out);
                }
            }
            for key in 0..count {
                let row = value(key);
                let columns: [S::V; BLOCK] = std::array::from_fn(|i| self.load(row, at + i * S::LANES));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let p = simd.splat(probabilities[r * KEYS + key]);
                    for (sum, column) in sums.iter_mut().zip(columns) {
                        *sum = simd.fma(p, column, *sum);
                    }
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (i, sum) in sums.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe { simd.store(*sum, out.as_mut_ptr().add(place(r, i))) };
                }
            }
        }
    }
}
