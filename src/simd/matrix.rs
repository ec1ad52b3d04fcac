//! Matrix units: tiles of 16 rows by 16 words, and products of tiles of bf16 pairs.

use super::Simd;
use super::portable::Portable;
use half::bf16;
use std::array;

/// Rows of a tile, and its words of 32 bits in a row.
pub(crate) const TILE: usize = 16;

/// Eight tiles, named by their numbers, that one thread holds, beside vectors of as many words as a
/// tile's row.
pub(crate) trait Matrix<S: Simd> {
    /// Sets the tile `T` to zeros.
    fn zero<const T: usize>(&mut self);

    /// Loads the tile `T` from rows that lie `stride` words apart.
    ///
    /// # Safety
    /// [`TILE`] rows of as many words must be readable.
    unsafe fn load<const T: usize>(&mut self, from: *const f32, stride: usize);

    /// Stores the tile `T` to rows that lie `stride` words apart.
    ///
    /// # Safety
    /// [`TILE`] rows of as many words must be writable.
    unsafe fn store<const T: usize>(&mut self, to: *mut f32, stride: usize);

    /// `C[i][j] += Σ_w A[i][w] · B[w][j]`: words of A and B are pairs of bf16, and a product of
    /// pairs is the sum of both products; C is f32.
    fn add_product<const C: usize, const A: usize, const B: usize>(&mut self);

    /// Words of the bf16 nearest to `first` (in the low halves) and `second`, and what they leave.
    fn round_pair(&self, first: S::V, second: S::V) -> (S::V, [S::V; 2]);

    /// Writes the transpose of [`TILE`] rows of as many words.
    ///
    /// # Safety
    /// The rows, which lie so many words apart, must be readable or writable.
    unsafe fn transpose(&self, from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        for row in 0..TILE {
            for column in 0..TILE {
                // SAFETY: inside the rows.
                unsafe { *to.add(column * to_stride + row) = *from.add(row * stride + column) };
            }
        }
    }
}

/// No unit.
pub(crate) enum NoUnit {}

impl<S: Simd> Matrix<S> for NoUnit {
    fn zero<const T: usize>(&mut self) {
        match *self {}
    }
    unsafe fn load<const T: usize>(&mut self, _: *const f32, _: usize) {
        match *self {}
    }
    unsafe fn store<const T: usize>(&mut self, _: *mut f32, _: usize) {
        match *self {}
    }
    fn add_product<const C: usize, const A: usize, const B: usize>(&mut self) {
        match *self {}
    }
    fn round_pair(&self, _: S::V, _: S::V) -> (S::V, [S::V; 2]) {
        match *self {}
    }
}

/// A unit in plain Rust, which computes what AMX does. Tiles begin with rubbish.
pub(crate) struct Model {
    tiles: [[[f32; TILE]; TILE]; 8],
}

impl Default for Model {
    fn default() -> Self {
        Self { tiles: [[[f32::NAN; TILE]; TILE]; 8] }
    }
}

/// What a test breaks in the models of its thread.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Tiles are loaded without their last row.
    ShortLoad,
    /// Tiles are stored without their last row.
    ShortStore,
    /// The bf16 of A's words are swapped.
    SwappedPairs,
    /// Tiles are not set to zeros.
    StaleSums,
    /// Tile 6 keeps what it was loaded with first.
    StaleFactor,
    /// Tile 3 is never stored.
    LostStore,
    /// Pairs of probabilities are rounded to the wrong halves.
    SwappedRounding,
}

#[cfg(test)]
thread_local! {
    pub(crate) static FAULT: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

#[cfg(test)]
fn has(fault: Fault) -> bool {
    FAULT.get() == Some(fault)
}

impl Matrix<Portable<TILE>> for Model {
    fn zero<const T: usize>(&mut self) {
        #[cfg(test)]
        if has(Fault::StaleSums) && self.tiles[T][0][0].is_finite() {
            return;
        }
        self.tiles[T] = [[0.0; TILE]; TILE];
    }

    unsafe fn load<const T: usize>(&mut self, from: *const f32, stride: usize) {
        #[cfg(test)]
        if T == 6 && has(Fault::StaleFactor) && !self.tiles[T][0][0].is_nan() {
            return;
        }
        for (i, row) in self.tiles[T].iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *row = unsafe { from.add(i * stride).cast::<[f32; TILE]>().read_unaligned() };
        }
        #[cfg(test)]
        if has(Fault::ShortLoad) {
            self.tiles[T][TILE - 1] = [0.0; TILE];
        }
    }

    unsafe fn store<const T: usize>(&mut self, to: *mut f32, stride: usize) {
        #[cfg(test)]
        if T == 3 && has(Fault::LostStore) {
            return;
        }
        for (i, row) in self.tiles[T].iter().enumerate() {
            #[cfg(test)]
            if i == TILE - 1 && has(Fault::ShortStore) {
                continue;
            }
            // SAFETY: the caller's promise.
            unsafe { to.add(i * stride).cast::<[f32; TILE]>().write_unaligned(*row) };
        }
    }

    fn add_product<const C: usize, const A: usize, const B: usize>(&mut self) {
        let [a, b] = [A, B].map(|tile| self.tiles[tile].map(|row| row.map(halves)));
        #[cfg(test)]
        let a = if has(Fault::SwappedPairs) { a.map(|row| row.map(|[low, high]| [high, low])) } else { a };
        for (sums, a) in self.tiles[C].iter_mut().zip(&a) {
            for (&a, b) in a.iter().zip(&b) {
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum = add_halves(a, b, *sum);
                }
            }
        }
    }

    fn round_pair(&self, first: [f32; TILE], second: [f32; TILE]) -> ([f32; TILE], [[f32; TILE]; 2]) {
        #[cfg(test)]
        let [first, second] = if has(Fault::SwappedRounding) { [second, first] } else { [first, second] };
        let halves = [first, second].map(|row| row.map(bf16::from_f32));
        let [low, high] = halves.map(|row| row.map(|x| u32::from(x.to_bits())));
        let rest = |row: [f32; TILE], half: [bf16; TILE]| array::from_fn(|i| row[i] - half[i].to_f32());
        (
            array::from_fn(|i| f32::from_bits(low[i] | high[i] << 16)),
            [rest(first, halves[0]), rest(second, halves[1])],
        )
    }
}

/// `sum` and both products of two words of bf16 pairs. Numbers below the normal range count as 0.
#[inline(always)]
pub(crate) fn add_pair(a: f32, b: f32, sum: f32) -> f32 {
    add_halves(halves(a), halves(b), sum)
}

#[inline(always)]
fn add_halves([a_low, a_high]: [f32; 2], [b_low, b_high]: [f32; 2], sum: f32) -> f32 {
    sum + (a_low * b_low + a_high * b_high)
}

/// The bf16 of a word; 0 for those below the normal range.
#[inline(always)]
fn halves(word: f32) -> [f32; 2] {
    let bits = word.to_bits();
    [bits << 16, bits & 0xffff_0000].map(|bits| {
        let x = f32::from_bits(bits);
        if x.is_subnormal() { 0.0 } else { x }
    })
}
