//! One interface over all backends: an engine writes the attention of its layers once.
//!
//! A [`Backend`] is a place where attention runs: the CPU, a stream of a GPU, or the emulator. Its
//! memory, slices and views are types of its own, so calls are static and cost nothing. An engine
//! that chooses at run time writes an enum over the backends that it serves, or one generic
//! function that is called from each arm of a `match`.

#[cfg(test)]
pub(crate) mod cases;

use crate::batch::with_dim;
use crate::merge::PartialOf;
use crate::{Append, Batch, Element, Error, Inputs, Keys, PlanConfig, Result};
use std::fmt::Debug;
use std::ops::Range;

/// What memory holds: [`Element`]s, and the numbers of tables and workspaces.
pub trait Plain: bytemuck::Pod + Default + Send + Sync + Debug {}
impl<T: bytemuck::Pod + Default + Send + Sync + Debug> Plain for T {}

/// What a plan is made for: the extents of tensors, and how much work a call may have at most.
///
/// A batch within the capacity can be set by [`Backend::update`] as often as needed. Where a
/// backend's calls can be captured in a graph, their addresses and extents follow from the
/// capacity alone, so the graph stays valid.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capacity {
    /// The shape of queries, `[batch, seq, query_heads, head_dim]`.
    pub query: [usize; 4],
    /// The shape of keys, `[batch, seq, kv_heads, head_dim]` or `[pages, page_len, kv_heads,
    /// head_dim]`.
    pub key: [usize; 4],
    /// Elements of one head of values and outputs.
    pub value_dim: usize,
    /// Extents batch and seq of the prefix tensors; zeros without.
    pub prefix: [usize; 2],
    /// Sequences.
    pub sequences: usize,
    /// Query rows of a sequence.
    pub rows: usize,
    /// Entries of all page tables; 0 where keys lie in rows.
    pub pages: usize,
    /// Ranges of all block lists ([`Mask::Blocks`](crate::Mask::Blocks)).
    pub ranges: usize,
}

impl Capacity {
    /// As many sequences as asked for, of at most `rows` query rows each, with keys in rows and
    /// values of the keys' head dim.
    pub fn new(query: [usize; 4], key: [usize; 4], sequences: usize, rows: usize) -> Self {
        Self { query, key, value_dim: key[3], prefix: [0, 0], sequences, rows, pages: 0, ranges: 0 }
    }

    /// The same with values and outputs of `value_dim` elements for each head
    /// ([`Batch::with_value_dim`]).
    #[must_use]
    pub fn with_value_dim(self, value_dim: usize) -> Self {
        Self { value_dim, ..self }
    }

    /// The same with keys in pages, of which the sequences name at most `pages` in all. One that
    /// two sequences share counts twice.
    #[must_use]
    pub fn with_pages(self, pages: usize) -> Self {
        Self { pages, ..self }
    }

    /// The same with room for block lists, of at most `ranges` ranges in all.
    #[must_use]
    pub fn with_ranges(self, ranges: usize) -> Self {
        Self { ranges, ..self }
    }

    /// The same with prefix tensors of these extents.
    #[must_use]
    pub fn with_prefix(self, batch: usize, seq: usize) -> Self {
        Self { prefix: [batch, seq], ..self }
    }

    /// Query rows of one sequence at most: the tensor may have fewer than [`rows`](Self::rows).
    pub(crate) fn most_rows(&self) -> usize {
        self.rows.min(self.query[1])
    }

    /// Query rows of all sequences at most, where each has at most `rows`.
    pub(crate) fn most_rows_in_all(&self, rows: usize) -> usize {
        self.sequences.saturating_mul(rows).min(self.query[0].saturating_mul(self.query[1]))
    }

    /// Keys of one sequence at most, and of all sequences together.
    pub(crate) fn most_keys(&self) -> [usize; 2] {
        let prefix = if self.prefix[0] == 0 { 0 } else { self.prefix[1] };
        let (keys, in_all) = match self.pages {
            0 => (self.key[1], self.sequences.saturating_mul(self.key[1])),
            pages => [pages.saturating_mul(self.key[1]); 2].into(),
        };
        let prefixes = self.sequences.saturating_mul(prefix);
        [keys.saturating_add(prefix), in_all.saturating_add(prefixes)]
    }

    /// What splits at multiples of `len` keys give at most, where sequences have at most `rows`
    /// query rows: the rows of more than one split, and the sum of these rows' splits.
    pub(crate) fn most_split_rows(&self, rows: usize, len: usize) -> [usize; 2] {
        let [longest, in_all] = self.most_keys();
        if longest <= len {
            return [0, 0];
        }
        // A sequence of more than one split has a whole one.
        let whole = in_all / len;
        let sequences = self.sequences.min(whole);
        let all_rows = self.most_rows_in_all(rows);
        let splits = rows.saturating_mul(whole.saturating_add(sequences));
        [
            rows.saturating_mul(sequences).min(all_rows),
            splits.min(all_rows.saturating_mul(longest.div_ceil(len))),
        ]
    }

    /// A batch of these extents without sequences.
    pub(crate) fn empty_batch(&self) -> Result<Batch> {
        Batch::new(self.query, self.key)?
            .with_value_dim(self.value_dim)?
            .with_prefix(self.prefix[0], self.prefix[1])
    }

    /// Refuses a batch with more than there is room for.
    ///
    /// # Errors
    /// [`Error::Shape`] for tensors of other extents, [`Error::Value`] for too many sequences,
    /// pages or ranges, [`Error::Sequence`] with [`Error::Value`] for one with too many rows.
    pub fn check(&self, batch: &Batch) -> Result<()> {
        let prefix = [self.prefix[0], self.prefix[1], self.key[2], self.key[3]];
        for (argument, expected, got) in [
            ("query", self.query, batch.query_shape()),
            ("key", self.key, batch.key_shape()),
            ("value", with_dim(self.key, self.value_dim), batch.value_shape()),
            ("prefix", prefix, batch.prefix_shape()),
        ] {
            if expected != got {
                return Err(Error::shape(argument, format!("{expected:?}"), format!("{got:?}")));
            }
        }
        let sequences = batch.sequences();
        if sequences.len() > self.sequences {
            return Err(Error::value("sequences", format!("at most {}", self.sequences), sequences.len()));
        }
        for (index, sequence) in sequences.iter().enumerate() {
            let rows = sequence.rows.len();
            let wrong = if rows > self.rows {
                Error::value("rows", format!("at most {}", self.rows), rows)
            } else {
                match (&sequence.keys, self.pages) {
                    (Keys::Pages { .. }, 0) => Error::value("keys", "rows, as the plan is for", "pages"),
                    (Keys::Rows { .. }, 1..) => Error::value("keys", "pages, as the plan is for", "rows"),
                    _ => continue,
                }
            };
            return Err(Error::Sequence { index, source: Box::new(wrong) });
        }
        let pages = batch.pages();
        if pages > self.pages {
            return Err(Error::value("pages", format!("at most {} in use", self.pages), pages));
        }
        let ranges = batch.ranges();
        if ranges > self.ranges {
            return Err(Error::value("ranges", format!("at most {} of block lists", self.ranges), ranges));
        }
        Ok(())
    }
}

/// Where attention runs, with its memory and, on a GPU, its stream.
///
/// A layer of an engine's step is: [`append`](Self::append) the new keys, [`attend`](Self::attend).
/// Before the first layer, [`update`](Self::update) the plan. Masks count from the last key: a
/// chunk of a context passes all keys so far under its star mask, and a decode after it
/// [`Mask::Causal`](crate::Mask::Causal).
///
/// Calls happen in the order in which they are made. On a GPU they return before they are done;
/// [`read`](Self::read) waits.
///
/// ```
/// use star_attention::{Backend, Batch, Inputs, Keys, Mask, PlanConfig, Sequence, cpu::Cpu};
///
/// /// One query row over 5 keys, on any backend.
/// fn decode<B: Backend>(backend: &B) -> star_attention::Result<Vec<f32>> {
///     let (query_shape, key_shape) = ([1, 1, 4, 64], [1, 8, 2, 64]);
///     let mut batch = Batch::new(query_shape, key_shape)?;
///     batch.push(Sequence::new(0, 0..1, Keys::rows(0, 0..5), Mask::Causal))?;
///     let mut plan = backend.plan_for(&PlanConfig::new(), &batch)?;
///
///     let query = backend.buffer_of(&[0.5f32; 4 * 64])?;
///     let cache = backend.buffer_of(&[0.25f32; 8 * 2 * 64])?;
///     let mut out = backend.buffer::<f32>(4 * 64)?;
///     let mut workspace = backend.buffer(backend.workspace_bytes(&plan))?;
///     let inputs = Inputs::new(
///         backend.whole("query", &query, query_shape)?,
///         backend.whole("key", &cache, key_shape)?,
///         backend.whole("value", &cache, key_shape)?,
///     );
///     let to = backend.whole_mut("out", &mut out, query_shape)?;
///     backend.attend(&mut plan, inputs, to, None, backend.slice_mut(&mut workspace, ..))?;
///     backend.read(&out)
/// }
///
/// assert!(decode(&Cpu::new())?.iter().all(|&x| (x - 0.25).abs() < 1e-6));
/// # Ok::<(), star_attention::Error>(())
/// ```
pub trait Backend {
    /// Owned memory.
    type Buffer<T: Plain>: Send + Debug;
    /// A part of a buffer, read only.
    type Slice<'a, T: Plain>
    where
        Self: 'a;
    /// A part of a buffer, to be written.
    type SliceMut<'a, T: Plain>
    where
        Self: 'a;
    /// A strided tensor `[batch, seq, heads, dim]`, read only.
    type View<'a, T: Element>
    where
        Self: 'a;
    /// A strided tensor `[batch, seq, heads, dim]`, to be written.
    type ViewMut<'a, T: Element>
    where
        Self: 'a;
    /// The schedule of a batch. It lives as long as the engine keeps it.
    type Plan: Send;

    /// Memory for `len` numbers, all 0.
    ///
    /// # Errors
    /// [`Error::Value`] if there is not so much; errors of the driver.
    fn buffer<T: Plain>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// Writes `data` to a buffer from element `at` on.
    ///
    /// # Errors
    /// [`Error::Value`] for elements behind the buffer's end; errors of the driver.
    fn write<T: Plain>(&self, buffer: &mut Self::Buffer<T>, at: usize, data: &[T]) -> Result<()>;

    /// What a buffer holds, once all earlier calls are done.
    ///
    /// # Errors
    /// Errors of the driver.
    fn read<T: Plain>(&self, buffer: &Self::Buffer<T>) -> Result<Vec<T>>;

    /// The elements of a range of a buffer, as far as there are any.
    fn slice<'a, T: Plain>(
        &'a self,
        buffer: &'a Self::Buffer<T>,
        range: impl std::ops::RangeBounds<usize>,
    ) -> Self::Slice<'a, T>;

    /// The elements of a range of a buffer, as far as there are any, to be written.
    fn slice_mut<'a, T: Plain>(
        &'a self,
        buffer: &'a mut Self::Buffer<T>,
        range: impl std::ops::RangeBounds<usize>,
    ) -> Self::SliceMut<'a, T>;

    /// A view of a slice with explicit strides, in elements. An axis of stride 0 repeats its
    /// elements.
    ///
    /// # Errors
    /// [`Error::Stride`], naming `argument`, if an index leaves the slice or two indices meet.
    fn view<'a, T: Element>(
        argument: &'static str,
        slice: Self::Slice<'a, T>,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self::View<'a, T>>
    where
        Self: 'a;

    /// A view to be written, of a slice with explicit strides, in elements.
    ///
    /// # Errors
    /// [`Error::Stride`], naming `argument`, if an index leaves the slice or two indices meet.
    fn view_mut<'a, T: Element>(
        argument: &'static str,
        slice: Self::SliceMut<'a, T>,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<Self::ViewMut<'a, T>>
    where
        Self: 'a;

    /// A plan for batches within a capacity. It has no sequence until the first
    /// [`update`](Self::update).
    ///
    /// # Errors
    /// [`Error::Value`] or [`Error::Shape`] for what is out of range or has no kernels; errors of
    /// the driver.
    fn plan(&self, config: &PlanConfig, capacity: &Capacity) -> Result<Self::Plan>;

    /// A plan for one batch alone: [`update`](Self::update) refuses it.
    ///
    /// # Errors
    /// As [`plan`](Self::plan) and [`update`](Self::update).
    fn plan_for(&self, config: &PlanConfig, batch: &Batch) -> Result<Self::Plan>;

    /// Sets the batch of the calls that follow.
    ///
    /// # Errors
    /// As [`Capacity::check`]; [`Error::Value`] for a plan of one batch alone; on a GPU
    /// [`Error::Busy`] while too many updates are under way, and [`Error::Value`] for a stream that
    /// is being captured. The plan is as it was.
    fn update(&self, plan: &mut Self::Plan, batch: &Batch) -> Result<()>;

    /// Bytes of the workspace that [`attend`](Self::attend) needs. One workspace serves any number
    /// of plans, one call after the other.
    fn workspace_bytes(&self, plan: &Self::Plan) -> usize;

    /// Attention of the plan's batch into `out`, of the shape [`Batch::out_shape`], and, if given,
    /// the natural log-sum-exp `[batch, query_heads, seq]` into `lse`. A row that sees no key gets
    /// 0 and `-inf`; one that belongs to no sequence is left alone.
    ///
    /// Sinks of the inputs ([`Inputs::with_sinks`]) count in every row: leave them out where a
    /// [`merge`](Self::merge) follows, and give them to that.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] for tensors that are not the plan's,
    /// [`Error::DType`] for element types that the backend does not take, [`Error::Workspace`];
    /// errors of the driver. Nothing was written then. The CPU also refuses sinks that are NaN or
    /// `+inf` ([`Error::Value`]); on a GPU that there are none is the caller's promise.
    fn attend<Q: Element, T: Element, O: Element>(
        &self,
        plan: &mut Self::Plan,
        inputs: Inputs<Self::View<'_, Q>, Self::View<'_, T>, Self::Slice<'_, f32>>,
        out: Self::ViewMut<'_, O>,
        lse: Option<Self::SliceMut<'_, f32>>,
        workspace: Self::SliceMut<'_, u8>,
    ) -> Result<()>;

    /// Stores new keys and values in a cache of two tensors `[pages, page_len, kv_heads,
    /// head_dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] for what does not fit together,
    /// [`Error::DType`] for element types that the backend does not take; errors of the driver.
    /// Nothing was written then. The CPU also refuses places and positions that are out of range
    /// and places that two rows have ([`Error::Sequence`]). A GPU leaves rows out whose place or
    /// position is out of range; that no two rows have one place is the caller's promise there.
    fn append<T: Element, C: Element>(
        &self,
        new: Append<Self::View<'_, T>, Self::Slice<'_, f32>, Self::Slice<'_, u32>>,
        cache_key: Self::ViewMut<'_, C>,
        cache_value: Self::ViewMut<'_, C>,
    ) -> Result<()>;

    /// Merges attention over disjoint keys into `out` and, if given, `lse`, in the order given.
    ///
    /// `sinks`, f32 `[heads]`, are those of the attention ([`Inputs::with_sinks`]). They count in
    /// every row, so they belong to the last merge: a result that is merged again holds none.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] for what does not fit together,
    /// [`Error::DType`] for element types that the backend does not take; errors of the driver.
    /// Sinks out of range as in [`attend`](Self::attend).
    fn merge<T: Element, O: Element>(
        &self,
        partials: Vec<PartialOf<Self::View<'_, T>, Self::Slice<'_, f32>>>,
        sinks: Option<Self::Slice<'_, f32>>,
        out: Self::ViewMut<'_, O>,
        lse: Option<Self::SliceMut<'_, f32>>,
    ) -> Result<()>;

    /// Memory that holds `data`.
    ///
    /// # Errors
    /// As [`buffer`](Self::buffer).
    fn buffer_of<T: Plain>(&self, data: &[T]) -> Result<Self::Buffer<T>> {
        let mut buffer = self.buffer(data.len())?;
        self.write(&mut buffer, 0, data)?;
        Ok(buffer)
    }

    /// A row-major view of a buffer from its start on.
    ///
    /// # Errors
    /// [`Error::Stride`], naming `argument`, if the buffer is shorter.
    fn whole<'a, T: Element>(
        &'a self,
        argument: &'static str,
        buffer: &'a Self::Buffer<T>,
        shape: [usize; 4],
    ) -> Result<Self::View<'a, T>> {
        Self::view(argument, self.slice(buffer, ..), shape, row_major(shape))
    }

    /// A row-major view of a buffer from its start on, to be written.
    ///
    /// # Errors
    /// [`Error::Stride`], naming `argument`, if the buffer is shorter.
    fn whole_mut<'a, T: Element>(
        &'a self,
        argument: &'static str,
        buffer: &'a mut Self::Buffer<T>,
        shape: [usize; 4],
    ) -> Result<Self::ViewMut<'a, T>> {
        Self::view_mut(argument, self.slice_mut(buffer, ..), shape, row_major(shape))
    }
}

pub(crate) fn row_major([_, seq, heads, dim]: [usize; 4]) -> [usize; 4] {
    let row = heads.saturating_mul(dim);
    [seq.saturating_mul(row), row, dim, 1]
}

/// The part of a range that lies within `len` elements.
pub(crate) fn clamp(range: impl std::ops::RangeBounds<usize>, len: usize) -> Range<usize> {
    use std::ops::Bound::{Excluded, Included, Unbounded};
    let end = match range.end_bound() {
        Included(&end) => end.saturating_add(1),
        Excluded(&end) => end,
        Unbounded => len,
    };
    let start = match range.start_bound() {
        Included(&start) => start,
        Excluded(&start) => start.saturating_add(1),
        Unbounded => 0,
    };
    let end = end.min(len);
    start.min(end)..end
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows and keys count as far as the tensors have them, and pages as far as they are named.
    #[test]
    fn what_a_capacity_counts() {
        let rows = Capacity::new([2, 10, 4, 8], [3, 100, 2, 8], 5, usize::MAX);
        assert_eq!((rows.most_rows(), rows.most_rows_in_all(3), rows.most_rows_in_all(10)), (10, 15, 20));
        assert_eq!(rows.most_keys(), [100, 500]);
        assert_eq!(rows.clone().with_prefix(1, 7).most_keys(), [107, 535]);
        assert_eq!(rows.with_prefix(0, 7).most_keys(), [100, 500]);
        let pages = Capacity::new([2, 10, 4, 8], [3, 16, 2, 8], 5, 1).with_pages(9);
        assert_eq!(pages.most_keys(), [144, 144]);
        // One split of 100 and one of 44 keys, of one sequence.
        assert_eq!(pages.most_split_rows(1, 100), [1, 2]);
        assert_eq!(pages.most_split_rows(1, 144), [0, 0]);
    }
}
