//! Matrix units: tiles of 16 rows by 16 words, and products of tiles of bf16 pairs.

/// Rows of a tile, and its words of 32 bits in a row.
pub(crate) const TILE: usize = 16;

/// Eight tiles, named by their numbers, that one thread holds.
pub(crate) trait Matrix {
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

impl Matrix for NoUnit {
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

impl Matrix for Model {
    fn zero<const T: usize>(&mut self) {
        self.tiles[T] = [[0.0; TILE]; TILE];
    }

    unsafe fn load<const T: usize>(&mut self, from: *const f32, stride: usize) {
        for (i, row) in self.tiles[T].iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *row = unsafe { from.add(i * stride).cast::<[f32; TILE]>().read_unaligned() };
        }
    }

    unsafe fn store<const T: usize>(&mut self, to: *mut f32, stride: usize) {
        for (i, row) in self.tiles[T].iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { to.add(i * stride).cast::<[f32; TILE]>().write_unaligned(*row) };
        }
    }

    fn add_product<const C: usize, const A: usize, const B: usize>(&mut self) {
        let (a, b) = (self.tiles[A], self.tiles[B]);
        for (sums, a) in self.tiles[C].iter_mut().zip(&a) {
            for (&a, b) in a.iter().zip(&b) {
                for (sum, &b) in sums.iter_mut().zip(b) {
                    *sum = add_pair(a, b, *sum);
                }
            }
        }
    }
}

/// `sum` and both products of two words of bf16 pairs. Numbers below the normal range count as 0.
#[inline(always)]
pub(crate) fn add_pair(a: f32, b: f32, sum: f32) -> f32 {
    let halves = |word: f32| {
        let bits = word.to_bits();
        [bits << 16, bits & 0xffff_0000].map(|bits| {
            let x = f32::from_bits(bits);
            if x.is_subnormal() { 0.0 } else { x }
        })
    };
    let ([a_low, a_high], [b_low, b_high]) = (halves(a), halves(b));
    sum + (a_low * b_low + a_high * b_high)
}
