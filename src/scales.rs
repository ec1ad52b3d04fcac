//! What fp8 keys and values are multiplied by.

use crate::{DType, Error, Result};

/// Scales of quantised keys and values: a key is `key` times what its code says, a value `value`
/// times that. `S` is a backend's slice of f32: `[1]` for all heads, or `[kv_heads]`.
///
/// Attention folds them into the factor of the scores and into the outputs;
/// [`Append`](crate::Append) divides by them. They are finite and above 0.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Scales<S> {
    /// Of keys.
    pub key: S,
    /// Of values.
    pub value: S,
}

impl<S> Scales<S> {
    /// Scales of keys and of values.
    pub fn new(key: S, value: S) -> Self {
        Self { key, value }
    }
}

/// Names of the arguments.
const NAMES: [&str; 2] = ["key scales", "value scales"];

impl Scales<&[f32]> {
    /// The scale of a head's keys, and of its values.
    pub(crate) fn of_head(&self, kv_head: usize) -> [f32; 2] {
        [self.key, self.value].map(|scales| scales[if scales.len() == 1 { 0 } else { kv_head }])
    }

    /// Refuses scales out of range, or of keys and values that are not fp8.
    pub(crate) fn check(&self, dtype: DType, kv_heads: usize) -> Result<()> {
        check_extents(dtype, kv_heads, [self.key.len(), self.value.len()])?;
        for (argument, scales) in NAMES.into_iter().zip([self.key, self.value]) {
            if let Some(head) = scales.iter().position(|scale| !(scale.is_finite() && *scale > 0.0)) {
                let expected = format!("a finite number above 0 for head {head}");
                return Err(Error::value(argument, expected, scales[head]));
            }
        }
        Ok(())
    }
}

/// Refuses scales that are not one for all heads or one for each, or that keys of this type have
/// not.
pub(crate) fn check_extents(dtype: DType, kv_heads: usize, counts: [usize; 2]) -> Result<()> {
    if dtype != DType::F8E4M3 {
        return Err(Error::DType { argument: "key", expected: DType::F8E4M3, got: dtype });
    }
    for (argument, count) in NAMES.into_iter().zip(counts) {
        if count != 1 && count != kv_heads {
            return Err(Error::shape(argument, format!("[1] or [{kv_heads}]"), format!("[{count}]")));
        }
    }
    Ok(())
}
