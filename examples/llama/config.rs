//! `config.json` of a Hugging Face checkpoint: a Llama, or a model of its shape.

use super::error::{Error, Result};
use super::family::Family;
use super::fields::{Fields, read_json};
use super::rope::Rope;
use super::windowed::Windowed;
use serde_json::{Value, json};
use std::path::Path;

/// The extents and constants of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    /// Of the layers without a window.
    pub rope: Rope,
    /// The layers with a window, if there are any.
    pub windowed: Option<Windowed>,
    /// Positions that the model was made for, where the file tells it.
    pub range: Option<usize>,
    pub tie_word_embeddings: bool,
    /// Whether the projections to queries, keys and values add a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection adds a bias.
    pub output_bias: bool,
    /// Factor of the scores; that of the head dim if none.
    pub score_scale: Option<f32>,
}

impl Config {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that cannot be read, another architecture, or extents that do
    /// not fit together.
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(path, &read_json(path)?)
    }

    /// What the content of a `config.json` says, `path` being what errors name.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn of(path: &Path, json: &Value) -> Result<Self> {
        let fields = Fields { path, json };
        let family = Family::of(&fields)?;
        let (name, activation) = family.activation();
        fields.only(name, json!(activation))?;
        fields.only("mlp_bias", json!(false))?;
        if !json["quantization_config"].is_null() {
            let method = &json["quantization_config"]["quant_method"];
            return Err(fields.error(format!("quantization_config: expected none, got {method}")));
        }
        let heads = fields.extent("num_attention_heads")?;
        let kv_heads = fields.extent_or("num_key_value_heads", heads)?;
        if !heads.is_multiple_of(kv_heads) {
            let reason = format!("num_key_value_heads: expected a divisor of {heads} heads, got {kv_heads}");
            return Err(fields.error(reason));
        }
        let hidden_size = fields.extent("hidden_size")?;
        let head_dim = fields.extent_or("head_dim", family.head_dim().unwrap_or(hidden_size / heads))?;
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(fields.error(format!("head_dim: expected an even number, got {head_dim}")));
        }
        let layers = fields.extent("num_hidden_layers")?;
        let [rope, windowed_rope] = Rope::of(&fields, family, head_dim)?;
        let attention_bias = family.may_have_biases() && json["attention_bias"] == true;
        Ok(Self {
            family,
            vocab_size: fields.extent("vocab_size")?,
            hidden_size,
            intermediate_size: fields.extent("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps: fields.optional("rms_norm_eps")?.unwrap_or(family.rms_norm_eps()),
            rope,
            windowed: Windowed::of(&fields, family, layers, windowed_rope)?,
            range: fields.optional("max_position_embeddings")?.map(|range| range as usize),
            tie_word_embeddings: json["tie_word_embeddings"].as_bool().unwrap_or(family.ties()),
            qkv_bias: attention_bias || family == Family::Qwen2,
            output_bias: attention_bias,
            score_scale: family.score_scale(&fields)?,
        })
    }

    /// The tokens that a token sees at most in a layer, itself included; all before it if none.
    pub fn window(&self, layer: usize) -> Option<usize> {
        self.windowed.as_ref().filter(|windowed| windowed.has(layer)).map(|windowed| windowed.window)
    }
}

/// The tokens that end an answer: `eos_token_id` of the checkpoint's `generation_config.json`, or
/// else of its `config.json`. None if neither has any.
///
/// # Errors
/// [`Error::Input`] for a file that cannot be read, or ids that are none.
pub fn eos_ids(directory: &Path) -> Result<Vec<u32>> {
    for name in ["generation_config.json", "config.json"] {
        let path = directory.join(name);
        if !path.exists() {
            continue;
        }
        let json = read_json(&path)?;
        let value = &json["eos_token_id"];
        let ids = match value {
            Value::Null => continue,
            Value::Array(ids) => ids.as_slice(),
            id => std::slice::from_ref(id),
        };
        let ids = ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect();
        return Option::ok_or_else(ids, || {
            let reason = format!("eos_token_id: expected an id or a list of ids, got {value}");
            Error::input(path.display().to_string(), reason)
        });
    }
    Ok(Vec::new())
}
