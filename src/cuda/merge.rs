//! The exact softmax over several sets of keys on a GPU: [`crate::merge`] in one pass over device
//! memory.

use super::device::{ALIGNMENT, Device, DeviceTensor, DeviceTensorMut, Span, SpanMut, bytes_of};
use super::params::{StarMergeParams, StarPartial, StarTensor};
use super::{Launch, MERGE_THREADS};
use crate::config::{check_rows, check_sink_count};
use crate::merge::PartialOf;
use crate::{DType, Element, Error, Result};

/// Attention over some of the keys, in device memory.
pub type DevicePartial<'a, 'b, D, T> = PartialOf<DeviceTensor<'a, D, T>, Span<'b, D, f32>>;

impl<D: Device, T: Element> DevicePartial<'_, '_, D, T> {
    /// Refuses one of another shape, or of memory that was borrowed for another stream.
    pub(crate) fn check(&self, stream: &D::Stream, shape: [usize; 4]) -> Result<()> {
        check_rows("partial", shape, self.out.shape(), self.out.strides())?;
        check_len("partial", rows_of(shape), self.lse.len)?;
        self.out.check_stream("partial", stream)?;
        self.lse.check_stream("partial", stream)
    }
}

/// Partials that [`merge_separate`] merges at once.
pub const MOST_PARTIALS: usize = 32;

// The kernel has room for as many.
const _: fn(&StarMergeParams) -> &[StarPartial; MOST_PARTIALS] = |params| &params.each;

/// Partials one after another in device memory: of the splits of one call, or of ranks after an
/// all-gather.
#[derive(Debug)]
pub struct Partials<'a, D: Device, T> {
    /// `[n · batch, seq, heads, dim]`, the last axis contiguous: the first partial's batch, then
    /// the next one's.
    pub out: DeviceTensor<'a, D, T>,
    /// `[batch, heads, seq]` for each partial, natural logarithm.
    pub lse: Span<'a, D, f32>,
    /// Elements from one partial's log-sum-exps to the next one's.
    pub lse_stride: usize,
}

/// The sinks of a merge, and which of them a row has: the row `i` of the output's log-sum-exp is
/// the row `first + i` of a log-sum-exp `[.., heads, seq]`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowSinks {
    /// Of f32 `[heads]`; 0 where there are none.
    pub address: u64,
    first: usize,
    heads: usize,
    seq: usize,
}

impl RowSinks {
    /// One sink for each head of a merge into `[batch, seq, heads, dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of them, [`Error::Value`] for memory that was borrowed
    /// for another stream.
    pub fn new<D: Device>(
        stream: &D::Stream,
        [_, seq, heads, _]: [usize; 4],
        sinks: Option<&Span<'_, D, f32>>,
    ) -> Result<Self> {
        let Some(sinks) = sinks else { return Ok(Self::default()) };
        check_sink_count(heads, sinks.len)?;
        sinks.check_stream("sinks", stream)?;
        Ok(Self { address: sinks.address, first: 0, heads, seq })
    }

    /// The same for the rows from `first` on.
    pub fn starting_at(self, first: usize) -> Self {
        Self { first, ..self }
    }
}

/// Merges `n` partials into `out` `[batch, seq, heads, dim]` and, if given, `lse` `[batch, heads,
/// seq]`, with `sinks` `[heads]` if the merge finishes rows that have them, as
/// [`crate::merge::merge_with_sinks`] says.
///
/// In f32; f32 partials merge into any type, others into their own or f32. Rows at multiples of 16
/// bytes, of dims that are multiples of 8, are read at full speed, all others too. No partial at
/// all gives the identity, (0, -inf); a log-sum-exp of `+inf` makes its row NaN, as
/// [`crate::merge`] says. To merge in place, into one of the partials, make `out` and `lse` of the
/// same memory with [`SpanMut::from_raw`].
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] if they do not fit together,
/// [`Error::DType`] for types that are not merged; errors of the driver.
pub fn merge<D: Device, T: Element, O: Element>(
    device: &D,
    stream: &D::Stream,
    partials: &Partials<'_, D, T>,
    sinks: Option<&Span<'_, D, f32>>,
    out: &mut DeviceTensorMut<'_, D, O>,
    lse: Option<&mut SpanMut<'_, D, f32>>,
) -> Result<()> {
    let sinks = RowSinks::new(stream, out.shape(), sinks)?;
    merge_stacked(device, stream, partials, sinks, out, lse)
}

/// [`merge`] into rows that may be a part of those of the attention.
pub(crate) fn merge_stacked<D: Device, T: Element, O: Element>(
    device: &D,
    stream: &D::Stream,
    partials: &Partials<'_, D, T>,
    sinks: RowSinks,
    out: &mut DeviceTensorMut<'_, D, O>,
    lse: Option<&mut SpanMut<'_, D, f32>>,
) -> Result<()> {
    let shape @ [batch, seq, heads, dim] = out.shape();
    check_out(stream, T::DTYPE, out, lse.as_deref())?;
    let rows = rows_of(shape);
    let stacked = partials.out.shape()[0];
    let n = stacked.checked_div(batch).unwrap_or(0);
    check_rows("partials", [n * batch, seq, heads, dim], partials.out.shape(), partials.out.strides())?;
    let lse_len = if n == 0 || rows == 0 {
        0
    } else {
        (n - 1).saturating_mul(partials.lse_stride).saturating_add(rows)
    };
    if partials.lse.len < lse_len || (n > 1 && partials.lse_stride < rows) {
        let expected = format!("{n} lse of {rows} elements, {} apart", partials.lse_stride);
        return Err(Error::shape("partials", expected, format!("{} elements", partials.lse.len)));
    }
    partials.out.check_stream("partials", stream)?;
    partials.lse.check_stream("partials", stream)?;
    let launch = MergeLaunch {
        partials: MergedFrom::Stacked {
            out: partials.out.params(),
            lse: partials.lse.address,
            stride: batch as u64 * partials.out.params().batch,
            lse_stride: partials.lse_stride as u64,
            n,
        },
        sinks,
        shape,
        dtypes: [T::DTYPE, O::DTYPE],
        out: out.params(),
        lse: lse.map_or(0, |lse| lse.address),
    };
    // SAFETY: extents, strides and lengths were checked.
    unsafe { launch_merge(device, stream, &launch) }
}

/// Merges partials that lie anywhere in device memory into `out` `[batch, seq, heads, dim]` and, if
/// given, `lse` `[batch, heads, seq]`, as [`merge`] does. At most [`MOST_PARTIALS`] of them.
///
/// # Errors
/// As [`merge`], and [`Error::Value`] for more partials.
pub fn merge_separate<D: Device, T: Element, O: Element>(
    device: &D,
    stream: &D::Stream,
    partials: &[DevicePartial<'_, '_, D, T>],
    sinks: Option<&Span<'_, D, f32>>,
    out: &mut DeviceTensorMut<'_, D, O>,
    lse: Option<&mut SpanMut<'_, D, f32>>,
) -> Result<()> {
    let shape = out.shape();
    check_out(stream, T::DTYPE, out, lse.as_deref())?;
    if partials.len() > MOST_PARTIALS {
        return Err(Error::value("partials", format!("at most {MOST_PARTIALS}"), partials.len()));
    }
    let mut each = [StarPartial::default(); MOST_PARTIALS];
    for (to, partial) in each.iter_mut().zip(partials) {
        partial.check(stream, shape)?;
        *to = StarPartial { out: partial.out.params(), lse: partial.lse.address };
    }
    let launch = MergeLaunch {
        partials: MergedFrom::Separate(&each[..partials.len()]),
        sinks: RowSinks::new(stream, shape, sinks)?,
        shape,
        dtypes: [T::DTYPE, O::DTYPE],
        out: out.params(),
        lse: lse.map_or(0, |lse| lse.address),
    };
    // SAFETY: extents, strides and lengths were checked.
    unsafe { launch_merge(device, stream, &launch) }
}

/// Refuses an output that no partial of type `from` is merged into.
fn check_out<D: Device, O: Element>(
    stream: &D::Stream,
    from: DType,
    out: &DeviceTensorMut<'_, D, O>,
    lse: Option<&SpanMut<'_, D, f32>>,
) -> Result<()> {
    let shape = out.shape();
    if shape[3] == 0 {
        return Err(Error::shape("out", "head_dim of at least 1", format!("{shape:?}")));
    }
    check_merged_types("out", from, O::DTYPE)?;
    check_rows("out", shape, shape, out.strides())?;
    out.check_stream("out", stream)?;
    if let Some(lse) = lse {
        check_len("lse", rows_of(shape), lse.len)?;
        lse.check_stream("lse", stream)?;
    }
    Ok(())
}

/// Refuses a type that no partial of type `from` is merged into.
pub(crate) fn check_merged_types(argument: &'static str, from: DType, to: DType) -> Result<()> {
    if from != to && from != DType::F32 && to != DType::F32 {
        return Err(Error::DType { argument, expected: from, got: to });
    }
    Ok(())
}

pub(crate) fn check_len(argument: &'static str, expected: usize, got: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::shape(argument, format!("{expected} elements"), got.to_string()))
}

/// Rows of a tensor. Beside an axis without elements the others may have any extents, whose product
/// may be out of range.
fn rows_of(shape: [usize; 4]) -> usize {
    if shape.contains(&0) { 0 } else { shape[..3].iter().product() }
}

/// Where the partials of a merge lie.
pub(super) enum MergedFrom<'a> {
    /// One after another, at one distance.
    Stacked { out: StarTensor, lse: u64, stride: u64, lse_stride: u64, n: usize },
    /// Anywhere.
    Separate(&'a [StarPartial]),
    /// Contiguous f32 rows and their log-sum-exps; `rows` is the address of so many
    /// `StarMergedRow`s. Rows of the output that these do not name are left alone.
    Listed { out: u64, lse: u64, rows: u64, count: usize },
}

/// A merge of which all is known.
pub(super) struct MergeLaunch<'a> {
    pub partials: MergedFrom<'a>,
    pub sinks: RowSinks,
    pub shape: [usize; 4],
    /// Of partials and output.
    pub dtypes: [DType; 2],
    pub out: StarTensor,
    pub lse: u64,
}

impl MergeLaunch<'_> {
    /// The partials' part of the parameters, and the rows to merge.
    fn partials(&self) -> Result<(StarMergeParams, usize)> {
        let mut params = StarMergeParams::default();
        let mut rows = rows_of(self.shape);
        match self.partials {
            MergedFrom::Stacked { out, lse, stride, lse_stride, n } => {
                (params.partials, params.partials_lse) = (out, lse);
                (params.partial_stride, params.lse_stride) = (stride, lse_stride);
                params.n = self.narrow(n)?;
            }
            MergedFrom::Separate(each) => {
                params.separate = 1;
                params.n = self.narrow(each.len())?;
                params.each[..each.len()].copy_from_slice(each);
            }
            MergedFrom::Listed { out, lse, rows: listed, count } => {
                let dim = self.shape[3] as u64;
                params.partials = StarTensor { data: out, batch: dim, seq: dim, head: dim };
                (params.partials_lse, params.partial_stride, params.lse_stride) = (lse, dim, 1);
                params.merged = listed;
                rows = count;
            }
        }
        Ok((params, rows))
    }

    /// Whether partials and output can be moved 16 bytes at a time.
    fn is_aligned(&self) -> bool {
        let aligned = |tensor: &StarTensor, dtype: DType| {
            let bytes = |stride: u64| stride * dtype.size() as u64;
            let all = tensor.data | bytes(tensor.batch) | bytes(tensor.seq) | bytes(tensor.head);
            all.is_multiple_of(ALIGNMENT as u64)
        };
        let [from, to] = self.dtypes;
        let partials = match &self.partials {
            MergedFrom::Stacked { out, stride, .. } => {
                aligned(out, from) && (stride * from.size() as u64).is_multiple_of(ALIGNMENT as u64)
            }
            MergedFrom::Separate(each) => each.iter().all(|partial| aligned(&partial.out, from)),
            MergedFrom::Listed { out, .. } => out.is_multiple_of(ALIGNMENT as u64),
        };
        self.shape[3].is_multiple_of(8) && partials && aligned(&self.out, to)
    }

    /// What the kernel counts in 32 bits.
    fn narrow(&self, extent: usize) -> Result<u32> {
        let too_large = |_| Error::shape("out", "fewer than 2³¹ rows", rows_of(self.shape).to_string());
        i32::try_from(extent).map(|extent| extent as u32).map_err(too_large)
    }
}

/// The kernel that merges one type into another; `fast` for rows at multiples of 16 bytes.
pub(super) fn merge_kernel(from: DType, to: DType, fast: bool) -> String {
    format!("merge_{from}_{to}{}", if fast { "" } else { "_unaligned" })
}

/// # Safety
/// The memory has the extents that `merge` says, and no one else writes it.
pub(super) unsafe fn launch_merge<D: Device>(
    device: &D,
    stream: &D::Stream,
    merge: &MergeLaunch<'_>,
) -> Result<()> {
    let (partials, rows) = merge.partials()?;
    if rows == 0 {
        return Ok(());
    }
    let [_, seq, heads, dim] = merge.shape;
    let fast = merge.is_aligned();
    let lanes = dim.div_ceil(if fast { 8 } else { 1 }).next_power_of_two().min(32);
    let params = StarMergeParams {
        out: merge.out,
        lse: merge.lse,
        sinks: merge.sinks.address,
        sink_first: merge.narrow(merge.sinks.first)?,
        sink_seq: merge.narrow(merge.sinks.seq)?,
        sink_heads: merge.narrow(merge.sinks.heads)?,
        rows: merge.narrow(rows)?,
        seq: merge.narrow(seq)?,
        heads: merge.narrow(heads)?,
        dim: merge.narrow(dim)?,
        lanes: lanes as u32,
        ..partials
    };
    let [from, to] = merge.dtypes;
    let kernel = merge_kernel(from, to, fast);
    let launch = Launch {
        kernel: &kernel,
        // Whole rows for each block.
        blocks: params.rows.div_ceil((MERGE_THREADS / lanes) as u32),
        threads: MERGE_THREADS as u32,
        shared_bytes: 0,
        params: bytes_of(std::slice::from_ref(&params)),
    };
    // SAFETY: the caller's promise.
    unsafe { device.launch(stream, &launch) }
}
