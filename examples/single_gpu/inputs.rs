//! Random queries, keys and values of one layer.

use crate::Sizes;
use crate::check::Visible;
use crate::rows::Rows;
use star_attention::Element;

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
