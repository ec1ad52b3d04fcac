//! What a kernel gets: the inputs of the call, and the piece of it to compute.

use super::rows::Rows;
use crate::tensor::sealed::AnySlice;
use crate::walk::Segment;
use std::ops::Range;

/// The inputs of a call and its constants.
#[derive(Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub query: Rows<'a>,
    pub key: Rows<'a>,
    pub value: Rows<'a>,
    pub head_dim: usize,
    /// The factor of `q·k`, and the log2-domain softcap that follows it.
    pub factors: (f32, Option<f32>),
}

/// A piece of work: some rows of one segment against some entries of its list of keys.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub batch: usize,
    pub kv_head: usize,
    /// Query heads, all of them served by `kv_head`.
    pub heads: Range<usize>,
    /// The place of the sequence on the seq axes.
    pub query_start: usize,
    pub key_start: usize,
    pub segment: Segment,
    pub entries: Range<usize>,
}

impl Piece {
    /// Query rows: heads times tokens.
    pub fn rows(&self) -> usize {
        self.segment.rows.len() * self.heads.len()
    }

    /// The token (on the seq axis) and the head of a row.
    #[inline(always)]
    pub fn place(&self, row: usize) -> (usize, usize) {
        let token = self.query_start + self.segment.rows.start + row / self.heads.len();
        (token, self.heads.start + row % self.heads.len())
    }

    /// Entries of the list that a row sees.
    #[inline(always)]
    pub fn visible(&self, row: usize) -> usize {
        self.segment.visible(self.segment.rows.start + row / self.heads.len())
    }

    /// The key (on the seq axis) of an entry.
    #[inline(always)]
    pub fn key(&self, entry: usize) -> usize {
        self.key_start + self.segment.key(entry)
    }

    /// The entries from `entry` on whose keys are consecutive.
    pub fn run(&self, entry: usize) -> Range<usize> {
        let gap = if entry < self.segment.prefix { self.segment.prefix } else { usize::MAX };
        entry..self.entries.end.min(gap)
    }

    /// An entry's row of keys or values.
    #[inline(always)]
    pub fn key_row<'a>(&self, source: &Rows<'a>, entry: usize) -> AnySlice<'a> {
        source.row(self.batch, self.key(entry), self.kv_head)
    }
}
