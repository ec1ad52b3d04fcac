//! From sequences to tiles of rows, for each kernel in use.

use super::room::Room;
use super::splits::split_len;
use super::{FEW_ROWS, Plan};
use crate::cuda::Properties;
use crate::cuda::params::{StarRange, StarTile};
use crate::cuda::policy::{Dims, Policy};
use crate::schedule::{self, Grid, Segment, Skipped};
use crate::{Batch, Error, Keys, Mask, PlanConfig, Result, Sequence};
use std::ops::Range;

/// The kernels of a head dim that sequences choose from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernels {
    /// For many rows, and for any number of them.
    encode: Policy,
    /// For as many rows as one tile of it has, if that is fewer.
    encode_64: Option<Policy>,
    /// For up to [`FEW_ROWS`]; none where a row's bits must not depend on their number.
    query: Option<Policy>,
}

impl Kernels {
    /// Those for heads of a kernel's dims, on a device. Where a row's bits must not depend on the
    /// number of rows, all have the tiles of keys and the order of sums of `encode`.
    pub fn new(properties: &Properties, config: &PlanConfig, dims: Dims) -> Self {
        let hopper = Policy::hopper(dims).filter(|_| properties.hopper);
        let alone = hopper.is_some() && config.row_invariant;
        Self {
            encode: hopper.unwrap_or(Policy::encode(dims)),
            encode_64: Policy::encode_64(dims).filter(|_| !alone),
            query: (!config.row_invariant).then_some(Policy::query(dims)),
        }
    }

    /// The same with another kernel for more than [`FEW_ROWS`] rows.
    #[cfg(feature = "variants")]
    pub fn with_encode(self, encode: Policy) -> Self {
        Self { encode, encode_64: None, ..self }
    }

    /// The kernel for so many rows of a KV head, over the query heads that share it.
    fn choose(&self, rows: usize) -> Policy {
        let few = self.query.filter(|_| rows <= FEW_ROWS);
        let some = self.encode_64.filter(|policy| rows <= policy.rows());
        few.or(some).unwrap_or(self.encode)
    }

    /// All of them, in the order of their launches.
    pub fn all(&self) -> impl Iterator<Item = Policy> + use<> {
        [Some(self.encode), self.encode_64, self.query].into_iter().flatten()
    }

    /// The most rows of a sequence, up to `most`, for which a kernel is chosen; 0 if it never is.
    pub fn most_rows(&self, policy: &Policy, group: usize, most: usize) -> usize {
        let few = self.query.map_or(0, |_| FEW_ROWS / group);
        let some = self.encode_64.map_or(0, |policy| policy.rows() / group);
        let candidates = [most, some.min(most), few.min(most)];
        candidates.into_iter().find(|&rows| rows > 0 && self.choose(rows * group) == *policy).unwrap_or(0)
    }

    /// Query heads of a KV head that are rows of one tile, where sequences have at most
    /// `most_rows`.
    pub fn pack(&self, policy: &Policy, group: usize, most_rows: usize) -> usize {
        if self.query == Some(*policy) || most_rows < policy.rows() { group } else { 1 }
    }

    /// A split length in whole steps of every kernel of the head dim. Longer than any list is as
    /// long as any list.
    pub fn whole_steps(&self, split_keys: usize) -> usize {
        split_keys.min(1 << 31).next_multiple_of(self.common_step())
    }

    /// Keys that are whole steps of every kernel of the head dim.
    fn common_step(&self) -> usize {
        let dims = self.encode.dims;
        [Policy::query(dims), Policy::encode(dims), self.encode]
            .map(|policy| policy.step_keys())
            .into_iter()
            .fold(1, lcm)
    }
}

fn lcm(a: usize, b: usize) -> usize {
    (1..=b).map(|i| a * i).find(|multiple| multiple.is_multiple_of(b)).unwrap_or(a * b)
}

/// The tiles of one kernel: one launch.
#[derive(Clone, Debug)]
pub(super) struct KernelTiles {
    pub policy: Policy,
    /// Query heads of a KV head that are rows of one tile.
    pub pack: usize,
    /// Those of the plan's tiles.
    pub tiles: Range<usize>,
}

/// A tile whose list is not split yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct WholeTile {
    pub tile: StarTile,
    pub skipped: Skipped,
}

impl WholeTile {
    /// Entries of the list.
    pub fn len(&self) -> usize {
        self.tile.end as usize
    }

    /// In how many parts the list is walked.
    pub fn splits(&self, len: usize) -> usize {
        self.skipped.splits(self.len(), len)
    }
}

/// A sequence whose keys were found their place.
struct Placed<'a> {
    sequence: &'a Sequence,
    /// Where the keys after its prefix start on the axes batch (or in the page table) and seq.
    keys: [u32; 2],
}

impl Plan {
    /// Makes the tiles of all sequences and the launches of all kernels in use.
    pub(super) fn push_launches(
        &mut self,
        properties: &Properties,
        config: &PlanConfig,
        batch: &Batch,
        kernels: &Kernels,
        room: Option<&Room>,
    ) -> Result<()> {
        let placed = self.place(batch)?;
        let rows_of = |placed: &Placed<'_>| placed.sequence.rows.len() * batch.group();
        for policy in kernels.all() {
            let own = || placed.iter().filter(|placed| kernels.choose(rows_of(placed)) == policy);
            let most_rows = own().map(|placed| placed.sequence.rows.len()).max().unwrap_or(0);
            let room = room.and_then(|room| room.of_kernel(policy.kernel));
            let pack = match room {
                Some(room) => room.launch.pack,
                None => kernels.pack(&policy, batch.group(), most_rows),
            };
            let mut launch = KernelTiles { policy, pack, tiles: self.tiles.len()..self.tiles.len() };
            let fixed = config.fixed_split_keys().map(|len| kernels.whole_steps(len));
            let grid = Grid { tile: policy.step_keys(), split: fixed };
            let mut tiles = Vec::new();
            for placed in own() {
                tiles.push(self.tiles_of_sequence(placed, &launch, grid));
            }
            check_count("mask", "fewer than 2³¹ ranges of block lists", self.ranges.len())?;
            let len = split_len(properties, config, kernels, &launch, self.heads(&launch), &tiles);
            let len = match room {
                Some(room) => self.fit(len, config, &launch, &tiles, &room.counts)?,
                None => len,
            };
            self.push_split(len, &launch, tiles)?;
            launch.tiles.end = self.tiles.len();
            let blocks = launch.tiles.len().saturating_mul(self.heads(&launch)).saturating_mul(self.parts());
            let tiles = &mut self.tiles[launch.tiles.clone()];
            if i32::try_from(blocks).is_err() {
                let expected = "at most 2³¹ - 1 tiles times heads (and parts of values)";
                return Err(Error::shape("query", expected, blocks.to_string()));
            }
            // The sort is stable: among equals, neighbours stay together.
            tiles.sort_by_key(|tile| std::cmp::Reverse(tile.end - tile.begin));
            if !launch.tiles.is_empty() {
                self.launches.push(launch);
            }
        }
        Ok(())
    }

    /// The tiles of a kernel.
    pub(super) fn tiles_of_kernel(&self, kernel: &str) -> &[StarTile] {
        let launch = self.launches.iter().find(|launch| launch.policy.kernel == kernel);
        launch.map_or(&[], |launch| &self.tiles[launch.tiles.clone()])
    }

    /// Heads of a launch: query heads, or KV heads where the others are rows.
    pub(super) fn heads(&self, launch: &KernelTiles) -> usize {
        self.query[2] / launch.pack
    }

    /// Finds the keys of all sequences, and lists their pages.
    fn place<'a>(&mut self, batch: &'a Batch) -> Result<Vec<Placed<'a>>> {
        let paged = batch.sequences().first().is_some_and(|first| matches!(first.keys, Keys::Pages { .. }));
        let mut placed = Vec::new();
        for (index, sequence) in batch.sequences().iter().enumerate() {
            let keys = self
                .place_keys(sequence, paged)
                .map_err(|source| Error::Sequence { index, source: Box::new(source) })?;
            placed.push(Placed { sequence, keys });
        }
        check_count("pages", "fewer than 2³¹ pages in use", self.pages.len())?;
        Ok(placed)
    }

    fn place_keys(&mut self, sequence: &Sequence, paged: bool) -> Result<[u32; 2]> {
        check_count("keys", "fewer than 2³¹ keys", sequence.key_len())?;
        match (&sequence.keys, paged) {
            (Keys::Rows { batch, rows }, false) => Ok([*batch as u32, rows.start as u32]),
            (Keys::Pages { len, pages }, true) => {
                let start = self.pages.len();
                self.pages.extend(&pages[..len.div_ceil(self.key[1].max(1))]);
                Ok([start as u32, 0])
            }
            (Keys::Rows { .. }, true) => Err(Error::value("keys", "pages, as sequence 0 has", "rows")),
            (Keys::Pages { .. }, false) => Err(Error::value("keys", "rows, as sequence 0 has", "pages")),
        }
    }

    /// The tiles of a sequence, none of them split.
    fn tiles_of_sequence(&mut self, placed: &Placed<'_>, launch: &KernelTiles, grid: Grid) -> Vec<WholeTile> {
        let mut tiles = Vec::new();
        let sequence = placed.sequence;
        // The tile of the block list whose ranges were listed last.
        let mut listed = None;
        schedule::segments(&sequence.mask, sequence.rows.len(), sequence.key_len(), |segment| {
            self.pairs = self.pairs.saturating_add(segment.pairs() as u64);
            if let (Some(tile), Mask::Blocks(blocks)) = (segment.block_tile, &sequence.mask)
                && listed.is_none_or(|(listed, _)| listed != tile)
            {
                listed = Some((tile, self.ranges.len()));
                let entries = blocks.entries(tile);
                self.ranges.extend(
                    entries.map(|(entry, keys)| StarRange { entry: entry as u32, key: keys.start as u32 }),
                );
            }
            let ranges = listed.map_or(0..0, |(_, first)| first..self.ranges.len());
            push_tiles(&mut tiles, placed, launch, &segment, grid, ranges);
        });
        tiles
    }
}

fn push_tiles(
    tiles: &mut Vec<WholeTile>,
    placed: &Placed<'_>,
    launch: &KernelTiles,
    segment: &Segment,
    grid: Grid,
    ranges: Range<usize>,
) {
    let Placed { sequence, keys: [key_batch, key_start] } = *placed;
    let [prefix_batch, prefix_start] = sequence
        .prefix
        .as_ref()
        .map_or([0; 2], |prefix| [prefix.batch, prefix.rows.start].map(|at| at as u32));
    let (pack, most) = (launch.pack, launch.policy.rows());
    let rows = segment.rows.start * pack..segment.rows.end * pack;
    for start in rows.clone().step_by(most) {
        let end = rows.end.min(start + most);
        let own = segment.part(start / pack..(end - 1) / pack + 1).skipping(grid);
        let tile = StarTile {
            batch: sequence.batch as u32,
            key_batch,
            row: (sequence.rows.start * pack + start) as u32,
            rows: (end - start) as u32,
            key_start,
            anchor: own.prefix as u32,
            start: own.start as u32,
            visible: own.first_visible as u32,
            causal: u32::from(own.causal),
            begin: 0,
            end: own.len() as u32,
            splits: 1,
            partial: 0,
            prefix_batch,
            prefix_start,
            prefix_len: sequence.prefix_len() as u32,
            hidden: own.first_hidden.map_or(i32::MIN, |hidden| hidden as i32),
            first_range: ranges.start as u32,
            ranges: ranges.len() as u32,
            padding: 0,
        };
        tiles.push(WholeTile { tile, skipped: own.skipped });
    }
}

pub(super) fn check_count(argument: &'static str, expected: &str, got: usize) -> Result<()> {
    i32::try_from(got).map_err(|_| Error::value(argument, expected, got)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AttentionConfig, AttentionShape};

    const PROPERTIES: Properties = Properties::new(132, 228 * 1024, 50 << 20);

    #[test]
    fn tiles_partition_rows_and_splits_their_keys() {
        let mask = Mask::Star { anchor_len: 40, block_len: 200, first_block_len: 200, left: None };
        let shape = AttentionShape {
            batch: 2,
            query_len: 700,
            key_len: 700,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 64,
            value_dim: 64,
        };
        let plan = Plan::new(&PROPERTIES, &AttentionConfig::new(mask), &shape).unwrap();
        for batch in 0..2 {
            let mut rows: Vec<_> =
                plan.tiles.iter().filter(|tile| tile.batch == batch && tile.begin == 0).collect();
            rows.sort_by_key(|tile| tile.row);
            let mut next = 0;
            for tile in rows {
                assert_eq!(tile.row, next);
                next += tile.rows;
                // Never across a block.
                assert_eq!(tile.row / 200, (next - 1) / 200);
                let mut parts: Vec<_> =
                    plan.tiles.iter().filter(|t| (t.batch, t.row) == (batch, tile.row)).collect();
                parts.sort_by_key(|part| part.begin);
                assert_eq!(parts.len(), tile.splits as usize);
                assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].begin));
                let last = tile.row + tile.rows - 1;
                let visible = if last < 200 { last + 1 } else { 40 + last % 200 + 1 };
                assert_eq!(parts.last().unwrap().end, visible);
            }
            assert_eq!(next, 700);
        }
    }

    /// Rows of a KV head, and which kernel they take.
    #[test]
    fn each_sequence_takes_the_kernel_for_its_own_rows() {
        let of = |head_dim, config: PlanConfig, rows: &[usize]| {
            let total = rows.iter().sum();
            let mut batch = Batch::new([1, total, 2, head_dim], [1, 500, 1, head_dim]).unwrap();
            let mut start = 0;
            for rows in rows {
                let rows = start..start + rows;
                start = rows.end;
                batch.push(Sequence::new(0, rows, Keys::rows(0, 0..500), Mask::Causal)).unwrap();
            }
            let plan = Plan::for_batch(&PROPERTIES, &config, &batch).unwrap();
            let launches = plan.launches.iter();
            launches.map(|l| (l.policy.kernel, l.pack)).collect::<Vec<_>>()
        };
        let plain = PlanConfig::new();
        let invariant = plain.with_row_invariant();
        assert_eq!(of(128, plain, &[16, 1]), [("query", 2)]);
        assert_eq!(of(128, plain, &[17, 32]), [("encode_64", 2)]);
        assert_eq!(of(128, plain, &[33]), [("encode", 2)]);
        assert_eq!(of(128, plain, &[33, 128]), [("encode", 1)]);
        assert_eq!(of(128, plain, &[1, 300, 20]), [("encode", 1), ("encode_64", 2), ("query", 2)]);
        assert_eq!(of(256, plain, &[1, 17]), [("encode", 2), ("query", 2)]);
        assert_eq!(of(128, invariant, &[1, 300, 20]), [("encode", 1), ("encode_64", 2)]);
        assert_eq!(of(256, invariant, &[1, 17]), [("encode", 2)]);
        assert_eq!(of(64, plain, &[]), []);
    }

    #[test]
    fn hopper_takes_its_own_kernel_for_many_rows_and_for_all_that_keep_their_bits() {
        let of = |properties: &Properties, config: PlanConfig, dim| {
            let mut batch = Batch::new([1, 321, 2, dim], [1, 500, 1, dim]).unwrap();
            for rows in [0..1, 1..301, 301..321] {
                batch.push(Sequence::new(0, rows, Keys::rows(0, 0..500), Mask::Causal)).unwrap();
            }
            let plan = Plan::for_batch(properties, &config, &batch).unwrap();
            plan.launches.iter().map(|l| l.policy.kernel).collect::<Vec<_>>()
        };
        let (hopper, plain) = (PROPERTIES.with_hopper(), PlanConfig::new());
        assert_eq!(of(&hopper, plain, 128), ["encode_hopper", "encode_64", "query"]);
        assert_eq!(of(&hopper, plain.with_row_invariant(), 128), ["encode_hopper"]);
        assert_eq!(of(&hopper, plain.with_row_invariant(), 192), ["encode"]);
        assert_eq!(of(&hopper, plain, 256), ["encode", "query"]);
        assert_eq!(of(&PROPERTIES, plain, 128), ["encode", "encode_64", "query"]);
    }
}
