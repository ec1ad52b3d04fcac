//! Random queries, keys and values of one layer.

use crate::Sizes;
use crate::check::Visible;
use star_attention::Element;

/// Standard normal values of any token, `[tokens, heads, dim]`.
pub struct Rows<T> {
    heads: usize,
    dim: usize,
    data: Vec<T>,
}

impl<T: Element> Rows<T> {
    fn random(seed: u64, tokens: usize, heads: usize, dim: usize) -> Self {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f32 + 0.5) / (1u64 << 31) as f32
        };
        // The sum of four uniform numbers, scaled to variance 1, is near enough to normal.
        let mut value = || (0..4).map(|_| uniform() - 0.5).sum::<f32>() * 3f32.sqrt();
        let data = (0..tokens * heads * dim).map(|_| T::from_f32(value())).collect();
        Self { heads, dim, data }
    }

    pub fn row(&self, token: usize, head: usize) -> &[T] {
        &self.data[(token * self.heads + head) * self.dim..][..self.dim]
    }

    pub fn gather(&self, tokens: impl Iterator<Item = usize>) -> Vec<T> {
        let size = self.heads * self.dim;
        tokens.flat_map(|token| &self.data[token * size..][..size]).copied().collect()
    }
}

/// Queries, keys and values of the context's tokens and then the query's.
pub struct Inputs<T> {
    pub query: Rows<T>,
    pub key: Rows<T>,
    pub value: Rows<T>,
}

impl<T: Element> Inputs<T> {
    pub fn random(sizes: &Sizes) -> Self {
        let Sizes { context_len, query_len, heads, kv_heads, head_dim, seed, .. } = *sizes;
        let rows = |which, heads| Rows::random(seed ^ which, context_len + query_len, heads, head_dim);
        Self { query: rows(1, heads), key: rows(2, kv_heads), value: rows(3, kv_heads) }
    }

    pub fn visible(&self, tokens: impl Iterator<Item = usize> + Clone, kv_head: usize) -> Visible<T> {
        let rows = |rows: &Rows<T>| tokens.clone().flat_map(|t| rows.row(t, kv_head).to_vec()).collect();
        Visible { keys: rows(&self.key), values: rows(&self.value) }
    }
}
