//! The same calls on [candle](candle_core) tensors: of the CPU, and with the feature `candle-cuda`
//! of NVIDIA GPUs.
//!
//! - [`Plan`]: attention of a [`Batch`] (packed sequences, pages, prefixes, a mask for each), by a
//!   plan that is kept between layers and steps;
//! - [`append`]: new keys and values to their places in a cache, in place;
//! - [`merge()`], [`merge_over`]: attention over disjoint keys to one, of this rank or of all;
//! - [`attention`], [`partial`]: one call under one mask.
//!
//! Tensors are borrowed where they lie: any strides do whose last axis is contiguous, so a
//! transposed, narrowed or broadcast tensor costs no copy. Only on a GPU one is copied whose rows
//! do not start at multiples of 16 bytes. No gradient flows through these calls.
//!
//! On a GPU the work is asked for on candle's stream, and outputs are allocated there, as candle's
//! own operations do.

mod append;
mod borrow;
#[cfg(feature = "candle-cuda")]
mod cuda;
mod in_place;
mod memory;
mod merge;
mod plan;

pub use append::append;
pub use borrow::Borrowed;
pub use merge::{merge, merge_over, merge_over_with_sinks, merge_with_sinks};
#[cfg(feature = "candle-cuda")]
pub use merge::{merge_over_gpus, merge_over_gpus_with_sinks};
pub use plan::Plan;

use crate::{AttentionConfig, AttentionShape, Batch, Inputs, Result};
use borrow::axes;
use candle_core::Tensor;

/// Evaluates `$call` with `$home`, the [`Home`] of a device.
macro_rules! on_device {
    ($argument:expr, $device:expr, $home:ident => $call:expr) => {
        match $device {
            candle_core::Device::Cpu => {
                let $home = crate::cpu::Cpu::new();
                $call
            }
            #[cfg(feature = "candle-cuda")]
            candle_core::Device::Cuda(device) => {
                let $home = crate::candle::cuda::Gpu::new(device)?;
                $call
            }
            other => {
                let got = format!("{:?}", other.location());
                Err(crate::Error::value($argument, crate::candle::DEVICES, got))
            }
        }
    };
}
use on_device;

/// Where tensors may be.
const DEVICES: &str = if cfg!(feature = "candle-cuda") {
    "the CPU or an NVIDIA GPU"
} else {
    "the CPU (GPUs: feature candle-cuda)"
};

/// Evaluates `$call` with `$T` the type of a [`DType`](crate::DType).
macro_rules! by_dtype {
    ($dtype:expr, $T:ident => $call:expr) => {
        match $dtype {
            crate::DType::F32 => {
                type $T = f32;
                $call
            }
            crate::DType::F16 => {
                type $T = crate::f16;
                $call
            }
            crate::DType::BF16 => {
                type $T = crate::bf16;
                $call
            }
            other @ crate::DType::F8E4M3 => {
                Err(crate::Error::value("tensor", "a tensor of f32, f16 or bf16", other))
            }
        }
    };
}
use by_dtype;

/// Attention of `query` `[batch, seq, heads, dim]` over `key` `[batch, keys, kv_heads, dim]` and
/// `value` `[batch, keys, kv_heads, value_dim]`, all f32, f16 or bf16.
///
/// Returns the output `[batch, seq, heads, value_dim]`, of the dtype of `query`, and its
/// log-sum-exp `[batch, heads, seq]` in f32. Where calls repeat, keep a [`Plan`].
///
/// # Errors
/// As [`Plan::for_batch`] and [`Plan::attend`].
pub fn attention(
    config: &AttentionConfig,
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
) -> Result<(Tensor, Tensor)> {
    plan_of(config, query, key, value)?.attend(Inputs::new(query, key, value))
}

/// [`attention`] with the output in f32, so that a [`merge()`] of partials rounds once.
///
/// # Errors
/// As [`attention`].
pub fn partial(
    config: &AttentionConfig,
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
) -> Result<(Tensor, Tensor)> {
    plan_of(config, query, key, value)?.partial(Inputs::new(query, key, value))
}

/// The plan of one call.
fn plan_of(config: &AttentionConfig, query: &Tensor, key: &Tensor, value: &Tensor) -> Result<Plan> {
    let [[batch, query_len, query_heads, head_dim], _] = axes("query", query.layout())?;
    let [[_, key_len, kv_heads, _], _] = axes("key", key.layout())?;
    let [[.., value_dim], _] = axes("value", value.layout())?;
    let shape = AttentionShape { batch, query_len, key_len, query_heads, kv_heads, head_dim, value_dim };
    Plan::for_batch(query.device(), &config.score().into(), &Batch::uniform(&shape, &config.mask)?)
}
