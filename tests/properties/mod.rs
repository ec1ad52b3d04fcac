//! What must hold for attention, whoever computes it: the CPU, the emulated kernels, or a GPU.

#![allow(dead_code)] // every test binary takes what it needs

pub mod append;
pub mod backend;
pub mod batches;
pub mod cases;
pub mod engine;
pub mod expected;
pub mod extremes;
pub mod masks;
pub mod merge;
pub mod models;
pub mod nonfinite;
pub mod packed;
pub mod quantised;
pub mod query;
pub mod refusals;
pub mod separate;
pub mod sinks;
pub mod softcap;
pub mod star;

use crate::common::Tensor;
use cases::Inputs;
use star_attention::{AttentionConfig, Element};

/// Whoever computes attention on elements of `T`.
pub trait Attend<T: Element> {
    /// Attention into `out` and, if given, its log-sum-exp `[batch, heads, seq]`; of packed
    /// sequences if they have offsets of queries and keys.
    fn attend<O: Element>(
        &self,
        config: &AttentionConfig,
        offsets: Option<[&[usize]; 2]>,
        inputs: &Inputs<T>,
        out: &mut Tensor<O>,
        lse: Option<&mut [f32]>,
    );

    /// The keys and values of a shard to which these were appended one after another.
    fn shard(&self, appended: &[[Tensor<T>; 2]]) -> [Tensor<T>; 2];

    /// Output and log-sum-exp of the partials, at least one, merged in each way there is, with a
    /// sink for each head if given.
    fn merge(
        &self,
        partials: &[(Tensor<f32>, Vec<f32>)],
        sinks: Option<&[f32]>,
    ) -> Vec<(Tensor<f32>, Vec<f32>)>;
}
