//! Where the keys of a batch's tasks are cut, and which pieces take several KV heads.

use super::{few, tile};
use crate::PlanConfig;
use crate::schedule::Segment;
use crate::simd::InstructionSet;
use std::ops::Range;

/// Keys are split until there are about this many pieces of work, enough for the threads of a large
/// machine...
pub(super) const PIECES: usize = 128;
/// ...but not below this many keys, where the merge would begin to count.
pub(super) const SPLIT_KEYS: usize = 6 * tile::KEYS;

/// KV heads go together only where this many pieces are left. So many threads read as fast as the
/// memory of most machines allows; fewer pieces would leave some of them without work.
pub(super) const PIECES_OF_HEADS: usize = 64;

/// Query rows of pieces at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RowLimits {
    /// Of a tile.
    pub tile: usize,
    /// Of those that the kernel for few rows computes.
    pub few: usize,
}

impl RowLimits {
    /// Those of the kernels of an instruction set. A matrix unit is faster from the rows on that
    /// fill one register block of vectors; a row-invariant plan has one kernel for all rows.
    pub fn new(instructions: InstructionSet, config: &PlanConfig) -> Self {
        let (tile, few) = if instructions.has_matrix_unit() {
            (tile::matrix::ROWS, few::BLOCK_ROWS)
        } else {
            (tile::ROWS, few::ROWS)
        };
        Self { tile, few: if config.row_invariant { 0 } else { few } }
    }
}

/// How all sequences of a batch are cut.
pub(super) struct Splits {
    /// The length that the config fixes.
    fixed: Option<usize>,
    /// Query heads of a tile.
    heads: usize,
    limits: RowLimits,
    /// Entries of all tasks.
    entries: usize,
    /// KV heads times parts of their query heads.
    planes: usize,
    /// KV heads of a piece where rows are few.
    together: usize,
}

impl Splits {
    /// Those of sequences with these tiles of `heads` query heads.
    pub fn new(
        config: &PlanConfig,
        sequences: &[Vec<Segment>],
        heads: usize,
        limits: RowLimits,
        kv_heads: usize,
        parts: usize,
    ) -> Self {
        let entries = |tiles: &Vec<Segment>| tiles.iter().map(Segment::len).fold(0, usize::saturating_add);
        let few = sequences.iter().filter(|tiles| all_few(tiles, heads, limits));
        let few_entries = few.map(entries).fold(0, usize::saturating_add);
        let fixed = fixed_len(config);
        let shortest = fixed.unwrap_or(SPLIT_KEYS);
        let most = few_entries.saturating_mul(kv_heads) / shortest.saturating_mul(PIECES_OF_HEADS);
        let mut counts = (1..=most.min(few::KV_HEADS)).rev();
        Self {
            fixed,
            heads,
            limits,
            entries: sequences.iter().map(entries).fold(0, usize::saturating_add),
            planes: kv_heads * parts,
            together: counts.find(|&count| kv_heads.is_multiple_of(count)).unwrap_or(1),
        }
    }

    /// Entries of all tasks.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// How a sequence with these tiles is cut.
    pub fn of(&self, tiles: &[Segment]) -> Cut {
        let few = all_few(tiles, self.heads, self.limits);
        let kv_heads = if few { self.together } else { 1 };
        if let Some(keys) = self.fixed {
            return Cut { kv_heads, keys, whole: 0, fixed: true };
        }
        // A tile of more rows has larger partials, and less time for each.
        let shortest = if few { SPLIT_KEYS } else { SPLIT_KEYS * self.limits.tile / tile::ROWS };
        let share = self.entries.saturating_mul(self.planes) / (PIECES * kv_heads);
        let keys = whole_tiles(share.max(shortest));
        // The tiles of a prefill differ by no more than that, and a merge is spared.
        let whole = if few { keys } else { keys.saturating_mul(2) };
        Cut { kv_heads, keys, whole, fixed: false }
    }
}

/// How the tasks of a sequence are cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// KV heads of a piece.
    pub kv_heads: usize,
    /// Keys of a split.
    keys: usize,
    /// Keys of the longest walk that is not cut.
    whole: usize,
    /// Whether that is what the config fixes: a list that crosses a border is cut, however short it
    /// is.
    fixed: bool,
}

impl Cut {
    /// In how many splits the list of a segment is walked.
    pub fn splits(&self, segment: &Segment) -> usize {
        if self.fixed || segment.len() > self.whole { segment.splits(self.keys) } else { 1 }
    }

    /// The entries of one of so many splits.
    pub fn split(&self, segment: &Segment, split: usize, splits: usize) -> Range<usize> {
        if splits == 1 { 0..segment.len() } else { segment.split(self.keys, split) }
    }
}

/// Whether the kernel for few rows computes all these tiles.
pub(super) fn all_few(tiles: &[Segment], heads: usize, limits: RowLimits) -> bool {
    tiles.iter().all(|tile| few::suits(tile, heads, limits.few))
}

/// The split length that a config fixes, in whole tiles.
pub(super) fn fixed_len(config: &PlanConfig) -> Option<usize> {
    config.fixed_split_keys().map(whole_tiles)
}

/// A split length of whole tiles.
fn whole_tiles(keys: usize) -> usize {
    keys.max(1).checked_next_multiple_of(tile::KEYS).unwrap_or(usize::MAX)
}
