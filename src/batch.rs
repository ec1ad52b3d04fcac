//! What a call attends to: sequences of any lengths, each with its own keys and its own mask.
//!
//! A [`Batch`] describes the tensors of a call and the sequences in them. It holds no data and
//! decides nothing about the work; plans of every backend are made from it. One batch can hold
//! context encoding under star masks of different layouts, dense prefill and decodes:
//!
//! ```
//! use star_attention::{Batch, Keys, Mask, Sequence};
//!
//! # fn main() -> star_attention::Result<()> {
//! // 40 packed query rows, over keys in 8 pages of 16 rows.
//! let mut batch = Batch::new([1, 40, 4, 64], [8, 16, 2, 64])?;
//! let star = Mask::Star { anchor_len: 8, block_len: 16, first_block_len: 16, left: None };
//! batch.push(Sequence::new(0, 0..32, Keys::pages(32, [5, 2]), star))?;
//! // One decode over 50 keys. The rows from 33 on are padding.
//! batch.push(Sequence::new(0, 32..33, Keys::pages(50, [0, 7, 1, 3]), Mask::Causal))?;
//! # Ok(())
//! # }
//! ```

use crate::config::{check_addressable, check_heads, check_value_dim};
use crate::{AttentionShape, Error, Mask, Result};
use std::collections::BTreeMap;
use std::ops::Range;

/// Where the keys and values of a sequence lie.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Keys {
    /// Consecutive rows of one index of the batch axis.
    Rows {
        /// Index on the batch axis of keys and values.
        batch: usize,
        /// Rows on their seq axis: as many as the sequence has keys, which may be fewer than the
        /// tensor holds.
        rows: Range<usize>,
    },
    /// Pages: each is one index of the batch axis, and the seq axis is the page's length.
    Pages {
        /// Keys of the sequence.
        len: usize,
        /// The pages in order. What stands behind the last one needed is not looked at.
        pages: Vec<u32>,
    },
}

impl Keys {
    /// Consecutive rows of index `batch` of the batch axis.
    pub fn rows(batch: usize, rows: Range<usize>) -> Self {
        Self::Rows { batch, rows }
    }

    /// `len` keys in pages.
    pub fn pages(len: usize, pages: impl Into<Vec<u32>>) -> Self {
        Self::Pages { len, pages: pages.into() }
    }

    /// Keys of the sequence.
    pub fn len(&self) -> usize {
        match self {
            Self::Rows { rows, .. } => rows.len(),
            Self::Pages { len, .. } => *len,
        }
    }

    /// Whether the sequence has no key.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The place of a key on the axes batch and seq, where pages have `page_len` rows.
    #[inline(always)]
    pub(crate) fn place(&self, key: usize, page_len: usize) -> (usize, usize) {
        match self {
            Self::Rows { batch, rows } => (*batch, rows.start + key),
            Self::Pages { pages, .. } => (pages[key / page_len] as usize, key % page_len),
        }
    }

    /// The key behind the last one that follows `key` without a gap.
    #[inline(always)]
    pub(crate) fn run_end(&self, key: usize, page_len: usize) -> usize {
        match self {
            Self::Rows { rows, .. } => rows.len(),
            Self::Pages { len, .. } => (key - key % page_len + page_len).min(*len),
        }
    }
}

/// Where the first keys of a sequence lie, if apart from the others: consecutive rows of the call's
/// prefix tensors, as a received anchor or a prefix that many sequences share.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prefix {
    /// Index on the batch axis of the prefix tensors.
    pub batch: usize,
    /// Rows on their seq axis.
    pub rows: Range<usize>,
}

/// One sequence of a [`Batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sequence {
    /// Index of its query rows on the batch axis of queries and outputs.
    pub batch: usize,
    /// Its query rows on their seq axis.
    pub rows: Range<usize>,
    /// Its first keys and values, where they lie in tensors of their own.
    pub prefix: Option<Prefix>,
    /// Its keys and values; those after the prefix, if there is one.
    pub keys: Keys,
    /// Which keys each of its rows sees.
    pub mask: Mask,
}

impl Sequence {
    /// The query rows `rows` of index `batch`, over `keys`, under `mask`.
    pub fn new(batch: usize, rows: Range<usize>, keys: Keys, mask: Mask) -> Self {
        Self { batch, rows, prefix: None, keys, mask }
    }

    /// The same with the rows `rows` of index `batch` of the call's prefix tensors as its first
    /// keys. Masks count from the first of them.
    #[must_use]
    pub fn with_prefix(self, batch: usize, rows: Range<usize>) -> Self {
        Self { prefix: Some(Prefix { batch, rows }), ..self }
    }

    /// Keys of the prefix; 0 without one.
    pub fn prefix_len(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.rows.len())
    }

    /// All keys of the sequence, those of the prefix among them.
    pub fn key_len(&self) -> usize {
        self.prefix_len() + self.keys.len()
    }
}

/// The sequences of a call, and the extents of its tensors.
///
/// Query rows that belong to no sequence are padding: they are neither read nor written. Keys may
/// be shared by any number of sequences.
#[derive(Clone, Debug)]
pub struct Batch {
    query: [usize; 4],
    key: [usize; 4],
    value_dim: usize,
    /// Extents batch and seq of the prefix tensors.
    prefix: [usize; 2],
    sequences: Vec<Sequence>,
    /// Query rows that have a sequence: from (batch, start) to (end, sequence).
    taken: BTreeMap<(usize, usize), (usize, usize)>,
}

impl Batch {
    /// A batch without sequences, over queries and outputs `[batch, seq, query_heads, head_dim]`
    /// and keys and values `[batch, seq, kv_heads, head_dim]`, which are `[pages, page_len,
    /// kv_heads, head_dim]` where they lie in pages. Where heads of values have another length,
    /// [`with_value_dim`](Self::with_value_dim) says so.
    ///
    /// # Errors
    /// [`Error::Shape`] if heads or head dims are 0 or do not fit together, or a tensor could not
    /// be addressed.
    pub fn new(query: [usize; 4], key: [usize; 4]) -> Result<Self> {
        if query[3] != key[3] {
            let expected = format!("head_dim {} as the queries'", query[3]);
            return Err(Error::shape("key", expected, key[3].to_string()));
        }
        check_heads(query[2], key[2], query[3])?;
        check_addressable("query", query)?;
        check_addressable("key", key)?;
        let (value_dim, prefix) = (key[3], [0, 0]);
        Ok(Self { query, key, value_dim, prefix, sequences: Vec::new(), taken: BTreeMap::new() })
    }

    /// The same batch with values and outputs of `value_dim` elements for each head, where those of
    /// queries and keys have another number: 192 and 128 in DeepSeek's prefill, say.
    ///
    /// # Errors
    /// [`Error::Shape`] for 0, or if values or outputs could not be addressed.
    pub fn with_value_dim(self, value_dim: usize) -> Result<Self> {
        check_value_dim(value_dim)?;
        let batch = Self { value_dim, ..self };
        check_addressable("value", batch.value_shape())?;
        check_addressable("prefix", batch.prefix_value_shape())?;
        check_addressable("out", batch.out_shape())?;
        Ok(batch)
    }

    /// The same batch with prefix tensors `[batch, seq, kv_heads, head_dim]`, where the first keys
    /// and values of sequences may lie.
    ///
    /// # Errors
    /// [`Error::Shape`] if such a tensor could not be addressed, [`Error::Value`] if there are
    /// sequences already.
    pub fn with_prefix(self, batch: usize, seq: usize) -> Result<Self> {
        if !self.sequences.is_empty() {
            return Err(Error::value("prefix", "before the first sequence", self.sequences.len()));
        }
        check_addressable("prefix", [batch, seq, self.key[2], self.key[3].max(self.value_dim)])?;
        Ok(Self { prefix: [batch, seq], ..self })
    }

    /// Sequences of one length under one mask: `shape.batch` times `query_len` rows over `key_len`
    /// keys.
    ///
    /// # Errors
    /// [`Error::Shape`] for extents out of range, [`Error::Value`] for a mask out of range.
    pub fn uniform(shape: &AttentionShape, mask: &Mask) -> Result<Self> {
        let mut batch = Self::of(shape)?;
        mask.validate()?;
        for index in 0..shape.batch {
            batch.push(Sequence::new(
                index,
                0..shape.query_len,
                Keys::rows(index, 0..shape.key_len),
                mask.clone(),
            ))?;
        }
        Ok(batch)
    }

    /// Sequences packed one after the other on the seq axes of a batch of 1, under one mask:
    /// sequence `i` has the query rows `query_offsets[i]..query_offsets[i + 1]` and the keys
    /// `key_offsets[i]..key_offsets[i + 1]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for extents out of range, a batch other than 1, or offsets of different
    /// counts, [`Error::Value`] for offsets that do not ascend from 0 to the total or a mask out of
    /// range.
    pub fn packed(
        shape: &AttentionShape,
        query_offsets: &[usize],
        key_offsets: &[usize],
        mask: &Mask,
    ) -> Result<Self> {
        if shape.batch != 1 {
            return Err(Error::shape("query", "batch 1 for packed sequences", shape.batch.to_string()));
        }
        if query_offsets.len() != key_offsets.len() {
            let expected = format!("{} offsets, as query_offsets", query_offsets.len());
            return Err(Error::shape("key_offsets", expected, key_offsets.len().to_string()));
        }
        check_offsets("query_offsets", query_offsets, shape.query_len)?;
        check_offsets("key_offsets", key_offsets, shape.key_len)?;
        mask.validate()?;
        let mut batch = Self::of(shape)?;
        for (rows, keys) in query_offsets.windows(2).zip(key_offsets.windows(2)) {
            batch.push(Sequence::new(0, rows[0]..rows[1], Keys::rows(0, keys[0]..keys[1]), mask.clone()))?;
        }
        Ok(batch)
    }

    fn of(shape: &AttentionShape) -> Result<Self> {
        Self::new(shape.query_shape(), shape.key_shape())?.with_value_dim(shape.value_dim)
    }

    /// Adds a sequence.
    ///
    /// # Errors
    /// [`Error::Sequence`], naming its index: with [`Error::Value`] for a mask out of range, rows
    /// or keys outside of the tensors, rows that another sequence has, a page that is not there, or
    /// too few pages for its keys. The batch is as it was.
    pub fn push(&mut self, sequence: Sequence) -> Result<()> {
        let index = self.sequences.len();
        self.check(&sequence).map_err(|source| Error::Sequence { index, source: Box::new(source) })?;
        if !sequence.rows.is_empty() {
            let Range { start, end } = sequence.rows;
            self.taken.insert((sequence.batch, start), (end, index));
        }
        self.sequences.push(sequence);
        Ok(())
    }

    fn check(&self, sequence: &Sequence) -> Result<()> {
        let Sequence { batch, rows, prefix, keys, mask } = sequence;
        mask.validate()?;
        check_rows("rows", self.query, *batch, rows)?;
        // The last range that starts before these rows end is the only one that can meet them.
        let before = self.taken.range(..(*batch, rows.end)).next_back();
        if let Some((&(other, _), &(end, index))) = before
            && (other, rows.is_empty()) == (*batch, false)
            && end > rows.start
        {
            let expected = format!("rows of no other sequence (sequence {index} ends at row {end})");
            return Err(Error::value("rows", expected, format!("{rows:?}")));
        }
        if let Some(Prefix { batch, rows }) = prefix {
            check_rows("prefix", self.prefix_shape(), *batch, rows)?;
            if rows.len().checked_add(keys.len()).is_none() {
                return Err(Error::value("keys", "a count that fits the address space", keys.len()));
            }
        }
        match keys {
            Keys::Rows { batch, rows } => check_rows("keys", self.key, *batch, rows)?,
            Keys::Pages { len, pages } => {
                let [count, page_len, ..] = self.key;
                let needed = if *len == 0 {
                    0
                } else if page_len == 0 {
                    usize::MAX
                } else {
                    len.div_ceil(page_len)
                };
                if pages.len() < needed {
                    let expected = format!("{needed} pages of {page_len} rows for {len} keys");
                    return Err(Error::value("pages", expected, pages.len()));
                }
                if let Some(page) = pages[..needed].iter().find(|&&page| page as usize >= count) {
                    return Err(Error::value("pages", format!("pages below {count}"), page));
                }
            }
        }
        mask.validate_for(rows.len(), sequence.key_len())
    }

    /// The sequences, in the order in which they were added.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// The shape of queries, `[batch, seq, query_heads, head_dim]`.
    pub fn query_shape(&self) -> [usize; 4] {
        self.query
    }

    /// The shape of outputs, `[batch, seq, query_heads, value_dim]`.
    pub fn out_shape(&self) -> [usize; 4] {
        with_dim(self.query, self.value_dim)
    }

    /// The shape of keys, `[batch, seq, kv_heads, head_dim]` or `[pages, page_len, kv_heads,
    /// head_dim]`.
    pub fn key_shape(&self) -> [usize; 4] {
        self.key
    }

    /// The shape of values, `[batch, seq, kv_heads, value_dim]` or `[pages, page_len, kv_heads,
    /// value_dim]`.
    pub fn value_shape(&self) -> [usize; 4] {
        with_dim(self.key, self.value_dim)
    }

    /// Elements of one head of values and outputs.
    pub fn value_dim(&self) -> usize {
        self.value_dim
    }

    /// The shape of the prefix's keys, `[batch, seq, kv_heads, head_dim]`: no row of them, if the
    /// batch was made without.
    pub fn prefix_shape(&self) -> [usize; 4] {
        [self.prefix[0], self.prefix[1], self.key[2], self.key[3]]
    }

    /// The shape of the prefix's values, `[batch, seq, kv_heads, value_dim]`.
    pub fn prefix_value_shape(&self) -> [usize; 4] {
        with_dim(self.prefix_shape(), self.value_dim)
    }

    /// Query heads that share a KV head.
    pub fn group(&self) -> usize {
        self.query[2] / self.key[2]
    }

    /// Pages that the sequences name, as far as their keys need them. One that two sequences share
    /// counts twice.
    pub fn pages(&self) -> usize {
        let pages = |sequence: &Sequence| match sequence.keys {
            Keys::Pages { len, .. } => len.div_ceil(self.key[1].max(1)),
            Keys::Rows { .. } => 0,
        };
        self.sequences.iter().map(pages).sum()
    }

    /// Ranges of all block lists. A list that two sequences share counts twice.
    pub fn ranges(&self) -> usize {
        let ranges = |sequence: &Sequence| match &sequence.mask {
            Mask::Blocks(blocks) => blocks.count(),
            _ => 0,
        };
        self.sequences.iter().map(ranges).sum()
    }

    /// Elements of the log-sum-exp, `[batch, query_heads, seq]` of the queries.
    pub fn lse_len(&self) -> usize {
        self.query[..3].iter().product()
    }
}

/// A shape with other elements of a head.
pub(crate) fn with_dim([batch, seq, heads, _]: [usize; 4], dim: usize) -> [usize; 4] {
    [batch, seq, heads, dim]
}

fn check_offsets(argument: &'static str, offsets: &[usize], total: usize) -> Result<()> {
    let bounds = offsets.first() == Some(&0) && offsets.last() == Some(&total);
    if !bounds || !offsets.is_sorted() {
        let expected = format!("offsets that ascend from 0 to {total}");
        return Err(Error::value(argument, expected, format!("{offsets:?}")));
    }
    Ok(())
}

/// Refuses rows outside of a tensor. A range whose end is below its start is one.
fn check_rows(argument: &'static str, shape: [usize; 4], batch: usize, rows: &Range<usize>) -> Result<()> {
    if batch >= shape[0] || rows.start > rows.end || rows.end > shape[1] {
        let expected = format!("rows within [{}, {}] of batch and seq", shape[0], shape[1]);
        return Err(Error::value(argument, expected, format!("{rows:?} of {batch}")));
    }
    Ok(())
}
