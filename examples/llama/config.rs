//! `config.json` of a Hugging Face checkpoint: a Llama, or a model of its shape (Mistral, Qwen2).

use super::error::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// `model_type` and class of the models that are read.
const ARCHITECTURES: [(&str, &str); 3] =
    [("llama", "LlamaForCausalLM"), ("mistral", "MistralForCausalLM"), ("qwen2", "Qwen2ForCausalLM")];

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
    /// Whether the projections to queries, keys and values add a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection adds a bias.
    pub output_bias: bool,
}

/// How rotations are slowed for contexts longer than those of the training (`rope_type`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// All, by a factor ("linear").
    Linear { factor: f64 },
    /// Llama 3.1: the slow ones ("llama3").
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: f64 },
}

impl Config {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error::Input`] for a file that cannot be read, another architecture, or extents that do
    /// not fit together.
    pub fn read(path: &Path) -> Result<Self> {
        let json = read_json(path)?;
        let fields = Fields { path, json: &json };
        let architecture = fields.architecture()?;
        fields.only("hidden_act", "silu")?;
        if json["mlp_bias"] == true {
            return Err(fields.error("mlp_bias: expected false, got true".into()));
        }
        fields.refuse_sliding_window(architecture)?;
        let attention_bias = architecture == "llama" && json["attention_bias"] == true;
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
            qkv_bias: attention_bias || architecture == "qwen2",
            output_bias: attention_bias,
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
    fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::Linear { factor } => frequency / factor,
            // Frequencies that turn often within the original length stay, slow ones are divided,
            // and those between are blended.
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let turns = original_max_position_embeddings * frequency / std::f64::consts::TAU;
                let kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let kept = kept.clamp(0.0, 1.0);
                kept * frequency + (1.0 - kept) * frequency / factor
            }
        }
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

    /// The `model_type`, which the class must agree with. A Llama where neither is told.
    fn architecture(&self) -> Result<&'static str> {
        let names = || ARCHITECTURES.map(|(name, _)| name);
        let model_type = match &self.json["model_type"] {
            Value::Null => "llama",
            Value::String(name) => name,
            other => {
                return Err(self.error(format!("model_type: expected one of {:?}, got {other}", names())));
            }
        };
        let found = ARCHITECTURES.into_iter().find(|(name, _)| *name == model_type);
        let Some((architecture, class)) = found else {
            let reason = format!("model_type: expected one of {:?}, got {model_type:?}", names());
            return Err(self.error(reason));
        };
        match self.json["architectures"].as_array() {
            Some(classes) if !classes.iter().any(|name| name == class) => {
                Err(self.error(format!("architectures: expected {class}, got {classes:?}")))
            }
            _ => Ok(architecture),
        }
    }

    /// Refuses attention over a window: dense and star attention see all before them.
    fn refuse_sliding_window(&self, architecture: &str) -> Result<()> {
        let (name, expected) = match architecture {
            "mistral" => ("sliding_window", Value::Null),
            "qwen2" => ("use_sliding_window", Value::Bool(false)),
            _ => return Ok(()),
        };
        // A Mistral that tells none has one; a Qwen2 has not.
        match self.json.get(name) {
            Some(value) if *value == expected => Ok(()),
            None if architecture == "qwen2" => Ok(()),
            other => {
                let got = other.map_or_else(|| "none".to_owned(), Value::to_string);
                Err(self.error(format!("{name}: expected {expected}, got {got}")))
            }
        }
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
                let (low, high) = (self.number("low_freq_factor")?, self.number("high_freq_factor")?);
                if high <= low {
                    return Err(self.error("high_freq_factor: expected more than low_freq_factor".into()));
                }
                Ok(Some(RopeScaling::Llama3 {
                    factor: self.number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: self.number("original_max_position_embeddings")?,
                }))
            }
            Some("linear") => Ok(Some(RopeScaling::Linear { factor: self.number("factor")? })),
            Some("default") => Ok(None),
            None if self.json[name].is_null() && self.json["factor"].is_null() => Ok(None),
            _ => {
                let got = &self.json[name];
                let reason = format!("rope scaling: expected \"llama3\", \"linear\" or none, got {got}");
                Err(self.error(reason))
            }
        }
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

/// Reads a JSON file.
///
/// # Errors
/// [`Error::Input`] naming the file.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|error| Error::input(path.display().to_string(), error))?;
    serde_json::from_slice(&text).map_err(|error| Error::input(path.display().to_string(), error))
}
