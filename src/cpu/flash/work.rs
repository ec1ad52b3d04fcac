//! The work of a plan, cut into pieces that threads take one after another.
//!
//! A task is a tile of query rows of one sequence, with the list of keys that they walk. Its keys
//! are cut into splits of a length that follows from the whole batch, so that a long sequence gives
//! more pieces than a short one. A piece is one split of a task for one KV head (or for a part of
//! its query heads, where they are too many for a tile). Of sequences of few rows a piece takes
//! some KV heads together where that leaves enough pieces, since their rows lie side by side in
//! memory.

use super::piece::Piece;
use super::splits::{Cut, PIECES, RowLimits, Splits, fixed_len};
use super::{few, tile};
use crate::schedule::{self, Grid, Segment};
use crate::{Batch, Capacity, Error, PlanConfig, Result};
use std::cmp::Reverse;
use std::ops::Range;

/// Query rows of one sequence that are worked on together.
#[derive(Clone, Debug)]
struct Task {
    sequence: usize,
    segment: Segment,
    /// In how many parts its keys are walked, and how they are cut.
    splits: usize,
    cut: Cut,
    /// Where the rows of its partials begin, if there is more than one split.
    partials: usize,
}

/// Pieces that follow each other: for each KV head (or part of one, or some together), the same
/// split of some tasks of one sequence.
#[derive(Clone, Debug)]
struct Group {
    /// Index of the first piece.
    first: usize,
    tasks: Range<usize>,
    split: usize,
    /// KV heads of a piece.
    kv_heads: usize,
}

/// All pieces of a plan.
#[derive(Clone, Debug)]
pub(super) struct Work {
    /// Those of a sequence together, longest walk first.
    tasks: Vec<Task>,
    groups: Vec<Group>,
    pieces: usize,
    /// Query heads that are worked on together: all of a KV head's, or as many as fill a tile.
    heads: usize,
    limits: RowLimits,
    /// Parts of the query heads of a KV head.
    parts: usize,
    kv_heads: usize,
    /// Entries of all tasks.
    entries: usize,
    /// Tasks of more than one split, and the rows of all their partials.
    split: Vec<usize>,
    partial_rows: usize,
}

/// Where a piece stands in its work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// Whether its result is final, or a partial that is to be merged.
    pub whole: bool,
    /// The row of partials that takes its first row.
    pub partials: usize,
    /// Rows of partials from one KV head's to the next's.
    head_rows: usize,
}

impl Place {
    /// The place of one KV head of the piece, counted from the first.
    #[inline(always)]
    pub fn of_head(self, index: usize) -> Self {
        Self { partials: self.partials + index * self.head_rows, ..self }
    }
}

impl Work {
    /// The tasks of a batch. With a fixed split length the keys of each row are cut at multiples of
    /// that, whatever else is in the batch; otherwise so that there are enough pieces for many
    /// threads.
    ///
    /// # Errors
    /// [`Error::Value`] for a split length that leaves 2³¹ partial rows or more.
    pub fn new(batch: &Batch, config: &PlanConfig, limits: RowLimits) -> Result<Self> {
        let heads = batch.group().min(tile::ROWS);
        let parts = batch.group().div_ceil(heads);
        let kv_heads = batch.key_shape()[2];
        let mut sequences: Vec<Vec<Segment>> =
            batch.sequences().iter().map(|s| tiles(s, config, heads, limits)).collect();
        sequences.iter_mut().for_each(|tiles| tiles.sort_by_key(|tile| Reverse(tile.len())));
        let longest = |index: &usize| sequences[*index].first().map_or(0, Segment::len);
        let mut order: Vec<usize> = (0..sequences.len()).collect();
        order.sort_by_key(|index| Reverse(longest(index)));

        let splits = Splits::new(config, &sequences, heads, limits, kv_heads, parts);
        let mut work = Self {
            tasks: Vec::with_capacity(sequences.iter().map(Vec::len).sum()),
            groups: Vec::new(),
            pieces: 0,
            heads,
            limits,
            parts,
            kv_heads,
            entries: splits.entries(),
            split: Vec::new(),
            partial_rows: 0,
        };
        let of_sequences: Vec<(Range<usize>, usize)> = order
            .into_iter()
            .map(|sequence| {
                let start = work.tasks.len();
                let tiles = std::mem::take(&mut sequences[sequence]);
                let cut = splits.of(&tiles);
                let mut tiles: Vec<_> =
                    tiles.into_iter().map(|segment| (cut.splits(&segment), segment)).collect();
                // By length still, but among equals.
                tiles.sort_by_key(|(splits, _)| Reverse(*splits));
                for (splits, segment) in tiles {
                    work.push(sequence, segment, splits, cut);
                }
                (start..work.tasks.len(), cut.kv_heads)
            })
            .collect();
        if i32::try_from(work.partial_rows).is_err() {
            let expected = "a length that leaves fewer than 2³¹ partial rows";
            return Err(Error::value("split_keys", expected, config.fixed_split_keys().unwrap_or(0)));
        }
        // All heads of a split before the next: in [seq, heads] layouts they share their pages of
        // memory.
        let most = work.tasks.iter().map(|task| task.splits).max().unwrap_or(0);
        for split in 0..most {
            for (tasks, kv_heads) in &of_sequences {
                // The tasks of a sequence are sorted by splits.
                let count = work.tasks[tasks.clone()].partition_point(|task| task.splits > split);
                if count > 0 {
                    let (tasks, kv_heads) = (tasks.start..tasks.start + count, *kv_heads);
                    work.groups.push(Group { first: work.pieces, tasks, split, kv_heads });
                    work.pieces += count * (work.planes() / kv_heads);
                }
            }
        }
        Ok(work)
    }

    fn push(&mut self, sequence: usize, segment: Segment, splits: usize, cut: Cut) {
        let partials = self.partial_rows;
        if splits > 1 {
            self.split.push(self.tasks.len());
            let rows = (self.planes() * self.rows(&segment)).saturating_mul(splits);
            self.partial_rows = self.partial_rows.saturating_add(rows);
        }
        self.tasks.push(Task { sequence, segment, splits, partials, cut });
    }

    /// Rows of a tile of one KV head or part.
    fn rows(&self, segment: &Segment) -> usize {
        segment.rows.len() * self.heads
    }

    /// KV heads times parts.
    fn planes(&self) -> usize {
        self.kv_heads * self.parts
    }

    /// How many pieces there are.
    pub fn pieces(&self) -> usize {
        self.pieces
    }

    /// Query rows of pieces at most.
    pub fn limits(&self) -> RowLimits {
        self.limits
    }

    /// Whether the kernel for few rows computes a piece.
    pub fn is_few(&self, piece: &Piece<'_>) -> bool {
        few::suits(&piece.segment, piece.heads.len(), self.limits.few)
    }

    /// Rows of keys that are read, each as often as a tile of rows reads it.
    pub fn key_rows(&self) -> usize {
        self.entries.saturating_mul(self.planes())
    }

    /// Rows of all partials.
    pub fn partial_rows(&self) -> usize {
        self.partial_rows
    }

    /// Visible (row, key) pairs of one query head.
    pub fn pairs(&self) -> u64 {
        let pairs = self.tasks.iter().map(|task| task.segment.pairs() as u64);
        pairs.fold(0, |sum: u64, pairs| sum.saturating_add(pairs))
    }

    /// The piece of this index, and where its result goes.
    pub fn piece<'a>(&self, batch: &'a Batch, index: usize) -> (Piece<'a>, Place) {
        let group = &self.groups[self.groups.partition_point(|group| group.first <= index) - 1];
        let index = index - group.first;
        let (plane, task) = (index / group.tasks.len(), group.tasks.start + index % group.tasks.len());
        let plane = plane * group.kv_heads;
        let Task { splits, partials, ref segment, .. } = self.tasks[task];
        let rows = self.rows(segment);
        let place = Place {
            whole: splits == 1,
            partials: partials + (plane * splits + group.split) * rows,
            head_rows: splits * rows,
        };
        let mut piece = self.piece_of(batch, task, plane, group.split);
        piece.kv_heads.end = piece.kv_heads.start + group.kv_heads;
        (piece, place)
    }

    fn piece_of<'a>(&self, batch: &'a Batch, task: usize, plane: usize, split: usize) -> Piece<'a> {
        let Task { sequence, ref segment, splits, cut, .. } = self.tasks[task];
        let (kv_head, part) = (plane / self.parts, plane % self.parts);
        let group = batch.group();
        let first = part * self.heads;
        Piece {
            sequence: &batch.sequences()[sequence],
            page_len: batch.key_shape()[1],
            kv_heads: kv_head..kv_head + 1,
            heads: kv_head * group + first..kv_head * group + group.min(first + self.heads),
            segment: segment.clone(),
            entries: cut.split(segment, split, splits),
        }
    }

    /// How many merges there are: one for each task of more than one split and KV head (or part).
    pub fn merges(&self) -> usize {
        self.split.len() * self.planes()
    }

    /// A merge: the first of the pieces whose partials become one, the rows of these, and the rows
    /// from one split's to the next.
    pub fn merge<'a>(&self, batch: &'a Batch, index: usize) -> (Piece<'a>, Range<usize>, usize) {
        let (task, plane) = (self.split[index / self.planes()], index % self.planes());
        let Task { splits, partials, ref segment, .. } = self.tasks[task];
        let rows = self.rows(segment);
        let start = partials + plane * splits * rows;
        (self.piece_of(batch, task, plane, 0), start..start + splits * rows, rows)
    }
}

/// Rows of all partials at most, for any batch within a capacity.
pub(super) fn most_partial_rows(capacity: &Capacity, split_keys: Option<usize>, limits: RowLimits) -> usize {
    let (kv_heads, group) = (capacity.key[2], capacity.query[2] / capacity.key[2]);
    let heads = group.min(tile::ROWS);
    let planes = kv_heads * group.div_ceil(heads);
    let Some(split_keys) = split_keys else {
        let tile_rows = capacity.most_rows().min(limits.tile / heads) * heads;
        let few_rows = capacity.most_rows().min(limits.few / heads) * heads;
        // The keys of all tasks are less than this many splits long, and a task that is split has
        // at least one whole one: no more than twice as many splits.
        let [whole, whole_few] = [PIECES.div_ceil(planes) + 1, PIECES + 1];
        return (2 * (whole * tile_rows + whole_few * few_rows)).saturating_mul(planes);
    };
    // Each row of a sequence is in one task, whose list is no longer than the sequence.
    let [_, splits] = capacity.most_split_rows(capacity.most_rows(), split_keys);
    splits.saturating_mul(heads * planes)
}

/// The tiles of a sequence, of so many heads: tokens that share their keys.
fn tiles(sequence: &crate::Sequence, config: &PlanConfig, heads: usize, limits: RowLimits) -> Vec<Segment> {
    let tokens = limits.tile / heads;
    let split = fixed_len(config);
    let mut tiles = Vec::with_capacity(sequence.rows.len().div_ceil(tokens));
    schedule::segments(&sequence.mask, sequence.rows.len(), sequence.key_len(), |segment| {
        for start in segment.rows.clone().step_by(tokens) {
            let tile = segment.part(start..segment.rows.end.min(start + tokens));
            // The kernel for few rows needs no whole tiles.
            let few = few::suits(&tile, heads, limits.few);
            tiles.push(tile.skipping(Grid { tile: if few { 1 } else { tile::GRID }, split }));
        }
    });
    tiles
}

#[cfg(test)]
mod tests {
    use super::super::splits::{PIECES_OF_HEADS, SPLIT_KEYS};
    use super::*;
    use crate::backend::cases::{configs, within_capacities};
    use crate::cpu::flash::Plan;
    use crate::{Keys, Mask, PlanConfig, Sequence};
    use proptest::prelude::*;

    const LIMITS: RowLimits = RowLimits { tile: tile::ROWS, few: few::ROWS };

    proptest! {
        #[test]
        fn no_batch_takes_more_than_its_capacity(
            (capacity, batch) in within_capacities(1..=300usize),
            config in configs(),
            threads in 1..=4usize,
        ) {
            let plan = |batch| Plan::for_batch(&config, batch).unwrap().with_threads(threads).unwrap();
            let most = plan(capacity.empty_batch().unwrap()).most_workspace_bytes(&capacity, threads);
            let bytes = plan(batch).workspace_bytes();
            prop_assert!(bytes <= most, "{bytes} of {most}");
        }
    }

    /// With a fixed split length that is about what the largest batch takes.
    #[test]
    fn fixed_splits_take_what_the_largest_batch_needs() {
        let config = PlanConfig::new().with_row_invariant();
        for (sequences, rows) in [(256, 1), (8, 2048)] {
            let (query, key) = ([sequences, rows, 32, 128], [sequences, 1 << 17, 8, 128]);
            let mut batch = Batch::new(query, key).unwrap();
            for index in 0..sequences {
                let keys = Keys::rows(index, 0..1 << 17);
                batch.push(Sequence::new(index, 0..rows, keys, Mask::Full)).unwrap();
            }
            let capacity = Capacity::new(query, key, sequences, rows);
            let most = most_partial_rows(&capacity, config.fixed_split_keys(), LIMITS);
            let rows = Work::new(&batch, &config, LIMITS).unwrap().partial_rows();
            assert!(rows <= most && rows as f64 > 0.9 * most as f64, "{rows} of {most}");
        }
    }

    /// A long sequence among short ones is cut into many pieces, the short ones are not cut.
    #[test]
    fn splits_follow_the_lengths() {
        let lens = [65_536, 256, 256, 300];
        let mut batch = Batch::new([4, 1, 8, 128], [4, 65_536, 8, 128]).unwrap();
        for (index, len) in lens.into_iter().enumerate() {
            batch.push(Sequence::new(index, 0..1, Keys::rows(index, 0..len), Mask::Causal)).unwrap();
        }
        let work = Work::new(&batch, &PlanConfig::new(), LIMITS).unwrap();
        let mut entries = [0; 4];
        let longest = (0..work.pieces())
            .map(|index| {
                let (piece, _) = work.piece(&batch, index);
                let rows = piece.entries.len() * piece.kv_heads.len();
                entries[piece.sequence.batch] += rows;
                rows
            })
            .max();
        assert_eq!(entries, lens.map(|len| 8 * len));
        let share = 8 * lens.iter().sum::<usize>() / PIECES;
        assert!(longest < Some(share + 8 * tile::KEYS), "{longest:?} of {share}");
    }

    /// Heads go together where that leaves enough pieces, and as many as divide them.
    #[test]
    fn few_rows_over_many_keys_take_heads_together() {
        let heads = |kv_heads: usize, rows: usize, len: usize, split_keys: Option<usize>| {
            let mut batch = Batch::new([1, rows, kv_heads, 128], [1, len, kv_heads, 128]).unwrap();
            batch.push(Sequence::new(0, 0..rows, Keys::rows(0, 0..len), Mask::Full)).unwrap();
            let config = split_keys.map_or(PlanConfig::new(), |keys| PlanConfig::new().with_split_keys(keys));
            let work = Work::new(&batch, &config, LIMITS).unwrap();
            let (piece, _) = work.piece(&batch, work.pieces() - 1);
            assert_eq!(piece.kv_heads.end, kv_heads);
            piece.kv_heads.len()
        };
        let enough = PIECES_OF_HEADS * SPLIT_KEYS;
        assert_eq!(heads(8, 1, enough, None), 8);
        assert_eq!(heads(8, 16, enough, None), 8);
        assert_eq!(heads(8, 17, enough, None), 1);
        assert_eq!(heads(8, 1, enough / 2, None), 4);
        assert_eq!(heads(8, 1, enough / 16, None), 1);
        assert_eq!(heads(9, 1, enough, None), 3);
        assert_eq!(heads(16, 1, enough, None), 8);
        // Of many short sequences too, so many are left.
        let mut batch = Batch::new([32, 1, 2, 128], [32, 1152, 2, 128]).unwrap();
        for index in 0..32 {
            batch.push(Sequence::new(index, 0..1, Keys::rows(index, 0..1152), Mask::Causal)).unwrap();
        }
        let work = Work::new(&batch, &PlanConfig::new(), LIMITS).unwrap();
        assert_eq!((work.piece(&batch, 0).0.kv_heads, work.pieces()), (0..2, PIECES_OF_HEADS));
        let enough = PIECES_OF_HEADS * tile::KEYS;
        assert_eq!(heads(8, 1, enough, Some(tile::KEYS)), 8);
        assert_eq!(heads(8, 1, enough, Some(1)), 8);
        assert_eq!(heads(8, 1, enough, Some(2 * tile::KEYS)), 4);
    }

    /// The tiles of a causal prefill differ in length, up to twice the mean: none is split.
    #[test]
    fn a_prefill_of_enough_tiles_is_not_split() {
        let mut batch = Batch::new([1, 2048, 8, 64], [1, 2048, 8, 64]).unwrap();
        batch.push(Sequence::new(0, 0..2048, Keys::rows(0, 0..2048), Mask::Causal)).unwrap();
        assert_eq!(Work::new(&batch, &PlanConfig::new(), LIMITS).unwrap().partial_rows(), 0);
    }

    /// With a fixed length the borders are its multiples, whatever is in the batch.
    #[test]
    fn fixed_splits_do_not_depend_on_the_batch() {
        let borders = |others: usize| {
            let mut batch = Batch::new([9, 1, 2, 64], [9, 3000, 1, 64]).unwrap();
            for index in 0..=others {
                let len = if index == 0 { 2500 } else { 100 * index };
                batch.push(Sequence::new(index, 0..1, Keys::rows(index, 0..len), Mask::Full)).unwrap();
            }
            let work = Work::new(&batch, &PlanConfig::new().with_split_keys(960), LIMITS).unwrap();
            let mut entries: Vec<_> = (0..work.pieces())
                .map(|index| work.piece(&batch, index).0)
                .filter(|piece| piece.sequence.batch == 0)
                .map(|piece| piece.entries)
                .collect();
            entries.sort_by_key(|entries| entries.start);
            entries
        };
        assert_eq!(borders(0), [0..960, 960..1920, 1920..2500]);
        assert_eq!(borders(8), borders(0));
    }
}
