//! Page tables beside packed queries, as engines keep them.

use super::Plan;
use crate::cuda::Properties;
use crate::{AttentionConfig, AttentionShape, Batch, Keys, Result, Sequence};

/// Keys and values in pages, as engines with a paged cache keep them: tensors `[pages, page_len,
/// kv_heads, head_dim]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageTable {
    /// Pages of the tensors.
    pub pages: usize,
    /// Tokens of a page, below 2³¹.
    pub page_len: usize,
    /// For each sequence its number of keys, and the pages that hold them in order.
    pub sequences: Vec<(usize, Vec<u32>)>,
}

impl Plan {
    /// A plan for keys and values in pages, under one mask: [`for_batch`](Self::for_batch) of
    /// sequences whose queries are packed as in [`packed`](Self::packed), `query_offsets` for the
    /// sequences of `table` in order. `shape.key_len` is the sum of their keys.
    ///
    /// # Errors
    /// As [`packed`](Self::packed), and [`Error::Sequence`](crate::Error::Sequence) with
    /// [`Error::Value`](crate::Error::Value) if a page is none of the table's, or a sequence has
    /// too few of them for its keys.
    pub fn paged(
        properties: &Properties,
        config: &AttentionConfig,
        shape: &AttentionShape,
        query_offsets: &[usize],
        table: &PageTable,
    ) -> Result<Self> {
        let ends = table.sequences.iter().scan(0usize, |end, (keys, _)| {
            *end = end.saturating_add(*keys);
            Some(*end)
        });
        let key_offsets: Vec<usize> = std::iter::once(0).chain(ends).collect();
        let packed = Batch::packed(shape, query_offsets, &key_offsets, &config.mask)?;
        let key = [table.pages, table.page_len, shape.kv_heads, shape.head_dim];
        let mut batch = Batch::new(shape.query_shape(), key)?.with_value_dim(shape.value_dim)?;
        for (sequence, (len, pages)) in packed.sequences().iter().zip(&table.sequences) {
            let keys = Keys::pages(*len, &pages[..]);
            batch.push(Sequence::new(0, sequence.rows.clone(), keys, config.mask.clone()))?;
        }
        Self::for_batch(properties, &config.score().into(), &batch)
    }
}
