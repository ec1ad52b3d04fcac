//! Attention on a GPU: `cuda/include/flash.cuh` under a plan made on the host.
//!
//! ```text
//! mask → segments of rows that share their keys (schedule) → tiles of rows, longest first, their keys perhaps split (Plan)
//!      → one launch: tiles × heads → out and lse, or partials, which a second launch merges
//! ```
//!
//! Up to [`FEW_ROWS`] rows for each KV head, counted over the query heads that share it, are query attention: bound by reading keys, so the heads of a
//! group are rows of one tile. More rows are context encoding: bound by products; there too the heads of a group share tiles if the tokens
//! alone do not fill one.
//!
//! Keys are split where there are too few tiles for the multiprocessors. With `w(s) = tiles · s / places` waves of blocks for `s` splits, the GPU is
//! busy for `w / ⌈w⌉` of the time: the smallest count within 85% of the best is taken (FlashAttention's rule), from one up to as many as
//! leave four tiles of keys for each.

mod prepared;

use super::Properties;
use super::device::{ALIGNMENT, Device, SpanMut, bytes_of, check_not_capturing};
use super::params::StarTile;
use super::policy::{HEAD_DIMS, Policy};
use crate::schedule::{self, Segment};
use crate::{AttentionConfig, AttentionShape, Error, Result};
pub use prepared::Prepared;
use std::ops::Range;

/// Rows of a KV head up to which attention is bound by reading its keys: two tiles of 16, which find the keys in the cache.
pub const FEW_ROWS: usize = 32;
/// Tiles of keys below which a split costs more than it saves.
const SPLIT_TILES: usize = 4;
/// More splits than this, and the merge begins to count.
const MAX_SPLITS: usize = 128;

/// Keys and values in pages, as engines with a paged cache keep them: tensors `[pages, page_len, kv_heads, head_dim]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageTable {
    /// Pages of the tensors.
    pub pages: usize,
    /// Tokens of a page: a power of two below 2³¹.
    pub page_len: usize,
    /// For each sequence its number of keys, and the pages that hold them in order.
    pub sequences: Vec<(usize, Vec<u32>)>,
}

/// Names of the variants of the kernel for many rows, for one head dim.
#[cfg(feature = "variants")]
pub fn variants(head_dim: usize) -> impl Iterator<Item = &'static str> {
    Policy::variants(head_dim).into_iter().map(|policy| policy.kernel)
}

/// Where a sequence lies on the axes of queries and keys.
#[derive(Clone)]
struct Sequence {
    batch: usize,
    query: Range<usize>,
    key: Range<usize>,
}

/// The sequences of a batch of one length.
fn batch(shape: &AttentionShape) -> impl Iterator<Item = Sequence> + Clone {
    let (query_len, key_len) = (shape.query_len, shape.key_len);
    (0..shape.batch).map(move |batch| Sequence { batch, query: 0..query_len, key: 0..key_len })
}

/// How a call of known config and extents is worked off on a device. Made once, it serves every layer of a model.
#[derive(Clone, Debug)]
pub struct Plan {
    config: AttentionConfig,
    shape: AttentionShape,
    policy: Policy,
    /// Query heads of a KV head that are rows of one tile.
    pack: usize,
    splits: usize,
    /// Longest first.
    tiles: Vec<StarTile>,
    /// Visible (row, key) pairs of one query head.
    pairs: u64,
    /// `[sequences, pages of the longest]`, and how pages lie.
    table: Option<(Vec<u32>, PageTable)>,
}

impl Plan {
    /// A plan for sequences of one length.
    ///
    /// # Errors
    /// [`Error::Value`] for a config out of range or a head dim without kernels, [`Error::Shape`] for extents out of range.
    pub fn new(properties: &Properties, config: &AttentionConfig, shape: &AttentionShape) -> Result<Self> {
        Self::with_sequences(properties, config, shape, Policy::encode, batch(shape))
    }

    /// [`new`](Self::new) by a variant of the kernel for many rows: one of [`variants`] for this head dim. Few rows take the
    /// kernel for few rows.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Value`] for a name that is no variant, or one that needs more shared memory than
    /// the device has.
    #[cfg(feature = "variants")]
    pub fn variant(
        properties: &Properties,
        config: &AttentionConfig,
        shape: &AttentionShape,
        name: &str,
    ) -> Result<Self> {
        let variants = Policy::variants(shape.head_dim);
        let fits = |policy: &&Policy| policy.shared_bytes() < properties.shared_bytes;
        let Some(&policy) = variants.iter().filter(fits).find(|policy| policy.kernel == name) else {
            let names: Vec<_> = variants.iter().filter(fits).map(|policy| policy.kernel).collect();
            return Err(Error::value("name", format!("one of {names:?}"), name));
        };
        Self::with_sequences(properties, config, shape, |_| policy, batch(shape))
    }

    /// A plan for packed sequences of different lengths, as [`cpu::flash::Plan::packed`](crate::cpu::flash::Plan::packed).
    ///
    /// # Errors
    /// [`Error::Value`] for a config out of range, a head dim without kernels or offsets that do not ascend from 0 to the total;
    /// [`Error::Shape`] for extents out of range, a batch other than 1, or offsets of different counts.
    pub fn packed(
        properties: &Properties,
        config: &AttentionConfig,
        shape: &AttentionShape,
        query_offsets: &[usize],
        key_offsets: &[usize],
    ) -> Result<Self> {
        let sequences = schedule::packed_sequences(shape, query_offsets, key_offsets)?;
        let sequences = sequences.into_iter().map(|[query, key]| Sequence { batch: 0, query, key });
        Self::with_sequences(properties, config, shape, Policy::encode, sequences)
    }

    /// A plan for keys and values in pages. Queries are packed as in [`packed`](Self::packed), `query_offsets` for the sequences of `table` in order;
    /// `shape.key_len` is the sum of their keys.
    ///
    /// # Errors
    /// As [`packed`](Self::packed), and [`Error::Value`] if a page is none of the table's, or a sequence has too few of them for its keys.
    pub fn paged(
        properties: &Properties,
        config: &AttentionConfig,
        shape: &AttentionShape,
        query_offsets: &[usize],
        table: &PageTable,
    ) -> Result<Self> {
        let PageTable { pages, page_len, ref sequences } = *table;
        if !page_len.is_power_of_two() || i32::try_from(page_len).is_err() {
            return Err(Error::value("page_len", "a power of two below 2³¹", page_len));
        }
        for (keys, list) in sequences {
            if list.len() < keys.div_ceil(page_len) {
                let expected = format!("{} pages for {keys} keys", keys.div_ceil(page_len));
                return Err(Error::value("sequences", expected, list.len()));
            }
            if let Some(page) = list.iter().find(|&&page| page as usize >= pages) {
                return Err(Error::value("sequences", format!("pages below {pages}"), page));
            }
        }
        let mut key_offsets = vec![0];
        key_offsets.extend(sequences.iter().scan(0, |end, (keys, _)| {
            *end += keys;
            Some(*end)
        }));
        let places = schedule::packed_sequences(shape, query_offsets, &key_offsets)?;
        let places = places.into_iter().map(|[query, key]| Sequence { batch: 0, query, key: 0..key.len() });
        let longest = sequences.iter().map(|(_, list)| list.len()).max().unwrap_or(0);
        let rows = sequences
            .iter()
            .flat_map(|(_, list)| list.iter().copied().chain(std::iter::repeat_n(0, longest - list.len())));
        let mut plan = Self::with_sequences(properties, config, shape, Policy::encode, places)?;
        plan.table = Some((rows.collect(), table.clone()));
        Ok(plan)
    }

    fn with_sequences(
        properties: &Properties,
        config: &AttentionConfig,
        shape: &AttentionShape,
        encode: impl FnOnce(usize) -> Policy,
        sequences: impl Iterator<Item = Sequence> + Clone,
    ) -> Result<Self> {
        config.validate()?;
        shape.validate()?;
        if !HEAD_DIMS.contains(&shape.head_dim) {
            return Err(Error::value("head_dim", format!("one of {HEAD_DIMS:?}"), shape.head_dim));
        }
        let group = shape.group();
        // What the kernels count in 32 bits.
        let largest = (shape.query_len.max(shape.key_len)).max(shape.batch).saturating_mul(group);
        let largest = largest.max(shape.query_heads);
        if i32::try_from(largest).is_err() {
            return Err(Error::shape(
                "query",
                "extents below 2³¹ (heads; tokens times heads of a group)",
                largest.to_string(),
            ));
        }
        let tokens = sequences.clone().map(|s| s.query.len()).max().unwrap_or(0);
        let (policy, pack) = if tokens * group <= FEW_ROWS {
            (Policy::query(shape.head_dim), group)
        } else {
            let policy = encode(shape.head_dim);
            (policy, if tokens < policy.rows() { group } else { 1 })
        };
        let mut plan = Self {
            config: *config,
            shape: *shape,
            policy,
            pack,
            splits: 1,
            tiles: Vec::new(),
            pairs: 0,
            table: None,
        };
        for (index, sequence) in sequences.enumerate() {
            schedule::segments(config.mask, sequence.query.len(), sequence.key.len(), |segment| {
                plan.pairs += segment.pairs() as u64;
                plan.push_tiles(index, &sequence, &segment);
            });
        }
        plan.split(properties);
        let blocks = plan.tiles.len().saturating_mul(plan.heads());
        if i32::try_from(blocks).is_err() {
            return Err(Error::shape("query", "at most 2³¹ - 1 tiles times heads", blocks.to_string()));
        }
        // The sort is stable: among equals, neighbours stay together.
        plan.tiles.sort_by_key(|tile| std::cmp::Reverse(tile.end - tile.begin));
        Ok(plan)
    }

    /// Heads of a launch: query heads, or KV heads where the others are rows.
    fn heads(&self) -> usize {
        self.shape.query_heads / self.pack
    }

    fn push_tiles(&mut self, index: usize, sequence: &Sequence, segment: &Segment) {
        let rows = segment.rows.start * self.pack..segment.rows.end * self.pack;
        for start in rows.clone().step_by(self.policy.rows()) {
            let end = rows.end.min(start + self.policy.rows());
            self.tiles.push(StarTile {
                batch: sequence.batch as u32,
                sequence: index as u32,
                row: (sequence.query.start * self.pack + start) as u32,
                rows: (end - start) as u32,
                key_start: sequence.key.start as u32,
                prefix: segment.prefix as u32,
                start: segment.start as u32,
                visible: segment.visible(start / self.pack) as u32,
                causal: u32::from(segment.causal),
                begin: 0,
                end: segment.visible((end - 1) / self.pack) as u32,
                split: 0,
            });
        }
    }

    /// Splits the keys of every tile into as many parts as fill the device.
    fn split(&mut self, properties: &Properties) {
        let unit = self.policy.keys * self.policy.key_warps;
        let longest = self.tiles.iter().map(|tile| tile.end as usize).max().unwrap_or(0);
        let most = (longest / (unit * SPLIT_TILES)).min(MAX_SPLITS);
        // A multiprocessor keeps a KB of each block's shared memory for itself, and has registers for two blocks of these kernels.
        let resident = (properties.shared_bytes / (self.policy.shared_bytes() + 1024)).clamp(1, 2);
        let places = properties.multiprocessors.max(1) * resident;
        self.splits = split_count(self.tiles.len() * self.heads(), places, most);
        if self.splits > 1 {
            let whole = std::mem::take(&mut self.tiles);
            for tile in whole {
                let each = (tile.end as usize).div_ceil(self.splits).next_multiple_of(unit) as u32;
                self.tiles.extend((0..self.splits as u32).map(|split| StarTile {
                    begin: (split * each).min(tile.end),
                    end: ((split + 1) * each).min(tile.end),
                    split,
                    ..tile
                }));
            }
        }
    }

    /// In how many parts each tile's keys are walked.
    pub fn splits(&self) -> usize {
        self.splits
    }

    /// Multiply-adds that the mask leaves, each counted as two: `4 · head_dim` per query head for every key a row sees.
    pub fn flops(&self) -> u64 {
        4 * self.pairs * (self.shape.query_heads * self.shape.head_dim) as u64
    }

    /// Bytes of the workspace: the tiles, the page table, and partials where keys are split.
    pub fn workspace_len(&self) -> usize {
        self.partials_at()
            + if self.splits > 1 { self.splits * 4 * (self.out_len() + self.shape.lse_len()) } else { 0 }
    }

    fn table_at(&self) -> usize {
        size_of_val(&self.tiles[..]).next_multiple_of(ALIGNMENT)
    }

    fn partials_at(&self) -> usize {
        let table = self.table.as_ref().map_or(0, |(table, _)| size_of_val(&table[..]));
        (self.table_at() + table).next_multiple_of(ALIGNMENT)
    }

    fn out_len(&self) -> usize {
        self.shape.query_shape().iter().product()
    }

    /// Copies the plan to a workspace of [`workspace_len`](Self::workspace_len) bytes on a device, for calls on one stream.
    ///
    /// # Errors
    /// [`Error::Workspace`] if it is too small, [`Error::Value`] if it is not aligned to 16 bytes or was borrowed for another stream, or if the
    /// stream is being captured in a graph; errors of the driver. Nothing was written then.
    pub fn prepare<'a, D: Device>(
        &'a self,
        device: &'a D,
        stream: &'a D::Stream,
        workspace: SpanMut<'a, D, u8>,
    ) -> Result<Prepared<'a, D>> {
        if workspace.len < self.workspace_len() {
            return Err(Error::Workspace { expected: self.workspace_len(), got: workspace.len });
        }
        workspace.check("workspace", 0)?;
        workspace.check_stream("workspace", stream)?;
        check_not_capturing::<D>(stream)?;
        // SAFETY: inside the workspace, as just checked, and that is borrowed to be written.
        unsafe {
            device.upload(stream, workspace.address, bytes_of(&self.tiles))?;
            if let Some((table, _)) = &self.table {
                device.upload(stream, workspace.address + self.table_at() as u64, bytes_of(table))?;
            }
        }
        Ok(Prepared { plan: self, device, stream, workspace })
    }
}

/// The number of splits, at most `most`, that keeps `places` busy with `blocks` blocks for each.
fn split_count(blocks: usize, places: usize, most: usize) -> usize {
    // Nearly full, or nothing to split.
    if blocks == 0 || blocks * 5 >= places * 4 || most <= 1 {
        return 1;
    }
    let busy = |splits: usize| {
        let waves = (blocks * splits) as f64 / places as f64;
        waves / waves.ceil()
    };
    let best = (1..=most).map(busy).fold(0.0, f64::max);
    (1..=most).find(|&splits| busy(splits) >= 0.85 * best).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mask;

    #[test]
    fn splits_fill_the_device() {
        assert_eq!(split_count(8, 264, 1000), 29);
        assert_eq!(split_count(8, 132, 1000), 15);
        // Full, nearly full, nothing to split, no blocks.
        assert_eq!(split_count(264, 264, 64), 1);
        assert_eq!(split_count(212, 264, 64), 1);
        assert_eq!(split_count(8, 264, 1), 1);
        assert_eq!(split_count(0, 264, 64), 1);
        // At most as many as asked for.
        assert_eq!(split_count(1, 264, 16), 14);
    }

    #[test]
    fn tiles_partition_rows_and_splits_their_keys() {
        let mask = Mask::Star { anchor_len: 40, block_len: 200, first_block_len: 200 };
        let shape = AttentionShape {
            batch: 2,
            query_len: 700,
            key_len: 700,
            query_heads: 4,
            kv_heads: 2,
            head_dim: 64,
        };
        let properties = Properties::new(132, 228 * 1024, 50 << 20);
        let plan = Plan::new(&properties, &AttentionConfig::new(mask), &shape).unwrap();
        for batch in 0..2 {
            let mut rows: Vec<_> = plan.tiles.iter().filter(|t| t.batch == batch && t.split == 0).collect();
            rows.sort_by_key(|tile| tile.row);
            let mut next = 0;
            for tile in rows {
                assert_eq!(tile.row, next);
                next += tile.rows;
                // Never across a block.
                assert_eq!(tile.row / 200, (next - 1) / 200);
                let mut parts: Vec<_> =
                    plan.tiles.iter().filter(|t| (t.batch, t.row) == (batch, tile.row)).collect();
                parts.sort_by_key(|part| part.split);
                assert_eq!(parts.len(), plan.splits());
                assert_eq!(parts[0].begin, 0);
                assert!(parts.windows(2).all(|pair| pair[0].end == pair[1].begin));
                let last = tile.row + tile.rows - 1;
                let visible = if last < 200 { last + 1 } else { 40 + last % 200 + 1 };
                assert_eq!(parts.last().unwrap().end, visible);
            }
            assert_eq!(next, 700);
        }
    }
}
