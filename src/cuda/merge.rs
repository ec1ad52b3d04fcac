//! The exact softmax over several sets of keys on a GPU: [`crate::merge`] in one pass over device memory.

use super::device::{ALIGNMENT, Device, DeviceTensor, DeviceTensorMut, Span, SpanMut, bytes_of};
use super::params::{StarMergeParams, StarTensor};
use super::{Launch, MERGE_THREADS};
use crate::config::check_rows;
use crate::{DType, Element, Error, Result};

/// Partials one after another in device memory: of the splits of one call, or of hosts after an all-gather.
#[derive(Debug)]
pub struct Partials<'a, D: Device, T> {
    /// `[n · batch, seq, heads, dim]`, the last axis contiguous: the first partial's batch, then the next one's.
    pub out: DeviceTensor<'a, D, T>,
    /// `[batch, heads, seq]` for each partial, natural logarithm.
    pub lse: Span<'a, D, f32>,
    /// Elements from one partial's log-sum-exps to the next one's.
    pub lse_stride: usize,
}

/// Merges `n` partials into `out` `[batch, seq, heads, dim]` and, if given, `lse` `[batch, heads, seq]`.
///
/// In f32; f32 partials merge into any type, others into their own or f32. Rows at multiples of 16 bytes, of dims that are multiples of 8, are
/// read at full speed, all others too. No partial at all gives the identity, (0, -inf). To merge in place, into one of the partials, make
/// `out` and `lse` of the same memory with [`SpanMut::from_raw`].
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] if they do not fit together, [`Error::DType`] for types that are not merged; errors of
/// the driver.
pub fn merge<D: Device, T: Element, O: Element>(
    device: &D,
    stream: &D::Stream,
    partials: &Partials<'_, D, T>,
    out: &mut DeviceTensorMut<'_, D, O>,
    lse: Option<&mut SpanMut<'_, D, f32>>,
) -> Result<()> {
    let shape @ [batch, seq, heads, dim] = out.shape();
    if dim == 0 {
        return Err(Error::shape("out", "head_dim of at least 1", format!("{shape:?}")));
    }
    if T::DTYPE != O::DTYPE && T::DTYPE != DType::F32 && O::DTYPE != DType::F32 {
        return Err(Error::DType { argument: "out", expected: T::DTYPE, got: O::DTYPE });
    }
    check_rows("out", shape, shape, out.strides())?;
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
    if let Some(lse) = &lse
        && lse.len != rows
    {
        return Err(Error::shape("lse", format!("{rows} elements"), lse.len.to_string()));
    }
    partials.out.check_stream("partials", stream)?;
    partials.lse.check_stream("partials", stream)?;
    out.check_stream("out", stream)?;
    lse.as_ref().map_or(Ok(()), |lse| lse.check_stream("lse", stream))?;
    let launch = MergeLaunch {
        partials: partials.out.params(),
        partials_lse: partials.lse.address,
        partial_stride: batch as u64 * partials.out.params().batch,
        lse_stride: partials.lse_stride,
        n,
        shape,
        merged: None,
        dtypes: [T::DTYPE, O::DTYPE],
        out: out.params(),
        lse: lse.map_or(0, |lse| lse.address),
    };
    // SAFETY: extents, strides and lengths were checked.
    unsafe { launch_merge(device, stream, &launch) }
}

/// Rows of a tensor. Beside an axis without elements the others may have any extents, whose product may be out of range.
fn rows_of(shape: [usize; 4]) -> usize {
    if shape.contains(&0) { 0 } else { shape[..3].iter().product() }
}

/// A merge of which all is known.
pub(super) struct MergeLaunch {
    pub partials: StarTensor,
    pub partials_lse: u64,
    pub partial_stride: u64,
    pub lse_stride: usize,
    pub n: usize,
    pub shape: [usize; 4],
    /// The address of a list of `StarMergedRow`s and its length: other rows are left alone, and the
    /// partials are `[partial row, dim]`.
    pub merged: Option<(u64, usize)>,
    /// Of partials and output.
    pub dtypes: [DType; 2],
    pub out: StarTensor,
    pub lse: u64,
}

/// # Safety
/// The memory has the extents that `merge` says, and no one else writes it.
pub(super) unsafe fn launch_merge<D: Device>(
    device: &D,
    stream: &D::Stream,
    merge: &MergeLaunch,
) -> Result<()> {
    let [_, seq, heads, dim] = merge.shape;
    let rows = merge.merged.map_or(rows_of(merge.shape), |(_, count)| count);
    if rows == 0 {
        return Ok(());
    }
    let aligned = |tensor: &StarTensor, dtype: DType| {
        let bytes = |stride: u64| stride * dtype.size() as u64;
        let all = tensor.data | bytes(tensor.batch) | bytes(tensor.seq) | bytes(tensor.head);
        all.is_multiple_of(ALIGNMENT as u64)
    };
    let [from, to] = merge.dtypes;
    let fast = dim.is_multiple_of(8) && aligned(&merge.partials, from) && aligned(&merge.out, to);
    let lanes = dim.div_ceil(if fast { 8 } else { 1 }).next_power_of_two().min(32);
    let too_large = || Error::shape("out", "fewer than 2³¹ rows", rows.to_string());
    let narrow = |extent: usize| i32::try_from(extent).map(|extent| extent as u32).map_err(|_| too_large());
    // The kernel counts rows in 32 bits.
    let rows = narrow(rows)?;
    let params = StarMergeParams {
        partials: merge.partials,
        out: merge.out,
        partials_lse: merge.partials_lse,
        partial_stride: merge.partial_stride,
        lse_stride: merge.lse_stride as u64,
        lse: merge.lse,
        merged: merge.merged.map_or(0, |(address, _)| address),
        n: narrow(merge.n)?,
        rows,
        seq: narrow(seq)?,
        heads: narrow(heads)?,
        dim: narrow(dim)?,
        lanes: lanes as u32,
    };
    let kernel = format!("merge_{from}_{to}{}", if fast { "" } else { "_unaligned" });
    let launch = Launch {
        kernel: &kernel,
        // Whole rows for each block.
        blocks: rows.div_ceil((MERGE_THREADS / lanes) as u32),
        threads: MERGE_THREADS as u32,
        shared_bytes: 0,
        params: bytes_of(std::slice::from_ref(&params)),
    };
    // SAFETY: the caller's promise.
    unsafe { device.launch(stream, &launch) }
}
