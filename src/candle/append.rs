//! New keys and values to their places in a cache of candle tensors.

use super::borrow::{axes, table};
use super::memory::{Home, Number, dtype};
use super::{by_dtype, in_place, on_device};
use crate::{Append, Backend, Element, Result, Rotation};
use candle_core::Tensor;

/// Stores new keys and values `[batch, seq, kv_heads, head_dim]` in a cache of two tensors `[pages,
/// page_len, kv_heads, head_dim]`, in place.
///
/// Rows of the cache must start at multiples of 16 bytes on a GPU. Places and positions are u32 `[batch, seq]`; the rotation's cos and sin are f32 `[positions,
/// rotated / 2]`. Rows are of the cache's dtype, or on the CPU of any.
///
/// # Errors
/// As [`Backend::append`]; [`Error::Value`](crate::Error::Value) for a tensor on another device or
/// of another dtype, and for one that shares its memory with a tensor of the cache: the two tensors
/// of the cache share none either. Nothing was written then.
pub fn append(
    new: Append<&Tensor, &Tensor, &Tensor>,
    cache_key: &Tensor,
    cache_value: &Tensor,
) -> Result<()> {
    let [from, to] = [dtype("key", new.key)?, dtype("cache_key", cache_key)?];
    on_device!("key", new.key.device(), home => {
        by_dtype!(from, T => by_dtype!(to, C => append_in::<_, T, C>(&home, new, cache_key, cache_value)))
    })
}

fn append_in<H: Home, T: Element + Number, C: Element + Number>(
    home: &H,
    new: Append<&Tensor, &Tensor, &Tensor>,
    cache_key: &Tensor,
    cache_value: &Tensor,
) -> Result<()> {
    let [[batch, seq, ..], _] = axes("key", new.key.layout())?;
    let rows = [batch, seq];
    let places = table(home, "places", new.places, &rows)?;
    let rotation = match &new.rotation {
        Some(rotation) => {
            let angles = [rotation.cos.dims().first().copied().unwrap_or(0), rotation.rotated / 2];
            let cos = table(home, "cos", rotation.cos, &angles)?;
            let sin = table(home, "sin", rotation.sin, &angles)?;
            Some([cos, sin, table(home, "positions", rotation.positions, &rows)?])
        }
        None => None,
    };
    home.check("key", new.key)?;
    home.check("value", new.value)?;
    let (key, value) = (home.readable(new.key)?, home.readable(new.value)?);
    let mut read = vec![("key", &key), ("value", &value), ("places", &places)];
    if let Some([cos, sin, positions]) = &rotation {
        read.extend([("cos", cos), ("sin", sin), ("positions", positions)]);
    }
    let caches = [("cache_key", cache_key), ("cache_value", cache_value)];
    let [of_key, of_value] =
        [axes("cache_key", cache_key.layout())?, axes("cache_value", cache_value.layout())?];
    for (argument, cache) in caches {
        home.check(argument, cache)?;
    }
    let starts = caches.map(|(_, cache)| cache.layout().start_offset()..usize::MAX);

    in_place::write_two(home, caches, &read, |to_key, to_value, read| {
        let mut rows = Append::new(
            read.view::<H, T>(home, 0)?,
            read.view::<H, T>(home, 1)?,
            read.elements::<H, u32>(home, 2)?,
        );
        if let Some(Rotation { rotated, interleaved, .. }) = new.rotation {
            rows = rows.with_rotation(Rotation {
                cos: read.elements::<H, f32>(home, 3)?,
                sin: read.elements::<H, f32>(home, 4)?,
                positions: read.elements::<H, u32>(home, 5)?,
                rotated,
                interleaved,
            });
        }
        let [key_start, value_start] = starts;
        let to_key = home.slice_mut::<C>("cache_key", to_key, key_start)?;
        let to_value = home.slice_mut::<C>("cache_value", to_value, value_start)?;
        home.backend().append(
            rows,
            H::Backend::view_mut("cache_key", to_key, of_key[0], of_key[1])?,
            H::Backend::view_mut("cache_value", to_value, of_value[0], of_value[1])?,
        )
    })
}
