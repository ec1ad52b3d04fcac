//! The products of a tile by a matrix unit.
//!
//! ```text
//! S = K Qᵀ      A: 16 keys, as they lie       B: words of the queries, 16 rows across
//! Oᵀ += Vᵀ Pᵀ   A: 16 columns of values       B: words of the probabilities, as the softmax leaves them
//! ```
//!
//! So only the values are transposed, once for all rows of the piece. Outputs are kept transposed,
//! `[column][row]`, until the end.

use super::{Buffers, Engine, Tile, WIDEST_PANEL};
use crate::cpu::flash::rows::{clear_special, pack_value_words};
use crate::cpu::simd::{Matrix, Product, Simd, TILE, load, store};
use crate::element::sealed::AnySlice;

/// Keys of a tile: outputs are loaded and stored once for so many, and a panel of scores stays in
/// L1.
pub(in crate::cpu::flash) const KEYS: usize = 256;
/// Query rows of a tile at most: values are transposed once for so many.
pub(in crate::cpu::flash) const ROWS: usize = 512;
/// Rows of a register block: two tiles.
const PAIR: usize = 2 * TILE;

/// Elements of workspace for one thread at most.
pub(in crate::cpu::flash) fn scratch_len([head_dim, value_dim]: [usize; 2]) -> usize {
    let words = head_dim.div_ceil(2).next_multiple_of(PAIR);
    Buffers::len(ROWS, KEYS, words, value_dim.next_multiple_of(PAIR), WIDEST_PANEL)
}

/// A matrix unit. Values lie `[column][word of keys]`, outputs of a panel `[column][row]`.
pub(in crate::cpu::flash) struct Unit<'a, M>(pub &'a mut M);

impl<S: Simd, P: Product<S>, M: Matrix> Engine<S, P> for Unit<'_, M> {
    const KEYS: usize = KEYS;
    const STEP: usize = PAIR;
    const ROWS_OF_SCRATCH: usize = WIDEST_PANEL;
    const SCALES: bool = false;

    #[inline(always)]
    fn scores(&mut self, tile: &Tile<S, P>, query: &[f32], key: &[f32], scores: &mut [f32]) {
        let words = tile.words;
        assert!(S::LANES == TILE && P::ELEMENTS == 2 && words.is_multiple_of(TILE));
        assert!(query.len() >= words * PAIR);
        for (key, scores) in key.chunks_exact(PAIR * words).zip(scores.chunks_exact_mut(PAIR * PAIR)) {
            // SAFETY: `key` holds PAIR rows of `words`, `query` that many rows of PAIR words.
            unsafe {
                self.multiply::<false>(key.as_ptr(), words, query.as_ptr(), words, scores.as_mut_ptr());
            }
        }
    }

    #[inline(always)]
    fn pack_values<'a>(
        &self,
        tile: &Tile<S, P>,
        rows: impl Fn(usize) -> AnySlice<'a>,
        count: usize,
        value: &mut [f32],
        scratch: &mut [f32],
    ) -> bool {
        let columns = tile.columns;
        let words = value.len() / columns;
        let block = &mut scratch[..TILE * columns];
        let mut finite = true;
        for first in (0..words).step_by(TILE) {
            for (word, row) in block.chunks_exact_mut(columns).enumerate() {
                finite &= pack_value_words::<2>(&rows, count, first + word, row);
            }
            for column in (0..columns).step_by(TILE) {
                let to = &mut value[column * words + first..][..(TILE - 1) * words + TILE];
                // SAFETY: `block` holds TILE rows of `columns`, and TILE rows of `to` are `words`
                // apart.
                unsafe { self.0.transpose(block.as_ptr().add(column), columns, to.as_mut_ptr(), words) };
            }
        }
        if !finite {
            clear_special::<2>(value);
        }
        finite
    }

    #[inline(always)]
    fn accumulate(
        &mut self,
        tile: &Tile<S, P>,
        probabilities: &[f32],
        value: &[f32],
        keys: usize,
        alpha: &[f32],
        out: &mut [f32],
    ) {
        let simd = tile.simd;
        if alpha.iter().any(|&alpha| alpha != 1.0) {
            let [low, high] = [load(simd, alpha), load(simd, &alpha[TILE..])];
            for column in out.chunks_exact_mut(PAIR) {
                let (first, second) = column.split_at_mut(TILE);
                store(simd, simd.mul(low, load(simd, first)), first);
                store(simd, simd.mul(high, load(simd, second)), second);
            }
        }
        let (stride, words) = (value.len() / tile.columns, keys / 2);
        assert!(probabilities.len() >= words * PAIR && words.is_multiple_of(TILE) && words <= stride);
        for (value, out) in value.chunks_exact(PAIR * stride).zip(out.chunks_exact_mut(PAIR * PAIR)) {
            // SAFETY: `value` holds PAIR rows of `stride` words, `probabilities` `words` rows of
            // PAIR.
            unsafe {
                self.multiply::<true>(
                    value.as_ptr(),
                    stride,
                    probabilities.as_ptr(),
                    words,
                    out.as_mut_ptr(),
                );
            }
        }
    }

    #[inline(always)]
    fn place(&self, tile: &Tile<S, P>, row: usize, column: usize) -> usize {
        (row / PAIR * tile.columns + column) * PAIR + row % PAIR
    }

    #[inline(always)]
    fn by_rows<'a>(&self, tile: &Tile<S, P>, out: &'a mut [f32], scratch: &'a mut [f32]) -> &'a mut [f32] {
        let columns = tile.columns;
        let rows = &mut scratch[..PAIR * columns];
        for column in (0..columns).step_by(TILE) {
            for row in [0, TILE] {
                let from = &out[column * PAIR + row..][..(TILE - 1) * PAIR + TILE];
                let to = &mut rows[row * columns + column..][..(TILE - 1) * columns + TILE];
                // SAFETY: TILE rows of `from` are PAIR apart, those of `to` `columns`.
                unsafe { self.0.transpose(from.as_ptr(), PAIR, to.as_mut_ptr(), columns) };
            }
        }
        rows
    }
}

impl<M: Matrix> Unit<'_, M> {
    /// `c[i][j] = Σ_w a[i][w] · b[w][j]` of PAIR rows i, `stride` words apart, and PAIR columns j;
    /// added to what is there if `ADD`.
    ///
    /// # Safety
    /// `a` must hold PAIR rows of `words`, `b` `words` rows of PAIR, and `c` PAIR rows of PAIR
    /// words; `words` must be a multiple of TILE.
    #[inline(always)]
    unsafe fn multiply<const ADD: bool>(
        &mut self,
        a: *const f32,
        stride: usize,
        b: *const f32,
        words: usize,
        c: *mut f32,
    ) {
        let unit = &mut *self.0;
        // SAFETY: the caller's promise.
        unsafe {
            let below = c.add(TILE * PAIR);
            if ADD {
                unit.load::<0>(c, PAIR);
                unit.load::<1>(c.add(TILE), PAIR);
                unit.load::<2>(below, PAIR);
                unit.load::<3>(below.add(TILE), PAIR);
            } else {
                unit.zero::<0>();
                unit.zero::<1>();
                unit.zero::<2>();
                unit.zero::<3>();
            }
            for word in (0..words).step_by(TILE) {
                unit.load::<4>(a.add(word), stride);
                unit.load::<6>(b.add(word * PAIR), PAIR);
                unit.add_product::<0, 4, 6>();
                unit.load::<7>(b.add(word * PAIR + TILE), PAIR);
                unit.add_product::<1, 4, 7>();
                unit.load::<5>(a.add(TILE * stride + word), stride);
                unit.add_product::<2, 5, 6>();
                unit.add_product::<3, 5, 7>();
            }
            unit.store::<0>(c, PAIR);
            unit.store::<1>(c.add(TILE), PAIR);
            unit.store::<2>(below, PAIR);
            unit.store::<3>(below.add(TILE), PAIR);
        }
    }
}
