//! Queries, and the keys and values of each rank: any rank can make any other's.

use crate::Sizes;
use star_attention::{AttentionShape, Element};

/// Random rows `[tokens, heads, dim]`.
#[derive(Clone, Debug)]
pub struct Rows<T> {
    pub data: Vec<T>,
    heads: usize,
    dim: usize,
}

impl<T: Element> Rows<T> {
    fn random(seed: u64, tokens: usize, heads: usize, dim: usize) -> Self {
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

    /// One head's rows of all tokens.
    pub fn head(&self, head: usize) -> impl Iterator<Item = T> + '_ {
        let tokens = self.data.len() / (self.heads * self.dim);
        (0..tokens).flat_map(move |token| self.row(token, head)).copied()
    }
}

/// A rank's keys and values.
#[derive(Clone, Debug)]
pub struct Shard<T> {
    pub len: usize,
    pub key: Rows<T>,
    pub value: Rows<T>,
}

impl Sizes {
    /// A rank's attention over so many keys.
    pub fn shape(&self, key_len: usize) -> AttentionShape {
        let Self { query_len, heads: query_heads, kv_heads, head_dim, .. } = *self;
        AttentionShape { batch: 1, query_len, key_len, query_heads, kv_heads, head_dim }
    }

    pub fn query<T: Element>(&self) -> Rows<T> {
        Rows::random(self.seed, self.query_len, self.heads, self.head_dim)
    }

    pub fn shard<T: Element>(&self, rank: usize) -> Shard<T> {
        let len = self.shards[rank % self.shards.len()];
        let rows = |part| {
            Rows::random(
                self.seed.wrapping_add(1 + 2 * rank as u64 + part),
                len,
                self.kv_heads,
                self.head_dim,
            )
        };
        Shard { len, key: rows(0), value: rows(1) }
    }
}
