//! How much room the tables and partial results of a plan have in device memory, and where.

use super::splits::places;
use super::tiles::{KernelTiles, Kernels};
use super::{Plan, kernel_dims};
use crate::cuda::Properties;
use crate::cuda::device::ALIGNMENT;
use crate::cuda::params::{StarMergedRow, StarRange, StarTile};
use crate::cuda::policy::Dims;
use crate::{Capacity, Error, PlanConfig, Result};

/// Splits beyond the first of all tiles of a launch, over the blocks that run at the same time. The
/// rule for split lengths asks for no more where all lists are of one length.
const SPLITS_OVER_PLACES: usize = 4;

/// Counts of what a launch has in the tables, or of how much room is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub tiles: usize,
    /// Rows of the output that are merged.
    pub merged: usize,
    pub partial_rows: usize,
}

impl Counts {
    pub fn fit(&self, room: &Self) -> bool {
        self.tiles <= room.tiles && self.merged <= room.merged && self.partial_rows <= room.partial_rows
    }
}

/// The room of a launch.
#[derive(Clone, Debug)]
pub(super) struct LaunchRoom {
    /// Its kernel, and where its tiles stand in the table of tiles.
    pub launch: KernelTiles,
    pub counts: Counts,
}

/// The room of a plan: what its tables are laid out by, so that their places stay while what they
/// hold changes.
#[derive(Clone, Debug)]
pub(super) struct Room {
    pub launches: Vec<LaunchRoom>,
    pub pages: usize,
    /// Ranges of block lists.
    pub ranges: usize,
    pub merged: usize,
    pub partial_rows: usize,
    value_dim: usize,
}

/// Where the parts of a plan's tables begin, in bytes; the tiles come first.
pub(super) struct Places {
    pub pages: usize,
    pub ranges: usize,
    pub merged: usize,
    pub end: usize,
}

impl Room {
    /// No more than a plan takes.
    pub fn of(plan: &Plan) -> Self {
        let launches = plan.launches.iter().cloned();
        Self {
            launches: launches.map(|launch| LaunchRoom { launch, counts: Counts::default() }).collect(),
            pages: plan.pages.len(),
            ranges: plan.ranges.len(),
            merged: plan.merged.len(),
            partial_rows: plan.partial_rows,
            value_dim: plan.value_dim,
        }
    }

    /// Enough for any batch within a capacity.
    ///
    /// # Errors
    /// [`Error::Value`] for a head dim without kernels, or more room than kernels can count.
    pub fn for_capacity(properties: &Properties, config: &PlanConfig, capacity: &Capacity) -> Result<Self> {
        let ([_, _, query_heads, head_dim], value_dim) = (capacity.query, capacity.value_dim);
        let dims = kernel_dims(head_dim, value_dim)?;
        let parts = Dims { key: head_dim, value: value_dim }.parts(dims);
        let kernels = Kernels::new(properties, config, dims);
        let group = query_heads / capacity.key[2];
        let mut room = Self {
            launches: Vec::new(),
            pages: capacity.pages,
            ranges: capacity.ranges,
            merged: 0,
            partial_rows: 0,
            value_dim,
        };
        let mut tiles = 0usize;
        for policy in kernels.all() {
            let rows = kernels.most_rows(&policy, group, capacity.most_rows());
            if rows == 0 || capacity.sequences == 0 {
                continue;
            }
            let pack = kernels.pack(&policy, group, rows);
            let split_keys = config.fixed_split_keys().map(|len| kernels.whole_steps(len));
            let launch = KernelTiles { policy, pack, tiles: 0..0 };
            let counts = most_counts(properties, capacity, &launch, rows, split_keys);
            let end = tiles.saturating_add(counts.tiles);
            let blocks = counts.tiles.saturating_mul(query_heads / pack).saturating_mul(parts);
            room.merged = room.merged.saturating_add(counts.merged);
            room.partial_rows = room.partial_rows.saturating_add(counts.partial_rows);
            if [blocks, end, room.merged, room.partial_rows, room.pages, room.ranges]
                .iter()
                .any(|&n| i32::try_from(n).is_err())
            {
                let got = format!("{counts:?}, {} pages, {} ranges", room.pages, room.ranges);
                return Err(Error::value("capacity", "fewer than 2³¹ blocks, rows, pages and ranges", got));
            }
            let launch = KernelTiles { tiles: tiles..end, ..launch };
            room.launches.push(LaunchRoom { launch, counts });
            tiles = end;
        }
        Ok(room)
    }

    /// Places of the tables' parts.
    pub fn places(&self) -> Places {
        let after = |start: usize, bytes: usize| (start + bytes).next_multiple_of(ALIGNMENT);
        let tiles = self.launches.last().map_or(0, |room| room.launch.tiles.end);
        let pages = after(0, tiles * size_of::<StarTile>());
        let ranges = after(pages, self.pages * size_of::<u32>());
        let merged = after(ranges, self.ranges * size_of::<StarRange>());
        Places { pages, ranges, merged, end: after(merged, self.merged * size_of::<StarMergedRow>()) }
    }

    /// Bytes of the partial outputs, which their log-sum-exps follow.
    pub fn partial_out_bytes(&self) -> usize {
        4 * self.partial_rows * self.value_dim
    }

    /// Bytes of the partial results.
    pub fn partials_bytes(&self) -> usize {
        self.partial_out_bytes() + 4 * self.partial_rows
    }

    /// The room of a kernel.
    pub fn of_kernel(&self, kernel: &str) -> Option<&LaunchRoom> {
        self.launches.iter().find(|room| room.launch.policy.kernel == kernel)
    }
}

/// What a launch takes at most, for sequences of up to `rows` query rows. `split_keys` is the fixed
/// split length in whole steps, if there is one.
fn most_counts(
    properties: &Properties,
    capacity: &Capacity,
    launch: &KernelTiles,
    rows: usize,
    split_keys: Option<usize>,
) -> Counts {
    let KernelTiles { policy, pack, .. } = launch;
    let (pack, query_heads) = (*pack, capacity.query[2]);
    let heads = query_heads / pack;
    let all_rows = capacity.most_rows_in_all(rows);
    // A tile has a token of its own, whatever the mask, and a token is in as few tiles as hold its
    // heads.
    let of_token = pack.div_ceil(policy.rows());
    let unsplit = all_rows.saturating_mul(of_token);
    let Some(len) = split_keys else {
        // Tiles that are split are no more than fill the device.
        let at_once = places(policy, properties).div_ceil(heads);
        let (extra, split) = (SPLITS_OVER_PLACES * at_once, at_once.min(unsplit));
        let tile_rows = policy.rows().min(rows * pack) * heads;
        return Counts {
            tiles: unsplit.saturating_add(extra),
            merged: (tile_rows * split).min(all_rows.saturating_mul(query_heads)),
            partial_rows: tile_rows * (extra + split),
        };
    };
    // Tiles of a sequence whose lists are longer than a split. Under a star mask a list is at most
    // two blocks long, except in the first block, so only blocks from half a split on have such
    // lists; three more are the first block, and two that the rows cut. A window cuts rows in two
    // places. A block list may cut them anywhere.
    let blocks = 2 * rows / len + 3;
    let long_tiles = match capacity.ranges {
        0 => (rows * of_token).min(rows * pack / policy.rows() + blocks),
        _ => rows * of_token,
    };
    let [merged, partial_rows] = capacity.most_split_rows(rows, len);
    let [_, keys] = capacity.most_keys();
    let extra = if merged == 0 { 0 } else { long_tiles.saturating_mul(keys / len) };
    Counts {
        tiles: unsplit.saturating_add(extra),
        merged: merged.saturating_mul(query_heads),
        partial_rows: partial_rows.saturating_mul(query_heads),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cases::{configs, within_capacities};
    use crate::cuda::HEAD_DIMS;
    use crate::cuda::flash::splits::smallest_split;
    use crate::{Keys, Mask, Sequence};
    use proptest::prelude::*;

    const H100: Properties = Properties::new(132, 228 * 1024, 50 << 20);

    fn properties() -> impl Strategy<Value = Properties> {
        prop::sample::select(vec![Properties::new(8, 100 * 1024, 1 << 20), H100])
    }

    proptest! {
        #[test]
        fn every_batch_within_a_capacity_fits_its_room(
            (capacity, batch) in within_capacities(prop::sample::select(HEAD_DIMS.to_vec())),
            config in configs(),
            properties in properties(),
        ) {
            let room = Room::for_capacity(&properties, &config, &capacity).unwrap();
            let plan = Plan::within(&properties, &config, &batch, &room).unwrap();
            prop_assert!(plan.pages.len() <= room.pages && plan.ranges.len() <= room.ranges);
            prop_assert!(plan.merged.len() <= room.merged);
            prop_assert!(plan.partial_rows <= room.partial_rows);
            for launch in &plan.launches {
                let own = room.of_kernel(launch.policy.kernel).unwrap();
                prop_assert_eq!(launch.pack, own.launch.pack);
                prop_assert!(launch.tiles.len() <= own.launch.tiles.len());
                if config.fixed_split_keys().is_none() {
                    let tiles = &plan.tiles[launch.tiles.clone()];
                    let walks = tiles.iter().map(|tile| (tile.end - tile.begin) as usize);
                    let total = plan.heads(launch) * walks.clone().sum::<usize>();
                    let share = total / places(&launch.policy, &properties);
                    let longest = walks.max().unwrap();
                    let smallest = smallest_split(&launch.policy);
                    prop_assert!(longest <= 2 * share + smallest, "{longest} keys, a share of {share}");
                }
            }
        }
    }

    /// 256 decodes and a prefill, each over 128K keys in pages of 16.
    fn capacities() -> [Capacity; 2] {
        [[256, 1], [8, 2048]].map(|[sequences, rows]| {
            let pages = sequences << 13;
            let key = [pages, 16, 8, 128];
            Capacity::new([sequences, rows, 32, 128], key, sequences, rows).with_pages(pages)
        })
    }

    /// With a fixed split length the room is about what the largest batch takes.
    #[test]
    fn fixed_splits_take_what_the_largest_batch_needs() {
        let config = PlanConfig::new().with_row_invariant();
        for capacity in capacities() {
            let room = Room::for_capacity(&H100, &config, &capacity).unwrap();
            let mut batch = capacity.empty_batch().unwrap();
            for index in 0..capacity.sequences {
                let pages: Vec<u32> = (0..1 << 13).collect();
                let keys = Keys::pages(1 << 17, pages);
                batch.push(Sequence::new(index, 0..capacity.rows, keys, Mask::Full)).unwrap();
            }
            let plan = Plan::within(&H100, &config, &batch, &room).unwrap();
            let of = |part: usize, whole: usize| part as f64 / whole as f64;
            assert!(
                of(plan.partial_rows, room.partial_rows) > 0.9,
                "{} {}",
                plan.partial_rows,
                room.partial_rows
            );
            assert!(of(plan.merged.len(), room.merged) > 0.9, "{} {}", plan.merged.len(), room.merged);
        }
    }

    /// Equal sequences are split as they are without a room.
    #[test]
    fn room_for_equal_sequences_forces_no_longer_splits() {
        let config = PlanConfig::new();
        for (sequences, rows) in (1..=70).flat_map(|sequences| [(sequences, 1), (sequences, 16)]) {
            let (query, key) = ([sequences, rows, 32, 128], [1, 1 << 17, 8, 128]);
            let capacity = Capacity::new(query, key, sequences, rows);
            let mut batch = capacity.empty_batch().unwrap();
            for index in 0..sequences {
                let keys = Keys::rows(0, 0..1 << 17);
                batch.push(Sequence::new(index, 0..rows, keys, Mask::Full)).unwrap();
            }
            let room = Room::for_capacity(&H100, &config, &capacity).unwrap();
            let within = Plan::within(&H100, &config, &batch, &room).unwrap().splits();
            let alone = Plan::for_batch(&H100, &config, &batch).unwrap().splits();
            assert_eq!(within, alone, "{sequences} sequences of {rows} rows");
        }
    }

    /// Plain plans take no more for partial results than fills the device a few times.
    #[test]
    fn balanced_splits_take_little() {
        for (capacity, most) in capacities().into_iter().zip([4 << 20, 160 << 20]) {
            let room = Room::for_capacity(&H100, &PlanConfig::new(), &capacity).unwrap();
            assert!(room.partials_bytes() < most, "{}", room.partials_bytes());
        }
    }

    /// Public fields of a capacity may hold anything.
    #[test]
    fn counts_do_not_overflow() {
        let of = |sequences: usize, rows: usize, pages: usize, config: PlanConfig| {
            let capacity = Capacity::new([3, 50, 8, 64], [5, 16, 2, 64], sequences, rows).with_pages(pages);
            Room::for_capacity(&H100, &config, &capacity)
        };
        for config in [PlanConfig::new(), PlanConfig::new().with_split_keys(1)] {
            for (sequences, rows) in [(usize::MAX, usize::MAX), (usize::MAX, 1), (0, 0), (0, 1), (1, 0)] {
                of(sequences, rows, 0, config).unwrap();
                of(sequences, rows, 1000, config).unwrap();
                let error = of(sequences, rows, usize::MAX, config);
                assert!(
                    matches!(error, Err(Error::Value { argument: "capacity", .. }))
                        || sequences.min(rows) == 0
                );
            }
            // Rows beyond the tensor's change nothing.
            let [all, more] = [50, usize::MAX].map(|rows| of(4, rows, 9, config).unwrap().places().end);
            assert_eq!(all, more);
        }
    }
}
