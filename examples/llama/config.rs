//! `config.json` of a Hugging Face Llama checkpoint.

use super::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// The extents and constants of a Llama.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<RopeScaling>,
    pub tie_word_embeddings: bool,
}

/// Llama 3.1's stretching of the slow rotations (`rope_type` "llama3").
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeScaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

impl Config {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that cannot be read, another architecture, or extents that do not fit together.
    pub fn read(path: &Path) -> Result<Self> {
        let json = read_json(path)?;
        let fields = Fields { path, json: &json };
        fields.only("model_type", "llama")?;
        if let Some(names) = json["architectures"].as_array()
            && !names.iter().any(|name| name == "LlamaForCausalLM")
        {
            return Err(fields.error(format!("architectures: expected LlamaForCausalLM, got {names:?}")));
        }
        fields.only("hidden_act", "silu")?;
        for bias in ["attention_bias", "mlp_bias"] {
            if json[bias] == true {
                return Err(fields.error(format!("{bias}: expected false, got true")));
            }
        }
        // Newer files keep theta beside the scaling, in `rope_parameters`.
        let rope = if json["rope_parameters"].is_object() {
            &json["rope_parameters"]
        } else {
            &json["rope_scaling"]
        };
        let rope = Fields { path, json: rope };
        let theta = fields.optional("rope_theta")?.or(rope.optional("rope_theta")?);
        let heads = fields.extent("num_attention_heads")?;
        let hidden_size = fields.extent("hidden_size")?;
        let config = Self {
            vocab_size: fields.extent("vocab_size")?,
            hidden_size,
            intermediate_size: fields.extent("intermediate_size")?,
            layers: fields.extent("num_hidden_layers")?,
            heads,
            kv_heads: fields.extent_or("num_key_value_heads", heads)?,
            head_dim: fields.extent_or("head_dim", hidden_size / heads)?,
            rms_norm_eps: fields.optional("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: theta.unwrap_or(10_000.0),
            rope_scaling: rope.scaling()?,
            tie_word_embeddings: json["tie_word_embeddings"] == true,
        };
        if !config.heads.is_multiple_of(config.kv_heads) {
            let (heads, kv_heads) = (config.heads, config.kv_heads);
            let reason = format!("num_key_value_heads: expected a divisor of {heads} heads, got {kv_heads}");
            return Err(fields.error(reason));
        }
        if config.head_dim == 0 || !config.head_dim.is_multiple_of(2) {
            return Err(fields.error(format!("head_dim: expected an even number, got {}", config.head_dim)));
        }
        Ok(config)
    }

    /// Radians per position of each pair of a head's elements, `[head_dim / 2]`.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let exponent = |pair| -2.0 * pair as f64 / self.head_dim as f64;
        let plain = (0..self.head_dim / 2).map(|pair| self.rope_theta.powf(exponent(pair)));
        match self.rope_scaling {
            Some(scaling) => plain.map(|frequency| scaling.apply(frequency)).collect(),
            None => plain.collect(),
        }
    }
}

impl RopeScaling {
    /// Frequencies that turn often within the original length stay, slow ones are divided by `factor`, and those between are blended.
    fn apply(&self, frequency: f64) -> f64 {
        let turns = self.original_max_position_embeddings * frequency / std::f64::consts::TAU;
        let kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        let kept = kept.clamp(0.0, 1.0);
        kept * frequency + (1.0 - kept) * frequency / self.factor
    }
}

/// The fields of one JSON object, with errors that name file and field.
struct Fields<'a> {
    path: &'a Path,
    json: &'a Value,
}

impl Fields<'_> {
    fn error(&self, reason: String) -> Error {
        Error::input(self.path.display().to_string(), reason)
    }

    /// Refuses a field that is there and is not `expected`.
    fn only(&self, name: &str, expected: &str) -> Result<()> {
        match &self.json[name] {
            Value::Null => Ok(()),
            value if value == expected => Ok(()),
            other => Err(self.error(format!("{name}: expected {expected:?}, got {other}"))),
        }
    }

    fn optional(&self, name: &str) -> Result<Option<f64>> {
        match &self.json[name] {
            Value::Null => Ok(None),
            value => value
                .as_f64()
                .filter(|number| *number > 0.0)
                .map(Some)
                .ok_or_else(|| self.error(format!("{name}: expected a number above 0, got {value}"))),
        }
    }

    fn number(&self, name: &str) -> Result<f64> {
        self.optional(name)?.ok_or_else(|| self.error(format!("{name}: missing")))
    }

    fn extent(&self, name: &str) -> Result<usize> {
        match &self.json[name] {
            Value::Null => Err(self.error(format!("{name}: missing"))),
            value => value
                .as_u64()
                .filter(|extent| (1..1 << 32).contains(extent))
                .map(|extent| extent as usize)
                .ok_or_else(|| self.error(format!("{name}: expected a whole number above 0, got {value}"))),
        }
    }

    fn extent_or(&self, name: &str, default: usize) -> Result<usize> {
        if self.json[name].is_null() { Ok(default) } else { self.extent(name) }
    }

    fn scaling(&self) -> Result<Option<RopeScaling>> {
        let name = if self.json["rope_type"].is_null() { "type" } else { "rope_type" };
        match self.json[name].as_str() {
            Some("llama3") => {
                let scaling = RopeScaling {
                    factor: self.number("factor")?,
                    low_freq_factor: self.number("low_freq_factor")?,
                    high_freq_factor: self.number("high_freq_factor")?,
                    original_max_position_embeddings: self.number("original_max_position_embeddings")?,
                };
                if scaling.high_freq_factor <= scaling.low_freq_factor {
                    return Err(self.error("high_freq_factor: expected more than low_freq_factor".into()));
                }
                Ok(Some(scaling))
            }
            Some("default") => Ok(None),
            None if self.json[name].is_null() => Ok(None),
            _ => {
                let reason = format!("rope scaling: expected \"llama3\" or none, got {}", self.json[name]);
                Err(self.error(reason))
            }
        }
    }
}

/// The tokens that end an answer: `eos_token_id` of the checkpoint's `generation_config.json`, or else of its `config.json`. None if neither has any.
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

/// Reads a JSON file.
///
/// # Errors
/// [`Error::Input`] naming the file.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|error| Error::input(path.display().to_string(), error))?;
    serde_json::from_slice(&text).map_err(|error| Error::input(path.display().to_string(), error))
}
