//! One decoder layer, without its attention.

use super::config::Config;
use super::error::Result;
use super::family::Family;
use super::weights::Weights;
use candle_core::{D, DType, Device, Tensor};

/// Cosine and sine of each pair of elements of a head, `[rows, head_dim / 2]`.
pub type Rotation = Vec<(f32, f32)>;

/// The weights of a layer.
pub struct Layer {
    input_norm: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    /// Of each head's queries and keys.
    head_norms: Option<[Tensor; 2]>,
    output: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    /// Of what attention and MLP add.
    output_norms: Option<[Tensor; 2]>,
    family: Family,
    head_dim: usize,
    eps: f64,
}

impl Layer {
    /// Takes out the weights of one layer.
    ///
    /// # Errors
    /// Those of [`Weights::take`].
    pub fn take(config: &Config, weights: &mut Weights, index: usize) -> Result<Self> {
        let Config { family, hidden_size: hidden, intermediate_size: inner, head_dim: dim, .. } = *config;
        let (query, kv) = (config.heads * dim, config.kv_heads * dim);
        let mut norm = |name: &str, extent| {
            take_norm(weights, family, &format!("model.layers.{index}.{name}.weight"), extent)
        };
        let input_norm = norm("input_layernorm", hidden)?;
        let after_attention = norm("post_attention_layernorm", hidden)?;
        let (mlp_norm, output_norms) = if family.has_output_norms() {
            let after_mlp = norm("post_feedforward_layernorm", hidden)?;
            (norm("pre_feedforward_layernorm", hidden)?, Some([after_attention, after_mlp]))
        } else {
            (after_attention, None)
        };
        let head_norms = if family.has_head_norms() {
            Some([norm("self_attn.q_norm", dim)?, norm("self_attn.k_norm", dim)?])
        } else {
            None
        };
        let mut linear = |name: &str, extents, bias| {
            Linear::take(weights, &format!("model.layers.{index}.{name}"), extents, bias)
        };
        let (qkv_bias, output_bias) = (config.qkv_bias, config.output_bias);
        let [query, key, value, gate, up] = if family.is_fused() {
            let qkv = linear("self_attn.qkv_proj", [query + 2 * kv, hidden], false)?;
            let gate_up = linear("mlp.gate_up_proj", [2 * inner, hidden], false)?;
            [
                qkv.narrow(0, query)?,
                qkv.narrow(query, kv)?,
                qkv.narrow(query + kv, kv)?,
                gate_up.narrow(0, inner)?,
                gate_up.narrow(inner, inner)?,
            ]
        } else {
            [
                linear("self_attn.q_proj", [query, hidden], qkv_bias)?,
                linear("self_attn.k_proj", [kv, hidden], qkv_bias)?,
                linear("self_attn.v_proj", [kv, hidden], qkv_bias)?,
                linear("mlp.gate_proj", [inner, hidden], false)?,
                linear("mlp.up_proj", [inner, hidden], false)?,
            ]
        };
        Ok(Self {
            input_norm,
            query,
            key,
            value,
            head_norms,
            output: linear("self_attn.o_proj", [hidden, config.heads * dim], output_bias)?,
            mlp_norm,
            gate,
            up,
            down: linear("mlp.down_proj", [hidden, inner], false)?,
            output_norms,
            family,
            head_dim: dim,
            eps: config.rms_norm_eps,
        })
    }

    /// What comes before the attention: queries, keys and values `[rows, heads, dim]`, turned to
    /// their positions.
    ///
    /// # Errors
    /// Errors of candle.
    pub fn queries_keys_values(&self, hidden: &Tensor, rotation: &Rotation) -> Result<[Tensor; 3]> {
        let hidden = rms_norm(hidden, &self.input_norm, self.eps)?;
        let heads = |projection: &Linear| -> Result<Tensor> {
            let x = projection.forward(&hidden)?;
            let (rows, width) = x.dims2()?;
            Ok(x.reshape((rows, width / self.head_dim, self.head_dim))?)
        };
        let (mut query, mut key) = (heads(&self.query)?, heads(&self.key)?);
        if let Some([query_norm, key_norm]) = &self.head_norms {
            query = rms_norm(&query, query_norm, self.eps)?;
            key = rms_norm(&key, key_norm, self.eps)?;
        }
        Ok([rotate(&query, rotation)?, rotate(&key, rotation)?, heads(&self.value)?])
    }

    /// What follows the attention: output projection and MLP, each added to the residual stream.
    ///
    /// # Errors
    /// Errors of candle.
    pub fn finish(&self, hidden: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let attended = attended.to_dtype(DType::F32)?.flatten_from(1)?;
        let mut added = self.output.forward(&attended)?;
        if let Some([norm, _]) = &self.output_norms {
            added = rms_norm(&added, norm, self.eps)?;
        }
        let hidden = (hidden + added)?;
        let x = rms_norm(&hidden, &self.mlp_norm, self.eps)?;
        let gate = self.gate.forward(&x)?;
        // Candle's `gelu` is the approximation by tanh.
        let gate = if self.family == Family::Gemma3 { gate.gelu()? } else { gate.silu()? };
        let mut added = self.down.forward(&(gate * self.up.forward(&x)?)?)?;
        if let Some([_, norm]) = &self.output_norms {
            added = rms_norm(&added, norm, self.eps)?;
        }
        Ok((hidden + added)?)
    }
}

/// A projection of rows, `[n, in]` to `[n, out]`.
struct Linear {
    /// `[in, out]`.
    weight: Tensor,
    /// `[out]`.
    bias: Option<Tensor>,
}

impl Linear {
    fn take(weights: &mut Weights, name: &str, [output, input]: [usize; 2], bias: bool) -> Result<Self> {
        Ok(Self {
            weight: weights.take(&format!("{name}.weight"), &[output, input])?.t()?,
            bias: bias.then(|| weights.take(&format!("{name}.bias"), &[output])).transpose()?,
        })
    }

    /// The projection to some of the outputs; there is no bias.
    fn narrow(&self, start: usize, len: usize) -> Result<Self> {
        Ok(Self { weight: self.weight.narrow(1, start, len)?, bias: None })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = x.matmul(&self.weight)?;
        Ok(match &self.bias {
            Some(bias) => product.broadcast_add(bias)?,
            None => product,
        })
    }
}

/// Takes out the weight of a norm.
///
/// # Errors
/// Those of [`Weights::take`].
pub fn take_norm(weights: &mut Weights, family: Family, name: &str, extent: usize) -> Result<Tensor> {
    let weight = weights.take(name, &[extent])?;
    Ok(if family.norm_offset() == 0.0 { weight } else { (weight + family.norm_offset())? })
}

pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok(x.broadcast_mul(&scale)?.broadcast_mul(weight)?)
}

/// RoPE on `[rows, heads, dim]`: element `i` of a head turns with element `i + dim / 2`.
fn rotate(x: &Tensor, rotation: &Rotation) -> Result<Tensor> {
    let (_, heads, dim) = x.dims3()?;
    let mut data = x.flatten_all()?.to_vec1::<f32>()?;
    for (row, rotation) in data.chunks_exact_mut(heads * dim).zip(rotation.chunks_exact(dim / 2)) {
        for head in row.chunks_exact_mut(dim) {
            let (first, second) = head.split_at_mut(dim / 2);
            for ((a, b), &(cos, sin)) in first.iter_mut().zip(second).zip(rotation) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
    Ok(Tensor::from_vec(data, x.shape(), &Device::Cpu)?)
}
