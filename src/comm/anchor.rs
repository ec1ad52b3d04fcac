//! Keys and values of the anchor, from rank 0 to all.

use super::Collective;
#[cfg(any(feature = "cuda", feature = "simt"))]
use super::{DeviceCollective, device::Region};
use crate::batch::with_dim;
use crate::config::check_rows;
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::cuda::{Device, DeviceTensorMut, SpanMut};
use crate::{Element, Error, Result, TensorViewMut};

/// Elements of the scratch that [`share_anchor`] needs for keys `[batch, anchor_len, kv_heads,
/// head_dim]` and values `[batch, anchor_len, kv_heads, value_dim]`.
pub fn anchor_scratch_len(key: [usize; 4], value_dim: usize) -> usize {
    elements(key) + elements(with_dim(key, value_dim))
}

fn elements(shape: [usize; 4]) -> usize {
    // Beside an axis without elements the others may have any extents.
    if shape.contains(&0) { 0 } else { shape.iter().product() }
}

/// Copies rank 0's keys and values of the anchor, one layer's, over every other rank's: one message
/// of both.
///
/// They are `[batch, anchor_len, kv_heads, head_dim]`, already rotated to their positions, and
/// `[batch, anchor_len, kv_heads, value_dim]`. A rank that received them encodes its own tokens
/// only: queries of its rows [`kept`](crate::RankLayout::kept), against keys and values of all
/// local rows, under the same [`mask`](crate::RankLayout::mask), which counts positions from the
/// end. What the scratch holds does not matter.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Stride`] for tensors that do not fit together, [`Error::Workspace`]
/// for a scratch shorter than [`anchor_scratch_len`] (nothing was sent then); and the collective's
/// errors. Nothing was written to keys and values.
pub fn share_anchor<T: Element>(
    group: &(impl Collective + ?Sized),
    mut key: TensorViewMut<'_, T>,
    mut value: TensorViewMut<'_, T>,
    scratch: &mut [T],
) -> Result<()> {
    let shape = key.shape();
    check_rows("key", shape, shape, key.strides())?;
    let value_dim = value.shape()[3];
    check_rows("value", with_dim(shape, value_dim), value.shape(), value.strides())?;
    let needed = anchor_scratch_len(shape, value_dim);
    if scratch.len() < needed {
        return Err(Error::scratch::<T>(needed, scratch.len()));
    }
    let message = &mut scratch[..needed];
    let sends = group.rank() == 0;
    if sends {
        let (keys, values) = message.split_at_mut(elements(shape));
        each_row(&mut key, keys, |row, packed| packed.copy_from_slice(row));
        each_row(&mut value, values, |row, packed| packed.copy_from_slice(row));
    }
    group.broadcast(0, bytemuck::cast_slice_mut(message))?;
    if !sends {
        let (keys, values) = message.split_at_mut(elements(shape));
        each_row(&mut key, keys, |row, packed| row.copy_from_slice(packed));
        each_row(&mut value, values, |row, packed| row.copy_from_slice(packed));
    }
    Ok(())
}

/// Calls `copy` with each row of a tensor and its place in the row-major `packed`.
fn each_row<T: Element>(
    tensor: &mut TensorViewMut<'_, T>,
    packed: &mut [T],
    copy: impl Fn(&mut [T], &mut [T]),
) {
    let ([_, seq, heads, dim], strides) = (tensor.shape(), tensor.strides());
    for (row, part) in packed.chunks_exact_mut(dim.max(1)).enumerate() {
        let index = [row / heads / seq, row / heads % seq, row % heads];
        let start: usize = index.iter().zip(strides).map(|(i, stride)| i * stride).sum();
        copy(&mut tensor.data_mut()[start..start + dim], part);
    }
}

/// As [`share_anchor`], for keys and values in device memory, in the order of a stream: one
/// collective of both.
///
/// Each sequence's piece of memory without gaps goes as it lies, without a scratch: one of keys and
/// one of values, or one for each head where heads come before tokens. Within a sequence all ranks'
/// tensors must have their gaps at the same places.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Stride`] for tensors that do not fit together, [`Error::Value`] for
/// memory of another stream (nothing was sent then); and the errors of the collective and of the
/// driver.
#[cfg(any(feature = "cuda", feature = "simt"))]
pub fn share_anchor_on_device<D: Device, T: Element>(
    group: &impl DeviceCollective<D>,
    stream: &D::Stream,
    key: &mut DeviceTensorMut<'_, D, T>,
    value: &mut DeviceTensorMut<'_, D, T>,
) -> Result<()> {
    let shape = key.shape();
    check_rows("key", shape, shape, key.strides())?;
    let value_shape = with_dim(shape, value.shape()[3]);
    check_rows("value", value_shape, value.shape(), value.strides())?;
    key.check_stream("key", stream)?;
    value.check_stream("value", stream)?;
    let places =
        [(key.params().data, shape, key.strides()), (value.params().data, value_shape, value.strides())];
    let part = |(address, (start, len)): (u64, (usize, usize))| {
        let [start, len] = [start, len].map(|elements| elements * size_of::<T>());
        Region::new(address + start as u64, len).write()
    };
    let pieces = places
        .into_iter()
        .flat_map(|(address, shape, strides)| pieces(shape, strides).into_iter().map(move |p| (address, p)));
    let mut parts: Vec<SpanMut<'_, D, u8>> = pieces.map(part).collect();
    group.broadcast(stream, 0, &mut parts)
}

/// The pieces without gaps that each sequence of a tensor lies in: where each starts, and its
/// elements.
#[cfg(any(feature = "cuda", feature = "simt"))]
fn pieces([batch, seq, heads, dim]: [usize; 4], strides: [usize; 4]) -> Vec<(usize, usize)> {
    let mut pieces: Vec<(usize, usize)> = Vec::new();
    if [batch, seq, heads, dim].contains(&0) {
        return pieces;
    }
    for row in 0..batch * seq * heads {
        let index = [row / heads / seq, row / heads % seq, row % heads];
        let start: usize = index.iter().zip(strides).map(|(i, stride)| i * stride).sum();
        match pieces.last_mut() {
            Some((first, len)) if *first + *len == start && !row.is_multiple_of(seq * heads) => *len += dim,
            _ => pieces.push((start, dim)),
        }
    }
    pieces
}
