//! The oracle: attention in f64, one row after another, straight from the definition.
//!
//! ```text
//! s_j = softcap(scale · q·k_j)   over the keys j that the mask shows to the row
//! lse = ln Σ_j exp(s_j)          out = Σ_j exp(s_j - lse) v_j
//! ```
//!
//! With attention sinks, one logit for each head, `lse = ln(Σ_j exp(s_j) + exp(sink))`. With scales
//! k and v are their codes' values times these, in f64.
//!
//! It shares no code with the backends: neither their tiles nor their view of the mask. Slow; made
//! to be right.

use crate::config::check_sinks;
use crate::{AttentionConfig, AttentionShape, Element, Error, Inputs, Mask, Result, TensorView};

/// An output and its log-sum-exp in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// `[batch, seq, heads, value_dim]`, row-major.
    pub out: Vec<f64>,
    /// `[batch, heads, seq]`, natural logarithm; `-inf`, or the sink, where no key is seen.
    pub lse: Vec<f64>,
}

/// Whether a query row sees a key, with `query_len` rows aligned to the end of `key_len` keys.
pub fn sees(mask: &Mask, query_len: usize, key_len: usize, row: usize, key: usize) -> bool {
    let position = (row + key_len) as i128 - query_len as i128;
    let (key, distance) = (key as i128, key as i128 - position);
    let after = |left: Option<usize>| left.is_none_or(|left| -distance <= left as i128);
    match mask {
        Mask::Full => true,
        Mask::Causal => key <= position,
        Mask::Window { left, right } => after(*left) && right.is_none_or(|right| distance <= right as i128),
        Mask::Star { anchor_len, block_len, first_block_len, left } => {
            let first = *first_block_len as i128;
            let block = |p: i128| if p < first { 0 } else { 1 + (p - first) / *block_len as i128 };
            let own = block(key) == block(position) && after(*left);
            key <= position && (own || key < *anchor_len as i128)
        }
        Mask::Blocks(blocks) => {
            let ranges = blocks.ranges(row / blocks.tile_rows());
            let listed = ranges.iter().any(|range| range.contains(&(key as usize)));
            listed && (!blocks.is_causal() || key <= position)
        }
    }
}

/// Attention of `query` `[batch, seq, heads, dim]` over `key` `[batch, keys, kv_heads, dim]` and
/// `value` `[batch, keys, kv_heads, value_dim]`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] for tensors or a config that do not fit
/// together.
pub fn attention<T: Element>(
    config: &AttentionConfig,
    query: TensorView<'_, T>,
    key: TensorView<'_, T>,
    value: TensorView<'_, T>,
) -> Result<Reference> {
    attention_of(config, Inputs::new(query, key, value))
}

/// [`attention`] of inputs with sinks and scales, and with queries of another type than keys. A
/// sink of `-inf` is none.
///
/// # Errors
/// As [`attention`]; [`Error::Shape`] for another number of sinks or scales, [`Error::Value`] for a
/// sink that is NaN or `+inf`, a scale out of range, or inputs with a prefix, which the oracle
/// takes as the first keys; [`Error::DType`] for scales of keys that are not
/// [`F8E4M3`](crate::F8E4M3).
pub fn attention_of<Q: Element, T: Element>(
    config: &AttentionConfig,
    inputs: Inputs<TensorView<'_, Q>, TensorView<'_, T>, &[f32]>,
) -> Result<Reference> {
    let Inputs { query, key, value, prefix, sinks, scales } = inputs;
    config.validate()?;
    let shape = AttentionShape::of(&query, &key, &value)?;
    if prefix.is_some() {
        return Err(Error::value("prefix", "none: its rows are the first keys", "some"));
    }
    check_sinks(shape.query_heads, sinks)?;
    scales.map_or(Ok(()), |scales| scales.check(T::DTYPE, shape.kv_heads))?;
    let AttentionShape { batch, query_len, key_len, query_heads, head_dim, value_dim, .. } = shape;
    config.mask.validate_for(query_len, key_len)?;
    let scale = f64::from(config.scale_for(head_dim));
    let mut out = vec![0.0; batch * query_len * query_heads * value_dim];
    let mut lse = vec![f64::NEG_INFINITY; shape.lse_len()];
    for b in 0..batch {
        for row in 0..query_len {
            for head in 0..query_heads {
                let kv_head = head / shape.group();
                let [key_scale, value_scale] =
                    scales.map_or([1.0; 2], |scales| scales.of_head(kv_head).map(f64::from));
                let visible: Vec<usize> =
                    (0..key_len).filter(|&j| sees(&config.mask, query_len, key_len, row, j)).collect();
                let scores: Vec<f64> = visible
                    .iter()
                    .map(|&j| {
                        let term =
                            |d| at(&query, [b, row, head, d]) * key_scale * at(&key, [b, j, kv_head, d]);
                        let score = scale * (0..head_dim).map(term).sum::<f64>();
                        config.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    })
                    .collect();
                let sink = sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[head]));
                let max = scores.iter().copied().fold(sink, f64::max);
                // If every term is -inf, there is nothing to shift by.
                let shift = if max == f64::NEG_INFINITY { 0.0 } else { max };
                let sum = scores.iter().map(|s| (s - shift).exp()).sum::<f64>() + (sink - shift).exp();
                let row_out =
                    &mut out[((b * query_len + row) * query_heads + head) * value_dim..][..value_dim];
                if sum != 0.0 {
                    for (&j, s) in visible.iter().zip(&scores) {
                        let weight = (s - shift).exp() / sum;
                        for (d, out) in row_out.iter_mut().enumerate() {
                            *out += weight * value_scale * at(&value, [b, j, kv_head, d]);
                        }
                    }
                }
                lse[(b * query_heads + head) * query_len + row] = shift + sum.ln();
            }
        }
    }
    Ok(Reference { out, lse })
}

fn at<T: Element>(tensor: &TensorView<'_, T>, index: [usize; 4]) -> f64 {
    f64::from(tensor.at(index).to_f32())
}
