//! The products of a tile by vectors, in registers.

use super::softmax::softmax;
use super::{Engine, Panel, STEP, Sizes, TileRows, WIDEST_PANEL};
use crate::cpu::flash::piece::Operands;
use crate::cpu::flash::rows::{clear_special, pack_value_words, pack_words};
use crate::element::sealed::AnySlice;
use crate::simd::{Product, Simd, load, store};

/// Multiply-adds of vectors. Keys lie `[key][word]`, queries `[panel][word][row]`, values `[panel
/// of columns][word of keys][column]`, outputs row by row.
#[derive(Clone, Copy)]
pub(in crate::cpu::flash) struct Vectors<S, P> {
    pub(super) simd: S,
    pub(super) product: P,
    words: usize,
    columns: usize,
    factor: f32,
    pub(super) softcap: Option<f32>,
}

impl<S: Simd, P: Product<S>> Vectors<S, P> {
    /// For one KV head.
    pub fn new(simd: S, product: P, inputs: &Operands<'_>, kv_head: usize) -> Self {
        let (factor, softcap) = inputs.factors(kv_head, 1.0);
        let words = inputs.head_dim.div_ceil(P::ELEMENTS).next_multiple_of(STEP);
        let columns = inputs.value_dim.next_multiple_of(2 * S::LANES);
        Self { simd, product, words, columns, factor, softcap }
    }
}

/// The buffers for heads of so many words and columns.
pub(super) fn sizes(words: usize, columns: usize, rows: usize, keys: usize) -> Sizes {
    Sizes {
        query: rows * words,
        key: keys * words,
        value: keys * columns,
        scores: keys * WIDEST_PANEL,
        out: rows * columns,
        scratch: columns.max(words),
    }
}

/// Writes a row as words.
#[inline(always)]
fn pack_row<P: Product<S>, S: Simd>(simd: S, row: AnySlice<'_>, to: &mut [f32]) {
    if P::ELEMENTS == 1 { pack_words::<S, 1>(simd, row, to) } else { pack_words::<S, 2>(simd, row, to) }
}

impl<S: Simd, P: Product<S>> Engine for Vectors<S, P> {
    const PANEL: usize = 2 * S::LANES;
    const KEYS: usize = super::KEYS;
    const STEP: usize = STEP;

    fn sizes(&self, rows: usize, keys: usize) -> Sizes {
        sizes(self.words, self.columns, rows, keys)
    }

    #[inline(always)]
    fn pack_queries<'a>(
        &mut self,
        rows: impl Iterator<Item = AnySlice<'a>>,
        to: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (words, panel_rows) = (self.words, Self::PANEL);
        let row_words = &mut scratch[..words];
        to.fill(0.0);
        for (index, row) in rows.enumerate() {
            pack_row::<P, S>(self.simd, row, row_words);
            let to = &mut to[index / panel_rows * (panel_rows * words)..][..panel_rows * words];
            for (word, to) in row_words.iter().zip(to.chunks_exact_mut(panel_rows)) {
                to[index % panel_rows] = *word;
            }
        }
    }

    #[inline(always)]
    fn pack_keys(&mut self, source: &TileRows<'_, '_>, count: usize, to: &mut [f32], _: &mut [f32]) {
        for (index, to) in to.chunks_exact_mut(self.words).enumerate() {
            if index < count { pack_row::<P, S>(self.simd, source.key(index), to) } else { to.fill(0.0) }
        }
    }

    #[inline(always)]
    fn pack_values(
        &mut self,
        source: &TileRows<'_, '_>,
        count: usize,
        to: &mut [f32],
        scratch: &mut [f32],
    ) -> bool {
        let panel = Self::PANEL;
        let len = to.len() / P::ELEMENTS;
        let to = &mut to[..len];
        let words = to.len() / self.columns;
        let row = &mut scratch[..self.columns];
        let rows = |index| source.value(index);
        let mut finite = true;
        for word in 0..words {
            finite &= if P::ELEMENTS == 1 {
                pack_value_words::<S, 1>(self.simd, &rows, count, word, row)
            } else {
                pack_value_words::<S, 2>(self.simd, &rows, count, word, row)
            };
            for (p, columns) in row.chunks_exact(panel).enumerate() {
                to[(p * words + word) * panel..][..panel].copy_from_slice(columns);
            }
        }
        if !finite {
            if P::ELEMENTS == 1 { clear_special::<1>(to) } else { clear_special::<2>(to) }
        }
        finite
    }

    #[inline(always)]
    fn step(&mut self, mut panel: Panel<'_>, _: &TileRows<'_, '_>) {
        let scores = &mut std::mem::take(&mut panel.scores)[..Self::PANEL * panel.keys];
        let query = &panel.query[panel.first * self.words..];
        let key = &panel.key[..panel.keys * self.words];
        match S::TILE_ROWS {
            8 => scores_by::<S, P, 8>(self, query, key, scores),
            4 => scores_by::<S, P, 4>(self, query, key, scores),
            _ => scores_by::<S, P, 2>(self, query, key, scores),
        }
        softmax(self, &mut panel, scores);
        let value = &panel.value[..panel.value.len() / P::ELEMENTS];
        let (keys, alpha, out) = (panel.keys, &*panel.alpha, panel.out);
        match S::TILE_ROWS {
            8 => accumulate_by::<S, P, 8>(self, scores, value, keys, alpha, out),
            4 => accumulate_by::<S, P, 4>(self, scores, value, keys, alpha, out),
            _ => accumulate_by::<S, P, 2>(self, scores, value, keys, alpha, out),
        }
    }

    #[inline(always)]
    fn place(&self, row: usize, column: usize) -> usize {
        row * self.columns + column
    }

    #[inline(always)]
    fn by_rows<'o>(&self, out: &'o mut [f32], _: &'o mut [f32]) -> &'o mut [f32] {
        out
    }
}

#[inline(always)]
fn scores_by<S: Simd, P: Product<S>, const R: usize>(
    tile: &Vectors<S, P>,
    query: &[f32],
    key: &[f32],
    scores: &mut [f32],
) {
    let (simd, words) = (tile.simd, tile.words);
    let factor = simd.splat(tile.factor);
    let panel = 2 * S::LANES;
    assert!(query.len() >= words * panel && words.is_multiple_of(4));
    for (key, scores) in key.chunks_exact(R * words).zip(scores.chunks_exact_mut(R * panel)) {
        let zero = [[simd.splat(0.0); 2]; R];
        // SAFETY: `key` holds R rows of `words`, `query` holds `words` vectors of a panel.
        let sums = unsafe { multiply(tile, key.as_ptr(), words, 1, query.as_ptr(), words, zero) };
        for (sums, scores) in sums.iter().zip(scores.chunks_exact_mut(panel)) {
            let (low, high) = scores.split_at_mut(S::LANES);
            store(simd, simd.mul(sums[0], factor), low);
            store(simd, simd.mul(sums[1], factor), high);
        }
    }
}

#[inline(always)]
fn accumulate_by<S: Simd, P: Product<S>, const R: usize>(
    tile: &Vectors<S, P>,
    probabilities: &[f32],
    value: &[f32],
    keys: usize,
    alpha: &[f32],
    out: &mut [f32],
) {
    let (simd, columns) = (tile.simd, tile.columns);
    let panel = 2 * S::LANES;
    let words = keys / P::ELEMENTS;
    let value_panel = value.len() / columns * panel;
    assert!(probabilities.len() >= words * panel && words.is_multiple_of(4) && panel.is_multiple_of(R));
    assert!(out.len() >= panel * columns);
    for (index, value) in value.chunks_exact(value_panel).take(columns / panel).enumerate() {
        assert!(value.len() >= words * panel);
        for row in (0..panel).step_by(R) {
            let place = |r: usize| (row + r) * columns + index * panel;
            let mut sums = [[simd.splat(0.0); 2]; R];
            for (r, sums) in sums.iter_mut().enumerate() {
                let alpha = simd.splat(alpha[row + r]);
                sums[0] = simd.mul(alpha, load(simd, &out[place(r)..]));
                sums[1] = simd.mul(alpha, load(simd, &out[place(r) + S::LANES..]));
            }
            // SAFETY: `probabilities` holds `words` vectors of a panel, of which R lanes from `row`
            // on are read, and `value` holds `words` vectors of a panel.
            let sums = unsafe {
                multiply(tile, probabilities.as_ptr().add(row), 1, panel, value.as_ptr(), words, sums)
            };
            for (r, sums) in sums.iter().enumerate() {
                store(simd, sums[0], &mut out[place(r)..]);
                store(simd, sums[1], &mut out[place(r) + S::LANES..]);
            }
        }
    }
}

/// `sums[r] += Σ_w a[r · a_row + w · a_step] · b[w]`, `b[w]` being the two vectors of a panel.
///
/// # Safety
/// All these words must be readable; `steps` must be a multiple of 4.
#[inline(always)]
unsafe fn multiply<S: Simd, P: Product<S>, const R: usize>(
    tile: &Vectors<S, P>,
    a: *const f32,
    a_row: usize,
    a_step: usize,
    b: *const f32,
    steps: usize,
    mut sums: [[S::V; 2]; R],
) -> [[S::V; 2]; R] {
    if S::LANE_OPERANDS {
        // SAFETY: the caller's promise.
        return unsafe { multiply_by_lanes(tile, a, a_row, a_step, b, steps, sums) };
    }
    let simd = tile.simd;
    for step in (0..steps).step_by(4) {
        for step in step..step + 4 {
            // SAFETY: the caller's promise.
            unsafe {
                let b = b.add(step * 2 * S::LANES);
                let (b0, b1) = (simd.load(b), simd.load(b.add(S::LANES)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = simd.splat(*a.add(r * a_row + step * a_step));
                    sums[0] = tile.product.fma(a, b0, sums[0]);
                    sums[1] = tile.product.fma(a, b1, sums[1]);
                }
            }
        }
    }
    sums
}

/// [`multiply`] with the words of `a` read four at a time: of one row, or of one step for four
/// rows.
///
/// # Safety
/// As for [`multiply`].
// Arrays of registers are indexed by constants once the loops are unrolled.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn multiply_by_lanes<S: Simd, P: Product<S>, const R: usize>(
    tile: &Vectors<S, P>,
    a: *const f32,
    a_row: usize,
    a_step: usize,
    b: *const f32,
    steps: usize,
    mut sums: [[S::V; 2]; R],
) -> [[S::V; 2]; R] {
    let simd = tile.simd;
    assert!(R.is_multiple_of(4) && (a_row == 1 || a_step == 1));
    for step in (0..steps).step_by(4) {
        // SAFETY: the caller's promise; words of one row, or of four rows, lie side by side.
        unsafe {
            let mut words = [[simd.splat(0.0); R]; 4];
            if a_step == 1 {
                for r in 0..R {
                    let of_row = simd.splat_four(a.add(r * a_row + step));
                    for i in 0..4 {
                        words[i][r] = of_row[i];
                    }
                }
            } else {
                for i in 0..4 {
                    for r in (0..R).step_by(4) {
                        let of_step = simd.splat_four(a.add(r + (step + i) * a_step));
                        words[i][r..r + 4].copy_from_slice(&of_step);
                    }
                }
            }
            for i in 0..4 {
                let b = b.add((step + i) * 2 * S::LANES);
                let (b0, b1) = (simd.load(b), simd.load(b.add(S::LANES)));
                for r in 0..R {
                    sums[r][0] = tile.product.fma(words[i][r], b0, sums[r][0]);
                    sums[r][1] = tile.product.fma(words[i][r], b1, sums[r][1]);
                }
            }
        }
    }
    sums
}
