//! Scales of fp8 keys and values, as kernels are told of them.

use super::device::{Device, Span};
use crate::scales::check_extents;
use crate::{DType, Result, Scales};

/// The addresses of scales, 0 if there are none, and how far one head's are from the next's: 0 where
/// all heads have one.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ScaleParams {
    pub key: u64,
    pub value: u64,
    pub key_step: u32,
    pub value_step: u32,
}

impl ScaleParams {
    /// Refuses scales that are not one for all heads or one for each, of keys that are not fp8,
    /// or of another stream. That they are finite and above 0 is the caller's promise.
    pub fn new<D: Device>(
        stream: &D::Stream,
        dtype: DType,
        kv_heads: usize,
        scales: Option<&Scales<&Span<'_, D, f32>>>,
    ) -> Result<Self> {
        let Some(Scales { key, value }) = scales else { return Ok(Self::default()) };
        check_extents(dtype, kv_heads, [key.len, value.len])?;
        key.check_stream("key scales", stream)?;
        value.check_stream("value scales", stream)?;
        let step = |scales: &Span<'_, D, f32>| u32::from(scales.len > 1);
        Ok(Self { key: key.address, value: value.address, key_step: step(key), value_step: step(value) })
    }
}
