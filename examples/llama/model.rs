//! A Llama, or a model of its shape, that leaves its attention to the caller.
//!
//! Activations and linear layers are in f32; queries, keys and values are rounded to the model's
//! dtype.

use super::checkpoint::Checkpoint;
use super::config::Config;
use super::error::{Error, Result};
use super::layer::{Layer, Rotation, rms_norm, take_norm};
use super::rank::fold;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;
use std::path::Path;

/// Rows that go through the linear layers at a time. Enough to use each weight often, few enough
/// that a long context's intermediate activations stay small; chunks run in parallel.
const CHUNK: usize = 512;

/// The attention of one layer: from the layer's index, queries `[1, n, heads, dim]`, keys and
/// values `[1, n, kv_heads, dim]`, rotated to their positions, to outputs `[1, n, heads, dim]`.
pub type Attention<'a> = &'a mut dyn FnMut(usize, [Tensor; 3]) -> Result<Tensor>;

/// A Llama (RMSNorm, RoPE, grouped-query attention, SwiGLU), or a model of a
/// [`Family`](super::family::Family) like it.
pub struct Llama {
    pub config: Config,
    /// Dtype of queries, keys, values and the KV cache.
    pub dtype: DType,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    lm_head: Tensor,
    embedding_scale: f64,
    /// Of the layers without a window, and of those with one.
    turns: [Turns; 2],
}

/// How fast the pairs of a head's elements turn.
struct Turns {
    /// Radians per position.
    frequencies: Vec<f64>,
    magnitude: f64,
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
        let windowed_rope = config.windowed.as_ref().map_or(&config.rope, |windowed| &windowed.rope);
        let mut turns = [&config.rope, windowed_rope].map(|rope| Turns {
            frequencies: rope.frequencies(config.head_dim),
            magnitude: rope.magnitude(),
        });
        // A GGUF file of a Llama 3 tells by what its rotations are slowed, one by one.
        if weights.has("rope_freqs.weight") {
            let divisors = weights.take("rope_freqs.weight", &[config.head_dim / 2])?.to_vec1::<f32>()?;
            for Turns { frequencies, .. } in &mut turns {
                frequencies.iter_mut().zip(&divisors).for_each(|(f, &divisor)| *f /= f64::from(divisor));
            }
        }
        // As exact as the weights are.
        let embedding_scale = Tensor::new(config.family.embedding_scale(config.hidden_size), &Device::Cpu)?
            .to_dtype(weights.dtype)?
            .to_dtype(DType::F64)?
            .to_scalar()?;
        Ok(Self {
            dtype: weights.dtype,
            embedding,
            layers,
            norm: take_norm(&mut weights, config.family, "model.norm.weight", config.hidden_size)?,
            lm_head: lm_head.t()?,
            embedding_scale,
            turns,
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
        let rotations = self.turns.each_ref().map(|turns| {
            let rotation = |rows: &Range<usize>| turns.rotation(&positions[rows.clone()]);
            rows.par_iter().map(rotation).collect::<Vec<Rotation>>()
        });
        let mut hidden = rows
            .iter()
            .map(|rows| {
                let ids = Tensor::new(&tokens[rows.clone()], &Device::Cpu)?;
                Ok((self.embedding.index_select(&ids, 0)? * self.embedding_scale)?)
            })
            .collect::<Result<Vec<_>>>()?;
        for (index, layer) in self.layers.iter().enumerate() {
            let chunks = hidden
                .par_iter()
                .zip(&rotations[usize::from(self.config.window(index).is_some())])
                .map(|(hidden, rotation)| {
                    let [q, k, v] = layer.queries_keys_values(hidden, rotation)?;
                    Ok([q.to_dtype(self.dtype)?, k.to_dtype(self.dtype)?, v.to_dtype(self.dtype)?])
                })
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
}

impl Turns {
    fn rotation(&self, positions: &[usize]) -> Rotation {
        let angles = positions.iter().flat_map(|&p| self.frequencies.iter().map(move |f| p as f64 * f));
        let turn =
            |angle: f64| ((self.magnitude * angle.cos()) as f32, (self.magnitude * angle.sin()) as f32);
        angles.map(turn).collect()
    }
}
