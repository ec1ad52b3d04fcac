//! Rotary position embeddings (RoPE), as `config.json` tells them.

use super::error::Result;
use super::family::Family;
use super::fields::Fields;
use serde_json::{Map, Value};
use std::f64::consts::TAU;

/// Theta where a file has none.
const DEFAULT_THETA: f64 = 10_000.0;
/// Gemma 3's, of layers without a window.
const GEMMA_3_THETA: f64 = 1_000_000.0;

/// How the elements of a head are turned with their positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub theta: f64,
    pub scaling: Option<Scaling>,
}

/// How rotations are slowed for contexts longer than those of the training (`rope_type`).
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// All, by a factor ("linear").
    Linear { factor: f64 },
    /// Llama 3.1: the slow ones ("llama3").
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_len: f64 },
    /// YaRN ("yarn", arXiv 2309.00071): pairs before `fast` turn as before, those from `slow` on
    /// are slowed by the factor, those between are blended.
    Yarn { factor: f64, fast: f64, slow: f64, magnitude: f64 },
    /// LongRoPE ("longrope", arXiv 2402.13753) up to the original length: each pair by a factor.
    Long { short: Vec<f64>, magnitude: f64, original_len: f64 },
}

impl Rope {
    /// What a config says of heads of `head_dim`, as transformers reads it: of the layers without a
    /// window, and of those with one.
    pub fn of(config: &Fields<'_>, family: Family, head_dim: usize) -> Result<[Self; 2]> {
        let read = |json: &Value, theta| Self::read(config, json, theta, family, head_dim);
        let theta = config.optional("rope_theta")?;
        if family == Family::Gemma3 {
            let parameters = &config.json["rope_parameters"];
            let local = config.optional("rope_local_base_freq")?.unwrap_or(DEFAULT_THETA);
            let mut full = parameters["full_attention"].as_object().cloned().unwrap_or(Map::new());
            full.extend(config.json["rope_scaling"].as_object().cloned().unwrap_or(Map::new()));
            return Ok([
                read(&Value::Object(full), theta.unwrap_or(GEMMA_3_THETA))?,
                read(&parameters["sliding_attention"], local)?,
            ]);
        }
        let names = ["rope_scaling", "rope_parameters"];
        let mut json = names.map(|name| &config.json[name]).into_iter().find(|json| !json.is_null());
        // Where types of layers differ, those of full attention count: these families have one rope.
        if let Some(object) = json.and_then(Value::as_object)
            && object.values().any(Value::is_object)
        {
            let full = object.get("full_attention").filter(|json| json.is_object());
            let error = || config.error("rope_parameters: expected those of full_attention, got none".into());
            json = Some(full.ok_or_else(error)?);
        }
        let rope = read(json.unwrap_or(&Value::Null), theta.unwrap_or(DEFAULT_THETA))?;
        Ok([rope.clone(), rope])
    }

    /// What one object of parameters says; theta in it comes before `theta`.
    fn read(config: &Fields<'_>, json: &Value, theta: f64, family: Family, head_dim: usize) -> Result<Self> {
        let fields = Fields { path: config.path, json };
        if !json.is_null() && !json.is_object() {
            return Err(config.error(format!("rope scaling: expected an object, got {json}")));
        }
        for fields in [config, &fields] {
            if fields.optional("partial_rotary_factor")?.is_some_and(|part| part != 1.0) {
                let got = &fields.json["partial_rotary_factor"];
                return Err(config.error(format!("partial_rotary_factor: expected 1, got {got}")));
            }
        }
        let theta = fields.optional("rope_theta")?.unwrap_or(theta);
        Ok(Self { theta, scaling: Scaling::of(config, &fields, theta, family, head_dim)? })
    }

    /// Radians per position of each pair of a head's elements, `[head_dim / 2]`.
    pub fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let plain = |pair| self.theta.powf(-2.0 * pair as f64 / head_dim as f64);
        let scaled = |pair| match &self.scaling {
            Some(scaling) => scaling.apply(pair, plain(pair)),
            None => plain(pair),
        };
        (0..head_dim / 2).map(scaled).collect()
    }

    /// What turned queries and keys are multiplied by.
    pub fn magnitude(&self) -> f64 {
        match self.scaling {
            Some(Scaling::Yarn { magnitude, .. } | Scaling::Long { magnitude, .. }) => magnitude,
            _ => 1.0,
        }
    }

    /// The tokens up to which rotations are as told: longer sequences have others.
    pub fn reach(&self) -> Option<usize> {
        match self.scaling {
            Some(Scaling::Long { original_len, .. }) => Some(original_len as usize),
            _ => None,
        }
    }
}

impl Scaling {
    fn of(
        config: &Fields<'_>,
        fields: &Fields<'_>,
        theta: f64,
        family: Family,
        head_dim: usize,
    ) -> Result<Option<Self>> {
        let range = config.optional("max_position_embeddings")?;
        let name = if fields.json["rope_type"].is_null() { "type" } else { "rope_type" };
        let kind = match fields.json[name].as_str() {
            // Older names of LongRoPE.
            Some("su" | "yarn") if family == Family::Phi3 => Some("longrope"),
            kind => kind,
        };
        match kind {
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
            Some("longrope") => Self::long(config, fields, range, head_dim).map(Some),
            Some("default") => Ok(None),
            None if fields.json[name].is_null() && fields.json["factor"].is_null() => Ok(None),
            _ => {
                let got = &fields.json[name];
                let expected = r#"expected "default", "linear", "llama3", "yarn", "longrope" or none"#;
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

    fn long(config: &Fields<'_>, fields: &Fields<'_>, range: Option<f64>, head_dim: usize) -> Result<Self> {
        let name = "original_max_position_embeddings";
        let original_len = match fields.optional(name)?.or(config.optional(name)?) {
            Some(original) => original,
            None => fields.number(name)?,
        };
        let factor = fields.optional("factor")?.or(range.map(|range| range / original_len));
        let magnitude = match factor {
            Some(factor) if factor > 1.0 => (1.0 + factor.ln() / original_len.ln()).sqrt(),
            _ => 1.0,
        };
        Ok(Self::Long {
            short: fields.numbers("short_factor", head_dim / 2)?,
            magnitude: fields.optional("attention_factor")?.unwrap_or(magnitude),
            original_len,
        })
    }

    fn apply(&self, pair: usize, frequency: f64) -> f64 {
        match *self {
            Self::Linear { factor } => frequency / factor,
            Self::Long { ref short, .. } => frequency / short[pair],
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
