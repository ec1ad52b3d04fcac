//! Random rows of queries, keys or values.

use star_attention::Element;

/// Standard normal rows `[tokens, heads, dim]`: those of a token are the same on every rank.
#[derive(Clone, Debug)]
pub struct Rows<T> {
    pub data: Vec<T>,
    heads: usize,
    dim: usize,
}

impl<T: Element> Rows<T> {
    pub fn random(seed: u64, tokens: usize, heads: usize, dim: usize) -> Self {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f32 + 0.5) / (1u64 << 31) as f32
        };
        // The sum of four uniform numbers, scaled to variance 1, is near enough to normal.
        let mut value = || (0..4).map(|_| uniform() - 0.5).sum::<f32>() * 3f32.sqrt();
        let data = (0..tokens * heads * dim).map(|_| T::from_f32(value())).collect();
        Self { data, heads, dim }
    }

    pub fn row(&self, token: usize, head: usize) -> &[T] {
        &self.data[(token * self.heads + head) * self.dim..][..self.dim]
    }

    /// The rows of some tokens.
    pub fn gather(&self, tokens: impl Iterator<Item = usize>) -> Vec<T> {
        let size = self.heads * self.dim;
        tokens.flat_map(|token| &self.data[token * size..][..size]).copied().collect()
    }

    /// One head's rows of all tokens.
    pub fn head(&self, head: usize) -> impl Iterator<Item = T> + '_ {
        let tokens = self.data.len() / (self.heads * self.dim);
        (0..tokens).flat_map(move |token| self.row(token, head)).copied()
    }
}
