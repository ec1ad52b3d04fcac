//! A Llama, or a model of its shape, that leaves its attention to the caller.
//!
//! Activations and linear layers are in f32; queries, keys and values are rounded to the model's
//! dtype.

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::error::{Error, Result};
use super::rank::fold;
use super::weights::Weights;
use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;
use std::path::Path;

/// Rows that go through the linear layers at a time. Enough to use each weight often, few enough
/// that a long context's intermediate activations stay small; chunks run in parallel.
const CHUNK: usize = 512;

/// The attention of one layer: from the layer's index, queries `[1, n, heads, dim]`, keys and
/// values `[1, n, kv_heads, dim]`, rotated to their positions, to outputs `[1, n, heads, dim]`.
pub type Attention<'a> = &'a mut dyn FnMut(usize, [Tensor; 3]) -> Result<Tensor>;

/// A Llama (RMSNorm, RoPE, grouped-query attention, SwiGLU).
pub struct Llama {
    pub config: Config,
    /// Dtype of queries, keys, values and the KV cache.
    pub dtype: DType,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    lm_head: Tensor,
    frequencies: Vec<f64>,
}

impl Llama {
    /// Loads a Hugging Face checkpoint directory or a GGUF file, in `dtype` or in its own.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file at fault.
    pub fn load(path: &Path, dtype: Option<DType>) -> Result<Self> {
        Self::of(&Checkpoint::open(path)?, dtype)
    }

    /// Loads an open checkpoint, in `dtype` or in its own.
    ///
    /// # Errors
    /// [`Error::Input`] naming the file at fault.
    pub fn of(checkpoint: &Checkpoint, dtype: Option<DType>) -> Result<Self> {
        let config = checkpoint.config()?;
        let mut weights = checkpoint.weights(&config, dtype)?;
        let embedding =
            weights.take("model.embed_tokens.weight", &[config.vocab_size, config.hidden_size])?;
        // A checkpoint without a head has the embeddings in its place, whatever its config says.
        let lm_head = if config.tie_word_embeddings || !weights.has("lm_head.weight") {
            embedding.clone()
        } else {
            weights.take("lm_head.weight", &[config.vocab_size, config.hidden_size])?
        };
        let layers = (0..config.layers)
            .map(|index| Layer::take(&config, &mut weights, index))
            .collect::<Result<_>>()?;
        let mut frequencies = config.rope.frequencies(config.head_dim);
        // A GGUF file of a Llama 3 tells by what its rotations are slowed, one by one.
        if weights.has("rope_freqs.weight") {
            let divisors = weights.take("rope_freqs.weight", &[config.head_dim / 2])?.to_vec1::<f32>()?;
            frequencies.iter_mut().zip(divisors).for_each(|(f, divisor)| *f /= f64::from(divisor));
        }
        Ok(Self {
            dtype: weights.dtype,
            embedding,
            layers,
            norm: weights.take("model.norm.weight", &[config.hidden_size])?,
            lm_head: lm_head.t()?,
            frequencies,
            config,
        })
    }

    /// A number that differs for other weights: of the embedding and the last norm's.
    ///
    /// # Errors
    /// Errors of candle.
    pub fn fingerprint(&self) -> Result<u64> {
        let rows = self.embedding.narrow(0, 0, self.config.vocab_size.min(64))?;
        let weights = [rows.flatten_all()?.to_vec1::<f32>()?, self.norm.to_vec1::<f32>()?].concat();
        Ok(weights.iter().fold(0, |sum, x| fold(sum, u64::from(x.to_bits()))))
    }

    /// Refuses ids outside the vocabulary.
    ///
    /// # Errors
    /// [`Error::Input`] naming `argument`.
    pub fn check_ids(&self, argument: &str, ids: &[u32]) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => Err(Error::input(
                argument,
                format!("expected ids below the vocabulary's {vocab_size}, got {id}"),
            )),
            None => Ok(()),
        }
    }

    /// Runs `tokens` at `positions` through all layers; returns the logits of the last `logit_rows`
    /// rows, `[logit_rows, vocab]`.
    ///
    /// # Errors
    /// [`Error::Input`] for ids outside the vocabulary; errors of the attention.
    pub fn forward(
        &self,
        tokens: &[u32],
        positions: &[usize],
        logit_rows: usize,
        attention: Attention<'_>,
    ) -> Result<Tensor> {
        self.check_ids("tokens", tokens)?;
        assert!(tokens.len() == positions.len() && logit_rows <= tokens.len());
        if tokens.is_empty() {
            return Ok(Tensor::zeros((0, self.config.vocab_size), DType::F32, &Device::Cpu)?);
        }
        let rows: Vec<Range<usize>> =
            (0..tokens.len()).step_by(CHUNK).map(|start| start..tokens.len().min(start + CHUNK)).collect();
        let rotations: Vec<Rotation> =
            rows.par_iter().map(|rows| self.rotation(&positions[rows.clone()])).collect();
        let mut hidden = rows
            .iter()
            .map(|rows| {
                let ids = Tensor::new(&tokens[rows.clone()], &Device::Cpu)?;
                Ok(self.embedding.index_select(&ids, 0)?)
            })
            .collect::<Result<Vec<_>>>()?;
        for (index, layer) in self.layers.iter().enumerate() {
            let chunks = hidden
                .par_iter()
                .zip(&rotations)
                .map(|(hidden, rotation)| self.queries_keys_values(layer, hidden, rotation))
                .collect::<Result<Vec<_>>>()?;
            let all = |part: usize| -> Result<Tensor> {
                let parts: Vec<&Tensor> = chunks.iter().map(|chunk| &chunk[part]).collect();
                Ok(Tensor::cat(&parts, 0)?.unsqueeze(0)?)
            };
            let inputs = [all(0)?, all(1)?, all(2)?];
            drop(chunks);
            let output = attention(index, inputs)?.squeeze(0)?;
            hidden = hidden
                .par_iter()
                .zip(&rows)
                .map(|(hidden, rows)| layer.finish(hidden, &output.narrow(0, rows.start, rows.len())?))
                .collect::<Result<_>>()?;
        }
        self.logits(&hidden, logit_rows)
    }

    /// The logits of the last `rows` rows.
    fn logits(&self, hidden: &[Tensor], rows: usize) -> Result<Tensor> {
        if rows == 0 {
            return Ok(Tensor::zeros((0, self.config.vocab_size), DType::F32, &Device::Cpu)?);
        }
        let chunks = hidden.len().min(rows.div_ceil(CHUNK) + 1);
        let last = Tensor::cat(&hidden[hidden.len() - chunks..], 0)?;
        let last = last.narrow(0, last.dim(0)? - rows, rows)?;
        Ok(rms_norm(&last, &self.norm, self.config.rms_norm_eps)?.matmul(&self.lm_head)?)
    }

    fn rotation(&self, positions: &[usize]) -> Rotation {
        let angles = positions.iter().flat_map(|&p| self.frequencies.iter().map(move |f| p as f64 * f));
        let magnitude = self.config.rope.magnitude();
        angles.map(|angle| ((magnitude * angle.cos()) as f32, (magnitude * angle.sin()) as f32)).collect()
    }

    fn queries_keys_values(
        &self,
        layer: &Layer,
        hidden: &Tensor,
        rotation: &Rotation,
    ) -> Result<[Tensor; 3]> {
        let hidden = rms_norm(hidden, &layer.input_norm, layer.eps)?;
        let dim = self.config.head_dim;
        let heads = |x: Tensor| -> Result<Tensor> {
            let (rows, width) = x.dims2()?;
            Ok(x.reshape((rows, width / dim, dim))?.to_dtype(self.dtype)?)
        };
        Ok([
            heads(rotate(&layer.query.forward(&hidden)?, rotation, dim)?)?,
            heads(rotate(&layer.key.forward(&hidden)?, rotation, dim)?)?,
            heads(layer.value.forward(&hidden)?)?,
        ])
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

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let product = x.matmul(&self.weight)?;
        Ok(match &self.bias {
            Some(bias) => product.broadcast_add(bias)?,
            None => product,
        })
    }
}

/// One decoder layer.
struct Layer {
    input_norm: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    eps: f64,
}

impl Layer {
    fn take(config: &Config, weights: &mut Weights, index: usize) -> Result<Self> {
        let Config { hidden_size: hidden, intermediate_size: inner, head_dim: dim, .. } = *config;
        let (query, kv) = (config.heads * dim, config.kv_heads * dim);
        let mut vector = |name: &str| weights.take(&format!("model.layers.{index}.{name}.weight"), &[hidden]);
        let (input_norm, mlp_norm) = (vector("input_layernorm")?, vector("post_attention_layernorm")?);
        let mut linear = |name: &str, extents, bias| {
            Linear::take(weights, &format!("model.layers.{index}.{name}"), extents, bias)
        };
        Ok(Self {
            input_norm,
            query: linear("self_attn.q_proj", [query, hidden], config.qkv_bias)?,
            key: linear("self_attn.k_proj", [kv, hidden], config.qkv_bias)?,
            value: linear("self_attn.v_proj", [kv, hidden], config.qkv_bias)?,
            output: linear("self_attn.o_proj", [hidden, query], config.output_bias)?,
            mlp_norm,
            gate: linear("mlp.gate_proj", [inner, hidden], false)?,
            up: linear("mlp.up_proj", [inner, hidden], false)?,
            down: linear("mlp.down_proj", [hidden, inner], false)?,
            eps: config.rms_norm_eps,
        })
    }

    /// What follows the attention: output projection and MLP, each added to the residual stream.
    fn finish(&self, hidden: &Tensor, attended: &Tensor) -> Result<Tensor> {
        let attended = attended.to_dtype(DType::F32)?.flatten_from(1)?;
        let hidden = (hidden + self.output.forward(&attended)?)?;
        let x = rms_norm(&hidden, &self.mlp_norm, self.eps)?;
        let inner = (self.gate.forward(&x)?.silu()? * self.up.forward(&x)?)?;
        Ok((hidden + self.down.forward(&inner)?)?)
    }
}

fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let scale = (x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?;
    Ok(x.broadcast_mul(&scale)?.broadcast_mul(weight)?)
}

/// Cosine and sine of each pair of elements of a head, `[rows, head_dim / 2]`.
type Rotation = Vec<(f32, f32)>;

/// RoPE on `[rows, heads * dim]`: element `i` of a head turns with element `i + dim / 2`.
fn rotate(x: &Tensor, rotation: &Rotation, dim: usize) -> Result<Tensor> {
    let (rows, width) = x.dims2()?;
    let mut data = x.flatten_all()?.to_vec1::<f32>()?;
    for (row, rotation) in data.chunks_exact_mut(width).zip(rotation.chunks_exact(dim / 2)) {
        for head in row.chunks_exact_mut(dim) {
            let (first, second) = head.split_at_mut(dim / 2);
            for ((a, b), &(cos, sin)) in first.iter_mut().zip(second).zip(rotation) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
    Ok(Tensor::from_vec(data, (rows, width), &Device::Cpu)?)
}
