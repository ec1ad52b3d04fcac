//! What a kernel gets: the inputs of the call, and the piece of it to compute.

use super::rows::Rows;
use crate::Sequence;
use crate::schedule::Segment;
use crate::tensor::sealed::AnySlice;
use std::ops::Range;

/// Keys or values: those of prefixes, and all others.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub prefix: Rows<'a>,
    pub rows: Rows<'a>,
}

/// The inputs of a call and its constants.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub query: Rows<'a>,
    pub key: Source<'a>,
    pub value: Source<'a>,
    pub head_dim: usize,
    /// The factor of `q·k`, and the log2-domain softcap that follows it.
    pub factors: (f32, Option<f32>),
}

/// A piece of work: some rows of one segment against some entries of its list of keys.
#[derive(Clone, Debug)]
pub(super) struct Piece<'a> {
    pub sequence: &'a Sequence,
    /// Rows of a page, where keys lie in pages.
    pub page_len: usize,
    pub kv_head: usize,
    /// Query heads, all of them served by `kv_head`.
    pub heads: Range<usize>,
    pub segment: Segment,
    pub entries: Range<usize>,
}

impl Piece<'_> {
    /// Query rows: heads times tokens.
    pub fn rows(&self) -> usize {
        self.segment.rows.len() * self.heads.len()
    }

    /// The place of a row on the axes batch, seq and heads.
    #[inline(always)]
    pub fn place(&self, row: usize) -> [usize; 3] {
        let token = self.sequence.rows.start + self.segment.rows.start + row / self.heads.len();
        [self.sequence.batch, token, self.heads.start + row % self.heads.len()]
    }

    /// Entries of the list that a row sees.
    #[inline(always)]
    pub fn visible(&self, row: usize) -> usize {
        self.segment.visible(self.segment.rows.start + row / self.heads.len())
    }

    /// The tensor that an entry's key or value lies in, and its place there on the axes batch, seq
    /// and heads.
    #[inline(always)]
    pub fn key_place<'s, 'a>(&self, source: &'s Source<'a>, entry: usize) -> (&'s Rows<'a>, [usize; 3]) {
        let key = self.segment.key(entry);
        let (rows, (batch, seq)) = match &self.sequence.prefix {
            Some(prefix) if key < prefix.rows.len() => {
                (&source.prefix, (prefix.batch, prefix.rows.start + key))
            }
            _ => {
                let key = key - self.sequence.prefix_len();
                (&source.rows, self.sequence.keys.place(key, self.page_len))
            }
        };
        (rows, [batch, seq, self.kv_head])
    }

    /// The entries from `entry` to `end` at most whose keys are consecutive in memory.
    pub fn run(&self, entry: usize, end: usize) -> Range<usize> {
        let key = self.segment.key(entry);
        let prefix = self.sequence.prefix_len();
        let key_end = if key < prefix {
            prefix
        } else {
            prefix + self.sequence.keys.run_end(key - prefix, self.page_len)
        };
        let gap = if entry < self.segment.prefix { self.segment.prefix } else { usize::MAX };
        entry..end.min(gap).min(entry + (key_end - key))
    }

    /// An entry's row of keys or values.
    #[inline(always)]
    pub fn key_row<'a>(&self, source: &Source<'a>, entry: usize) -> AnySlice<'a> {
        let (rows, place) = self.key_place(source, entry);
        rows.row(place)
    }
}
