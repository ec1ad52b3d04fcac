//! Attention on a GPU: `cuda/include/flash.cuh` under a plan made on the CPU.
//!
//! ```text
//! batch → segments of rows that share their keys (schedule) → tiles of rows, longest first (tiles), their keys perhaps split (splits)
//!       → a launch for each kernel in use: tiles × heads → out and lse, or partials, which another launch merges
//! ```
//!
//! Each sequence takes the kernel for its own number of rows for each KV head, counted over the
//! query heads that share it. Up to [`FEW_ROWS`] rows are query attention: bound by reading keys,
//! so the heads of a group are rows of one tile. More rows are context encoding: bound by products;
//! there too the heads of a group share tiles if the tokens alone do not fill one. On a Hopper GPU
//! they take its own kernel, where there is one for the head dim.
//!
//! Keys are split where there are too few tiles for the multiprocessors, or some tiles have far
//! more keys than others; or at a fixed length ([`PlanConfig`]).

mod call;
mod division;
mod lasting;
mod pages;
mod prepared;
mod room;
mod splits;
mod tiles;

use super::Properties;
use super::device::{Device, DeviceTensor, Span, SpanMut, bytes_of, check_not_capturing};
use super::params::{StarMergedRow, StarRange, StarTile};
#[cfg(feature = "variants")]
use super::policy::Policy;
use super::policy::{DIMS, Dims};
use crate::batch::with_dim;
use crate::{AttentionConfig, AttentionShape, Batch, Error, Inputs, PlanConfig, Result, ScoreConfig};
pub use lasting::DevicePlan;
pub use pages::PageTable;
pub use prepared::Prepared;
use room::{Places, Room};
use tiles::{KernelTiles, Kernels};

/// Rows of a KV head up to which attention is bound by reading its keys: two tiles of 16, which
/// find the keys in the cache.
pub const FEW_ROWS: usize = 32;

/// Names of the variants of the kernel for many rows, for one head dim.
#[cfg(feature = "variants")]
pub fn variants(head_dim: usize) -> impl Iterator<Item = &'static str> {
    Policy::variants(Dims::same(head_dim)).into_iter().map(|policy| policy.kernel)
}

/// The inputs of a call in device memory: queries of `Q`, keys and values of `T`.
pub type DeviceInputs<'a, 'q, 'k, 's, D, Q, T> =
    Inputs<&'a DeviceTensor<'q, D, Q>, &'a DeviceTensor<'k, D, T>, &'a Span<'s, D, f32>>;

/// How a call of known sequences and extents is worked off on a device. Made once, it serves every
/// layer of a model.
#[derive(Clone, Debug)]
pub struct Plan {
    score: ScoreConfig,
    /// `[batch, seq, query_heads, head_dim]`.
    query: [usize; 4],
    /// `[batch, seq, kv_heads, head_dim]`, or `[pages, page_len, kv_heads, head_dim]`.
    key: [usize; 4],
    value_dim: usize,
    /// Those of the kernels.
    dims: Dims,
    /// As `key`, of the prefixes' keys, and whether a sequence has one.
    prefix: [usize; 4],
    has_prefix: bool,
    /// One for each kernel in use.
    launches: Vec<KernelTiles>,
    /// Of one launch after another, longest first.
    tiles: Vec<StarTile>,
    /// Where keys lie in pages: those of each sequence in order, one sequence after another.
    pages: Vec<u32>,
    /// Those of all block lists.
    ranges: Vec<StarRange>,
    /// The output rows whose keys are split.
    merged: Vec<StarMergedRow>,
    /// Rows of partial results, of all `merged` together.
    partial_rows: usize,
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
        Self::for_batch(properties, &config.score().into(), &uniform(config, shape)?)
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
        let variants = Policy::variants(Dims { key: shape.head_dim, value: shape.value_dim });
        let fits = |policy: &&Policy| policy.shared_bytes() < properties.shared_bytes;
        let Some(&policy) = variants.iter().filter(fits).find(|policy| policy.kernel == name) else {
            let names: Vec<_> = variants.iter().filter(fits).map(|policy| policy.kernel).collect();
            return Err(Error::value("name", format!("one of {names:?}"), name));
        };
        Self::with_kernels(
            properties,
            &config.score().into(),
            &uniform(config, shape)?,
            |config, dims| Kernels::new(properties, config, dims).with_encode(policy),
            None,
        )
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
        let batch = Batch::packed(shape, query_offsets, key_offsets, &config.mask)?;
        Self::for_batch(properties, &config.score().into(), &batch)
    }

    /// A plan for the sequences of a batch. Their keys are all rows or all in pages; a batch
    /// without sequences is no work.
    ///
    /// # Errors
    /// [`Error::Value`] for a config out of range, a head dim without kernels, more than 2³¹ - 1
    /// pages in use, or a fixed split length that leaves more than 2³¹ - 1 partial rows;
    /// [`Error::Shape`] for extents that kernels cannot count; [`Error::Sequence`] with
    /// [`Error::Value`] for a sequence of 2³¹ keys or more, or whose keys are rows where others'
    /// are in pages.
    pub fn for_batch(properties: &Properties, config: &PlanConfig, batch: &Batch) -> Result<Self> {
        let kernels = |config: &_, dims| Kernels::new(properties, config, dims);
        Self::with_kernels(properties, config, batch, kernels, None)
    }

    /// A plan for a batch, whose tables fit a room.
    fn within(properties: &Properties, config: &PlanConfig, batch: &Batch, room: &Room) -> Result<Self> {
        let kernels = |config: &_, dims| Kernels::new(properties, config, dims);
        Self::with_kernels(properties, config, batch, kernels, Some(room))
    }

    /// `kernels` gives the kernels to choose from for their dims.
    fn with_kernels(
        properties: &Properties,
        config: &PlanConfig,
        batch: &Batch,
        kernels: impl FnOnce(&PlanConfig, Dims) -> Kernels,
        room: Option<&Room>,
    ) -> Result<Self> {
        let (query, key, prefix) = (batch.query_shape(), batch.key_shape(), batch.prefix_shape());
        let value_dim = batch.value_dim();
        config.validate()?;
        let dims = kernel_dims(query[3], value_dim)?;
        check_countable(query, key, prefix)?;
        let mut plan = Self {
            score: config.score,
            query,
            key,
            value_dim,
            dims,
            prefix,
            has_prefix: batch.sequences().iter().any(|sequence| sequence.prefix_len() > 0),
            launches: Vec::new(),
            tiles: Vec::new(),
            pages: Vec::new(),
            ranges: Vec::new(),
            merged: Vec::new(),
            partial_rows: 0,
            pairs: 0,
        };
        plan.push_launches(properties, config, batch, &kernels(config, dims), room)?;
        Ok(plan)
    }

    /// In how many parts a tile's keys are walked, at most.
    pub fn splits(&self) -> usize {
        self.tiles.iter().map(|tile| tile.splits as usize).max().unwrap_or(1)
    }

    /// Multiply-adds that the masks leave, each counted as two: `2 · (head_dim + value_dim)` per
    /// query head for every key a row sees.
    pub fn flops(&self) -> u64 {
        self.pairs.saturating_mul(2 * (self.query[2] * (self.query[3] + self.value_dim)) as u64)
    }

    /// Bytes of the workspace of [`prepare`](Self::prepare): the tiles, the page table, and, where
    /// keys are split, the rows to merge and their partials.
    pub fn workspace_bytes(&self) -> usize {
        let room = Room::of(self);
        room.places().end + room.partials_bytes()
    }

    /// The tables but that of the tiles, and where they go.
    fn tables<'a>(&'a self, places: &Places) -> [(usize, &'a [u8]); 3] {
        [
            (places.pages, bytes_of(&self.pages)),
            (places.ranges, bytes_of(&self.ranges)),
            (places.merged, bytes_of(&self.merged)),
        ]
    }

    /// The shape of outputs.
    fn out(&self) -> [usize; 4] {
        with_dim(self.query, self.value_dim)
    }

    /// In how many parts a block's values are worked off.
    fn parts(&self) -> usize {
        Dims { key: self.query[3], value: self.value_dim }.parts(self.dims)
    }

    fn lse_len(&self) -> usize {
        self.query[..3].iter().product()
    }

    /// Copies the plan to a workspace of [`workspace_bytes`](Self::workspace_bytes) bytes on a
    /// device, for calls on one stream.
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
        if workspace.len < self.workspace_bytes() {
            return Err(Error::Workspace { expected: self.workspace_bytes(), got: workspace.len });
        }
        workspace.check("workspace", 0)?;
        workspace.check_stream("workspace", stream)?;
        check_not_capturing::<D>(stream)?;
        let room = Room::of(self);
        let tables = self.tables(&room.places());
        let parts = std::iter::once((0, bytes_of(&self.tiles))).chain(tables);
        // SAFETY: inside the workspace, as just checked, and that is borrowed to be written.
        unsafe {
            for (at, bytes) in parts.filter(|(_, bytes)| !bytes.is_empty()) {
                device.upload(stream, workspace.address + at as u64, bytes)?;
            }
        }
        Ok(Prepared { plan: self, device, stream, room, workspace })
    }
}

/// The dims of the kernels for heads of these.
///
/// # Errors
/// [`Error::Value`] if there are none.
fn kernel_dims(head_dim: usize, value_dim: usize) -> Result<Dims> {
    let most = DIMS.map(|dims| dims.key).into_iter().max().unwrap_or(0);
    if !head_dim.is_multiple_of(8) || head_dim > most {
        return Err(Error::value("head_dim", format!("a multiple of 8, at most {most}"), head_dim));
    }
    let dims = Dims { key: head_dim, value: value_dim }.of_kernel();
    dims.ok_or_else(|| Error::value("value_dim", "a multiple of 8", value_dim))
}

fn uniform(config: &AttentionConfig, shape: &AttentionShape) -> Result<Batch> {
    shape.validate()?;
    // Before there is a sequence for each index of the batch.
    check_countable(shape.query_shape(), shape.key_shape(), [0; 4])?;
    Batch::uniform(shape, &config.mask)
}

/// Refuses extents that the kernels do not count, in 32 bits: of an axis, or of query rows times
/// the heads of a group.
fn check_countable(query: [usize; 4], key: [usize; 4], prefix: [usize; 4]) -> Result<()> {
    let group = query[2] / key[2];
    let rows = query[1].saturating_mul(group);
    let largest = |extents: [usize; 3]| extents.into_iter().max().unwrap_or(0);
    for (argument, largest, expected) in [
        ("query", largest([query[0], rows, query[2]]), "extents below 2³¹ (batch, seq times group, heads)"),
        ("key", largest([key[0], key[1], key[2]]), "extents below 2³¹ (batch, seq, heads)"),
        ("prefix", largest([prefix[0], prefix[1], 0]), "extents below 2³¹ (batch, seq)"),
    ] {
        if i32::try_from(largest).is_err() {
            return Err(Error::shape(argument, expected, largest.to_string()));
        }
    }
    Ok(())
}
