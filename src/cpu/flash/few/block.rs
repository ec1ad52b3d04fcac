//! The products of some rows with keys or values, in registers.

use crate::simd::{Load, Product, Simd, has_hidden_nan, load, store};
use std::marker::PhantomData;

/// Keys of a register block.
pub(super) const BLOCK: usize = 4;
/// Sums of products that are under way at a time.
const CHAINS: usize = 4;
/// Rows of the largest register block.
pub(in crate::cpu::flash) const BLOCK_ROWS: usize = 4;
/// Heads are padded to whole blocks of so many vectors.
const WIDTH: usize = 8;
/// The widest vector of any instruction set.
const WIDEST: usize = 16;

/// Elements of a row that is padded for any instruction set.
pub(super) fn widest(head_dim: usize) -> usize {
    head_dim.next_multiple_of(WIDTH * WIDEST)
}

/// Consecutive rows of keys or values of one head.
#[derive(Clone, Copy)]
pub(super) struct Run<'a, T> {
    /// The elements from the first row on.
    pub data: &'a [T],
    /// Elements from one row to the next.
    pub stride: usize,
    /// How many rows there are.
    pub len: usize,
}

impl<'a, T: Load> Run<'a, T> {
    #[inline(always)]
    fn row(&self, index: usize, dim: usize) -> &'a [T] {
        &self.data[index * self.stride..][..dim]
    }

    /// Whether a row has a NaN that does not load as NaN.
    #[inline(always)]
    fn has_hidden_nan(&self, dim: usize) -> bool {
        if self.stride == dim {
            return has_hidden_nan(&self.data[..self.len * dim]);
        }
        (0..self.len).any(|index| has_hidden_nan(self.row(index, dim)))
    }
}

/// The register blocks: up to four rows by four keys, or by four vectors of columns.
#[derive(Clone, Copy)]
pub(super) struct Block<S, P, T> {
    pub simd: S,
    product: P,
    /// Elements of a row of keys, and of values.
    dims: [usize; 2],
    /// Elements from a row of queries to the next, and from a row of outputs.
    pub widths: [usize; 2],
    /// Elements from a row of scores to the next.
    stride: usize,
    element: PhantomData<T>,
}

/// Rows of the next register block: 4, 2 or 1; three that are left over make a block of 4 with a
/// row of zeros.
#[inline(always)]
fn block_rows(left: usize) -> usize {
    if left >= 3 { 4 } else { left }
}

// Register blocks are arrays that are indexed by constants once the loops are unrolled.
#[allow(clippy::needless_range_loop)]
impl<S: Simd, P: Product<S>, T: Load> Block<S, P, T> {
    /// `stride` is from a row of scores to the next.
    #[inline(always)]
    pub fn new(simd: S, product: P, dims: [usize; 2], stride: usize) -> Self {
        let widths = dims.map(|dim| dim.next_multiple_of(WIDTH * S::LANES));
        Self { simd, product, dims, widths, stride, element: PhantomData }
    }

    /// The scores of all rows with [`BLOCK`] keys from `first` on; the last key stands for those
    /// that are missing.
    #[inline(always)]
    pub fn scores(&self, rows: usize, query: &[f32], keys: Run<'_, T>, first: usize, scores: &mut [f32]) {
        let ([head_dim, _], [width, _]) = (self.dims, self.widths);
        let mut block = [keys.row(first, head_dim); BLOCK];
        for (i, row) in block.iter_mut().enumerate() {
            *row = keys.row((first + i).min(keys.len - 1), head_dim);
        }
        // Loops and no closures: those are compiled without the vector instructions unless they are
        // inlined.
        let mut row = 0;
        while row < rows {
            let (query, scores) = (&query[row * width..], &mut scores[row * self.stride..]);
            match block_rows(rows - row) {
                1 => self.block_scores::<1>(query, block, scores),
                2 => self.block_scores::<2>(query, block, scores),
                _ => self.block_scores::<4>(query, block, scores),
            }
            row += block_rows(rows - row);
        }
    }

    /// `out[row] = alpha[row] · out[row] + Σ_i probabilities[row][i] · values[i]` for all rows.
    #[inline(always)]
    pub fn add_values(
        &self,
        rows: usize,
        alpha: &[f32],
        probabilities: &[f32],
        values: Run<'_, T>,
        out: &mut [f32],
    ) {
        // As many sums as fill the registers. f32 values of longer heads go through two rows by
        // more vectors, so that they too are read in order; others through four rows, so that
        // they are converted once.
        let ([_, value_dim], [_, width]) = (self.dims, self.widths);
        let wide = value_dim > BLOCK * S::LANES && size_of::<T>() == size_of::<f32>();
        let sixteen = S::TILE_ROWS >= 8;
        let mut row = 0;
        while row < rows {
            let alpha = &alpha[row..];
            let (probabilities, out) = (&probabilities[row * self.stride..], &mut out[row * width..]);
            row += match rows - row {
                1 if wide => self.accumulate::<1, 8>(alpha, probabilities, values, out),
                1 => self.accumulate::<1, 4>(alpha, probabilities, values, out),
                _ if wide && sixteen => self.accumulate::<2, 8>(alpha, probabilities, values, out),
                2 => self.accumulate::<2, 4>(alpha, probabilities, values, out),
                _ if wide => self.accumulate::<2, 4>(alpha, probabilities, values, out),
                _ if sixteen => self.accumulate::<4, 4>(alpha, probabilities, values, out),
                _ => self.accumulate::<4, 2>(alpha, probabilities, values, out),
            };
        }
    }

    /// Makes NaN of the scores of keys that have a NaN, where it loads as a number.
    #[inline(always)]
    pub fn mark_nan_scores(&self, rows: usize, keys: Run<'_, T>, scores: &mut [f32]) {
        if keys.has_hidden_nan(self.dims[0]) {
            for key in (0..keys.len).filter(|&key| has_hidden_nan(keys.row(key, self.dims[0]))) {
                (0..rows).for_each(|row| scores[row * self.stride + key] = f32::NAN);
            }
        }
    }

    /// Makes NaN of the outputs that a NaN among the values makes NaN, where it loads as a number.
    #[inline(always)]
    pub fn mark_nan_outputs(&self, rows: usize, values: Run<'_, T>, out: &mut [f32]) {
        let ([_, value_dim], [_, width]) = (self.dims, self.widths);
        if values.has_hidden_nan(value_dim) {
            for value in (0..values.len).map(|key| values.row(key, value_dim)) {
                for (column, _) in value.iter().enumerate().filter(|(_, x)| x.is_hidden_nan()) {
                    out.chunks_exact_mut(width).take(rows).for_each(|out| out[column] = f32::NAN);
                }
            }
        }
    }

    /// The vector of a value's elements from `at` on, zero past the head's end.
    #[inline(always)]
    fn load<const FULL: bool>(&self, row: &[T], at: usize) -> S::V {
        if FULL {
            let row = &row[at..at + S::LANES];
            // SAFETY: `row` holds a vector.
            return unsafe { T::load(self.simd, row.as_ptr()) };
        }
        let mut tail = [T::default(); WIDEST];
        let rest = &row[at.min(row.len())..row.len().min(at + S::LANES)];
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

    /// `scores[r][i] = query[r] · keys[i]`, one key after the other, so that they stream from
    /// memory in order.
    #[inline(always)]
    fn block_scores<const R: usize>(&self, query: &[f32], keys: [&[T]; BLOCK], scores: &mut [f32]) {
        if S::KEYS_TOGETHER {
            return self.block_scores_together::<R>(query, keys, scores);
        }
        let ([head_dim, _], [width, _]) = (self.dims, self.widths);
        assert!(query.len() >= R * width && keys.iter().all(|key| key.len() >= head_dim));
        // Two keys' sums are folded at once: more sums would not fit the registers. SAFETY: the
        // rows are as long as asserted.
        let (first, second) = unsafe {
            (
                self.fold_products::<R>(query, keys[0], keys[1]),
                self.fold_products::<R>(query, keys[2], keys[3]),
            )
        };
        for r in 0..R {
            let sums = self.simd.sum_folded([first[r], second[r]]);
            scores[r * self.stride..][..BLOCK].copy_from_slice(&sums);
        }
    }

    /// The products of `R` rows with two keys, each row's sums folded into one vector.
    ///
    /// # Safety
    /// As for [`products`](Self::products), of either key.
    #[inline(always)]
    unsafe fn fold_products<const R: usize>(&self, query: &[f32], a: &[T], b: &[T]) -> [S::V; R] {
        // SAFETY: the caller's promise.
        let (a, b) = unsafe { (self.products::<R>(query, a), self.products::<R>(query, b)) };
        let mut folded = a;
        for r in 0..R {
            folded[r] = self.simd.fold_two(a[r], b[r]);
        }
        folded
    }

    /// The products of `R` rows with a key; the lanes of each are to be added.
    ///
    /// # Safety
    /// `query` must hold `R` padded rows, and `key` a row.
    #[inline(always)]
    unsafe fn products<const R: usize>(&self, query: &[f32], key: &[T]) -> [S::V; R] {
        let simd = self.simd;
        let elements = P::ELEMENTS * S::LANES;
        let ([head_dim, _], [width, _]) = (self.dims, self.widths);
        let whole = head_dim - head_dim % elements;
        // Sums of one row's product, so that there are enough to hide the latency of a
        // multiply-add.
        let turns = if R < CHAINS { CHAINS / R } else { 1 };
        let in_turns = whole - whole % (turns * elements);
        let mut parts = [[simd.splat(0.0); CHAINS]; R];
        // The tail comes first, so that no branch follows the loops: they spilled a sum for it.
        if whole < head_dim {
            let mut tail = [T::default(); 2 * WIDEST];
            tail[..head_dim - whole].copy_from_slice(&key[whole..head_dim]);
            // SAFETY: `tail` holds the longest vector of words.
            let key = unsafe { self.load_words(tail.as_ptr()) };
            for r in 0..R {
                let query = load(simd, &query[r * width + whole / P::ELEMENTS..]);
                parts[r][0] = self.product.fma(query, key, parts[r][0]);
            }
        }
        // SAFETY: the caller's promise.
        unsafe {
            for start in (0..in_turns).step_by(turns * elements) {
                for turn in 0..turns {
                    self.add_words(query, key, start + turn * elements, turn, &mut parts);
                }
            }
            for at in (in_turns..whole).step_by(elements) {
                self.add_words(query, key, at, 0, &mut parts);
            }
        }
        let mut products = [simd.splat(0.0); R];
        for r in 0..R {
            products[r] = parts[r][0];
            for turn in 1..turns {
                products[r] = simd.add(products[r], parts[r][turn]);
            }
        }
        products
    }

    /// Adds the products of a key's words from the element `at` on to one of each row's sums.
    ///
    /// # Safety
    /// So many elements must be in `key`, and in each of `R` rows of `query`.
    #[inline(always)]
    unsafe fn add_words<const R: usize>(
        &self,
        query: &[f32],
        key: &[T],
        at: usize,
        turn: usize,
        parts: &mut [[S::V; CHAINS]; R],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let key = self.load_words(key.as_ptr().add(at));
            for r in 0..R {
                let query = self.simd.load(query.as_ptr().add(r * self.widths[0] + at / P::ELEMENTS));
                parts[r][turn] = self.product.fma(query, key, parts[r][turn]);
            }
        }
    }

    /// [`block_scores`](Self::block_scores) with all keys together, which share the loads of the
    /// queries.
    #[inline(always)]
    fn block_scores_together<const R: usize>(&self, query: &[f32], keys: [&[T]; BLOCK], scores: &mut [f32]) {
        let simd = self.simd;
        let elements = P::ELEMENTS * S::LANES;
        let ([head_dim, _], [width, _]) = (self.dims, self.widths);
        let whole = head_dim - head_dim % elements;
        assert!(query.len() >= R * width && keys.iter().all(|key| key.len() >= whole));
        let turns = if R < CHAINS { CHAINS / R } else { 1 };
        let in_turns = whole - whole % (turns * elements);
        let mut parts = [[[simd.splat(0.0); BLOCK]; R]; CHAINS];
        // SAFETY: keys hold `whole` elements and `query` R rows of `width`, as asserted above.
        unsafe {
            for start in (0..in_turns).step_by(turns * elements) {
                for turn in 0..turns {
                    let at = start + turn * elements;
                    let words = keys.map(|key| self.load_words(key.as_ptr().add(at)));
                    self.add_products(query, at, words, &mut parts[turn]);
                }
            }
            for at in (in_turns..whole).step_by(elements) {
                let words = keys.map(|key| self.load_words(key.as_ptr().add(at)));
                self.add_products(query, at, words, &mut parts[0]);
            }
        }
        let mut sums = parts[0];
        for part in &parts[1..turns] {
            for r in 0..R {
                for i in 0..BLOCK {
                    sums[r][i] = simd.add(sums[r][i], part[r][i]);
                }
            }
        }
        if whole < head_dim {
            let words = keys.map(|key| {
                let mut tail = [T::default(); 2 * WIDEST];
                tail[..head_dim - whole].copy_from_slice(&key[whole..head_dim]);
                // SAFETY: `tail` holds the longest vector of words.
                unsafe { self.load_words(tail.as_ptr()) }
            });
            // SAFETY: rows of `query` are padded to `width`.
            unsafe { self.add_products(query, whole, words, &mut sums) };
        }
        for (r, sums) in sums.iter().enumerate() {
            let [a, b, c, d] = *sums;
            let sums = simd.sum_folded([simd.fold_two(a, b), simd.fold_two(c, d)]);
            scores[r * self.stride..][..BLOCK].copy_from_slice(&sums);
        }
    }

    /// Adds the products of the words of [`BLOCK`] keys at the element `at`.
    ///
    /// # Safety
    /// A vector of words must be there in each of `R` rows of `query`.
    #[inline(always)]
    unsafe fn add_products<const R: usize>(
        &self,
        query: &[f32],
        at: usize,
        words: [S::V; BLOCK],
        sums: &mut [[S::V; BLOCK]; R],
    ) {
        for r in 0..R {
            // SAFETY: the caller's promise.
            let query = unsafe { self.simd.load(query.as_ptr().add(r * self.widths[0] + at / P::ELEMENTS)) };
            for i in 0..BLOCK {
                sums[r][i] = self.product.fma(query, words[i], sums[r][i]);
            }
        }
    }

    /// [`add_values`](Self::add_values) of `R` rows, `C` vectors of columns at a time. Returns `R`.
    #[inline(always)]
    fn accumulate<const R: usize, const C: usize>(
        &self,
        alpha: &[f32],
        probabilities: &[f32],
        values: Run<'_, T>,
        out: &mut [f32],
    ) -> usize {
        let columns = C * S::LANES;
        let [_, value_dim] = self.dims;
        let whole = value_dim - value_dim % columns;
        for at in (0..whole).step_by(columns) {
            self.accumulate_columns::<R, C, true>(alpha, probabilities, values, at, out);
        }
        if whole < value_dim {
            self.accumulate_columns::<R, C, false>(alpha, probabilities, values, whole, out);
        }
        R
    }

    #[inline(always)]
    fn accumulate_columns<const R: usize, const C: usize, const FULL: bool>(
        &self,
        alpha: &[f32],
        probabilities: &[f32],
        values: Run<'_, T>,
        at: usize,
        out: &mut [f32],
    ) {
        let simd = self.simd;
        let ([_, value_dim], [_, width]) = (self.dims, self.widths);
        let mut sums = [[simd.splat(0.0); C]; R];
        for r in 0..R {
            for i in 0..C {
                let out = &out[r * width + at + i * S::LANES..];
                sums[r][i] = simd.mul(simd.splat(alpha[r]), load(simd, out));
            }
        }
        let fours =
            if FULL && S::LANE_OPERANDS { self.add_fours(probabilities, values, at, &mut sums) } else { 0 };
        for key in fours..values.len {
            let row = values.row(key, value_dim);
            let mut p = [simd.splat(0.0); R];
            for r in 0..R {
                p[r] = simd.splat(probabilities[r * self.stride + key]);
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
                store(simd, sums[r][i], &mut out[r * width + at + i * S::LANES..]);
            }
        }
    }

    /// The sums of [`accumulate_columns`](Self::accumulate_columns) for as many keys as there are
    /// fours of them, probabilities being read four at a time; returns how many keys.
    #[inline(always)]
    fn add_fours<const R: usize, const C: usize>(
        &self,
        probabilities: &[f32],
        values: Run<'_, T>,
        at: usize,
        sums: &mut [[S::V; C]; R],
    ) -> usize {
        let fours = values.len - values.len % 4;
        if fours == 0 {
            return 0;
        }
        assert!(probabilities.len() >= (R - 1) * self.stride + fours);
        assert!(values.data.len() >= (fours - 1) * values.stride + at + C * S::LANES);
        for first in (0..fours).step_by(4) {
            // SAFETY: `probabilities` holds `fours` of each row, and `values` as many rows of which
            // `C` vectors from `at` on are read, as asserted above.
            unsafe {
                let mut p = [[self.simd.splat(0.0); 4]; R];
                for r in 0..R {
                    p[r] = self.simd.splat_four(probabilities.as_ptr().add(r * self.stride + first));
                }
                for key in 0..4 {
                    let row = values.data.as_ptr().add((first + key) * values.stride + at);
                    for i in 0..C {
                        let column = T::load(self.simd, row.add(i * S::LANES));
                        for r in 0..R {
                            sums[r][i] = self.simd.fma(p[r][key], column, sums[r][i]);
                        }
                    }
                }
            }
        }
        fours
    }
}
