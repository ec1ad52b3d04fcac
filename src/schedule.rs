//! From masks to work: which rows share their keys, and in which tiles they are walked. For all
//! backends.
//!
//! Every mask cuts the query rows of a sequence into [`Segment`]s whose rows walk one list of keys:
//! `prefix` keys from the start of the sequence (the anchor) and then the keys from `start` on, or
//! the ranges of a block list. The list is never longer than what its last row sees, so that a tile
//! of it is skipped by never being reached. Where a window hides keys from all rows of a tile, its
//! own list [skips](Segment::skipping) them. So only the tiles in which visibility changes from row
//! to row need a mask element by element.

use crate::{BlockList, Mask};
use std::ops::Range;

#[cfg(test)]
mod tests;

/// Query rows of one sequence that walk one list of keys.
///
/// ```text
/// entries:  0 ....... prefix ........ hidden(row) ...... visible(row) ...... len
///           seen, if visible | hidden            | seen              | hidden
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Rows of the sequence.
    pub rows: Range<usize>,
    /// Keys `0..prefix` of the sequence come first in the list...
    pub prefix: usize,
    /// ...and the keys from here on follow.
    pub start: usize,
    /// Entries of the list that the first row sees, if none is hidden on the left.
    pub first_visible: usize,
    /// Whether each further row sees one entry more.
    pub causal: bool,
    /// Under a window, the entry up to which those behind the prefix are hidden from the first row,
    /// and one more from each further row. Below 0 for a row to whom nothing is hidden yet.
    pub first_hidden: Option<isize>,
    /// Under a fixed split length, the entries that the list skips.
    pub skipped: Skipped,
    /// The tile of the sequence's block list that is the list.
    pub block_tile: Option<usize>,
}

/// A gap in a list: entries of the whole list that are left out, since they are hidden from all rows.
/// Splits of a fixed length are cut where those of the whole list are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Skipped {
    /// The first entry behind the gap.
    pub at: usize,
    /// How many entries are left out.
    pub count: usize,
}

impl Skipped {
    /// In how many splits a list of `end` entries is cut at multiples of `len` entries of the whole
    /// list; at least 1. One that the gap crosses is one split; in the gap there is none.
    pub fn splits(&self, end: usize, len: usize) -> usize {
        let [before, first, shared] = self.around(len);
        let after = if end > self.at { (end - 1 + self.count) / len + 1 - first } else { 0 };
        (before + after - shared).max(1)
    }

    /// The entries of one of these splits.
    pub fn split(&self, end: usize, len: usize, split: usize) -> Range<usize> {
        let [before, first, shared] = self.around(len);
        let border = |split: usize| {
            let border = match split.checked_sub(before) {
                None => split * len,
                Some(after) => {
                    (first + after + shared).saturating_mul(len).max(self.at + self.count) - self.count
                }
            };
            border.min(end)
        };
        border(split)..border(split + 1)
    }

    /// Splits that begin before the gap, the index of the one behind it among those of the whole
    /// list, and 1 if that is the last before it.
    fn around(&self, len: usize) -> [usize; 3] {
        let (before, first) = (self.at.div_ceil(len), (self.at + self.count) / len);
        [before, first, usize::from(before > first)]
    }
}

/// Tiles of entries: whole ones from every multiple of `split` on, or from the list's start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    /// Entries of a tile.
    pub tile: usize,
    /// The fixed split length.
    pub split: Option<usize>,
}

impl Grid {
    /// The border at an entry or before it.
    fn down(&self, entry: usize) -> usize {
        let split = self.split.map_or(0, |split| entry - entry % split);
        split + (entry - split) / self.tile * self.tile
    }

    /// The border at an entry or behind it.
    fn up(&self, entry: usize) -> usize {
        let down = self.down(entry);
        if down == entry {
            return entry;
        }
        let next = down.saturating_add(self.tile);
        self.split.map_or(next, |split| next.min((entry - entry % split).saturating_add(split)))
    }
}

impl Segment {
    /// Rows that all see the first `visible` keys.
    fn full(rows: Range<usize>, visible: usize) -> Self {
        Self {
            rows,
            prefix: 0,
            start: 0,
            first_visible: visible,
            causal: false,
            first_hidden: None,
            skipped: Skipped::default(),
            block_tile: None,
        }
    }

    /// Rows of which the first sees `visible` keys, and each further row one more.
    fn growing(rows: Range<usize>, visible: usize) -> Self {
        Self { causal: true, ..Self::full(rows, visible) }
    }

    /// The part of the segment that is `rows`, which must lie inside it.
    pub fn part(&self, rows: Range<usize>) -> Self {
        let first_visible = self.visible(rows.start);
        let further = (rows.start - self.rows.start) as isize;
        Self { rows, first_visible, first_hidden: self.first_hidden.map(|hidden| hidden + further), ..*self }
    }

    /// The entry from which on nothing is visible to a row of the segment.
    #[inline(always)]
    pub fn visible(&self, row: usize) -> usize {
        if self.causal { self.first_visible + row - self.rows.start } else { self.first_visible }
    }

    /// The entry up to which those behind the prefix are hidden from a row of the segment.
    #[inline(always)]
    pub fn hidden(&self, row: usize) -> usize {
        self.first_hidden.map_or(self.prefix, |first| {
            usize::try_from(first + (row - self.rows.start) as isize).unwrap_or(0).max(self.prefix)
        })
    }

    /// Whether all rows see the same entries.
    pub fn is_uniform(&self) -> bool {
        self.rows.len() <= 1 || !self.causal && self.first_hidden.is_none()
    }

    /// Entries up to the last that a row sees: the length of the list.
    pub fn len(&self) -> usize {
        if self.rows.is_empty() { 0 } else { self.visible(self.rows.end - 1) }
    }

    /// The key of an entry of the list of a sequence under `mask`, and how many entries from it on
    /// are keys in a row.
    #[inline(always)]
    pub fn key(&self, mask: &Mask, entry: usize) -> (usize, usize) {
        if let (Some(tile), Mask::Blocks(blocks)) = (self.block_tile, mask) {
            return blocks.key(tile, entry);
        }
        if entry < self.prefix {
            (entry, self.prefix - entry)
        } else {
            (self.start + entry - self.prefix, usize::MAX)
        }
    }

    /// The same rows over a list without the tiles that a window hides from all of them.
    pub fn skipping(mut self, grid: Grid) -> Self {
        if self.rows.is_empty() || self.first_hidden.is_none() {
            return self;
        }
        let (at, to) = (grid.up(self.prefix), grid.down(self.hidden(self.rows.start)));
        let Some(count) = to.checked_sub(at).filter(|&count| count > 0) else { return self };
        self.start += count;
        self.first_visible -= count;
        self.first_hidden = self.first_hidden.map(|hidden| hidden - count as isize);
        if grid.split.is_some() {
            self.skipped = Skipped { at, count };
        }
        self
    }

    /// In how many splits the list is cut at multiples of `len`.
    pub fn splits(&self, len: usize) -> usize {
        self.skipped.splits(self.len(), len)
    }

    /// The entries of one of these splits.
    pub fn split(&self, len: usize, split: usize) -> Range<usize> {
        self.skipped.split(self.len(), len, split)
    }

    /// Visible (row, key) pairs.
    pub fn pairs(&self) -> usize {
        let rows = self.rows.len();
        let triangle = |rows: usize| rows.saturating_mul(rows.saturating_sub(1)) / 2;
        let growth = if self.causal { triangle(rows) } else { 0 };
        let all = rows.saturating_mul(self.first_visible).saturating_add(growth);
        let Some(first_hidden) = self.first_hidden else { return all };
        // Of the rows from the first to whom something is hidden.
        let beyond = first_hidden - self.prefix as isize;
        let blind = usize::try_from(-beyond).unwrap_or(0).min(rows);
        let first = usize::try_from(beyond + blind as isize).unwrap_or(0);
        all.saturating_sub((rows - blind).saturating_mul(first).saturating_add(triangle(rows - blind)))
    }
}

/// Calls `emit` with the segments of `mask` over `query_len` rows and `key_len` keys; they
/// partition the rows in order.
pub(crate) fn segments(mask: &Mask, query_len: usize, key_len: usize, mut emit: impl FnMut(Segment)) {
    let mut emit = |segment: Segment| {
        if !segment.rows.is_empty() {
            emit(segment);
        }
    };
    // The first row that stands at a position of the keys; under a causal mask those before it see
    // nothing.
    let blind = query_len.saturating_sub(key_len);
    let position = |row: usize| key_len - (query_len - row);
    match mask {
        Mask::Full => emit(Segment::full(0..query_len, key_len)),
        Mask::Causal => {
            emit(Segment::full(0..blind, 0));
            if blind < query_len {
                emit(Segment::growing(blind..query_len, position(blind) + 1));
            }
        }
        Mask::Window { left, right } => windows(*left, *right, query_len, key_len, emit),
        &Mask::Star { anchor_len, block_len, first_block_len, left } => {
            emit(Segment::full(0..blind, 0));
            let mut row = blind;
            while row < query_len {
                let p = position(row);
                let (start, end) = if p < first_block_len {
                    (0, first_block_len)
                } else {
                    let start = p - (p - first_block_len) % block_len;
                    (start, start.saturating_add(block_len))
                };
                let rows = row..query_len.min(row.saturating_add(end - p));
                row = rows.end;
                let left = left.filter(|&left| left < key_len);
                // In block 0 the anchor is seen anyhow, unless a window hides what follows it.
                let (prefix, start) = match start {
                    0 if left.is_none() => (0, 0),
                    0 => (anchor_len.min(key_len), anchor_len.min(key_len)),
                    start => (anchor_len, start),
                };
                // The entry of the row's own key.
                let own = prefix as isize + p as isize - start as isize;
                let mut segment = Segment::growing(rows, (own + 1) as usize);
                (segment.prefix, segment.start) = (prefix, start);
                segment.first_hidden = left.map(|left| own - left as isize);
                emit(segment);
            }
        }
        Mask::Blocks(blocks) => {
            for tile in 0..blocks.tiles() {
                let start = tile.saturating_mul(blocks.tile_rows());
                let rows = start.min(query_len)..start.saturating_add(blocks.tile_rows()).min(query_len);
                block_segments(blocks, tile, rows, query_len, key_len, &mut emit);
            }
        }
    }
}

/// The segments of a window.
fn windows(
    left: Option<usize>,
    right: Option<usize>,
    query_len: usize,
    key_len: usize,
    mut emit: impl FnMut(Segment),
) {
    // Positions are of rows that may stand before the first key.
    let (rows, keys) = (query_len as isize, key_len as isize);
    let first_hidden = |row: usize| {
        left.filter(|&left| left < key_len).map(|left| row as isize + keys - rows - left as isize)
    };
    let Some(right) = right.filter(|&right| right < key_len.max(query_len)) else {
        let first_hidden = first_hidden(0);
        return emit(Segment { first_hidden, ..Segment::full(0..query_len, key_len) });
    };
    // Rows from `first` on see a key, and those from `last` on all keys on their right.
    let row = |visible: isize| (visible - 1 - right as isize - keys + rows).clamp(0, rows) as usize;
    let (first, last) = (row(1), row(keys.max(1)));
    emit(Segment::full(0..first, 0));
    let visible = (first as isize + keys - rows + right as isize + 1).clamp(0, keys) as usize;
    emit(Segment { first_hidden: first_hidden(first), ..Segment::growing(first..last, visible) });
    emit(Segment { first_hidden: first_hidden(last), ..Segment::full(last..query_len, key_len) });
}

/// The segments of a tile of a block list. If it is causal, rows that stand in one of the tile's
/// ranges see one key more each, those between two ranges all the same.
fn block_segments(
    blocks: &BlockList,
    tile: usize,
    rows: Range<usize>,
    query_len: usize,
    key_len: usize,
    mut emit: impl FnMut(Segment),
) {
    let mut emit = |segment: Segment| emit(Segment { block_tile: Some(tile), ..segment });
    if !blocks.is_causal() {
        return emit(Segment::full(rows, blocks.len(tile)));
    }
    // The rows whose positions are below `end`.
    let row_at =
        |end: usize| (end.saturating_add(query_len)).saturating_sub(key_len).clamp(rows.start, rows.end);
    let mut row = rows.start;
    for (before, keys) in blocks.entries(tile) {
        let (start, end) = (row_at(keys.start), row_at(keys.end));
        emit(Segment::full(row..start, before));
        if start < end {
            let position = start + key_len - query_len;
            emit(Segment::growing(start..end, before + position - keys.start + 1));
        }
        row = end;
    }
    emit(Segment::full(row..rows.end, blocks.len(tile)));
}
