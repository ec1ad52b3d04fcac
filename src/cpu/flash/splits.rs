//! Where the keys of a batch's tasks are cut, and which pieces take several KV heads.

use super::{few, tile};
use crate::PlanConfig;
use crate::schedule::Segment;

/// Keys are split until there are this many pieces of work, enough for the threads of a large
/// machine...
pub(super) const PIECES: usize = 128;
/// ...but not below this many keys, where the merge would begin to count.
pub(super) const SPLIT_KEYS: usize = 6 * tile::KEYS;

/// KV heads go together only where this many pieces are left: fewer threads than that read as fast as
/// the memory allows.
pub(super) const PIECES_OF_HEADS: usize = 64;

pub(super) struct Splits {
    /// The length that the config fixes, in whole tiles.
    fixed: Option<usize>,
    row_invariant: bool,
    /// Query heads of a tile.
    heads: usize,
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
        kv_heads: usize,
        parts: usize,
    ) -> Self {
        let entries = |tiles: &Vec<Segment>| tiles.iter().map(Segment::len).fold(0, usize::saturating_add);
        let mut splits = Self {
            fixed: config.fixed_split_keys().map(whole_tiles),
            row_invariant: config.row_invariant,
            heads,
            entries: sequences.iter().map(entries).fold(0, usize::saturating_add),
            planes: kv_heads * parts,
            together: 1,
        };
        let few = sequences.iter().filter(|tiles| splits.all_few(tiles));
        let few_entries = few.map(entries).fold(0, usize::saturating_add);
        let shortest = splits.fixed.unwrap_or(SPLIT_KEYS);
        let most = few_entries.saturating_mul(kv_heads) / shortest.saturating_mul(PIECES_OF_HEADS);
        let mut counts = (1..=most.min(few::HEADS)).rev();
        splits.together = counts.find(|&heads| kv_heads.is_multiple_of(heads)).unwrap_or(1);
        splits
    }

    /// Entries of all tasks.
    pub fn entries(&self) -> usize {
        self.entries
    }

    /// KV heads of a piece of a sequence with these tiles.
    pub fn heads(&self, tiles: &[Segment]) -> usize {
        if self.all_few(tiles) { self.together } else { 1 }
    }

    fn all_few(&self, tiles: &[Segment]) -> bool {
        !self.row_invariant && tiles.iter().all(|tile| few::suits(tile, self.heads))
    }

    /// Keys of a split where a piece has so many KV heads.
    pub fn keys(&self, together: usize) -> usize {
        let share = || self.entries.saturating_mul(self.planes) / (PIECES * together);
        self.fixed.unwrap_or_else(|| whole_tiles(share().max(SPLIT_KEYS)))
    }

    /// In how many splits `len` entries are walked. Without a fixed length a walk of up to two splits
    /// stays whole: that spares a merge, and the tiles of one prefill differ by no more.
    pub fn count(&self, len: usize, together: usize) -> usize {
        let keys = self.keys(together);
        let whole = if self.fixed.is_some() { keys } else { keys.saturating_mul(2) };
        if len > whole { len.div_ceil(keys) } else { 1 }
    }
}

fn whole_tiles(keys: usize) -> usize {
    keys.max(1).checked_next_multiple_of(tile::KEYS).unwrap_or(usize::MAX)
}
