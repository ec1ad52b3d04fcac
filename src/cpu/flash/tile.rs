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
mod softmax;
mod vectors;

pub(super) use vectors::Vectors;

use super::piece::{Operands, Piece, Source};
use super::rows::{Rows, for_each_special};
use super::workspace::Scratch;
use crate::element::sealed::AnySlice;
use crate::simd::{Simd, load, prefetch_early};
use std::ops::Range;

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
    Buffers::len(ROWS, &vectors::sizes(words, columns, ROWS, KEYS))
}

/// Who computes the panels of a tile, and how what it takes lies in memory.
pub(super) trait Engine {
    /// Rows of a panel.
    const PANEL: usize;
    /// Keys of a tile at most.
    const KEYS: usize;
    /// Keys are padded to multiples of this.
    const STEP: usize;

    /// The buffers for so many rows (whole panels) and keys (padded).
    fn sizes(&self, rows: usize, keys: usize) -> Sizes;

    /// Packs the queries of a piece; missing rows are zero.
    fn pack_queries<'a>(
        &mut self,
        rows: impl Iterator<Item = AnySlice<'a>>,
        to: &mut [f32],
        scratch: &mut [f32],
    );

    /// Packs the keys of a tile into `to`, which is as long as the padded tile needs.
    fn pack_keys(&mut self, source: &TileRows<'_, '_>, count: usize, to: &mut [f32], scratch: &mut [f32]);

    /// Packs the values of a tile in the same way, with those that are not finite as zeros; returns
    /// whether there were none.
    fn pack_values(
        &mut self,
        source: &TileRows<'_, '_>,
        count: usize,
        to: &mut [f32],
        scratch: &mut [f32],
    ) -> bool;

    /// Adds a tile of keys to the outputs of a panel.
    fn step(&mut self, panel: Panel<'_>, source: &TileRows<'_, '_>);

    /// The place of an element in the outputs of all panels.
    fn place(&self, row: usize, column: usize) -> usize;

    /// The outputs of a panel, row by row.
    fn by_rows<'a>(&self, out: &'a mut [f32], scratch: &'a mut [f32]) -> &'a mut [f32];
}

/// One panel of rows against a tile of keys.
pub(super) struct Panel<'a> {
    /// The first row, and how many there are.
    first: usize,
    rows: usize,
    /// Keys of the tile, and of the padded tile.
    count: usize,
    padded: usize,
    /// Keys that a row may see, padded.
    keys: usize,
    /// Which of them each row sees, if not all see all.
    limits: Option<&'a Limits>,
    /// Of all panels.
    query: &'a [f32],
    key: &'a [f32],
    value: &'a [f32],
    scores: &'a mut [f32],
    /// The rows' largest scores so far (log2 domain) and their sums.
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// Memory for a factor for each row.
    alpha: &'a mut [f32],
    out: &'a mut [f32],
}

/// Which keys of a tile the rows of a panel see: those before `visible`, if they are before
/// `anchor` or not before `hidden`.
#[derive(Default)]
struct Limits {
    visible: [f32; WIDEST_PANEL],
    hidden: [f32; WIDEST_PANEL],
    anchor: usize,
}

impl Limits {
    /// Of `rows` rows (the last stands for those that are missing) and the keys `entries`, if not
    /// all see all of `padded` keys.
    fn new(
        piece: &Piece<'_>,
        rows: Range<usize>,
        panel: usize,
        entries: &Range<usize>,
        padded: usize,
    ) -> Option<Self> {
        let (start, count) = (entries.start, entries.len());
        let last = rows.end - 1;
        let left = start.max(piece.segment.prefix) < piece.hidden(last).min(entries.end);
        if piece.visible(rows.start) >= start + padded && count >= padded && !left {
            return None;
        }
        let within = |entry: usize| entry.saturating_sub(start).min(count) as f32;
        let anchor = piece.segment.prefix.saturating_sub(start);
        let mut limits = Self { visible: [0.0; WIDEST_PANEL], hidden: [0.0; WIDEST_PANEL], anchor };
        for lane in 0..panel {
            let row = (rows.start + lane).min(last);
            limits.visible[lane] = within(piece.visible(row));
            limits.hidden[lane] = if left { within(piece.hidden(row)) } else { 0.0 };
        }
        Some(limits)
    }

    /// Whether some row does not see all keys from `first` to `end`.
    fn hides(&self, first: usize, end: usize) -> bool {
        let (first, end, left) = (first as f32, end as f32, end > self.anchor);
        let hides = |(visible, hidden): (&f32, &f32)| *visible < end || (left && *hidden > first);
        self.visible.iter().zip(&self.hidden).fold(false, |found, lane| found | hides(lane))
    }

    /// `x` for the rows from `lane` on that see a key, `hidden` for the others.
    #[inline(always)]
    fn apply<S: Simd>(&self, simd: S, key: usize, lane: usize, x: S::V, hidden: f32) -> S::V {
        let (at, hidden) = (simd.splat(key as f32), simd.splat(hidden));
        let seen = simd.if_greater(load(simd, &self.visible[lane..]), at, x, hidden);
        if key < self.anchor {
            return seen;
        }
        simd.if_greater(load(simd, &self.hidden[lane..]), at, hidden, seen)
    }
}

/// How long an engine's buffers are.
pub(super) struct Sizes {
    query: usize,
    key: usize,
    value: usize,
    /// Scores and probabilities of one panel.
    scores: usize,
    out: usize,
    scratch: usize,
}

/// One thread's buffers.
struct Buffers<'a> {
    query: &'a mut [f32],
    key: &'a mut [f32],
    value: &'a mut [f32],
    scores: &'a mut [f32],
    out: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    alpha: &'a mut [f32],
    scratch: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    fn len(rows: usize, sizes: &Sizes) -> usize {
        sizes.query + sizes.key + sizes.value + sizes.scores + sizes.out + sizes.scratch + 3 * rows
    }

    fn new(scratch: &'a mut Scratch<'_>, rows: usize, sizes: &Sizes) -> Self {
        let mut memory = scratch.first(Self::len(rows, sizes));
        let mut take = |len: usize| {
            let (taken, rest) = std::mem::take(&mut memory).split_at_mut(len);
            memory = rest;
            taken
        };
        Self {
            query: take(sizes.query),
            key: take(sizes.key),
            value: take(sizes.value),
            scores: take(sizes.scores),
            out: take(sizes.out),
            max: take(rows),
            sum: take(rows),
            alpha: take(rows),
            scratch: take(sizes.scratch),
        }
    }
}

/// The rows that a tile is packed from: queries of a piece, keys and values from an entry on.
pub(super) struct TileRows<'t, 'a> {
    inputs: &'t Operands<'a>,
    piece: &'t Piece<'t>,
    start: usize,
    /// Entries from there on that follow each other in memory, as most of them do, and where: they
    /// are found without a look at the batch.
    run: usize,
    /// How far ahead rows are asked for; 0 where they are in a cache.
    ahead: usize,
    keys: Rows<'a>,
    values: Rows<'a>,
    place: [usize; 3],
}

impl<'t, 'a> TileRows<'t, 'a> {
    #[inline(always)]
    fn new(inputs: &'t Operands<'a>, piece: &'t Piece<'t>, start: usize, tile: usize) -> Self {
        let run = piece.run(start, piece.entries.end).len();
        let (in_prefix, place) = piece.key_place(start);
        let [keys, values] = [&inputs.key, &inputs.value].map(|source| *source.rows(in_prefix));
        let ahead = if inputs.cold { tile } else { 0 };
        Self { inputs, piece, start, run, ahead, keys, values, place }
    }

    #[inline(always)]
    fn query(&self, row: usize) -> AnySlice<'a> {
        self.inputs.query.row(self.piece.place(row))
    }

    /// The row of a key. Asks for the one in its place of the next tile.
    #[inline(always)]
    fn key(&self, index: usize) -> AnySlice<'a> {
        self.prefetch(&self.inputs.key, &self.keys, index);
        self.row(&self.inputs.key, &self.keys, index)
    }

    /// The row of a value, in the same way.
    #[inline(always)]
    fn value(&self, index: usize) -> AnySlice<'a> {
        self.prefetch(&self.inputs.value, &self.values, index);
        self.row(&self.inputs.value, &self.values, index)
    }

    /// Asks for a row of the next tile.
    #[inline(always)]
    fn prefetch(&self, source: &Source<'a>, rows: &Rows<'a>, index: usize) {
        let next = index + self.ahead;
        if self.ahead > 0 && self.start + next < self.piece.entries.end {
            match self.row(source, rows, next) {
                AnySlice::F32(row) => prefetch_early(row),
                AnySlice::F16(row) => prefetch_early(row),
                AnySlice::BF16(row) => prefetch_early(row),
                AnySlice::F8E4M3(row) => prefetch_early(row),
            }
        }
    }

    #[inline(always)]
    fn row(&self, source: &Source<'a>, rows: &Rows<'a>, index: usize) -> AnySlice<'a> {
        if index < self.run {
            let [batch, seq, head] = self.place;
            rows.row([batch, seq + index, head])
        } else {
            self.piece.key_row(source, self.start + index)
        }
    }
}

/// Computes one piece. `write(row, out, lse)` gets each row's result; `out` has `value_dim`
/// elements.
#[inline(always)]
pub(super) fn attend<E: Engine>(
    mut engine: E,
    inputs: &Operands<'_>,
    piece: &Piece<'_>,
    scratch: &mut Scratch<'_>,
    mut write: impl FnMut(usize, &[f32], f32),
) {
    debug_assert_eq!(piece.kv_heads.len(), 1);
    let rows = piece.rows();
    let panels = rows.div_ceil(E::PANEL);
    let [_, value_scale] = inputs.scales_of(piece.kv_heads.start);
    let most_keys = piece.entries.len().min(E::KEYS).next_multiple_of(E::STEP);
    let padded_rows = panels * E::PANEL;
    let sizes = engine.sizes(padded_rows, most_keys);
    let buffers = Buffers::new(scratch, padded_rows, &sizes);
    let columns = sizes.out / padded_rows;

    let queries = (0..rows).map(|row| inputs.query.row(piece.place(row)));
    engine.pack_queries(queries, buffers.query, buffers.scratch);
    buffers.out.fill(0.0);
    buffers.max.fill(f32::NEG_INFINITY);
    buffers.sum.fill(0.0);

    for start in piece.entries.clone().step_by(E::KEYS) {
        let count = E::KEYS.min(piece.entries.end - start);
        let entries = start..start + count;
        if piece.hides(&entries, 0) {
            continue;
        }
        let padded = count.next_multiple_of(E::STEP);
        let source = TileRows::new(inputs, piece, start, E::KEYS);
        let key = &mut buffers.key[..sizes.key / most_keys * padded];
        let value = &mut buffers.value[..sizes.value / most_keys * padded];
        engine.pack_keys(&source, count, key, buffers.scratch);
        let finite = engine.pack_values(&source, count, value, buffers.scratch);

        for panel in 0..panels {
            let first = panel * E::PANEL;
            let end = rows.min(first + E::PANEL);
            let seen = piece.visible(end - 1).saturating_sub(start).min(count);
            if seen == 0 || piece.hides(&entries, first) {
                continue;
            }
            let keys = seen.next_multiple_of(E::STEP);
            let limits = Limits::new(piece, first..end, E::PANEL, &entries, keys);
            let state = first..first + E::PANEL;
            let panel = Panel {
                first,
                rows: end - first,
                count,
                padded,
                keys,
                limits: limits.as_ref(),
                query: buffers.query,
                key,
                value,
                scores: buffers.scores,
                max: &mut buffers.max[state.clone()],
                sum: &mut buffers.sum[state.clone()],
                alpha: &mut buffers.alpha[state],
                out: &mut buffers.out[first * columns..][..E::PANEL * columns],
            };
            engine.step(panel, &source);
        }
        if !finite {
            // They are packed as zeros; a row's weight of a key it sees is above 0, of others 0.
            for i in 0..count {
                for_each_special(source.value(i), |column, x| {
                    for row in (0..rows).filter(|&row| piece.sees(row, start + i)) {
                        buffers.out[engine.place(row, column)] += x;
                    }
                });
            }
        }
    }

    for panel in 0..panels {
        let first = panel * E::PANEL;
        let out = &mut buffers.out[first * columns..][..E::PANEL * columns];
        let out = engine.by_rows(out, buffers.scratch);
        for (row, out) in (first..rows).zip(out.chunks_exact_mut(columns)) {
            let (max, sum) = (buffers.max[row], buffers.sum[row]);
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
