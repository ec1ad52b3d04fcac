//! What an append to a KV cache is told, on every backend: new rows, their places, and how keys are
//! rotated on the way.

use crate::Scales;

/// The place of a row that is not stored. Its position is not looked at.
pub const LEFT_OUT: u32 = u32::MAX;

/// New keys and values, and where they go. `V` is a backend's view of a tensor, `F` and `U` are its
/// slices of f32 and u32.
///
/// A cache is a tensor of keys `[pages, page_len, kv_heads, head_dim]` and one of values `[pages,
/// page_len, kv_heads, value_dim]`; one that has a row of
/// consecutive tokens for each sequence, `[batch, capacity, kv_heads, head_dim]`, is the same with
/// a page for each sequence.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Append<V, F, U> {
    /// New keys, `[batch, seq, kv_heads, head_dim]`.
    pub key: V,
    /// New values, `[batch, seq, kv_heads, value_dim]`.
    pub value: V,
    /// The place of each new row in the cache, `page · page_len + row`, or [`LEFT_OUT`]; `[batch,
    /// seq]`. No two rows have one place.
    pub places: U,
    /// How keys are rotated on the way, if they are.
    pub rotation: Option<Rotation<F, U>>,
    /// What keys and values are divided by on the way to an fp8 cache.
    pub scales: Option<Scales<F>>,
}

impl<V, F, U> Append<V, F, U> {
    /// New rows that are stored as they are.
    pub fn new(key: V, value: V, places: U) -> Self {
        Self { key, value, places, rotation: None, scales: None }
    }

    /// The same with keys rotated on the way.
    #[must_use]
    pub fn with_rotation(self, rotation: Rotation<F, U>) -> Self {
        Self { rotation: Some(rotation), ..self }
    }

    /// The same with keys and values, after the rotation, divided by scales and rounded once, to a
    /// cache of [`F8E4M3`](crate::F8E4M3): with the scales that
    /// [attention](crate::Inputs::with_scales) then gets. What is beyond the largest becomes that.
    #[must_use]
    pub fn with_scales(self, scales: Scales<F>) -> Self {
        Self { scales: Some(scales), ..self }
    }
}

/// The rotation of keys by position (RoPE): pairs of dims `(x, y)` become `(x cos - y sin, x sin +
/// y cos)`, in f32, rounded once.
#[derive(Clone, Copy, Debug)]
pub struct Rotation<F, U> {
    /// `[positions, rotated / 2]`.
    pub cos: F,
    /// `[positions, rotated / 2]`.
    pub sin: F,
    /// The position of each new row, `[batch, seq]`.
    pub positions: U,
    /// The first dims of a head that are rotated; the others stay.
    pub rotated: usize,
    /// Whether pairs are `(2 i, 2 i + 1)`; else `(i, i + rotated / 2)`, as in Hugging Face's Llama.
    pub interleaved: bool,
}
