//! New keys and values to their places in a KV cache, the keys rotated on the way where asked.

use crate::batch::with_dim;
use crate::config::check_rows;
use crate::tensor::SharedRows;
use crate::{Append, Element, Error, LEFT_OUT, Result, Rotation, TensorView, TensorViewMut};
use rayon::prelude::*;

/// Elements below which a second thread costs more than it saves.
const ELEMENTS_PER_TASK: usize = 1 << 15;

/// Stores new keys and values in a cache of keys `[pages, page_len, kv_heads, head_dim]` and values
/// `[pages, page_len, kv_heads, value_dim]`, each row at its place.
///
/// The last axes are contiguous. Rows are converted where the cache has another element type, in
/// f32, rounded once, after a division by the scales if there are any. Places are compared with
/// each other, which takes memory for a copy of them.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Stride`] for tensors that do not fit together, [`Error::Value`] for
/// a rotation of an odd number of dims or of more than there are, or scales that are not finite or
/// not above 0, [`Error::DType`] for scales of a cache of another type than
/// [`F8E4M3`](crate::F8E4M3); [`Error::Sequence`], naming the index on the batch axis, with
/// [`Error::Value`] for a place outside of the cache, one that another row has, or a position
/// outside of the rotation's table. Nothing was written then.
pub fn append<T: Element, C: Element>(
    new: &Append<TensorView<'_, T>, &[f32], &[u32]>,
    cache_key: TensorViewMut<'_, C>,
    cache_value: TensorViewMut<'_, C>,
) -> Result<()> {
    let shape @ [batch, seq, kv_heads, dim] = new.key.shape();
    let [pages, page_len, ..] = cache_key.shape();
    let [.., value_dim] = cache_value.shape();
    let cache = [pages, page_len, kv_heads, dim];
    check_rows("key", shape, shape, new.key.strides())?;
    check_rows("value", with_dim(shape, value_dim), new.value.shape(), new.value.strides())?;
    check_rows("cache_key", cache, cache_key.shape(), cache_key.strides())?;
    check_rows("cache_value", with_dim(cache, value_dim), cache_value.shape(), cache_value.strides())?;
    // Axes of stride 0 may have any extent.
    let tokens = if shape.contains(&0) { Some(0) } else { batch.checked_mul(seq) };
    let Some(tokens) = tokens else {
        return Err(Error::shape("key", "rows that can be counted", format!("{shape:?}")));
    };
    check_len("places", tokens, new.places.len())?;
    let places = Places { of: new.places, seq, page_len };
    places.check(pages)?;
    if let Some(rotation) = &new.rotation {
        check_rotation(rotation, new.places, tokens, seq, dim)?;
    }

    if let Some(scales) = &new.scales {
        scales.check(C::DTYPE, kv_heads)?;
    }
    let (cache_key, cache_value) = (SharedRows::new(cache_key), SharedRows::new(cache_value));
    let least = ELEMENTS_PER_TASK.div_ceil((kv_heads * dim.max(value_dim)).max(1));
    (0..tokens).into_par_iter().with_min_len(least).for_each(|token| {
        let Some([page, row]) = places.get(token) else { return };
        let angles = new.rotation.as_ref().map(|rotation| Angles::new(rotation, token));
        for head in 0..kv_heads {
            // SAFETY: no two tokens have one place, as checked, and a token is worked on once.
            let (to_key, to_value) =
                unsafe { (cache_key.row(page, row, head), cache_value.row(page, row, head)) };
            let from = [token / seq, token % seq, head];
            let [key_scale, value_scale] = new.scales.map_or([1.0; 2], |scales| scales.of_head(head));
            convert(row_of(&new.value, from), value_scale, to_value);
            match &angles {
                Some(angles) => angles.rotate(row_of(&new.key, from), key_scale, to_key),
                None => convert(row_of(&new.key, from), key_scale, to_key),
            }
        }
    });
    Ok(())
}

/// The places of new rows.
struct Places<'a> {
    of: &'a [u32],
    /// Rows of each index on the batch axis.
    seq: usize,
    page_len: usize,
}

impl Places<'_> {
    /// Page and row of a token, unless it is left out.
    fn get(&self, token: usize) -> Option<[usize; 2]> {
        let place = self.of[token];
        (place != LEFT_OUT).then(|| [place as usize / self.page_len, place as usize % self.page_len])
    }

    /// Refuses places outside of the cache, and one that two rows have.
    fn check(&self, pages: usize) -> Result<()> {
        let refuse = |token: usize, expected: String| {
            let source = Error::value("places", expected, self.of[token]);
            Err(Error::Sequence { index: token / self.seq, source: Box::new(source) })
        };
        let rows = pages.saturating_mul(self.page_len);
        if let Some(token) = self.of.iter().position(|&place| place != LEFT_OUT && place as usize >= rows) {
            return refuse(token, format!("below {rows}, or LEFT_OUT"));
        }
        let mut order: Vec<usize> = (0..self.of.len()).collect();
        order.sort_by_key(|&token| self.of[token]);
        let twice = order
            .windows(2)
            .find(|pair| self.of[pair[0]] == self.of[pair[1]] && self.of[pair[0]] != LEFT_OUT);
        match twice {
            Some(pair) => refuse(pair[1], format!("a place that row {} has not", pair[0])),
            None => Ok(()),
        }
    }
}

fn check_len(argument: &'static str, expected: usize, got: usize) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::shape(argument, format!("{expected} elements"), got.to_string()))
}

fn check_rotation(
    rotation: &Rotation<&[f32], &[u32]>,
    places: &[u32],
    tokens: usize,
    seq: usize,
    dim: usize,
) -> Result<()> {
    let Rotation { cos, sin, positions, rotated, .. } = *rotation;
    if rotated == 0 || !rotated.is_multiple_of(2) || rotated > dim {
        return Err(Error::value("rotated", format!("an even number from 2 to {dim}"), rotated));
    }
    let half = rotated / 2;
    check_len("positions", tokens, positions.len())?;
    check_len("cos", cos.len() / half * half, cos.len())?;
    check_len("sin", cos.len(), sin.len())?;
    let end = cos.len() / half;
    let mut stored = (0..tokens).filter(|&token| places[token] != LEFT_OUT);
    match stored.find(|&token| positions[token] as usize >= end) {
        Some(token) => {
            let source = Error::value("positions", format!("below {end}"), positions[token]);
            Err(Error::Sequence { index: token / seq, source: Box::new(source) })
        }
        None => Ok(()),
    }
}

fn row_of<'a, T: Element>(tensor: &TensorView<'a, T>, [batch, seq, head]: [usize; 3]) -> &'a [T] {
    let [batch_stride, seq_stride, head_stride, _] = tensor.strides();
    let start = batch * batch_stride + seq * seq_stride + head * head_stride;
    &tensor.data()[start..start + tensor.shape()[3]]
}

fn convert<T: Element, C: Element>(from: &[T], scale: f32, to: &mut [C]) {
    if T::DTYPE == C::DTYPE && scale == 1.0 {
        to.copy_from_slice(bytemuck::cast_slice(from));
    } else {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = C::from_f32(from.to_f32() / scale));
    }
}

/// The angles of one token.
struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    interleaved: bool,
}

impl<'a> Angles<'a> {
    fn new(rotation: &Rotation<&'a [f32], &[u32]>, token: usize) -> Self {
        let half = rotation.rotated / 2;
        let start = rotation.positions[token] as usize * half;
        let of = |table: &'a [f32]| &table[start..start + half];
        Self { cos: of(rotation.cos), sin: of(rotation.sin), interleaved: rotation.interleaved }
    }

    fn rotate<T: Element, C: Element>(&self, from: &[T], scale: f32, to: &mut [C]) {
        let half = self.cos.len();
        convert(&from[2 * half..], scale, &mut to[2 * half..]);
        for (i, (cos, sin)) in self.cos.iter().zip(self.sin).enumerate() {
            let [first, second] = if self.interleaved { [2 * i, 2 * i + 1] } else { [i, i + half] };
            let (x, y) = (from[first].to_f32(), from[second].to_f32());
            to[first] = C::from_f32((x * cos - y * sin) / scale);
            to[second] = C::from_f32((x * sin + y * cos) / scale);
        }
    }
}
