//! Elements as sums of bf16 terms.
//!
//! ```text
//! f32 = 3 terms      f16 = 2 terms      bf16, fp8 = 1 term        (exact)
//! a · b = Σ_(i + j < kept) a_i · b_j                              a_i is about 2^(-8 i) of a
//! ```
//!
//! Three orders of products are as good as f32. Where queries and keys are both f16, probabilities
//! have two terms and outputs two orders: far below f16's own rounding. Where both are bf16, one.
//!
//! Terms below the normal range of f32 count as 0, so that elements below 2⁻¹¹⁰ lose digits.

use crate::cpu::flash::rows::pack_words;
use crate::element::sealed::AnySlice;
use crate::simd::Simd;

/// How many terms the factors of both products have.
#[derive(Clone, Copy)]
pub(super) struct Terms {
    pub query: usize,
    /// Terms of keys and of values.
    pub key: usize,
    pub probability: usize,
}

impl Terms {
    /// Those of f32.
    pub const MOST: Self = Self { query: 3, key: 3, probability: 3 };

    /// Those of queries and keys that are stored as these rows are.
    pub fn new(query: AnySlice<'_>, key: AnySlice<'_>) -> Self {
        let probability = match (query, key) {
            (AnySlice::BF16(_), AnySlice::BF16(_)) => 1,
            (AnySlice::F16(_), AnySlice::F16(_)) => 2,
            _ => Self::MOST.probability,
        };
        Self { query: count(query), key: count(key), probability }
    }

    /// Whether scores are sums of several products, of which an infinite element would make NaN.
    pub fn are_several(self) -> bool {
        self.query * self.key > 1
    }

    /// The products of keys (first) with queries: all but those below f32's precision.
    pub fn scores(self) -> Products {
        Products::new(self.key, self.query, Self::MOST.key)
    }

    /// The products of values (first) with probabilities.
    pub fn outputs(self) -> Products {
        Products::new(self.key, self.probability, self.probability)
    }
}

fn count(rows: AnySlice<'_>) -> usize {
    match rows {
        AnySlice::F32(_) => 3,
        AnySlice::F16(_) => 2,
        AnySlice::BF16(_) | AnySlice::F8E4M3(_) => 1,
    }
}

/// Pairs of terms that are multiplied, in an order in which each shares one with the next.
#[derive(Clone, Copy)]
pub(super) struct Products {
    pairs: [[usize; 2]; 6],
    len: usize,
}

impl Products {
    /// Of factors with `first` and `second` terms, the products of the largest `kept` orders. The
    /// order does not depend on the counts, so that absent terms and terms of 0 give the same bits.
    fn new(first: usize, second: usize, kept: usize) -> Self {
        const ALL: [[usize; 2]; 6] = [[1, 1], [1, 0], [2, 0], [0, 0], [0, 1], [0, 2]];
        let mut products = Self { pairs: [[0; 2]; 6], len: 0 };
        for pair @ [i, j] in ALL {
            if i < first && j < second && i + j < kept {
                products.pairs[products.len] = pair;
                products.len += 1;
            }
        }
        products
    }

    #[inline(always)]
    pub fn pairs(&self) -> &[[usize; 2]] {
        &self.pairs[..self.len]
    }
}

/// Elements as f32, those that are infinite or NaN as 0; returns whether there were none.
#[inline(always)]
pub(super) fn finite_f32<S: Simd>(simd: S, row: AnySlice<'_>, to: &mut [f32]) -> bool {
    pack_words::<S, 1>(simd, row, to);
    let mut finite = true;
    for x in to {
        let is_finite = x.is_finite();
        finite &= is_finite;
        *x = if is_finite { *x } else { 0.0 };
    }
    finite
}

/// The bits of the bf16 nearest to a finite `x`; what would round to infinity is cut off.
#[inline(always)]
fn nearest(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    if rounded & 0x7fff == 0x7f80 { bits >> 16 } else { rounded }
}

/// Takes the next term from what is left of pairs of elements: a word has the term of `rest[2 i]`
/// in its low half and of `rest[2 i + 1]` in its high half.
#[inline(always)]
pub(super) fn take_pairs(rest: &mut [f32], words: &mut [f32]) {
    for (word, pair) in words.iter_mut().zip(rest.as_chunks_mut::<2>().0) {
        let [low, high] = pair.map(nearest);
        *word = f32::from_bits(low | high << 16);
        pair[0] -= f32::from_bits(low << 16);
        pair[1] -= f32::from_bits(high << 16);
    }
}

/// The same for the elements of two rows: words of `low[i]` and `high[i]`.
#[inline(always)]
pub(super) fn take_rows(low: &mut [f32], high: &mut [f32], words: &mut [f32]) {
    for ((word, low), high) in words.iter_mut().zip(low).zip(high) {
        let (first, second) = (nearest(*low), nearest(*high));
        *word = f32::from_bits(first | second << 16);
        *low -= f32::from_bits(first << 16);
        *high -= f32::from_bits(second << 16);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Portable;
    use half::{bf16, f16};

    fn split(x: f32, terms: usize) -> (Vec<f32>, f32) {
        let mut rest = [x, -x];
        let mut word = [0.0];
        let terms = (0..terms)
            .map(|_| {
                take_pairs(&mut rest, &mut word);
                let [low, high] = [word[0].to_bits() << 16, word[0].to_bits() & 0xffff_0000];
                assert_eq!(f32::from_bits(low), -f32::from_bits(high));
                f32::from_bits(low)
            })
            .collect();
        (terms, rest[0])
    }

    #[test]
    fn terms_add_up_to_the_element() {
        for bits in (0..=u16::MAX).filter(|&bits| f16::from_bits(bits).is_finite()) {
            assert_eq!(split(f16::from_bits(bits).to_f32(), 2).1, 0.0);
        }
        for x in (0..=u32::MAX).step_by(9973).map(f32::from_bits).filter(|x| x.is_finite()) {
            let (terms, rest) = split(x, 3);
            assert!(terms.iter().all(|term| term.is_finite()), "{x:e}: {terms:?}");
            // Nothing is below 2^-133, the smallest bf16.
            assert!(rest.abs() < 2f32.powi(-133) && (x.abs() < 2f32.powi(-110) || rest == 0.0), "{x:e}");
        }
        for x in [f32::MAX, f32::MIN] {
            assert_eq!(split(x, 3).1, 0.0);
        }
    }

    #[test]
    fn products_share_a_term_with_the_next() {
        for (first, second, kept) in
            [(1, 1, 3), (2, 2, 2), (2, 2, 3), (3, 3, 3), (2, 3, 3), (3, 1, 3), (1, 3, 3)]
        {
            let products = Products::new(first, second, kept);
            assert_eq!(
                products.pairs().len(),
                (0..kept).map(|i| if i < first { second.min(kept - i) } else { 0 }).sum::<usize>()
            );
            for pair in products.pairs().windows(2) {
                assert!(pair[0][0] == pair[1][0] || pair[0][1] == pair[1][1], "{pair:?}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_becomes_zero() {
        let mut row = [1.0; 4];
        let x = [bf16::ONE, bf16::INFINITY, bf16::NAN];
        assert!(!finite_f32(Portable::<8>, AnySlice::BF16(&x), &mut row));
        assert_eq!(row, [1.0, 0.0, 0.0, 0.0]);
        assert!(finite_f32(Portable::<8>, AnySlice::F32(&[2.0]), &mut row));
    }
}
