//! New keys and values to their places in a cache on a GPU, in rows or pages, the keys rotated on
//! the way where asked.

use super::device::{Device, DeviceTensor, DeviceTensorMut, Span, bytes_of};
use super::params::StarAppendParams;
use super::scales::ScaleParams;
use super::{APPEND_THREADS, Launch};
use crate::batch::with_dim;
use crate::{Append, DType, Element, Error, Result, Scales};

/// New rows in device memory.
type NewRows<'v, 'f, 'u, D, T> = Append<DeviceTensor<'v, D, T>, Span<'f, D, f32>, Span<'u, D, u32>>;

/// Stores new keys and values, f16 or bf16, in a cache of keys `[pages, page_len, kv_heads,
/// head_dim]` and values `[pages, page_len, kv_heads, value_dim]` of the same type, or of
/// [`F8E4M3`](crate::F8E4M3). Rows of that type go to a cache of it as they are. Both dims are
/// multiples of 8, or of 16 in an fp8 cache; where keys are rotated, `rotated` is a multiple
/// of 16.
///
/// Places and positions are read by the kernel: a row whose place is outside of the cache, or whose
/// position is outside of the rotation's table, is left out, which serves rows that another rank
/// keeps. No two rows may have one place. That scales are finite and above 0 is the caller's
/// promise.
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
    let Append { key, value, places, rotation, scales, .. } = new;
    let kernel = kernel_of(T::DTYPE, C::DTYPE)?;
    let shape @ [batch, seq, kv_heads, dim] = key.shape();
    let stored @ [pages, page_len, ..] = cache_key.shape();
    let [.., value_dim] = cache_value.shape();
    // Rows are moved 16 bytes at a time, eight elements by each thread.
    let unit = if C::DTYPE == DType::F8E4M3 { 16 } else { 8 };
    for (argument, shape, dim) in [("key", shape, dim), ("value", cache_value.shape(), value_dim)] {
        if dim == 0 || !dim.is_multiple_of(unit) {
            let expected = format!("head_dim a multiple of {unit}");
            return Err(Error::shape(argument, expected, format!("{shape:?}")));
        }
    }
    if let (DType::F8E4M3, Some(_)) = (T::DTYPE, rotation) {
        return Err(Error::value("rotation", "none for fp8 rows", "one"));
    }
    if let (DType::F8E4M3, Some(_)) = (T::DTYPE, scales) {
        return Err(Error::value("scales", "none for fp8 rows", "some"));
    }
    let scales = scales.as_ref().map(|scales| Scales::new(&scales.key, &scales.value));
    let scales = ScaleParams::new(stream, C::DTYPE, kv_heads, scales.as_ref())?;
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
    value.check_rows("value", with_dim(shape, value_dim))?;
    cache_key.check_rows("cache_key", [pages, page_len, kv_heads, dim])?;
    cache_value.check_rows("cache_value", [pages, page_len, kv_heads, value_dim])?;
    let value_extent = narrow("value", with_dim(shape, value_dim))?[3];
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
    let threads = tokens.saturating_mul(kv_heads * dim.max(value_dim) / 8);
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
        value_dim: value_extent,
        key_scales: scales.key,
        value_scales: scales.value,
        key_scale_step: scales.key_step,
        value_scale_step: scales.value_step,
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
    let launch = Launch {
        kernel,
        blocks: blocks as u32,
        threads: APPEND_THREADS as u32,
        shared_bytes: 0,
        params: bytes_of(std::slice::from_ref(&params)),
    };
    // SAFETY: extents and lengths were checked; the kernel checks places and positions.
    unsafe { device.launch(stream, &launch) }
}

/// The kernel for new rows of one type and a cache of another.
fn kernel_of(from: DType, to: DType) -> Result<&'static str> {
    Ok(match (from, to) {
        (DType::F16, DType::F16) => "append_f16",
        (DType::BF16, DType::BF16) => "append_bf16",
        (DType::F8E4M3, DType::F8E4M3) => "append_e4m3",
        (DType::F16, DType::F8E4M3) => "append_f16_e4m3",
        (DType::BF16, DType::F8E4M3) => "append_bf16_e4m3",
        (DType::F32, _) => return Err(Error::DType { argument: "key", expected: DType::BF16, got: from }),
        _ => return Err(Error::DType { argument: "cache_key", expected: from, got: to }),
    })
}
