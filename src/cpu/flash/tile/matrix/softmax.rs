//! The softmax beside a matrix unit, with maxima that are kept as long as they serve.
//!
//! A row's maximum is that of the first tile in which it sees a key. Later scores may be above it:
//! f32 and bf16 have the exponents for probabilities above 1. So most tiles need no look for the
//! maximum, and their outputs are not rescaled. Where the probabilities of a tile add up to more
//! than [`MOST_SUM`], the maximum of that row, and of no other, is raised to the tile's.

use super::super::Limits;
use super::PAIR;
use crate::simd::{Matrix, Simd, TILE, load, store};

/// Probabilities of a tile add up to this at most; otherwise the row's maximum is raised. Far from
/// where a sum over all keys or an output would overflow.
const MOST_SUM: f32 = 1024.0;

/// The softmax of one panel of rows over a tile of keys.
pub(super) struct Softmax<'a, S: Simd> {
    simd: S,
    /// What turns scores into exponents of 2.
    factor: f32,
    limits: Option<&'a Limits>,
    /// Halves of the panel that have rows.
    halves: usize,
    /// The rows' maxima with the sign turned; 0 where there is none.
    below: [S::V; 2],
    /// Sums of this tile's probabilities.
    sums: [S::V; 2],
}

impl<'a, S: Simd> Softmax<'a, S> {
    /// For a panel with these maxima so far.
    #[inline(always)]
    pub fn new(simd: S, factor: f32, limits: Option<&'a Limits>, halves: usize, max: &[f32]) -> Self {
        let zero = simd.splat(0.0);
        let mut softmax = Self { simd, factor, limits, halves, below: [zero; 2], sums: [zero; 2] };
        softmax.start(max);
        softmax
    }

    /// Begins the tile under these maxima. A row whose maximum is infinite becomes NaN: its score
    /// is beyond f32.
    #[inline(always)]
    pub fn start(&mut self, max: &[f32]) {
        let simd = self.simd;
        let (zero, none) = (simd.splat(0.0), simd.splat(f32::NEG_INFINITY));
        for half in 0..self.halves {
            let max = load(simd, &max[half * TILE..]);
            self.below[half] = simd.sub(zero, simd.if_greater(max, none, max, zero));
            self.sums[half] = simd.if_greater(max, simd.splat(f32::MAX), simd.splat(f32::NAN), zero);
        }
    }

    /// The probabilities of two keys, from the scores of `PAIR` rows each, as words of pairs of
    /// bf16: `PAIR` words for each of `TERMS` terms, `next` words from one term to the next.
    ///
    /// # Safety
    /// The scores must be readable and the words writable.
    #[inline(always)]
    pub unsafe fn pair<M: Matrix<S>, const MASK: bool, const TERMS: usize>(
        &mut self,
        unit: &M,
        scores: *const f32,
        key: usize,
        words: *mut f32,
        next: usize,
    ) {
        let simd = self.simd;
        let factor = simd.splat(self.factor);
        for half in 0..self.halves {
            let at = half * TILE;
            let [mut first, mut second] = [0, 1].map(|i| {
                // SAFETY: the caller's promise.
                let score = unsafe { simd.load(scores.add(i * PAIR + at)) };
                simd.exp2_of_terms::<TERMS>(simd.fma(score, factor, self.below[half]))
            });
            if let Some(limits) = self.limits.filter(|_| MASK) {
                first = limits.apply(simd, key, half * TILE, first, 0.0);
                second = limits.apply(simd, key + 1, half * TILE, second, 0.0);
            }
            self.sums[half] = simd.add(self.sums[half], simd.add(first, second));
            for term in 0..TERMS {
                let (word, rest) = unit.round_pair(first, second);
                // SAFETY: the caller's promise.
                unsafe { simd.store(word, words.add(term * next + at)) };
                [first, second] = rest;
            }
        }
    }

    /// Raises the maxima of the chosen rows to their largest exponents of a tile.
    #[inline(always)]
    pub fn raise(&self, scores: &[f32], chosen: &[bool; PAIR], max: &mut [f32]) {
        let simd = self.simd;
        for half in 0..self.halves {
            let mut largest = simd.splat(f32::NEG_INFINITY);
            for (key, scores) in scores.chunks_exact(PAIR).enumerate() {
                let mut score = simd.mul(load(simd, &scores[half * TILE..]), simd.splat(self.factor));
                if let Some(limits) = self.limits {
                    score = limits.apply(simd, key, half * TILE, score, f32::NEG_INFINITY);
                }
                largest = simd.max(score, largest);
            }
            let mut of_rows = [0.0; TILE];
            store(simd, largest, &mut of_rows);
            for (i, of_row) in of_rows.into_iter().enumerate().filter(|(i, _)| chosen[half * TILE + i]) {
                let max = &mut max[half * TILE + i];
                *max = max.max(of_row);
            }
        }
    }

    /// The rows whose probabilities add up to too much, or to NaN.
    #[inline(always)]
    pub fn too_large(&self) -> Option<[bool; PAIR]> {
        let mut rows = [false; PAIR];
        for half in 0..self.halves {
            let mut sums = [0.0; TILE];
            store(self.simd, self.sums[half], &mut sums);
            for (row, sum) in rows[half * TILE..].iter_mut().zip(sums) {
                *row = sum.is_nan() || sum > MOST_SUM;
            }
        }
        rows.contains(&true).then_some(rows)
    }

    /// Adds this tile's sums to those of all tiles.
    #[inline(always)]
    pub fn add_sums(&self, sums: &mut [f32]) {
        for (half, sums) in sums.chunks_exact_mut(TILE).take(self.halves).enumerate() {
            store(self.simd, self.simd.add(load(self.simd, sums), self.sums[half]), sums);
        }
    }
}

/// Puts the factor and the softcap on scores: exponents of 2.
#[inline(always)]
pub(super) fn cap<S: Simd>(simd: S, factor: f32, softcap: f32, scores: &mut [f32]) {
    for scores in scores.chunks_exact_mut(S::LANES) {
        let score = simd.mul(load(simd, scores), simd.splat(factor));
        store(simd, simd.mul(simd.splat(softcap), simd.tanh(score)), scores);
    }
}
