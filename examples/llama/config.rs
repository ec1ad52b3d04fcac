//! `config.json` of a Hugging Face checkpoint: a Llama, or a model of its shape (Mistral, Qwen2).

use super::error::{Error, Result};
use super::rope::Rope;
use serde_json::Value;
use std::path::Path;

/// The models that are read, by `model_type`.
const ARCHITECTURES: [&str; 3] = ["llama", "mistral", "qwen2"];
/// The window where a file of Mistral's or Qwen2's does not tell it.
const DEFAULT_WINDOW: usize = 4096;

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
    pub rope: Rope,
    /// Tokens that a token sees at most, itself included. Nothing longer is run.
    pub window: Option<usize>,
    pub tie_word_embeddings: bool,
    /// Whether the projections to queries, keys and values add a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection adds a bias.
    pub output_bias: bool,
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
        let architecture = fields.architecture()?;
        fields.only("hidden_act", "silu")?;
        if json["mlp_bias"] == true {
            return Err(fields.error("mlp_bias: expected false, got true".into()));
        }
        if !json["quantization_config"].is_null() {
            let method = &json["quantization_config"]["quant_method"];
            return Err(fields.error(format!("quantization_config: expected none, got {method}")));
        }
        let attention_bias = architecture == "llama" && json["attention_bias"] == true;
        let heads = fields.extent("num_attention_heads")?;
        let hidden_size = fields.extent("hidden_size")?;
        let head_dim = fields.extent_or("head_dim", hidden_size / heads)?;
        let config = Self {
            vocab_size: fields.extent("vocab_size")?,
            hidden_size,
            intermediate_size: fields.extent("intermediate_size")?,
            layers: fields.extent("num_hidden_layers")?,
            heads,
            kv_heads: fields.extent_or("num_key_value_heads", heads)?,
            head_dim,
            rms_norm_eps: fields.optional("rms_norm_eps")?.unwrap_or(1e-6),
            rope: Rope::of(&fields, head_dim)?,
            window: fields.window(architecture)?,
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
}

/// The fields of one JSON object, with errors that name file and field.
pub struct Fields<'a> {
    pub path: &'a Path,
    pub json: &'a Value,
}

impl Fields<'_> {
    pub fn error(&self, reason: String) -> Error {
        Error::input(self.path.display().to_string(), reason)
    }

    /// The `model_type`; a Llama where none is told. Of the classes one must be a language model.
    fn architecture(&self) -> Result<&'static str> {
        let model_type = match &self.json["model_type"] {
            Value::Null => "llama",
            Value::String(name) => name,
            other => {
                return Err(self.error(format!("model_type: expected one of {ARCHITECTURES:?}, got {other}")));
            }
        };
        let Some(architecture) = ARCHITECTURES.into_iter().find(|name| *name == model_type) else {
            let reason = format!("model_type: expected one of {ARCHITECTURES:?}, got {model_type:?}");
            return Err(self.error(reason));
        };
        let is_language_model =
            |class: &Value| class.as_str().is_some_and(|name| name.ends_with("ForCausalLM"));
        match self.json["architectures"].as_array() {
            Some(classes) if !classes.is_empty() && !classes.iter().any(is_language_model) => {
                Err(self.error(format!("architectures: expected a class ForCausalLM, got {classes:?}")))
            }
            _ => Ok(architecture),
        }
    }

    /// The window of attention. A Mistral that tells none has one; a Qwen2 has not.
    fn window(&self, architecture: &str) -> Result<Option<usize>> {
        let (used, told) = (&self.json["use_sliding_window"], self.json.get("sliding_window"));
        if !(used.is_null() || used.is_boolean()) {
            return Err(self.error(format!("use_sliding_window: expected true or false, got {used}")));
        }
        match architecture {
            "mistral" if told.is_some_and(Value::is_null) => Ok(None),
            "qwen2" if *used != true => Ok(None),
            "mistral" | "qwen2" => self.extent_or("sliding_window", DEFAULT_WINDOW).map(Some),
            _ => Ok(None),
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

    pub fn optional(&self, name: &str) -> Result<Option<f64>> {
        match &self.json[name] {
            Value::Null => Ok(None),
            value => value
                .as_f64()
                .filter(|number| *number > 0.0)
                .map(Some)
                .ok_or_else(|| self.error(format!("{name}: expected a number above 0, got {value}"))),
        }
    }

    pub fn number(&self, name: &str) -> Result<f64> {
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

/// Reads a JSON file, as Python writes it: `NaN` and `Infinity` are read as null.
///
/// # Errors
/// [`Error::Input`] naming the file.
pub fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).map_err(|error| Error::input(path.display().to_string(), error))?;
    serde_json::from_slice(&without_nan(&text))
        .map_err(|error| Error::input(path.display().to_string(), error))
}

/// The same text with null for numbers that JSON has not, outside of strings.
fn without_nan(text: &[u8]) -> Vec<u8> {
    let (mut out, mut rest, mut in_string) = (Vec::with_capacity(text.len()), text, false);
    while let Some(&byte) = rest.first() {
        let name = [&b"NaN"[..], b"Infinity", b"-Infinity"].into_iter().find(|name| rest.starts_with(name));
        let len = match name {
            Some(name) if !in_string => {
                out.extend_from_slice(b"null");
                name.len()
            }
            // What follows a backslash ends no string.
            _ if in_string && byte == b'\\' => {
                out.extend_from_slice(&rest[..rest.len().min(2)]);
                rest.len().min(2)
            }
            _ => {
                in_string ^= byte == b'"';
                out.push(byte);
                1
            }
        };
        rest = &rest[len..];
    }
    out
}
