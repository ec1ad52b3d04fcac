//! What a kernel gets: the inputs of the call, and the piece of it to compute.

use super::rows::Rows;
use crate::element::sealed::AnySlice;
use crate::schedule::Segment;
use crate::{Scales, ScoreConfig, Sequence};
use std::ops::Range;

/// Keys or values: those of prefixes, and all others.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub prefix: Rows<'a>,
    pub others: Rows<'a>,
}

impl<'a> Source<'a> {
    /// The rows of prefixes, or all others.
    #[inline(always)]
    pub fn rows(&self, in_prefix: bool) -> &Rows<'a> {
        if in_prefix { &self.prefix } else { &self.others }
    }
}

/// The inputs of a call and its constants.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    pub query: Rows<'a>,
    pub key: Source<'a>,
    pub value: Source<'a>,
    /// Elements of a row of queries or keys, and of values.
    pub head_dim: usize,
    pub value_dim: usize,
    /// Whether keys and values are too many to be in a cache from an earlier call.
    pub cold: bool,
    pub score: ScoreConfig,
    /// What keys and values are multiplied by.
    pub scales: Option<Scales<&'a [f32]>>,
}

impl Operands<'_> {
    /// The factor of `q·k` for a KV head, whose keys are `times` larger than what they are loaded
    /// as, and the log2-domain softcap that follows it.
    #[inline(always)]
    pub fn factors(&self, kv_head: usize, times: f32) -> (f32, Option<f32>) {
        let [key_scale, _] = self.scales_of(kv_head);
        self.score.factors_for(self.score.scale_for(self.head_dim) * (key_scale * times))
    }

    /// The scales of a KV head's keys and values.
    #[inline(always)]
    pub fn scales_of(&self, kv_head: usize) -> [f32; 2] {
        self.scales.map_or([1.0; 2], |scales| scales.of_head(kv_head))
    }
}

/// A piece of work: some rows of one segment against some entries of its list of keys, for one KV
/// head or for some one after another. Where it says a row, it is one of the first KV head's.
#[derive(Clone, Debug)]
pub(super) struct Piece<'a> {
    pub sequence: &'a Sequence,
    /// Rows of a page, where keys lie in pages.
    pub page_len: usize,
    pub kv_heads: Range<usize>,
    /// Query heads of the first KV head.
    pub heads: Range<usize>,
    pub segment: Segment,
    pub entries: Range<usize>,
}

impl Piece<'_> {
    /// The part of one KV head, counted from the first.
    #[inline(always)]
    pub fn of_head(&self, index: usize) -> Self {
        let kv_head = self.kv_heads.start + index;
        let first = self.heads.start + index * self.heads.len();
        Self {
            kv_heads: kv_head..kv_head + 1,
            heads: first..first + self.heads.len(),
            segment: self.segment.clone(),
            entries: self.entries.clone(),
            ..*self
        }
    }

    /// Query rows of a KV head: heads times tokens.
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

    /// The entry up to which those behind the anchor are hidden from a row.
    #[inline(always)]
    pub fn hidden(&self, row: usize) -> usize {
        self.segment.hidden(self.segment.rows.start + row / self.heads.len())
    }

    /// Whether `entries` are hidden on the left from a row and those after it.
    #[inline(always)]
    pub fn hides(&self, entries: &Range<usize>, row: usize) -> bool {
        self.segment.first_hidden.is_some()
            && entries.start >= self.segment.prefix
            && entries.end <= self.hidden(row)
    }

    /// Whether a row sees an entry.
    #[inline(always)]
    pub fn sees(&self, row: usize, entry: usize) -> bool {
        entry < self.visible(row) && !self.hides(&(entry..entry + 1), row)
    }

    /// Whether an entry's key and value lie in the prefix, and their place there (or among the
    /// other rows) on the axes batch, seq and heads.
    #[inline(always)]
    pub fn key_place(&self, entry: usize) -> (bool, [usize; 3]) {
        let (key, _) = self.segment.key(&self.sequence.mask, entry);
        let (in_prefix, (batch, seq)) = match &self.sequence.prefix {
            Some(prefix) if key < prefix.rows.len() => (true, (prefix.batch, prefix.rows.start + key)),
            _ => {
                let key = key - self.sequence.prefix_len();
                (false, self.sequence.keys.place(key, self.page_len))
            }
        };
        (in_prefix, [batch, seq, self.kv_heads.start])
    }

    /// The entries from `entry` to `end` at most whose keys are consecutive in memory.
    pub fn run(&self, entry: usize, end: usize) -> Range<usize> {
        let (key, count) = self.segment.key(&self.sequence.mask, entry);
        let prefix = self.sequence.prefix_len();
        let key_end = if key < prefix {
            prefix
        } else {
            prefix + self.sequence.keys.run_end(key - prefix, self.page_len)
        };
        entry..end.min(entry.saturating_add(count.min(key_end - key)))
    }

    /// An entry's row of keys or values.
    #[inline(always)]
    pub fn key_row<'a>(&self, source: &Source<'a>, entry: usize) -> AnySlice<'a> {
        let (in_prefix, place) = self.key_place(entry);
        source.rows(in_prefix).row(place)
    }
}
