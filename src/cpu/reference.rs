//! The oracle: attention in f64, one row after another, straight from the definition.
//!
//! ```text
//! s_j = softcap(scale · q·k_j)   over the keys j that the mask shows to the row
//! lse = ln Σ_j exp(s_j)          out = Σ_j exp(s_j - lse) v_j
//! ```
//!
//! It shares no code with the backends: neither their tiles nor their view of the mask. Slow; made
//! to be right.

use crate::{AttentionConfig, AttentionShape, Element, Mask, Result, TensorView};

/// An output and its log-sum-exp in f64.
#[derive(Clone, Debug, PartialEq)]
pub struct Reference {
    /// `[batch, seq, heads, dim]`, row-major.
    pub out: Vec<f64>,
    /// `[batch, heads, seq]`, natural logarithm; `-inf` where no key is seen.
    pub lse: Vec<f64>,
}

/// Whether a query row sees a key, with `query_len` rows aligned to the end of `key_len` keys.
pub fn sees(mask: Mask, query_len: usize, key_len: usize, row: usize, key: usize) -> bool {
    let position = (row + key_len) as i128 - query_len as i128;
    let key = key as i128;
    match mask {
        Mask::Full => true,
        Mask::Causal => key <= position,
        Mask::Star { anchor_len, block_len, first_block_len } => {
            let first = first_block_len as i128;
            let block = |p: i128| if p < first { 0 } else { 1 + (p - first) / block_len as i128 };
            key <= position && (block(key) == block(position) || key < anchor_len as i128)
        }
    }
}

/// Attention of `query` `[batch, seq, heads, dim]` over `key` and `value` `[batch, keys, kv_heads,
/// dim]`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Stride`](crate::Error::Stride) or
/// [`Error::Value`](crate::Error::Value) for tensors or a config that do not fit together.
pub fn attention<T: Element>(
    config: &AttentionConfig,
    query: TensorView<'_, T>,
    key: TensorView<'_, T>,
    value: TensorView<'_, T>,
) -> Result<Reference> {
    config.validate()?;
    let shape = AttentionShape::of(&query, &key, &value)?;
    let AttentionShape { batch, query_len, key_len, query_heads, head_dim, .. } = shape;
    let scale = f64::from(config.scale_for(head_dim));
    let mut out = vec![0.0; batch * query_len * query_heads * head_dim];
    let mut lse = vec![f64::NEG_INFINITY; shape.lse_len()];
    for b in 0..batch {
        for row in 0..query_len {
            for head in 0..query_heads {
                let kv_head = head / shape.group();
                let at = |x: &TensorView<'_, T>, seq, head, d| f64::from(x.at([b, seq, head, d]).to_f32());
                let visible: Vec<usize> =
                    (0..key_len).filter(|&j| sees(config.mask, query_len, key_len, row, j)).collect();
                let scores: Vec<f64> = visible
                    .iter()
                    .map(|&j| {
                        let dot: f64 =
                            (0..head_dim).map(|d| at(&query, row, head, d) * at(&key, j, kv_head, d)).sum();
                        let score = scale * dot;
                        config.softcap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh())
                    })
                    .collect();
                if scores.is_empty() {
                    continue;
                }
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                // If every score is -inf, there is nothing to shift by.
                let shift = if max == f64::NEG_INFINITY { 0.0 } else { max };
                let sum: f64 = scores.iter().map(|s| (s - shift).exp()).sum();
                let row_out = &mut out[((b * query_len + row) * query_heads + head) * head_dim..][..head_dim];
                if sum != 0.0 {
                    for (&j, s) in visible.iter().zip(&scores) {
                        let weight = (s - shift).exp() / sum;
                        for (d, out) in row_out.iter_mut().enumerate() {
                            *out += weight * at(&value, j, kv_head, d);
                        }
                    }
                }
                lse[(b * query_heads + head) * query_len + row] = shift + sum.ln();
            }
        }
    }
    Ok(Reference { out, lse })
}
