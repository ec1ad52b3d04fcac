//! Queries, and the keys and values of each rank: any rank can make any other's.

use crate::Sizes;
use crate::rows::Rows;
use star_attention::{AttentionShape, Element};

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
        AttentionShape { batch: 1, query_len, key_len, query_heads, kv_heads, head_dim, value_dim: head_dim }
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
