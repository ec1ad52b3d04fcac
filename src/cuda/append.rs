//! New keys and values to their places in a cache on a GPU, in rows or pages, the keys rotated on
//! the way where asked.

use super::device::{Device, DeviceTensor, DeviceTensorMut, Span, bytes_of};
use super::params::StarAppendParams;
use super::{APPEND_THREADS, Launch};
use crate::{Append, DType, Element, Error, Result};

/// New rows in device memory.
type NewRows<'v, 'f, 'u, D, T> = Append<DeviceTensor<'v, D, T>, Span<'f, D, f32>, Span<'u, D, u32>>;

/// Stores new keys and values in a cache of two tensors `[pages, page_len, kv_heads, head_dim]` of
/// f16 or bf16, as the new rows are. Head dims are multiples of 8; where keys are rotated,
/// `rotated` is a multiple of 16.
///
/// Places and positions are read by the kernel: a row whose place is outside of the cache, or whose
/// position is outside of the rotation's table, is left out, which serves rows that another rank
/// keeps. No two rows may have one place.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] if they do not fit together,
/// [`Error::DType`] for other element types; errors of the driver.
pub fn append<D: Device, T: Element, C: Element>(
    device: &D,
    stream: &D::Stream,
    new: &NewRows<'_, '_, '_, D, T>,
    cache_key: &mut DeviceTensorMut<'_, D, C>,
    cache_value: &mut DeviceTensorMut<'_, D, C>,
) -> Result<()> {
    let Append { key, value, places, rotation, .. } = new;
    if T::DTYPE == DType::F32 {
        return Err(Error::DType { argument: "key", expected: DType::BF16, got: T::DTYPE });
    }
    if C::DTYPE != T::DTYPE {
        return Err(Error::DType { argument: "cache_key", expected: T::DTYPE, got: C::DTYPE });
    }
    let shape @ [batch, seq, kv_heads, dim] = key.shape();
    let stored @ [pages, page_len, ..] = cache_key.shape();
    if dim == 0 || !dim.is_multiple_of(8) {
        return Err(Error::shape("key", "head_dim a multiple of 8", format!("{shape:?}")));
    }
    // What the kernel counts in 32 bits. Their products, two at a time, fit 64.
    let narrow = |argument, extents: [usize; 4]| -> Result<[u32; 4]> {
        let narrow = extents.map(|extent| u32::try_from(extent).unwrap_or(u32::MAX));
        if narrow.map(|extent| extent as usize) == extents {
            return Ok(narrow);
        }
        Err(Error::shape(argument, "extents below 2³²", format!("{extents:?}")))
    };
    let extents = narrow("key", shape)?;
    let stored_extents = narrow("cache_key", stored)?;
    key.check_rows("key", shape)?;
    value.check_rows("value", shape)?;
    cache_key.check_rows("cache_key", [pages, page_len, kv_heads, dim])?;
    cache_value.check_rows("cache_value", [pages, page_len, kv_heads, dim])?;
    key.check_stream("key", stream)?;
    value.check_stream("value", stream)?;
    cache_key.check_stream("cache_key", stream)?;
    cache_value.check_stream("cache_value", stream)?;
    places.check_stream("places", stream)?;
    let tokens = batch * seq;
    let check_len = |argument, expected: usize, got: usize| {
        if got == expected {
            return Ok(());
        }
        Err(Error::shape(argument, format!("{expected} elements"), got.to_string()))
    };
    check_len("places", tokens, places.len)?;
    let threads = tokens.saturating_mul(kv_heads * dim / 8);
    let blocks = threads.div_ceil(APPEND_THREADS);
    if i32::try_from(blocks).is_err() {
        return Err(Error::shape("key", "fewer than 2⁴² elements", format!("{shape:?}")));
    }
    let stored_rows = pages * page_len;
    if u32::try_from(stored_rows).is_err() {
        return Err(Error::shape("cache_key", "fewer than 2³² rows", format!("{stored:?}")));
    }
    let mut params = StarAppendParams {
        key: key.params(),
        value: value.params(),
        shard_key: cache_key.params(),
        shard_value: cache_value.params(),
        places: places.address,
        batch: extents[0],
        seq: extents[1],
        kv_heads: extents[2],
        dim: extents[3],
        pages: stored_extents[0],
        page_len: stored_extents[1],
        ..Default::default()
    };
    if let Some(rotation) = rotation {
        let rotated = rotation.rotated;
        if rotated == 0 || !rotated.is_multiple_of(16) || rotated > dim {
            return Err(Error::value("rotated", format!("a multiple of 16, at most {dim}"), rotated));
        }
        check_len("positions", tokens, rotation.positions.len)?;
        for (argument, span) in [("cos", &rotation.cos), ("sin", &rotation.sin)] {
            span.check_stream(argument, stream)?;
        }
        rotation.positions.check_stream("positions", stream)?;
        let positions = rotation.cos.len / (rotated / 2);
        check_len("cos", positions * (rotated / 2), rotation.cos.len)?;
        check_len("sin", rotation.cos.len, rotation.sin.len)?;
        params.cos = rotation.cos.address;
        params.sin = rotation.sin.address;
        params.positions = rotation.positions.address;
        params.rotated = rotated as u32;
        params.interleaved = u32::from(rotation.interleaved);
        params.position_end = u32::try_from(positions).unwrap_or(u32::MAX);
    }
    if threads == 0 || stored_rows == 0 {
        return Ok(());
    }
    let kernel = format!("append_{}", T::DTYPE);
    let launch = Launch {
        kernel: &kernel,
        blocks: blocks as u32,
        threads: APPEND_THREADS as u32,
        shared_bytes: 0,
        params: bytes_of(std::slice::from_ref(&params)),
    };
    // SAFETY: extents and lengths were checked; the kernel checks places and positions.
    unsafe { device.launch(stream, &launch) }
}
