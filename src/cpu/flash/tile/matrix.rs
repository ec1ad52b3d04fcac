//! A tile by a matrix unit.
//!
//! ```text
//! S = K Qᵀ      A: 16 keys, as they lie       B: words of the queries, 16 rows across
//! Oᵀ += Vᵀ Pᵀ   A: 16 columns of values       B: words of the probabilities, as the softmax leaves them
//! ```
//!
//! So only the values are transposed, once for all rows of the piece. Outputs are kept transposed,
//! `[column][row]`, until the end. The unit multiplies bf16; other types are sums of bf16 [`terms`].
//!
//! While the unit multiplies a block of keys, vectors compute the probabilities of the block
//! before.

mod multiply;
mod softmax;
mod terms;
#[cfg(test)]
mod tests;

use super::{Buffers, Engine, Panel, Sizes, TileRows};
use crate::cpu::flash::piece::Operands;
use crate::cpu::flash::rows::{clear_special, for_each_special, pack_value_words, pack_words};
use crate::element::sealed::AnySlice;
use crate::simd::{Matrix, Simd, TILE, load, store};
use multiply::{Factor, Meanwhile, Multiplier, Nothing};
use softmax::{Softmax, cap};
use std::array;
use terms::{Products, Terms, finite_f32, take_pairs, take_rows};

/// Keys of a tile: outputs are loaded and stored once for so many, and a panel of scores stays in
/// L1.
pub(in crate::cpu::flash) const KEYS: usize = 256;
/// Query rows of a tile at most: values are transposed once for so many.
pub(in crate::cpu::flash) const ROWS: usize = 512;
/// Rows of a register block, and of a panel: two tiles.
const PAIR: usize = 2 * TILE;

/// Elements of workspace for one thread at most.
pub(in crate::cpu::flash) fn scratch_len(dims: [usize; 2]) -> usize {
    Buffers::len(ROWS, &sizes(dims, Terms::MOST, ROWS, KEYS))
}

/// Words of a row of queries or keys, and columns of values.
fn padded([head_dim, value_dim]: [usize; 2]) -> [usize; 2] {
    [head_dim.div_ceil(2).next_multiple_of(TILE), value_dim.next_multiple_of(PAIR)]
}

fn sizes(dims: [usize; 2], terms: Terms, rows: usize, keys: usize) -> Sizes {
    let [words, columns] = padded(dims);
    Sizes {
        query: rows * words * terms.query,
        key: keys * words * terms.key,
        value: keys / 2 * columns * terms.key,
        scores: keys * PAIR + keys / 2 * PAIR * terms.probability,
        out: rows * columns,
        scratch: (PAIR * columns).max((2 + terms.query) * words).max((TILE * terms.key + 2) * columns),
    }
}

/// A matrix unit. Keys lie `[term][key][word]`, queries `[panel][term][word][row]`, values
/// `[term][column][word of keys]`, outputs of a panel `[column][row]`.
pub(in crate::cpu::flash) struct Unit<'a, S, M> {
    simd: S,
    unit: &'a mut M,
    terms: Terms,
    scores: Products,
    outputs: Products,
    dims: [usize; 2],
    words: usize,
    columns: usize,
    factor: f32,
    softcap: Option<f32>,
    /// Whether queries, and keys of the tile, have elements that are not finite and packed as 0.
    special_queries: bool,
    special_keys: bool,
}

impl<'a, S: Simd, M: Matrix<S>> Unit<'a, S, M> {
    /// For one KV head.
    pub fn new(simd: S, unit: &'a mut M, inputs: &Operands<'_>, kv_head: usize) -> Self {
        assert!(S::LANES == TILE);
        let terms = Terms::new(inputs.query.elements(), inputs.key.others.elements());
        let (factor, softcap) = inputs.factors(kv_head, 1.0);
        let dims = [inputs.head_dim, inputs.value_dim];
        let [words, columns] = padded(dims);
        Self {
            simd,
            unit,
            terms,
            scores: terms.scores(),
            outputs: terms.outputs(),
            dims,
            words,
            columns,
            factor,
            softcap,
            special_queries: false,
            special_keys: false,
        }
    }

    /// Writes the terms of a row, `next` words apart from each other; returns whether all elements
    /// were finite. Where scores are one product, elements that are not are written as they are.
    #[inline(always)]
    fn pack_row(
        &self,
        row: AnySlice<'_>,
        terms: usize,
        to: &mut [f32],
        next: usize,
        scratch: &mut [f32],
    ) -> bool {
        if let AnySlice::BF16(_) = row
            && !self.terms.are_several()
        {
            pack_words::<S, 2>(self.simd, row, &mut to[..self.words]);
            return true;
        }
        let rest = &mut scratch[..2 * self.words];
        let finite = finite_f32(self.simd, row, rest);
        for term in 0..terms {
            take_pairs(rest, &mut to[term * next..][..self.words]);
        }
        finite
    }

    fn query(&self, panel: &Panel<'_>) -> Factor {
        let term = self.words * PAIR;
        let query = &panel.query[panel.first * self.words * self.terms.query..][..term * self.terms.query];
        Factor { at: query.as_ptr(), stride: PAIR, term }
    }

    /// The keys of a block.
    fn key(&self, panel: &Panel<'_>, block: usize) -> Factor {
        let term = panel.padded * self.words;
        let at = block * PAIR * self.words;
        assert!(panel.key.len() >= term * self.terms.key && at + PAIR * self.words <= term);
        Factor { at: panel.key[at..].as_ptr(), stride: self.words, term }
    }

    /// The scores of a panel, ready for the factor of the softmax.
    #[inline(always)]
    fn scores_at_once(&mut self, panel: &Panel<'_>, source: &TileRows<'_, '_>, scores: &mut [f32]) {
        let query = self.query(panel);
        for (block, scores) in scores.chunks_exact_mut(PAIR * PAIR).enumerate() {
            let key = self.key(panel, block);
            let mut product = Multiplier::new(&mut *self.unit, is_wide(panel));
            // SAFETY: the factors hold what was packed, `scores` PAIR rows of PAIR.
            unsafe {
                let to = scores.as_mut_ptr();
                product.multiply::<false>(key, query, self.words, &self.scores, to, Nothing);
                product.finish();
            }
        }
        if self.special_queries || self.special_keys {
            patch_scores(self.simd, panel, source, self.dims[0], scores);
        }
        if let Some(softcap) = self.softcap {
            cap(self.simd, self.factor, softcap, scores);
        }
    }

    /// Scores and probabilities: while the unit multiplies a block of keys, vectors compute the
    /// probabilities of the block before.
    #[inline(always)]
    fn overlapped<const TERMS: usize>(
        &mut self,
        panel: &Panel<'_>,
        softmax: &mut Softmax<'_, S>,
        scores: &mut [f32],
        probabilities: Probabilities,
    ) {
        let query = self.query(panel);
        let keys: [Factor; KEYS / PAIR] =
            array::from_fn(|block| self.key(panel, block.min(panel.keys / PAIR - 1)));
        let turns = Multiplier::<S, M>::turns(self.words, &self.scores);
        let mut product = Multiplier::new(&mut *self.unit, is_wide(panel));
        let scores = scores[..PAIR * PAIR].as_mut_ptr();
        for (block, &key) in keys[..panel.keys / PAIR].iter().enumerate() {
            let before = block.checked_sub(1);
            let work = Turns::<_, TERMS>::new(softmax, panel, before, scores, probabilities, turns);
            // SAFETY: the factors hold what was packed, `scores` PAIR rows of PAIR.
            unsafe { product.multiply::<false>(key, query, self.words, &self.scores, scores, work) };
        }
        // SAFETY: the last block's scores have room.
        unsafe { product.finish() };
        let last = Some(panel.keys / PAIR - 1);
        Turns::<_, TERMS>::new(softmax, panel, last, scores, probabilities, 2).run(product.unit, 1);
    }

    /// `out += probabilities · value`
    #[inline(always)]
    fn accumulate(&mut self, panel: &mut Panel<'_>, probabilities: Probabilities) {
        let words = panel.keys / 2;
        let stride = panel.padded / 2;
        let term = stride * self.columns;
        assert!(panel.value.len() >= term * self.terms.key && words <= stride);
        let probability = Factor { at: probabilities.words, stride: PAIR, term: probabilities.next };
        let mut product = Multiplier::new(&mut *self.unit, is_wide(panel));
        for (value, out) in
            panel.value[..term].chunks_exact(PAIR * stride).zip(panel.out.chunks_exact_mut(PAIR * PAIR))
        {
            let value = Factor { at: value.as_ptr(), stride, term };
            // SAFETY: the factors hold what was packed, `out` PAIR rows of PAIR until all is stored.
            unsafe {
                let to = out.as_mut_ptr();
                product.multiply::<true>(value, probability, words, &self.outputs, to, Nothing);
            }
        }
        // SAFETY: the last block's outputs have room.
        unsafe { product.finish() };
    }

    /// One panel, with probabilities of `TERMS` terms.
    #[inline(always)]
    fn step_by<const TERMS: usize>(&mut self, mut panel: Panel<'_>, source: &TileRows<'_, '_>) {
        let lanes = if is_wide(&panel) { PAIR } else { TILE };
        let (scores, words) = std::mem::take(&mut panel.scores).split_at_mut(panel.padded * PAIR);
        let scores = &mut scores[..panel.keys * PAIR];
        let probabilities = Probabilities::new(words, panel.padded, TERMS);
        let factor = if self.softcap.is_some() { 1.0 } else { self.factor };
        let mut softmax = Softmax::new(self.simd, factor, panel.limits, lanes / TILE, panel.max);

        // The softmax of a first tile, and of what is rare, needs all scores.
        let unseen: [bool; PAIR] = array::from_fn(|row| row < lanes && panel.max[row] == f32::NEG_INFINITY);
        let special = self.special_queries || self.special_keys || self.softcap.is_some();
        let at_once = special || unseen.contains(&true);
        let mut to_raise = if at_once {
            self.scores_at_once(&panel, source, scores);
            Some(unseen)
        } else {
            self.overlapped::<TERMS>(&panel, &mut softmax, scores, probabilities);
            softmax.too_large()
        };
        let (mut raised, mut complete) = ([false; PAIR], at_once);
        while let Some(rows) = to_raise {
            if !complete {
                self.scores_at_once(&panel, source, scores);
                complete = true;
            }
            let before: [f32; PAIR] = array::from_fn(|row| panel.max[row]);
            softmax.raise(scores, &rows, panel.max);
            if before
                .iter()
                .zip(&*panel.max)
                .any(|(&before, &max)| before != max && before > f32::NEG_INFINITY)
            {
                let alpha = array::from_fn(|row| {
                    if before[row] == panel.max[row] { 1.0 } else { (before[row] - panel.max[row]).exp2() }
                });
                rescale(self.simd, &alpha, panel.sum);
                panel.out.chunks_exact_mut(PAIR).for_each(|column| rescale(self.simd, &alpha, column));
            }
            softmax.start(panel.max);
            for pair in 0..panel.keys / 2 {
                // SAFETY: there are the scores of all pairs of keys, and the words.
                unsafe {
                    let (scores, words) = (scores[2 * pair * PAIR..].as_ptr(), probabilities.of_pair(pair));
                    softmax.pair::<M, true, TERMS>(self.unit, scores, 2 * pair, words, probabilities.next);
                }
            }
            // A maximum is raised once: a row of NaN stays too large.
            raised.iter_mut().zip(rows).for_each(|(raised, row)| *raised |= row);
            let large = softmax.too_large();
            to_raise = large.map(|large| array::from_fn(|row| large[row] && !raised[row]));
            to_raise = to_raise.filter(|rows| rows.contains(&true));
        }
        softmax.add_sums(panel.sum);
        self.accumulate(&mut panel, probabilities);
    }
}

/// Where the probabilities of a panel lie: `[term][pair of keys][row]`.
#[derive(Clone, Copy)]
struct Probabilities {
    words: *mut f32,
    /// Words from one term to the next.
    next: usize,
}

impl Probabilities {
    fn new(words: &mut [f32], keys: usize, terms: usize) -> Self {
        let next = keys / 2 * PAIR;
        Self { words: words[..next * terms].as_mut_ptr(), next }
    }

    /// # Safety
    /// The pair must be one of the padded keys'.
    #[inline(always)]
    unsafe fn of_pair(self, pair: usize) -> *mut f32 {
        // SAFETY: the caller's promise.
        unsafe { self.words.add(pair * PAIR) }
    }
}

/// The probabilities of a block of keys, computed in turns between the products of the next.
struct Turns<'s, 'a, S: Simd, const TERMS: usize> {
    softmax: &'s mut Softmax<'a, S>,
    scores: *const f32,
    probabilities: Probabilities,
    /// The block's first key, and whether some row does not see all of its keys.
    key: usize,
    masked: bool,
    /// Pairs of keys, those that are done, and the turns that there are for them.
    pairs: usize,
    done: usize,
    turns: usize,
}

impl<'s, 'a, S: Simd, const TERMS: usize> Turns<'s, 'a, S, TERMS> {
    #[inline(always)]
    fn new(
        softmax: &'s mut Softmax<'a, S>,
        panel: &Panel<'_>,
        block: Option<usize>,
        scores: *const f32,
        probabilities: Probabilities,
        turns: usize,
    ) -> Self {
        let key = block.unwrap_or(0) * PAIR;
        let pairs = if block.is_some() { PAIR / 2 } else { 0 };
        let masked = panel.limits.is_some_and(|limits| limits.hides(key, key + PAIR));
        Self { softmax, scores, probabilities, key, masked, pairs, done: 0, turns }
    }
}

impl<S: Simd, M: Matrix<S>, const TERMS: usize> Meanwhile<M> for Turns<'_, '_, S, TERMS> {
    #[inline(always)]
    fn run(&mut self, unit: &M, turn: usize) {
        // The scores are stored before the second turn.
        let due = self.pairs * turn / (self.turns - 1);
        for pair in self.done..due {
            let key = self.key + 2 * pair;
            // SAFETY: the block's scores are stored, and there are the words of all pairs of keys.
            unsafe {
                let (scores, words) = (self.scores.add(2 * pair * PAIR), self.probabilities.of_pair(key / 2));
                let next = self.probabilities.next;
                if self.masked {
                    self.softmax.pair::<M, true, TERMS>(unit, scores, key, words, next);
                } else {
                    self.softmax.pair::<M, false, TERMS>(unit, scores, key, words, next);
                }
            }
        }
        self.done = due;
    }
}

/// Whether a panel has more rows than one tile.
fn is_wide(panel: &Panel<'_>) -> bool {
    panel.rows > TILE
}

/// Puts a factor on each row of a panel.
#[inline(always)]
fn rescale<S: Simd>(simd: S, alpha: &[f32; PAIR], rows: &mut [f32]) {
    for (alpha, rows) in alpha.chunks_exact(TILE).zip(rows.chunks_exact_mut(TILE)) {
        store(simd, simd.mul(load(simd, alpha), load(simd, rows)), rows);
    }
}

/// Writes the scores of queries and keys that have elements that are not finite.
#[cold]
fn patch_scores<S: Simd>(
    simd: S,
    panel: &Panel<'_>,
    source: &TileRows<'_, '_>,
    head_dim: usize,
    scores: &mut [f32],
) {
    let is_special = |row: AnySlice<'_>| {
        let mut found = false;
        for_each_special(row, |_, _| found = true);
        found
    };
    let special: Vec<bool> = (0..panel.rows).map(|row| is_special(source.query(panel.first + row))).collect();
    let (mut key, mut query) = (vec![0.0; head_dim], vec![0.0; head_dim]);
    for index in 0..panel.keys.min(panel.count) {
        pack_words::<S, 1>(simd, source.key(index), &mut key);
        let special_key = is_special(source.key(index));
        for row in (0..panel.rows).filter(|&row| special_key || special[row]) {
            pack_words::<S, 1>(simd, source.query(panel.first + row), &mut query);
            scores[index * PAIR + row] = key.iter().zip(&query).map(|(a, b)| a * b).sum();
        }
    }
}

impl<S: Simd, M: Matrix<S>> Engine for Unit<'_, S, M> {
    const PANEL: usize = PAIR;
    const KEYS: usize = KEYS;
    const STEP: usize = PAIR;

    fn sizes(&self, rows: usize, keys: usize) -> Sizes {
        sizes(self.dims, self.terms, rows, keys)
    }

    #[inline(always)]
    fn pack_queries<'k>(
        &mut self,
        rows: impl Iterator<Item = AnySlice<'k>>,
        to: &mut [f32],
        scratch: &mut [f32],
    ) {
        let (words, terms) = (self.words, self.terms.query);
        let (row_words, scratch) = scratch.split_at_mut(terms * words);
        to.fill(0.0);
        for (index, row) in rows.enumerate() {
            let finite = self.pack_row(row, terms, row_words, words, scratch);
            self.special_queries |= !finite;
            let to = &mut to[index / PAIR * (terms * words * PAIR)..][..terms * words * PAIR];
            for (word, to) in row_words.iter().zip(to.chunks_exact_mut(PAIR)) {
                to[index % PAIR] = *word;
            }
        }
    }

    #[inline(always)]
    fn pack_keys(&mut self, source: &TileRows<'_, '_>, count: usize, to: &mut [f32], scratch: &mut [f32]) {
        let (words, terms) = (self.words, self.terms.key);
        let term = to.len() / terms;
        self.special_keys = false;
        for index in 0..count {
            let finite = self.pack_row(source.key(index), terms, &mut to[index * words..], term, scratch);
            self.special_keys |= !finite;
        }
        for term in to.chunks_exact_mut(term) {
            term[count * words..].fill(0.0);
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
        let (columns, terms) = (self.columns, self.terms.key);
        let term = to.len() / terms;
        let words = term / columns;
        let (block, rest) = scratch.split_at_mut(TILE * columns * terms);
        let (low, high) = rest[..2 * columns].split_at_mut(columns);
        let mut finite = true;
        for first in (0..words).step_by(TILE) {
            for word in 0..TILE {
                let index = 2 * (first + word);
                if index < count && matches!(source.value(index), AnySlice::BF16(_)) {
                    let row = &mut block[word * columns..][..columns];
                    finite &=
                        pack_value_words::<S, 2>(self.simd, &|i| source.value(i), count, first + word, row);
                    continue;
                }
                for (i, row) in [&mut *low, &mut *high].into_iter().enumerate() {
                    let value = if index + i < count { source.value(index + i) } else { AnySlice::F32(&[]) };
                    finite &= finite_f32(self.simd, value, row);
                }
                for term in block.chunks_exact_mut(TILE * columns) {
                    take_rows(low, high, &mut term[word * columns..][..columns]);
                }
            }
            for (block, to) in block.chunks_exact(TILE * columns).zip(to.chunks_exact_mut(term)) {
                for column in (0..columns).step_by(TILE) {
                    let to = &mut to[column * words + first..][..(TILE - 1) * words + TILE];
                    // SAFETY: `block` holds TILE rows of `columns`, and TILE rows of `to` are
                    // `words` apart.
                    unsafe {
                        self.unit.transpose(block.as_ptr().add(column), columns, to.as_mut_ptr(), words)
                    };
                }
            }
        }
        if !finite && terms == 1 {
            clear_special::<2>(to);
        }
        finite
    }

    #[inline(always)]
    fn step(&mut self, panel: Panel<'_>, source: &TileRows<'_, '_>) {
        match self.terms.probability {
            1 => self.step_by::<1>(panel, source),
            2 => self.step_by::<2>(panel, source),
            _ => self.step_by::<3>(panel, source),
        }
    }

    #[inline(always)]
    fn place(&self, row: usize, column: usize) -> usize {
        (row / PAIR * self.columns + column) * PAIR + row % PAIR
    }

    #[inline(always)]
    fn by_rows<'o>(&self, out: &'o mut [f32], scratch: &'o mut [f32]) -> &'o mut [f32] {
        let columns = self.columns;
        let rows = &mut scratch[..PAIR * columns];
        for column in (0..columns).step_by(TILE) {
            for row in [0, TILE] {
                let from = &out[column * PAIR + row..][..(TILE - 1) * PAIR + TILE];
                let to = &mut rows[row * columns + column..][..(TILE - 1) * columns + TILE];
                // SAFETY: TILE rows of `from` are PAIR apart, those of `to` `columns`.
                unsafe { self.unit.transpose(from.as_ptr(), PAIR, to.as_mut_ptr(), columns) };
            }
        }
        rows
    }
}
