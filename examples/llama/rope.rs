//! Rotary position embeddings (RoPE), as `config.json` tells them.

use super::config::Fields;
use super::error::Result;
use serde_json::Value;
use std::f64::consts::TAU;

/// Theta where a file has none.
const DEFAULT_THETA: f64 = 10_000.0;

/// How the elements of a head are turned with their positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Option<Scaling>,
}

/// How rotations are slowed for contexts longer than those of the training (`rope_type`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// All, by a factor ("linear").
    Linear { factor: f64 },
    /// Llama 3.1: the slow ones ("llama3").
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_len: f64 },
    /// YaRN ("yarn", arXiv 2309.00071): pairs before `fast` turn as before, those from `slow` on
    /// are slowed by the factor, those between are blended.
    Yarn { factor: f64, fast: f64, slow: f64, magnitude: f64 },
}

impl Rope {
    /// What a config says of heads of `head_dim`, as transformers reads it: `rope_scaling` before
    /// `rope_parameters`, and theta there before that of the top level.
    pub fn of(config: &Fields<'_>, head_dim: usize) -> Result<Self> {
        let names = ["rope_scaling", "rope_parameters"];
        let mut json = names.map(|name| &config.json[name]).into_iter().find(|json| !json.is_null());
        // Where types of layers differ, all layers are of full attention here.
        if let Some(object) = json.and_then(Value::as_object)
            && object.values().any(Value::is_object)
        {
            let full = object.get("full_attention").filter(|json| json.is_object());
            let error = || config.error("rope_parameters: expected those of full_attention, got none".into());
            json = Some(full.ok_or_else(error)?);
        }
        let fields = Fields { path: config.path, json: json.unwrap_or(&Value::Null) };
        if !fields.json.is_null() && !fields.json.is_object() {
            return Err(config.error(format!("rope scaling: expected an object, got {}", fields.json)));
        }
        let theta = fields.optional("rope_theta")?.or(config.optional("rope_theta")?);
        let theta = theta.unwrap_or(DEFAULT_THETA);
        let range = config.optional("max_position_embeddings")?;
        Ok(Self { theta, scaling: Scaling::of(&fields, range, theta, head_dim)? })
    }

    /// Radians per position of each pair of a head's elements, `[head_dim / 2]`.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let plain = |pair| self.theta.powf(-2.0 * pair as f64 / head_dim as f64);
        let scaled = |pair| match self.scaling {
            Some(scaling) => scaling.apply(pair, plain(pair)),
            None => plain(pair),
        };
        (0..head_dim / 2).map(scaled).collect()
    }

    /// What turned queries and keys are multiplied by.
    pub fn magnitude(&self) -> f64 {
        if let Some(Scaling::Yarn { magnitude, .. }) = self.scaling { magnitude } else { 1.0 }
    }
}

impl Scaling {
    fn of(fields: &Fields<'_>, range: Option<f64>, theta: f64, head_dim: usize) -> Result<Option<Self>> {
        let name = if fields.json["rope_type"].is_null() { "type" } else { "rope_type" };
        match fields.json[name].as_str() {
            Some("llama3") => {
                let (low, high) = (fields.number("low_freq_factor")?, fields.number("high_freq_factor")?);
                if high <= low {
                    return Err(fields.error("high_freq_factor: expected more than low_freq_factor".into()));
                }
                Ok(Some(Self::Llama3 {
                    factor: fields.number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_len: fields.number("original_max_position_embeddings")?,
                }))
            }
            Some("linear") => Ok(Some(Self::Linear { factor: fields.number("factor")? })),
            Some("yarn") => Self::yarn(fields, range, theta, head_dim).map(Some),
            Some("default") => Ok(None),
            None if fields.json[name].is_null() && fields.json["factor"].is_null() => Ok(None),
            _ => {
                let got = &fields.json[name];
                let expected = r#"expected "default", "linear", "llama3", "yarn" or none"#;
                Err(fields.error(format!("rope scaling: {expected}, got {got}")))
            }
        }
    }

    fn yarn(fields: &Fields<'_>, range: Option<f64>, theta: f64, head_dim: usize) -> Result<Self> {
        let original = match fields.optional("original_max_position_embeddings")?.or(range) {
            Some(original) => original,
            None => fields.number("original_max_position_embeddings")?,
        };
        let factor = fields.number("factor")?;
        let (many, few) = (fields.optional("beta_fast")?, fields.optional("beta_slow")?);
        // The pair that turns so often within the original length.
        let pair = |turns: f64| head_dim as f64 * (original / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (mut fast, mut slow) = (pair(many.unwrap_or(32.0)), pair(few.unwrap_or(1.0)));
        if fields.json["truncate"] != false {
            (fast, slow) = (fast.floor(), slow.ceil());
        }
        let magnitude = |times: f64| if factor > 1.0 { 0.1 * times * factor.ln() + 1.0 } else { 1.0 };
        let told = fields.optional("attention_factor")?;
        let both = fields.optional("mscale")?.zip(fields.optional("mscale_all_dim")?);
        let default = both.map_or(magnitude(1.0), |(one, all)| magnitude(one) / magnitude(all));
        Ok(Self::Yarn {
            factor,
            fast: fast.max(0.0),
            slow: slow.min(head_dim as f64 - 1.0),
            magnitude: told.unwrap_or(default),
        })
    }

    fn apply(self, pair: usize, frequency: f64) -> f64 {
        match self {
            Self::Linear { factor } => frequency / factor,
            // Frequencies that turn often within the original length stay, slow ones are divided,
            // and those between are blended.
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_len } => {
                let turns = original_len * frequency / TAU;
                blend((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), frequency, factor)
            }
            Self::Yarn { factor, fast, slow, .. } => {
                // Apart by a little, as in transformers, where the two meet.
                let width = if slow == fast { 0.001 } else { slow - fast };
                blend(1.0 - (pair as f64 - fast) / width, frequency, factor)
            }
        }
    }
}

/// A frequency of which a share stays and the rest is divided by `factor`.
fn blend(kept: f64, frequency: f64, factor: f64) -> f64 {
    let kept = kept.clamp(0.0, 1.0);
    kept * frequency + (1.0 - kept) * frequency / factor
}
