//! From masks to work: which rows share their keys, and in which tiles they are walked. For all
//! backends.
//!
//! Every mask cuts the query rows of a sequence into [`Segment`]s whose rows walk one list of keys:
//! `prefix` keys from the start of the sequence (the anchor) and then the keys from `start` on. The
//! list is never longer than what its last row sees, so that a tile of it is skipped by never being
//! reached, and only the tiles in which visibility grows from row to row need a mask element by
//! element.

use crate::Mask;
use std::ops::Range;

/// Query rows of one sequence that walk one list of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Rows of the sequence.
    pub rows: Range<usize>,
    /// Keys `0..prefix` of the sequence come first in the list...
    pub prefix: usize,
    /// ...and the keys from here on follow.
    pub start: usize,
    /// Entries of the list that the first row sees.
    pub first_visible: usize,
    /// Whether each further row sees one entry more.
    pub causal: bool,
}

impl Segment {
    /// The part of the segment that is `rows`, which must lie inside it.
    pub fn part(&self, rows: Range<usize>) -> Self {
        let first_visible = self.visible(rows.start);
        Self { rows, first_visible, ..*self }
    }

    /// Entries of the list that a row of the segment sees.
    pub fn visible(&self, row: usize) -> usize {
        if self.causal { self.first_visible + row - self.rows.start } else { self.first_visible }
    }

    /// Entries that the last row sees: the length of the list.
    pub fn len(&self) -> usize {
        if self.rows.is_empty() { 0 } else { self.visible(self.rows.end - 1) }
    }

    /// The key of an entry of the list.
    #[inline(always)]
    pub fn key(&self, entry: usize) -> usize {
        if entry < self.prefix { entry } else { self.start + entry - self.prefix }
    }

    /// Visible (row, key) pairs.
    pub fn pairs(&self) -> usize {
        let (rows, first) = (self.rows.len(), self.first_visible);
        let triangle = if self.causal { rows.saturating_mul(rows.saturating_sub(1)) / 2 } else { 0 };
        rows.saturating_mul(first).saturating_add(triangle)
    }
}

/// Calls `emit` with the segments of `mask` over `query_len` rows and `key_len` keys; they
/// partition the rows in order.
pub(crate) fn segments(mask: Mask, query_len: usize, key_len: usize, mut emit: impl FnMut(Segment)) {
    let mut emit = |segment: Segment| {
        if !segment.rows.is_empty() {
            emit(segment);
        }
    };
    // Rows before the first key see nothing; `row` is the first that stands at a key, and `shift`
    // its position.
    let blind = if mask == Mask::Full { 0 } else { query_len.saturating_sub(key_len) };
    emit(Segment { rows: 0..blind, prefix: 0, start: 0, first_visible: 0, causal: false });
    let position = |row: usize| key_len - (query_len - row);
    match mask {
        Mask::Full => {
            let rows = 0..query_len;
            emit(Segment { rows, prefix: 0, start: 0, first_visible: key_len, causal: false });
        }
        Mask::Causal => {
            let rows = blind..query_len;
            if !rows.is_empty() {
                let first_visible = position(blind) + 1;
                emit(Segment { rows, prefix: 0, start: 0, first_visible, causal: true });
            }
        }
        Mask::Star { anchor_len, block_len, first_block_len } => {
            let mut row = blind;
            while row < query_len {
                let p = position(row);
                let (start, end) = if p < first_block_len {
                    (0, first_block_len)
                } else {
                    let start = p - (p - first_block_len) % block_len;
                    (start, start.saturating_add(block_len))
                };
                let rows = row..query_len.min((row).saturating_add(end - p));
                row = rows.end;
                let prefix = if start == 0 { 0 } else { anchor_len };
                emit(Segment { rows, prefix, start, first_visible: prefix + p - start + 1, causal: true });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::reference::sees;
    use proptest::prelude::*;

    fn masks() -> impl Strategy<Value = Mask> {
        let star = (0..6usize, 1..9usize, 0..12usize).prop_map(|(anchor, block, first)| Mask::Star {
            anchor_len: anchor.min(block).min(first),
            block_len: block,
            first_block_len: first,
        });
        prop_oneof![Just(Mask::Full), Just(Mask::Causal), star]
    }

    proptest! {
        #[test]
        fn segments_show_what_the_mask_shows(mask in masks(), query_len in 0..40usize, key_len in 0..40usize) {
            let mut rows = 0;
            let mut failed = None;
            segments(mask, query_len, key_len, |segment| {
                if segment.rows.start != rows { failed = Some(rows); }
                rows = segment.rows.end;
                for row in segment.rows.clone() {
                    let part = segment.part(row..segment.rows.end);
                    let seen: Vec<usize> = (0..part.visible(row)).map(|entry| part.key(entry)).collect();
                    let expected: Vec<usize> =
                        (0..key_len).filter(|&key| sees(mask, query_len, key_len, row, key)).collect();
                    if seen != expected { failed = Some(row); }
                }
            });
            prop_assert_eq!(failed, None);
            prop_assert_eq!(rows, query_len);
        }
    }
}
