//! The tensors that a call of attention reads.

#[cfg(doc)]
use crate::Batch;
use crate::Scales;

/// The tensors that a call reads: `Q` is a backend's view of queries, `K` its view of keys and
/// values, `S` its slice of f32.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Inputs<Q, K, S> {
    /// Queries, of the shape [`Batch::query_shape`].
    pub query: Q,
    /// Keys, of the shape [`Batch::key_shape`].
    pub key: K,
    /// Values, of the shape [`Batch::value_shape`].
    pub value: K,
    /// Keys of the shape [`Batch::prefix_shape`] and values of the shape
    /// [`Batch::prefix_value_shape`], where a sequence has a prefix.
    pub prefix: Option<[K; 2]>,
    /// Attention sinks, f32 `[query_heads]`, where rows have one.
    pub sinks: Option<S>,
    /// What fp8 keys and values are multiplied by.
    pub scales: Option<Scales<S>>,
}

impl<Q, K, S> Inputs<Q, K, S> {
    /// The tensors of a call without prefixes and sinks.
    pub fn new(query: Q, key: K, value: K) -> Self {
        Self { query, key, value, prefix: None, sinks: None, scales: None }
    }

    /// The same with the keys and values of prefixes.
    #[must_use]
    pub fn with_prefix(self, key: K, value: K) -> Self {
        Self { prefix: Some([key, value]), ..self }
    }

    /// The same with attention sinks, as gpt-oss has them: one logit for each query head, f32
    /// `[query_heads]`, in the units of a score after scale and softcap. The softmax of each row
    /// has one more term, without a value:
    ///
    /// ```text
    /// out = Σ_j exp(s_j) v_j / (Σ_j exp(s_j) + exp(sink))
    /// lse = ln(Σ_j exp(s_j) + exp(sink))
    /// ```
    ///
    /// A row that sees no key gets 0 and its sink. A sink of `-inf` is none; NaN and `+inf` are
    /// out of range. A sink counts once: it belongs to the call that finishes a row. Where the
    /// results are partials, still to be merged, give it to the last merge instead.
    #[must_use]
    pub fn with_sinks(self, sinks: S) -> Self {
        Self { sinks: Some(sinks), ..self }
    }

    /// The same with scales of keys and values, which are [`F8E4M3`](crate::F8E4M3): those of the
    /// call's prefix as well. Without, keys and values are what their codes say.
    #[must_use]
    pub fn with_scales(self, scales: Scales<S>) -> Self {
        Self { scales: Some(scales), ..self }
    }
}
