//! At which length the keys of tiles are split.
//!
//! A launch has one split length: a tile whose list is longer is walked by several blocks, so that
//! a long sequence gets many of them and a short one a single one. Their partial results are
//! merged.
//!
//! Keys are split where there are too few tiles for the multiprocessors. With `w(s) = blocks · s /
//! places` waves of blocks for `s` splits of the longest list, the GPU is busy for `w / ⌈w⌉` of the
//! time: the smallest count within 85% of the best is taken (FlashAttention's rule). Tiles of
//! shorter lists count for their part of the longest. No block then walks more than twice a
//! place's share of all keys, except that no split is made of fewer than [`SPLIT_STEPS`] steps.

use super::Plan;
use super::room::Counts;
use super::tiles::{KernelTiles, Kernels, WholeTile, check_count};
use crate::cuda::Properties;
use crate::cuda::params::{StarMergedRow, StarTile};
use crate::cuda::policy::Policy;
use crate::{Error, PlanConfig, Result};

/// Steps of a kernel below which a split costs more than it saves.
const SPLIT_STEPS: usize = 4;

impl Plan {
    /// What a launch takes of the tables if its tiles are split at a length.
    fn counts(&self, len: usize, launch: &KernelTiles, tiles: &[Vec<WholeTile>]) -> Counts {
        let heads = self.heads(launch);
        tiles.iter().flatten().fold(Counts::default(), |sum, tile| {
            let splits = tile.splits(len);
            let merged = if splits > 1 { heads * tile.tile.rows as usize } else { 0 };
            Counts {
                tiles: sum.tiles.saturating_add(splits),
                merged: sum.merged.saturating_add(merged),
                partial_rows: sum.partial_rows.saturating_add(merged.saturating_mul(splits)),
            }
        })
    }

    /// The least split length from `len` on that leaves a launch within its room.
    pub(super) fn fit(
        &self,
        mut len: usize,
        config: &PlanConfig,
        launch: &KernelTiles,
        tiles: &[Vec<WholeTile>],
        room: &Counts,
    ) -> Result<usize> {
        let longest = tiles.iter().flatten().map(WholeTile::len).max().unwrap_or(0);
        let step = launch.policy.step_keys();
        while !self.counts(len, launch, tiles).fit(room) {
            if len >= longest || config.fixed_split_keys().is_some() {
                let got = format!("{:?}", self.counts(len, launch, tiles));
                return Err(Error::value("batch", format!("work within {room:?}"), got));
            }
            len += (len / 4).next_multiple_of(step);
        }
        Ok(len)
    }

    /// Adds the tiles of a launch, those of each sequence by themselves, with their keys split at
    /// multiples of `len`, and lists the rows to merge.
    pub(super) fn push_split(
        &mut self,
        len: usize,
        launch: &KernelTiles,
        tiles: Vec<Vec<WholeTile>>,
    ) -> Result<()> {
        let heads = self.heads(launch);
        let more = self.counts(len, launch, &tiles).partial_rows;
        let expected = "a length that leaves fewer than 2³¹ partial rows";
        check_count("split_keys", expected, self.partial_rows.saturating_add(more))?;
        for tile in tiles.iter().flatten() {
            let count = tile.splits(len);
            let first = self.partial_rows as u32;
            let WholeTile { tile, skipped } = tile;
            self.tiles.extend((0..count).map(|split| {
                let entries = skipped.split(tile.end as usize, len, split);
                StarTile {
                    begin: entries.start as u32,
                    end: entries.end as u32,
                    splits: count as u32,
                    partial: first + split as u32,
                    ..*tile
                }
            }));
            if count > 1 {
                self.list_merged(tile, launch.pack, heads, [first, count as u32]);
                self.partial_rows += heads * count * tile.rows as usize;
            }
        }
        Ok(())
    }

    /// Lists the rows of a tile that has `count` splits and whose partial rows begin at `first`.
    fn list_merged(&mut self, tile: &StarTile, pack: usize, heads: usize, [first, count]: [u32; 2]) {
        let pack = pack as u32;
        for head in 0..heads as u32 {
            self.merged.extend((0..tile.rows).map(|row| StarMergedRow {
                batch: tile.batch,
                row: (tile.row + row) / pack,
                head: head * pack + (tile.row + row) % pack,
                first: first + (head * tile.rows + row) * count,
                count,
            }));
        }
    }
}

/// The split length of a launch, if there is room for all that it gives.
pub(super) fn split_len(
    properties: &Properties,
    config: &PlanConfig,
    kernels: &Kernels,
    launch: &KernelTiles,
    heads: usize,
    tiles: &[Vec<WholeTile>],
) -> usize {
    match config.fixed_split_keys() {
        Some(len) => kernels.whole_steps(len),
        None => balanced_len(&launch.policy, places(&launch.policy, properties), heads, tiles),
    }
}

/// Blocks of a kernel that run at the same time.
pub(super) fn places(policy: &Policy, properties: &Properties) -> usize {
    // A multiprocessor keeps a KB of each block's shared memory for itself, and has registers for
    // two blocks of these kernels, or one of those for Hopper.
    let most = if policy.is_hopper() { 1 } else { 2 };
    let resident = (properties.shared_bytes / (policy.shared_bytes() + 1024)).clamp(1, most);
    properties.multiprocessors.max(1) * resident
}

/// The shortest split, in keys.
pub(super) fn smallest_split(policy: &Policy) -> usize {
    policy.step_keys() * SPLIT_STEPS
}

/// The split length for tiles of several sequences, of which each is walked for every head: a
/// multiple of the kernel's step.
fn balanced_len(policy: &Policy, places: usize, heads: usize, tiles: &[Vec<WholeTile>]) -> usize {
    let step = policy.step_keys();
    let smallest = smallest_split(policy);
    let longest_of = |tiles: &[WholeTile]| tiles.iter().map(WholeTile::len).max().unwrap_or(0);
    let longest = tiles.iter().map(|tiles| longest_of(tiles)).max().unwrap_or(0);
    if longest <= smallest {
        return smallest;
    }
    // Of the longest walk: the tiles of a sequence count for its own longest.
    let blocks = tiles.iter().map(|tiles| (tiles.len() * longest_of(tiles)) as f64).sum::<f64>();
    let blocks = blocks * heads as f64 / longest as f64;
    let total = heads * tiles.iter().flatten().map(WholeTile::len).sum::<usize>();
    let most = longest.div_ceil(smallest).min(places);
    (split_count(blocks, places, most)..=most)
        .map(|splits| longest.div_ceil(splits).next_multiple_of(step))
        .find(|&len| len <= 2 * total / places + smallest)
        .unwrap_or(smallest)
}

/// The number of splits, at most `most`, that keeps `places` busy with `blocks` blocks for each.
fn split_count(blocks: f64, places: usize, most: usize) -> usize {
    let places = places as f64;
    // Nearly full.
    if blocks >= 0.8 * places {
        return 1;
    }
    let busy = |splits: usize| {
        let waves = blocks * splits as f64 / places;
        waves / waves.ceil()
    };
    let best = (1..=most).map(busy).fold(0.0, f64::max);
    (1..=most).find(|&splits| busy(splits) >= 0.85 * best).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Batch, Keys, Mask, Sequence};
    use proptest::prelude::*;

    #[test]
    fn splits_fill_the_device() {
        assert_eq!(split_count(8.0, 264, 1000), 29);
        assert_eq!(split_count(8.0, 132, 1000), 15);
        // Full, nearly full, nothing to split.
        assert_eq!(split_count(264.0, 264, 64), 1);
        assert_eq!(split_count(212.0, 264, 64), 1);
        assert_eq!(split_count(8.0, 264, 1), 1);
        // At most as many as asked for.
        assert_eq!(split_count(1.0, 264, 16), 14);
    }

    /// A batch of decodes and prefills over any numbers of keys.
    fn batches(most_rows: usize) -> impl Strategy<Value = Batch> {
        let keys =
            (0..=20u32, 0.5f64..1.0).prop_map(|(bits, part)| ((1u64 << bits) as f64 * part).ceil() as usize);
        let rows = prop_oneof![4 => Just(1), 1 => 1..40usize, 1 => 1..most_rows];
        let mask = prop_oneof![Just(Mask::Full), Just(Mask::Causal)];
        let sequences = prop::collection::vec((rows, keys, mask), 1..=256);
        let heads = (prop::sample::select(vec![1, 2, 8]), prop::sample::select(vec![1, 4, 7]));
        (sequences, heads, prop::sample::select(vec![64, 96, 128, 256])).prop_map(
            |(sequences, (kv_heads, group), dim)| {
                let total = sequences.iter().map(|(rows, ..)| rows).sum();
                let mut batch =
                    Batch::new([1, total, kv_heads * group, dim], [1, 1 << 20, kv_heads, dim]).unwrap();
                let mut start = 0;
                for (rows, keys, mask) in sequences {
                    batch.push(Sequence::new(0, start..start + rows, Keys::rows(0, 0..keys), mask)).unwrap();
                    start += rows;
                }
                batch
            },
        )
    }

    fn properties() -> impl Strategy<Value = Properties> {
        prop::sample::select(vec![
            Properties::new(8, 100 * 1024, 1 << 20),
            Properties::new(108, 164 * 1024, 40 << 20),
            Properties::new(132, 228 * 1024, 50 << 20),
            Properties::new(142, 100 * 1024, 96 << 20),
        ])
    }

    proptest! {
        #[test]
        fn no_block_walks_far_more_than_its_share(batch in batches(3000), properties in properties()) {
            let plan = Plan::for_batch(&properties, &PlanConfig::new(), &batch).unwrap();
            for launch in &plan.launches {
                let tiles = &plan.tiles[launch.tiles.clone()];
                let walk = |tile: &StarTile| (tile.end - tile.begin) as usize;
                let total = plan.heads(launch) * tiles.iter().map(walk).sum::<usize>();
                let longest = tiles.iter().map(walk).max().unwrap();
                let share = total / places(&launch.policy, &properties);
                let smallest = smallest_split(&launch.policy);
                prop_assert!(longest <= 2 * share + smallest, "{longest} keys, a share of {share}");
            }
        }

        /// Every partial row is written once and merged once, by a row that has all its splits.
        #[test]
        fn partial_rows_belong_to_one_row_each(batch in batches(100), fixed in prop::option::of(50_000..1_000_000usize)) {
            let properties = Properties::new(132, 228 * 1024, 50 << 20);
            let config = PlanConfig { split_keys: fixed, ..PlanConfig::new() };
            let plan = Plan::for_batch(&properties, &config, &batch).unwrap();
            let mut written = vec![0; plan.partial_rows];
            for launch in &plan.launches {
                for tile in plan.tiles[launch.tiles.clone()].iter().filter(|tile| tile.splits > 1) {
                    for row in 0..tile.rows as usize * plan.heads(launch) {
                        written[tile.partial as usize + row * tile.splits as usize] += 1;
                    }
                }
            }
            prop_assert!(written.iter().all(|&times| times == 1));
            for row in &plan.merged {
                (row.first..row.first + row.count).for_each(|at| written[at as usize] += 1);
            }
            prop_assert!(written.iter().all(|&times| times == 2));
        }
    }

    /// Decodes over equally many keys: about as many splits as fill every place.
    #[test]
    fn equal_sequences_fill_the_device() {
        let splits = |sequences: usize, keys: usize| {
            let mut batch = Batch::new([1, sequences, 32, 128], [1, keys, 8, 128]).unwrap();
            for row in 0..sequences {
                batch.push(Sequence::new(0, row..row + 1, Keys::rows(0, 0..keys), Mask::Full)).unwrap();
            }
            let properties = Properties::new(132, 228 * 1024, 50 << 20);
            Plan::for_batch(&properties, &PlanConfig::new(), &batch).unwrap().splits()
        };
        assert_eq!(splits(1, 1 << 17), 29);
        assert_eq!(splits(2, 1 << 17), 15);
        assert_eq!(splits(33, 1 << 17), 1);
        assert_eq!(splits(1, 256), 1);
        assert_eq!(splits(1, 4096), 13);
    }
}
