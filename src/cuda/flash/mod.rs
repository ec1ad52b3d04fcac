//! Attention on a GPU: `cuda/include/flash.cuh` under a plan made on the host.
//!
//! ```text
//! batch → segments of rows that share their keys (schedule) → tiles of rows, longest first, their keys perhaps split (Plan)
//!       → one launch: tiles × heads → out and lse, or partials, which a second launch merges
//! ```
//!
//! Up to [`FEW_ROWS`] rows for each KV head, counted over the query heads that share it, are query
//! attention: bound by reading keys, so the heads of a group are rows of one tile. More rows are
//! context encoding: bound by products; there too the heads of a group share tiles if the tokens
//! alone do not fill one.
//!
//! Keys are split where there are too few tiles for the multiprocessors (`splits`).
//!
//! One batch has one kernel and one count of splits: the sequence with the most rows chooses the
//! kernel, and that with the most keys limits the splits.

mod division;
mod pages;
mod prepared;
mod splits;

use super::Properties;
use super::device::{ALIGNMENT, Device, SpanMut, bytes_of, check_not_capturing};
use super::params::StarTile;
use super::policy::{HEAD_DIMS, Policy};
use crate::schedule::{self, Segment};
use crate::{AttentionConfig, AttentionShape, Batch, Error, Keys, Result, ScoreConfig, Sequence};
pub use pages::PageTable;
pub use prepared::Prepared;

/// Rows of a KV head up to which attention is bound by reading its keys: two tiles of 16, which
/// find the keys in the cache.
pub const FEW_ROWS: usize = 32;

/// Names of the variants of the kernel for many rows, for one head dim.
#[cfg(feature = "variants")]
pub fn variants(head_dim: usize) -> impl Iterator<Item = &'static str> {
    Policy::variants(head_dim).into_iter().map(|policy| policy.kernel)
}

/// How a call of known sequences and extents is worked off on a device. Made once, it serves every
/// layer of a model.
#[derive(Clone, Debug)]
pub struct Plan {
    score: ScoreConfig,
    /// `[batch, seq, query_heads, head_dim]`.
    query: [usize; 4],
    /// `[batch, seq, kv_heads, head_dim]`, or `[pages, page_len, kv_heads, head_dim]`.
    key: [usize; 4],
    policy: Policy,
    /// Query heads of a KV head that are rows of one tile.
    pack: usize,
    splits: usize,
    /// Longest first.
    tiles: Vec<StarTile>,
    /// Where keys lie in pages: those of each sequence in order, one sequence after another.
    pages: Vec<u32>,
    /// Where keys are split and there are rows of padding: the rows of all sequences, as `batch ·
    /// seq + row`.
    merged: Vec<u32>,
    /// Visible (row, key) pairs of one query head.
    pairs: u64,
}

impl Plan {
    /// A plan for sequences of one length under one mask: [`for_batch`](Self::for_batch) of
    /// [`Batch::uniform`].
    ///
    /// # Errors
    /// [`Error::Value`] for a config out of range or a head dim without kernels, [`Error::Shape`]
    /// for extents out of range.
    pub fn new(properties: &Properties, config: &AttentionConfig, shape: &AttentionShape) -> Result<Self> {
        Self::for_batch(properties, &config.score(), &uniform(config, shape)?)
    }

    /// [`new`](Self::new) by a variant of the kernel for many rows: one of [`variants`] for this
    /// head dim. Few rows take the kernel for few rows.
    ///
    /// # Errors
    /// As [`new`](Self::new), and [`Error::Value`] for a name that is no variant, or one that needs
    /// more shared memory than the device has.
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
        Self::with_encode(properties, &config.score(), &uniform(config, shape)?, |_| policy)
    }

    /// A plan for packed sequences of different lengths under one mask:
    /// [`for_batch`](Self::for_batch) of [`Batch::packed`].
    ///
    /// # Errors
    /// [`Error::Value`] for a config out of range, a head dim without kernels or offsets that do
    /// not ascend from 0 to the total; [`Error::Shape`] for extents out of range, a batch other
    /// than 1, or offsets of different counts.
    pub fn packed(
        properties: &Properties,
        config: &AttentionConfig,
        shape: &AttentionShape,
        query_offsets: &[usize],
        key_offsets: &[usize],
    ) -> Result<Self> {
        let batch = Batch::packed(shape, query_offsets, key_offsets, config.mask)?;
        Self::for_batch(properties, &config.score(), &batch)
    }

    /// A plan for the sequences of a batch. Their keys are all rows or all in pages; a batch
    /// without sequences is no work.
    ///
    /// # Errors
    /// [`Error::Value`] for a score config out of range, a head dim without kernels, or more than
    /// 2³¹ - 1 pages in use; [`Error::Shape`] for extents that kernels cannot count;
    /// [`Error::Sequence`] with [`Error::Value`] for a sequence of 2³¹ keys or more, or whose keys
    /// are rows where others' are in pages.
    pub fn for_batch(properties: &Properties, score: &ScoreConfig, batch: &Batch) -> Result<Self> {
        Self::with_encode(properties, score, batch, Policy::encode)
    }

    /// `encode` gives the policy for many rows of a head dim.
    fn with_encode(
        properties: &Properties,
        score: &ScoreConfig,
        batch: &Batch,
        encode: impl FnOnce(usize) -> Policy,
    ) -> Result<Self> {
        let (query, key, group) = (batch.query_shape(), batch.key_shape(), batch.group());
        let head_dim = query[3];
        score.validate()?;
        if !HEAD_DIMS.contains(&head_dim) {
            return Err(Error::value("head_dim", format!("one of {HEAD_DIMS:?}"), head_dim));
        }
        check_countable(query, key)?;
        let most_rows = batch.sequences().iter().map(|sequence| sequence.rows.len()).max().unwrap_or(0);
        let (policy, pack) = if most_rows * group <= FEW_ROWS {
            (Policy::query(head_dim), group)
        } else {
            let policy = encode(head_dim);
            (policy, if most_rows < policy.rows() { group } else { 1 })
        };
        let mut plan = Self {
            score: *score,
            query,
            key,
            policy,
            pack,
            splits: 1,
            tiles: Vec::new(),
            pages: Vec::new(),
            merged: Vec::new(),
            pairs: 0,
        };
        let paged = batch.sequences().first().is_some_and(|first| matches!(first.keys, Keys::Pages { .. }));
        for (index, sequence) in batch.sequences().iter().enumerate() {
            plan.push_sequence(sequence, paged)
                .map_err(|source| Error::Sequence { index, source: Box::new(source) })?;
        }
        check_count("pages", "fewer than 2³¹ pages in use", plan.pages.len())?;
        plan.split(properties, batch.sequences());
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
        self.query[2] / self.pack
    }

    /// Adds a sequence's tiles and pages. `paged`: whether keys lie in pages.
    fn push_sequence(&mut self, sequence: &Sequence, paged: bool) -> Result<()> {
        let Sequence { ref rows, ref keys, mask, .. } = *sequence;
        let len = keys.len();
        check_count("keys", "fewer than 2³¹ keys", len)?;
        // Where the keys start on the axes batch (or in the page table) and seq.
        let start = match (keys, paged) {
            (Keys::Rows { batch, rows }, false) => [*batch, rows.start],
            (Keys::Pages { pages, .. }, true) => {
                let start = self.pages.len();
                self.pages.extend(&pages[..len.div_ceil(self.key[1].max(1))]);
                [start, 0]
            }
            (Keys::Rows { .. }, true) => {
                return Err(Error::value("keys", "pages, as sequence 0 has", "rows"));
            }
            (Keys::Pages { .. }, false) => {
                return Err(Error::value("keys", "rows, as sequence 0 has", "pages"));
            }
        };
        schedule::segments(mask, rows.len(), len, |segment| {
            self.pairs += segment.pairs() as u64;
            self.push_tiles(sequence, start.map(|at| at as u32), &segment);
        });
        Ok(())
    }

    fn push_tiles(&mut self, sequence: &Sequence, [key_batch, key_start]: [u32; 2], segment: &Segment) {
        let rows = segment.rows.start * self.pack..segment.rows.end * self.pack;
        for start in rows.clone().step_by(self.policy.rows()) {
            let end = rows.end.min(start + self.policy.rows());
            self.tiles.push(StarTile {
                batch: sequence.batch as u32,
                key_batch,
                row: (sequence.rows.start * self.pack + start) as u32,
                rows: (end - start) as u32,
                key_start,
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

    /// In how many parts each tile's keys are walked.
    pub fn splits(&self) -> usize {
        self.splits
    }

    /// Multiply-adds that the masks leave, each counted as two: `4 · head_dim` per query head for
    /// every key a row sees.
    pub fn flops(&self) -> u64 {
        4 * self.pairs * (self.query[2] * self.query[3]) as u64
    }

    /// Bytes of the workspace: the tiles, the page table, and, where keys are split, the rows to
    /// merge and their partials.
    pub fn workspace_len(&self) -> usize {
        let elements = if self.splits > 1 { self.splits * (self.out_len() + self.lse_len()) } else { 0 };
        self.workspace().partials + 4 * elements
    }

    fn workspace(&self) -> Workspace {
        let after = |start: usize, bytes: usize| (start + bytes).next_multiple_of(ALIGNMENT);
        let pages = after(0, size_of_val(&self.tiles[..]));
        let merged = after(pages, size_of_val(&self.pages[..]));
        Workspace { pages, merged, partials: after(merged, size_of_val(&self.merged[..])) }
    }

    fn out_len(&self) -> usize {
        self.query.iter().product()
    }

    fn lse_len(&self) -> usize {
        self.query[..3].iter().product()
    }

    /// Copies the plan to a workspace of [`workspace_len`](Self::workspace_len) bytes on a device,
    /// for calls on one stream.
    ///
    /// # Errors
    /// [`Error::Workspace`] if it is too small, [`Error::Value`] if it is not aligned to 16 bytes
    /// or was borrowed for another stream, or if the stream is being captured in a graph; errors of
    /// the driver. Nothing was written then.
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
        let at = self.workspace();
        let parts = [
            (0, bytes_of(&self.tiles)),
            (at.pages, bytes_of(&self.pages)),
            (at.merged, bytes_of(&self.merged)),
        ];
        // SAFETY: inside the workspace, as just checked, and that is borrowed to be written.
        unsafe {
            for (at, bytes) in parts.into_iter().filter(|(_, bytes)| !bytes.is_empty()) {
                device.upload(stream, workspace.address + at as u64, bytes)?;
            }
        }
        Ok(Prepared { plan: self, device, stream, workspace })
    }
}

/// Where the parts of a workspace begin, in bytes. The tiles come first.
struct Workspace {
    pages: usize,
    merged: usize,
    partials: usize,
}

fn uniform(config: &AttentionConfig, shape: &AttentionShape) -> Result<Batch> {
    shape.validate()?;
    // Before there is a sequence for each index of the batch.
    check_countable(shape.query_shape(), shape.key_shape())?;
    Batch::uniform(shape, config.mask)
}

/// Refuses extents that the kernels do not count, in 32 bits: of an axis, or of query rows times
/// the heads of a group.
fn check_countable(query: [usize; 4], key: [usize; 4]) -> Result<()> {
    let group = query[2] / key[2];
    let rows = query[1].saturating_mul(group);
    let largest = |extents: [usize; 3]| extents.into_iter().max().unwrap_or(0);
    for (argument, largest, expected) in [
        ("query", largest([query[0], rows, query[2]]), "extents below 2³¹ (batch, seq times group, heads)"),
        ("key", largest([key[0], key[1], key[2]]), "extents below 2³¹ (batch, seq, heads)"),
    ] {
        if i32::try_from(largest).is_err() {
            return Err(Error::shape(argument, expected, largest.to_string()));
        }
    }
    Ok(())
}

fn check_count(argument: &'static str, expected: &str, got: usize) -> Result<()> {
    i32::try_from(got).map_err(|_| Error::value(argument, expected, got)).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mask;

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
