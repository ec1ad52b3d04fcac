//! Few query rows against many keys: bound by reading the keys and values once.
//!
//! The same online softmax as in `tile`, with the head dimension across the vectors: keys and
//! values are read where they lie, converted in registers, and serve all rows of their KV head at
//! once. All rows see the same keys. A piece of some KV heads walks them together, tile by tile: in
//! layouts where the heads of a token lie side by side, memory is read in its own order.

mod block;

use super::piece::{Operands, Piece, Source};
use super::rows::pack_words;
use super::workspace::Scratch;
use crate::F8E4M3;
use crate::element::sealed::AnySlice;
use crate::schedule::Segment;
use crate::simd::{Load, Product, Simd, load, prefetch, store};
pub(super) use block::BLOCK_ROWS;
use block::{BLOCK, Block, Run};
use half::{bf16, f16};
use std::ops::Range;

/// Query rows at most: beyond, `tile` does less work per row.
pub(super) const ROWS: usize = 16;
/// KV heads of a piece at most: their tiles of keys and values stay in L2.
pub(super) const KV_HEADS: usize = 8;
/// Keys between two updates of the running maximum: their values stay in L1.
const KEYS: usize = 32;
/// From the scores of one row to the next's: the last block of keys may reach beyond the tile.
const STRIDE: usize = KEYS + BLOCK;

/// Whether this kernel computes the rows of a segment, each of so many heads, if it takes `most`.
pub(super) fn suits(segment: &Segment, heads: usize, most: usize) -> bool {
    segment.is_uniform() && segment.rows.len() * heads <= most
}

/// Elements of workspace for one thread.
pub(super) fn scratch_len(dims: [usize; 2]) -> usize {
    ROWS * STRIDE + KV_HEADS * State::len(ROWS, dims.map(block::widest))
}

/// Computes one piece of at most [`ROWS`] rows and [`KV_HEADS`] KV heads, whose rows all see
/// `piece.entries`. `write(head, row, out, lse)` gets each row's result; `head` counts from the
/// piece's first KV head.
#[inline(always)]
pub(super) fn attend<S: Simd, P: Product<S>>(
    simd: S,
    product: P,
    inputs: &Operands<'_>,
    piece: &Piece<'_>,
    scratch: &mut Scratch<'_>,
    write: impl FnMut(usize, usize, &[f32], f32),
) {
    match inputs.key.others.elements() {
        AnySlice::F32(_) => attend_as::<S, P, f32>(simd, product, inputs, piece, scratch, write),
        AnySlice::F16(_) => attend_as::<S, P, f16>(simd, product, inputs, piece, scratch, write),
        AnySlice::BF16(_) => attend_as::<S, P, bf16>(simd, product, inputs, piece, scratch, write),
        AnySlice::F8E4M3(_) => attend_as::<S, P, F8E4M3>(simd, product, inputs, piece, scratch, write),
    }
}

#[inline(always)]
fn attend_as<S: Simd, P: Product<S>, T: Load>(
    simd: S,
    product: P,
    inputs: &Operands<'_>,
    piece: &Piece<'_>,
    scratch: &mut Scratch<'_>,
    mut write: impl FnMut(usize, usize, &[f32], f32),
) {
    let block = Block::<S, P, T>::new(simd, product, [inputs.head_dim, inputs.value_dim], STRIDE);
    let (rows, heads, widths) = (piece.rows(), piece.kv_heads.len(), block.widths);
    let [width, out_width] = widths;
    let state_len = State::len(rows, widths);
    let (scores, states) = scratch.first(ROWS * STRIDE + heads * state_len).split_at_mut(ROWS * STRIDE);

    for (head, state) in states.chunks_exact_mut(state_len).enumerate() {
        let State { query, out, max, sum } = State::new(state, rows, widths);
        query.fill(0.0);
        out.fill(0.0);
        max.fill(f32::NEG_INFINITY);
        sum.fill(0.0);
        let piece = piece.of_head(head);
        for (row, query) in query.chunks_exact_mut(width).take(rows).enumerate() {
            let row = inputs.query.row(piece.place(row));
            if P::ELEMENTS == 1 {
                pack_words::<S, 1>(simd, row, query);
            } else {
                pack_words::<S, 2>(simd, row, query);
            }
        }
    }
    for start in piece.entries.clone().step_by(KEYS) {
        for (head, state) in states.chunks_exact_mut(state_len).enumerate() {
            tile(&block, inputs, piece, head, start, scores, State::new(state, rows, widths));
        }
    }
    for (head, state) in states.chunks_exact_mut(state_len).enumerate() {
        let State { out, max, sum, .. } = State::new(state, rows, widths);
        let [_, value_scale] = inputs.scales_of(piece.kv_heads.start + head);
        for (row, out) in out.chunks_exact_mut(out_width).take(rows).enumerate() {
            let out = &mut out[..inputs.value_dim];
            if sum[row] == 0.0 {
                out.fill(0.0);
            } else {
                let scale = T::FACTOR * value_scale / sum[row];
                out.iter_mut().for_each(|x| *x *= scale);
            }
            write(head, row, out, (max[row] + sum[row].log2()) * std::f32::consts::LN_2);
        }
    }
}

/// What is kept of the rows of one KV head from tile to tile; rows are padded to whole register
/// blocks.
struct State<'a> {
    /// `[row][word]`
    query: &'a mut [f32],
    /// `[row][column]`
    out: &'a mut [f32],
    /// The largest score so far, in the log2 domain.
    max: &'a mut [f32],
    sum: &'a mut [f32],
}

impl<'a> State<'a> {
    fn len(rows: usize, [width, out_width]: [usize; 2]) -> usize {
        rows.next_multiple_of(BLOCK_ROWS) * (width + out_width + 2)
    }

    #[inline(always)]
    fn new(memory: &'a mut [f32], rows: usize, [width, out_width]: [usize; 2]) -> Self {
        let rows = rows.next_multiple_of(BLOCK_ROWS);
        let (query, memory) = memory.split_at_mut(rows * width);
        let (out, memory) = memory.split_at_mut(rows * out_width);
        let (max, sum) = memory.split_at_mut(rows);
        Self { query, out, max, sum }
    }
}

/// The tile of keys from the entry `start` on, for one KV head of a piece.
#[inline(always)]
fn tile<S: Simd, P: Product<S>, T: Load>(
    block: &Block<S, P, T>,
    inputs: &Operands<'_>,
    piece: &Piece<'_>,
    head: usize,
    start: usize,
    scores: &mut [f32],
    State { query, out, max, sum }: State<'_>,
) {
    let own = piece.of_head(head);
    let (rows, end) = (piece.rows(), piece.entries.end.min(start + KEYS));
    for run in runs(&own, start, end) {
        let keys = run_of::<T>(&inputs.key, &own, &run);
        for first in (0..run.len()).step_by(BLOCK) {
            let at = run.start - start + first;
            if inputs.cold {
                let part = head * KEYS + at;
                prefetch_part::<T>(inputs, piece, end, part..part + BLOCK.min(run.len() - first));
            }
            block.scores(rows, query, keys, first, &mut scores[at..]);
        }
        block.mark_nan_scores(rows, keys, &mut scores[run.start - start..]);
    }
    let (factor, softcap) = inputs.factors(own.kv_heads.start, T::FACTOR);
    let mut alpha = [0f32; ROWS];
    for row in 0..rows {
        let scores = &mut scores[row * STRIDE..][..KEYS];
        let count = end - start;
        alpha[row] = softmax(block.simd, factor, softcap, scores, count, &mut max[row], &mut sum[row]);
    }
    for run in runs(&own, start, end) {
        let values = run_of::<T>(&inputs.value, &own, &run);
        block.add_values(rows, &alpha, &scores[run.start - start..], values, out);
        block.mark_nan_outputs(rows, values, out);
        // The other runs of this tile add to what it has.
        alpha = [1.0; ROWS];
    }
}

/// Asks for a part of the tile that follows the entry `end`. The part is a range of its rows,
/// counted as they lie in memory: all heads of a key before the next key.
#[inline(always)]
fn prefetch_part<T: Load>(inputs: &Operands<'_>, piece: &Piece<'_>, end: usize, part: Range<usize>) {
    let heads = piece.kv_heads.len();
    let mut row = part.start;
    while row < part.end {
        let (entry, head) = (end + row / heads, row % heads);
        if entry >= piece.entries.end {
            return;
        }
        // Those that follow each other at one stride.
        let count = if heads > 1 {
            (heads - head).min(part.end - row)
        } else {
            piece.run(entry, piece.entries.end.min(entry + part.end - row)).len()
        };
        let (in_prefix, mut place) = piece.key_place(entry);
        place[2] += head;
        for (source, dim) in [(&inputs.key, inputs.head_dim), (&inputs.value, inputs.value_dim)] {
            let rows = source.rows(in_prefix);
            let stride = if heads > 1 { rows.head_stride() } else { rows.seq_stride() };
            let data = T::rows(rows.rows_from(place));
            for i in 0..count {
                prefetch(&data[i * stride..][..dim]);
            }
        }
        row += count;
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

/// The rows of keys or values of such a part.
#[inline(always)]
fn run_of<'a, T: Load>(source: &Source<'a>, piece: &Piece<'_>, run: &Range<usize>) -> Run<'a, T> {
    let (in_prefix, place) = piece.key_place(run.start);
    let rows = source.rows(in_prefix);
    Run { data: T::rows(rows.rows_from(place)), stride: rows.seq_stride(), len: run.len() }
}

/// The first `count` scores of one row to probabilities, in place, and the rest to 0; returns the
/// factor on what was summed before.
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
