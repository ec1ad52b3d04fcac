//! Many query rows against tiles of keys: the online softmax.
//!
//! ```text
//! for each tile of keys:   S = c · K Qᵀ        c = scale · log2 e, so that exp(scale · s - ..) = 2^(..)
//!                          m' = max(m, max_j S_j),   α = 2^(m - m'),   P = 2^(S - m')
//!                          l  = α l + Σ_j P_j,       O = α O + Pᵀ V
//! at the end:              out = O / l,              lse = ln 2 · (m + log2 l)
//! ```
//!
//! Scores are kept transposed, keys down and query rows across, one panel of rows (two vectors)
//! after the other. So the softmax runs lane by lane. The products are an [`Engine`]'s. By vectors,
//! K and P enter them as broadcast words and Q and V as vectors: K and V are copied once per tile
//! and never transposed.
//!
//! The rows of a tile are the query heads of one KV head, token by token (row = token · heads +
//! head), so that all heads of a group share one pass over the keys.

pub(super) mod matrix;
mod vectors;

pub(super) use vectors::Vectors;

use super::piece::{Operands, Piece, Source};
use super::rows::{for_each_special, pack_words};
use super::workspace::Scratch;
use crate::cpu::simd::{Product, Simd, load, store};
use crate::element::sealed::AnySlice;

/// Query rows of a tile at most: a tile of keys is copied once for so many rows, and the tile's
/// outputs stay in L2.
pub(super) const ROWS: usize = 128;
/// Keys of a tile: one panel of scores and one of values together fit into L1. A multiple of
/// [`STEP`].
pub(super) const KEYS: usize = 96;
/// Whole tiles of every [`Engine`]: a list skips so many keys at a time.
pub(super) const GRID: usize = 768;
const _: () = assert!(GRID.is_multiple_of(KEYS) && GRID.is_multiple_of(matrix::KEYS));
/// Keys and words are padded to multiples of this: the register tile's rows, and the product's
/// unrolling times two bf16.
const STEP: usize = 8;
/// The widest panel of any instruction set: two vectors of 16.
pub(super) const WIDEST_PANEL: usize = 32;

/// Elements of workspace for one thread at most.
pub(super) fn scratch_len([head_dim, value_dim]: [usize; 2]) -> usize {
    let words = head_dim.next_multiple_of(2 * STEP);
    let columns = value_dim.next_multiple_of(WIDEST_PANEL);
    Buffers::len(ROWS, KEYS, words, columns, 1)
}

/// Who computes the products of a tile, and how what they take lies in memory.
pub(super) trait Engine<S: Simd, P: Product<S>> {
    /// Keys of a tile at most.
    const KEYS: usize;
    /// Keys and words are padded to multiples of this.
    const STEP: usize;
    /// Rows of scratch memory that it needs.
    const ROWS_OF_SCRATCH: usize;

    /// Whether scores come with the factor; otherwise the softmax puts it on them.
    const SCALES: bool;

    /// `scores[key][row] = key · query`, times the factor if it `SCALES`.
    fn scores(&mut self, tile: &Tile<S, P>, query: &[f32], key: &[f32], scores: &mut [f32]);

    /// Packs the values of a tile of keys, with those that are not finite as zeros; returns whether
    /// there were none. `value` is as long as the padded tile needs.
    fn pack_values<'a>(
        &self,
        tile: &Tile<S, P>,
        rows: impl Fn(usize) -> AnySlice<'a>,
        count: usize,
        value: &mut [f32],
        scratch: &mut [f32],
    ) -> bool;

    /// `out = alpha · out + probabilitiesᵀ · value`, for a panel of rows.
    fn accumulate(
        &mut self,
        tile: &Tile<S, P>,
        probabilities: &[f32],
        value: &[f32],
        keys: usize,
        alpha: &[f32],
        out: &mut [f32],
    );

    /// The place of an element in the outputs of all panels.
    fn place(&self, tile: &Tile<S, P>, row: usize, column: usize) -> usize;

    /// The outputs of a panel, row by row.
    fn by_rows<'a>(&self, tile: &Tile<S, P>, out: &'a mut [f32], scratch: &'a mut [f32]) -> &'a mut [f32];
}

/// One thread's buffers, for `rows` query rows (whole panels) and tiles of `keys`.
struct Buffers<'a> {
    /// `[panel][word][row of the panel]`
    query: &'a mut [f32],
    /// `[key][word]`
    key: &'a mut [f32],
    /// `[panel of columns][word of keys][column]`
    value: &'a mut [f32],
    /// `[key][row]` of one panel; scores, then probabilities as words.
    scores: &'a mut [f32],
    /// `[row][column]`
    out: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    alpha: &'a mut [f32],
    /// Rows of words or columns.
    row: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    fn len(rows: usize, keys: usize, words: usize, columns: usize, scratch_rows: usize) -> usize {
        rows * (words + columns + 3)
            + keys * (words + columns + WIDEST_PANEL)
            + scratch_rows * columns.max(words)
    }

    fn new(
        scratch: &'a mut Scratch<'_>,
        rows: usize,
        keys: usize,
        words: usize,
        columns: usize,
        scratch_rows: usize,
    ) -> Self {
        let mut memory = scratch.first(Self::len(rows, keys, words, columns, scratch_rows));
        let mut take = |len: usize| {
            let (taken, rest) = std::mem::take(&mut memory).split_at_mut(len);
            memory = rest;
            taken
        };
        Self {
            query: take(rows * words),
            key: take(keys * words),
            value: take(keys * columns),
            scores: take(keys * WIDEST_PANEL),
            out: take(rows * columns),
            max: take(rows),
            sum: take(rows),
            alpha: take(rows),
            row: take(scratch_rows * columns.max(words)),
        }
    }
}

/// Computes one piece. `write(row, out, lse)` gets each row's result; `out` has `value_dim`
/// elements.
#[inline(always)]
pub(super) fn attend<S: Simd, P: Product<S>, E: Engine<S, P>>(
    simd: S,
    product: P,
    mut engine: E,
    inputs: &Operands<'_>,
    piece: &Piece<'_>,
    scratch: &mut Scratch<'_>,
    mut write: impl FnMut(usize, &[f32], f32),
) {
    debug_assert_eq!(piece.kv_heads.len(), 1);
    let panel_rows = 2 * S::LANES;
    let words = inputs.head_dim.div_ceil(P::ELEMENTS).next_multiple_of(E::STEP);
    let columns = inputs.value_dim.next_multiple_of(panel_rows);
    let rows = piece.rows();
    let panels = rows.div_ceil(panel_rows);
    let (factor, softcap) = inputs.factors(piece.kv_heads.start, 1.0);
    let [_, value_scale] = inputs.scales_of(piece.kv_heads.start);
    let tile = Tile { simd, product, words, columns, factor, softcap };
    let most_keys = piece.entries.len().min(E::KEYS).next_multiple_of(E::STEP);
    let padded_rows = panels * panel_rows;
    let scratch = Buffers::new(scratch, padded_rows, most_keys, words, columns, E::ROWS_OF_SCRATCH);

    pack_queries::<S, P>(inputs, piece, words, scratch.query, scratch.row);
    scratch.out.fill(0.0);
    scratch.max.fill(f32::NEG_INFINITY);
    scratch.sum.fill(0.0);

    let visible = |row: usize| piece.visible(row);
    for start in piece.entries.clone().step_by(E::KEYS) {
        let count = E::KEYS.min(piece.entries.end - start);
        let entries = start..start + count;
        if piece.hides(&entries, 0) {
            continue;
        }
        let padded = count.next_multiple_of(E::STEP);
        let [key_row, value_row] = [&inputs.key, &inputs.value].map(|source| rows_from(piece, source, start));
        for i in 0..padded {
            let to = &mut scratch.key[i * words..][..words];
            if i < count { pack_row::<P, S>(key_row(i), to) } else { to.fill(0.0) }
        }
        let value = &mut scratch.value[..padded / P::ELEMENTS * columns];
        let finite = engine.pack_values(&tile, &value_row, count, value, scratch.row);

        for panel in 0..panels {
            let (first, last) = (panel * panel_rows, ((panel + 1) * panel_rows).min(rows) - 1);
            let seen = visible(last).saturating_sub(start).min(count);
            if seen == 0 || piece.hides(&entries, first) {
                continue;
            }
            let keys = seen.next_multiple_of(E::STEP);
            let scores = &mut scratch.scores[..panel_rows * keys];
            let state = first..first + panel_rows;
            engine.scores(&tile, &scratch.query[first * words..], &scratch.key[..keys * words], scores);
            let mut limits = Limits { visible: [0.0; WIDEST_PANEL], hidden: [0.0; WIDEST_PANEL], anchor: 0 };
            let left = start.max(piece.segment.prefix) < piece.hidden(last).min(start + count);
            let boundary = visible(first) < start + keys || count < keys || left;
            if boundary {
                limits.anchor = piece.segment.prefix.saturating_sub(start);
                for lane in 0..panel_rows {
                    let row = (first + lane).min(last);
                    let within = |entry: usize| entry.saturating_sub(start).min(count) as f32;
                    limits.visible[lane] = within(visible(row));
                    limits.hidden[lane] = if left { within(piece.hidden(row)) } else { 0.0 };
                }
            }
            let online = Online {
                max: &mut scratch.max[state.clone()],
                sum: &mut scratch.sum[state.clone()],
                alpha: &mut scratch.alpha[state],
            };
            // Maxima of scores with the factor need a positive one, and a softcap follows the
            // factor.
            let scales = E::SCALES || softcap.is_some() || factor <= 0.0;
            if scales && !E::SCALES {
                tile.scale(scores);
            }
            match (boundary, softcap.is_some()) {
                (false, false) if scales => tile.softmax::<false, false, true>(scores, &limits, online),
                (true, false) if scales => tile.softmax::<true, false, true>(scores, &limits, online),
                (false, false) => tile.softmax::<false, false, false>(scores, &limits, online),
                (true, false) => tile.softmax::<true, false, false>(scores, &limits, online),
                (false, true) => tile.softmax::<false, true, true>(scores, &limits, online),
                (true, true) => tile.softmax::<true, true, true>(scores, &limits, online),
            }
            let out = &mut scratch.out[first * columns..][..panel_rows * columns];
            let alpha = &scratch.alpha[first..][..panel_rows];
            engine.accumulate(&tile, scores, value, keys, alpha, out);
        }
        if !finite {
            // They are packed as zeros; a row's weight of a key it sees is above 0, of others 0.
            for i in 0..count {
                for_each_special(value_row(i), |column, x| {
                    for row in (0..rows).filter(|&row| piece.sees(row, start + i)) {
                        scratch.out[engine.place(&tile, row, column)] += x;
                    }
                });
            }
        }
    }

    for panel in 0..panels {
        let first = panel * panel_rows;
        let out = &mut scratch.out[first * columns..][..panel_rows * columns];
        let out = engine.by_rows(&tile, out, scratch.row);
        for (row, out) in (first..rows).zip(out.chunks_exact_mut(columns)) {
            let (max, sum) = (scratch.max[row], scratch.sum[row]);
            let out = &mut out[..inputs.value_dim];
            if sum == 0.0 {
                out.fill(0.0);
            } else {
                // A weight of 0 may turn -0 to 0, so that it depends on the keys that other rows
                // see. The sum with 0 makes both 0.
                let scale = value_scale / sum;
                out.iter_mut().for_each(|x| *x = *x * scale + 0.0);
            }
            write(row, out, (max + sum.log2()) * std::f32::consts::LN_2);
        }
    }
}

/// The rows of keys or values of the entries from `start` on. Most of them follow each other in
/// memory, and are found without a look at the batch.
#[inline(always)]
fn rows_from<'a>(piece: &Piece<'_>, source: &Source<'a>, start: usize) -> impl Fn(usize) -> AnySlice<'a> {
    let run = piece.run(start, piece.entries.end).len();
    let (in_prefix, [batch, seq, head]) = piece.key_place(start);
    let rows = *source.rows(in_prefix);
    move |i| {
        if i < run { rows.row([batch, seq + i, head]) } else { piece.key_row(source, start + i) }
    }
}

/// Packs the query rows of a piece panel by panel, rows across; missing rows are zero.
#[inline(always)]
fn pack_queries<S: Simd, P: Product<S>>(
    inputs: &Operands<'_>,
    piece: &Piece<'_>,
    words: usize,
    packed: &mut [f32],
    row_words: &mut [f32],
) {
    let panel_rows = 2 * S::LANES;
    let rows = piece.rows();
    for row in 0..rows.next_multiple_of(panel_rows) {
        if row < rows {
            pack_row::<P, S>(inputs.query.row(piece.place(row)), &mut row_words[..words]);
        } else {
            row_words[..words].fill(0.0);
        }
        let (panel, lane) = (row / panel_rows, row % panel_rows);
        let to = &mut packed[panel * panel_rows * words..][..panel_rows * words];
        for (word, to) in row_words[..words].iter().zip(to.chunks_exact_mut(panel_rows)) {
            to[lane] = *word;
        }
    }
}

#[inline(always)]
fn pack_row<P: Product<S>, S: Simd>(row: AnySlice<'_>, to: &mut [f32]) {
    if P::ELEMENTS == 1 { pack_words::<1>(row, to) } else { pack_words::<2>(row, to) }
}

/// The running maximum (log2 domain) and sum of a panel's rows, and the factor that the last tile
/// put on them.
struct Online<'a> {
    max: &'a mut [f32],
    sum: &'a mut [f32],
    alpha: &'a mut [f32],
}

/// Which keys of a tile the rows of a panel see: those before `visible`, if they are before
/// `anchor` or not before `hidden`.
struct Limits {
    visible: [f32; WIDEST_PANEL],
    hidden: [f32; WIDEST_PANEL],
    anchor: usize,
}

/// The steps of one tile.
#[derive(Clone, Copy)]
pub(super) struct Tile<S, P> {
    simd: S,
    product: P,
    words: usize,
    columns: usize,
    factor: f32,
    softcap: Option<f32>,
}

impl<S: Simd, P: Product<S>> Tile<S, P> {
    /// Puts the factor on scores.
    #[inline(always)]
    fn scale(&self, scores: &mut [f32]) {
        let factor = self.simd.splat(self.factor);
        for scores in scores.chunks_exact_mut(S::LANES) {
            store(self.simd, self.simd.mul(load(self.simd, scores), factor), scores);
        }
    }

    /// Turns scores, which have the factor if `SCALED`, into probabilities and updates the rows'
    /// state.
    #[inline(always)]
    fn softmax<const BOUNDARY: bool, const SOFTCAP: bool, const SCALED: bool>(
        &self,
        scores: &mut [f32],
        limits: &Limits,
        online: Online<'_>,
    ) {
        let simd = self.simd;
        let (zero, none) = (simd.splat(0.0), simd.splat(f32::NEG_INFINITY));
        let cap = simd.splat(self.softcap.unwrap_or(0.0));
        let (panel, keys) = (2 * S::LANES, scores.len() / (2 * S::LANES));
        for half in [0, S::LANES] {
            let visible = load(simd, &limits.visible[half..]);
            let hidden = load(simd, &limits.hidden[half..]);
            let before = load(simd, &online.max[half..]);
            let factor = simd.splat(self.factor);
            let mut max = if SCALED { before } else { none };
            for (key, scores) in scores.chunks_exact_mut(panel).enumerate() {
                let scores = &mut scores[half..][..S::LANES];
                let mut score = load(simd, scores);
                if SOFTCAP {
                    score = simd.mul(cap, simd.tanh(score));
                }
                if BOUNDARY {
                    let at = simd.splat(key as f32);
                    score = simd.if_greater(visible, at, score, none);
                    if key >= limits.anchor {
                        score = simd.if_greater(hidden, at, none, score);
                    }
                }
                if SOFTCAP || BOUNDARY {
                    store(simd, score, scores);
                }
                max = simd.max(score, max);
            }
            if !SCALED {
                max = simd.max(simd.mul(max, factor), before);
            }
            // Where nothing has been seen there is nothing to shift by, and -inf - -inf would be
            // NaN.
            let shift = simd.if_greater(max, none, max, zero);
            let below = simd.sub(zero, shift);
            let alpha = simd.exp2(simd.sub(before, shift));
            let mut sum = zero;
            for pair in 0..keys / 2 {
                let (first, second) = (2 * pair * panel + half, (2 * pair + 1) * panel + half);
                let (first, second) = (load(simd, &scores[first..]), load(simd, &scores[second..]));
                let (first, second) = if SCALED {
                    (simd.sub(first, shift), simd.sub(second, shift))
                } else {
                    (simd.fma(first, factor, below), simd.fma(second, factor, below))
                };
                let (first, second) = (simd.exp2(first), simd.exp2(second));
                sum = simd.add(sum, simd.add(first, second));
                let to = &mut scores[2 * pair / P::ELEMENTS * panel + half..];
                assert!(to.len() >= if P::ELEMENTS == 1 { panel + S::LANES } else { S::LANES });
                // SAFETY: the words end inside `to`, as just asserted.
                unsafe { self.product.store_pair(first, second, to.as_mut_ptr(), panel) };
            }
            let total = simd.fma(load(simd, &online.sum[half..]), alpha, sum);
            store(simd, total, &mut online.sum[half..]);
            store(simd, max, &mut online.max[half..]);
            store(simd, alpha, &mut online.alpha[half..]);
        }
    }
}
