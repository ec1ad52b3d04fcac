//! How much room the tables and partial results of a plan have in device memory, and where.

use super::Plan;
use super::splits::places;
use super::tiles::{KernelTiles, Kernels};
use crate::cuda::device::ALIGNMENT;
use crate::cuda::params::{StarMergedRow, StarTile};
use crate::cuda::{HEAD_DIMS, Properties};
use crate::{Capacity, Error, PlanConfig, Result};

/// Splits beyond the first of all tiles of a launch, over the blocks that run at the same time:
/// twice as many as fill a device once.
const SPLITS_OVER_PLACES: usize = 2;

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
    pub merged: usize,
    pub partial_rows: usize,
    head_dim: usize,
}

/// Where the parts of a plan's tables begin, in bytes; the tiles come first.
pub(super) struct Places {
    pub pages: usize,
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
            merged: plan.merged.len(),
            partial_rows: plan.partial_rows,
            head_dim: plan.query[3],
        }
    }

    /// Enough for any batch within a capacity.
    ///
    /// # Errors
    /// [`Error::Value`] for a head dim without kernels, or more room than kernels can count.
    pub fn for_capacity(properties: &Properties, config: &PlanConfig, capacity: &Capacity) -> Result<Self> {
        let [_, _, query_heads, head_dim] = capacity.query;
        if !HEAD_DIMS.contains(&head_dim) {
            return Err(Error::value("head_dim", format!("one of {HEAD_DIMS:?}"), head_dim));
        }
        let kernels = Kernels::new(config, head_dim);
        let group = query_heads / capacity.key[2];
        let mut room =
            Self { launches: Vec::new(), pages: capacity.pages, merged: 0, partial_rows: 0, head_dim };
        let mut tiles = 0usize;
        for policy in kernels.all() {
            let rows = kernels.most_rows(&policy, group, capacity.rows);
            if rows == 0 || capacity.sequences == 0 {
                continue;
            }
            let pack = kernels.pack(&policy, group, rows);
            let heads = query_heads / pack;
            // A tile has a row of its own, whatever the mask.
            let of_sequence = rows.saturating_mul(pack.div_ceil(policy.rows()));
            let all_rows = capacity.query[0].saturating_mul(capacity.query[1]);
            let unsplit = of_sequence
                .saturating_mul(capacity.sequences)
                .min(all_rows.saturating_mul(pack.div_ceil(policy.rows())));
            let extra = match config.fixed_split_keys() {
                Some(len) => {
                    let len = kernels.whole_steps(len);
                    of_sequence.saturating_mul(most_keys(capacity)) / len
                }
                None => (SPLITS_OVER_PLACES * places(&policy, properties)).div_ceil(heads),
            };
            let tile_rows = policy.rows().min(rows.saturating_mul(pack)).saturating_mul(heads);
            let counts = Counts {
                tiles: unsplit.saturating_add(extra),
                merged: tile_rows.saturating_mul(extra.min(unsplit)),
                partial_rows: tile_rows.saturating_mul(extra.saturating_add(extra.min(unsplit))),
            };
            let end = tiles.saturating_add(counts.tiles);
            let blocks = counts.tiles.saturating_mul(heads);
            room.merged = room.merged.saturating_add(counts.merged);
            room.partial_rows = room.partial_rows.saturating_add(counts.partial_rows);
            if [blocks, end, room.merged, room.partial_rows, room.pages]
                .iter()
                .any(|&n| i32::try_from(n).is_err())
            {
                let got = format!("{counts:?}, {} pages", room.pages);
                return Err(Error::value("capacity", "fewer than 2³¹ blocks, rows and pages", got));
            }
            room.launches
                .push(LaunchRoom { launch: KernelTiles { policy, pack, tiles: tiles..end }, counts });
            tiles = end;
        }
        Ok(room)
    }

    /// Places of the tables' parts.
    pub fn places(&self) -> Places {
        let after = |start: usize, bytes: usize| (start + bytes).next_multiple_of(ALIGNMENT);
        let tiles = self.launches.last().map_or(0, |room| room.launch.tiles.end);
        let pages = after(0, tiles * size_of::<StarTile>());
        let merged = after(pages, self.pages * size_of::<u32>());
        Places { pages, merged, end: after(merged, self.merged * size_of::<StarMergedRow>()) }
    }

    /// Bytes of the partial outputs, which their log-sum-exps follow.
    pub fn partial_out_bytes(&self) -> usize {
        4 * self.partial_rows * self.head_dim
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

/// Keys of all sequences at most.
fn most_keys(capacity: &Capacity) -> usize {
    let prefixes = capacity.sequences.saturating_mul(capacity.prefix[1]);
    let keys = match capacity.pages {
        0 => capacity.sequences.saturating_mul(capacity.key[1]),
        pages => pages.saturating_mul(capacity.key[1]),
    };
    prefixes.saturating_add(keys)
}
