//! Products of matrices by a unit, two by two tiles at a time.

use super::PAIR;
use super::terms::Products;
use crate::simd::{Matrix, Simd, TILE};
use std::marker::PhantomData;

/// Work of vectors that runs between the products. A trait, since a closure would be compiled
/// without the vector instructions unless it is inlined.
pub(super) trait Meanwhile<M> {
    fn run(&mut self, unit: &M, turn: usize);
}

/// No work.
pub(super) struct Nothing;

impl<M> Meanwhile<M> for Nothing {
    #[inline(always)]
    fn run(&mut self, _: &M, _: usize) {}
}

/// A factor: the terms of a matrix.
#[derive(Clone, Copy)]
pub(super) struct Factor {
    pub at: *const f32,
    /// Words from one row to the next.
    pub stride: usize,
    /// Words from one term to the next.
    pub term: usize,
}

/// A unit whose last sums may not be stored yet. Sums of `[PAIR][PAIR]` are the tiles 0 1 / 2 3;
/// factors go through the other four.
pub(super) struct Multiplier<'a, S, M> {
    pub unit: &'a mut M,
    /// Where they belong, if there are any.
    pending: *mut f32,
    /// Whether there are more than `TILE` rows across.
    wide: bool,
    simd: PhantomData<S>,
}

impl<'a, S: Simd, M: Matrix<S>> Multiplier<'a, S, M> {
    #[inline(always)]
    pub fn new(unit: &'a mut M, wide: bool) -> Self {
        Self { unit, pending: std::ptr::null_mut(), wide, simd: PhantomData }
    }

    /// How often [`multiply`](Self::multiply) lets other work run.
    #[inline(always)]
    pub fn turns(words: usize, products: &Products) -> usize {
        words / TILE * products.pairs().len() * 2
    }

    /// `c[i][j] = Σ_w a[i][w] · b[w][j]` of `PAIR` rows i and columns j, added to what is there if
    /// `ADD`; rows of `c` are `PAIR` words apart. Sums stay in the unit until the second turn of
    /// the next call, or until [`finish`](Self::finish): a store right after the last product would
    /// wait for it. `meanwhile` gets its turns between the products.
    ///
    /// # Safety
    /// For all terms that `products` names, `a` must hold `PAIR` rows of `words`, and `b` `words`
    /// rows of `PAIR` words; `c` must hold `PAIR` rows until the sums are stored. `words` must be a
    /// multiple of `TILE`.
    #[inline(always)]
    pub unsafe fn multiply<const ADD: bool>(
        &mut self,
        a: Factor,
        b: Factor,
        words: usize,
        products: &Products,
        c: *mut f32,
        mut meanwhile: impl Meanwhile<M>,
    ) {
        let mut turn = 0;
        // SAFETY: the caller's promise.
        unsafe {
            for word in (0..words).step_by(TILE) {
                let mut held = [usize::MAX; 2];
                for &[term_a, term_b] in products.pairs() {
                    let first = turn == 0;
                    let [new_a, new_b] = [held[0] != term_a, held[1] != term_b];
                    held = [term_a, term_b];
                    let a0 = a.at.add(term_a * a.term + word);
                    let b0 = b.at.add(term_b * b.term + word * b.stride);
                    if first {
                        self.begin::<ADD, 0>(c, 0);
                    }
                    if new_a {
                        self.unit.load::<4>(a0, a.stride);
                    }
                    if new_b {
                        self.unit.load::<6>(b0, b.stride);
                    }
                    self.unit.add_product::<0, 4, 6>();
                    if self.wide {
                        if first {
                            self.begin::<ADD, 1>(c, TILE);
                        }
                        if new_b {
                            self.unit.load::<7>(b0.add(TILE), b.stride);
                        }
                        self.unit.add_product::<1, 4, 7>();
                    }
                    meanwhile.run(self.unit, turn);
                    if first {
                        self.begin::<ADD, 2>(c, TILE * PAIR);
                    }
                    if new_a {
                        self.unit.load::<5>(a0.add(TILE * a.stride), a.stride);
                    }
                    self.unit.add_product::<2, 5, 6>();
                    if self.wide {
                        if first {
                            self.begin::<ADD, 3>(c, TILE * PAIR + TILE);
                        }
                        self.unit.add_product::<3, 5, 7>();
                    }
                    meanwhile.run(self.unit, turn + 1);
                    turn += 2;
                }
            }
        }
        self.pending = c;
    }

    /// Stores a tile of the last sums and begins the next.
    ///
    /// # Safety
    /// As of [`multiply`](Self::multiply).
    #[inline(always)]
    unsafe fn begin<const ADD: bool, const T: usize>(&mut self, c: *mut f32, at: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            if !self.pending.is_null() {
                self.unit.store::<T>(self.pending.add(at), PAIR);
            }
            if ADD { self.unit.load::<T>(c.add(at), PAIR) } else { self.unit.zero::<T>() }
        }
    }

    /// Stores the last sums.
    ///
    /// # Safety
    /// As of [`multiply`](Self::multiply).
    #[inline(always)]
    pub unsafe fn finish(&mut self) {
        let c = std::mem::replace(&mut self.pending, std::ptr::null_mut());
        if c.is_null() {
            return;
        }
        // SAFETY: the caller's promise.
        unsafe {
            self.unit.store::<0>(c, PAIR);
            self.unit.store::<2>(c.add(TILE * PAIR), PAIR);
            if self.wide {
                self.unit.store::<1>(c.add(TILE), PAIR);
                self.unit.store::<3>(c.add(TILE * PAIR + TILE), PAIR);
            }
        }
    }
}
