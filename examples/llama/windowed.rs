//! Layers whose tokens see a window of the tokens before them.

use super::error::Result;
use super::family::Family;
use super::fields::Fields;
use super::rope::Rope;
use serde_json::Value;

/// The window where a file tells none.
const DEFAULT_WINDOW: usize = 4096;

/// The layers with a window.
#[derive(Clone, Debug, PartialEq)]
pub struct Windowed {
    /// Tokens that a token sees at most, itself included.
    pub window: usize,
    pub rope: Rope,
    layers: Layers,
}

#[derive(Clone, Debug, PartialEq)]
enum Layers {
    All,
    /// From one on.
    From(usize),
    /// All but every so many-th.
    AllButEvery(usize),
    Listed(Vec<bool>),
}

impl Windowed {
    /// The windowed layers of a model of so many, as transformers reads them; none if there are
    /// none.
    pub fn of(fields: &Fields<'_>, family: Family, layers: usize, rope: Rope) -> Result<Option<Self>> {
        fields.is_flag("use_sliding_window")?;
        let told = fields.json.get("sliding_window");
        let has_window = match family {
            Family::Llama => false,
            // One that tells nothing has a window.
            Family::Mistral => !told.is_some_and(Value::is_null),
            Family::Phi3 => told.is_some_and(|told| !told.is_null()),
            Family::Qwen2 | Family::Qwen3 => {
                fields.json["use_sliding_window"] == true && !told.is_some_and(Value::is_null)
            }
            Family::Gemma3 => true,
        };
        if !has_window {
            return Ok(None);
        }
        let window = fields.extent_or("sliding_window", DEFAULT_WINDOW)?;
        let layers = match family {
            Family::Qwen2 | Family::Qwen3 | Family::Gemma3 => match Layers::listed(fields, layers)? {
                Some(listed) => listed,
                None if family == Family::Gemma3 => {
                    Layers::AllButEvery(fields.extent_or("sliding_window_pattern", 6)?)
                }
                None => Layers::From(fields.whole_or("max_window_layers", 28)?),
            },
            _ => Layers::All,
        };
        Ok(Some(Self { window, rope, layers }))
    }

    pub fn has(&self, layer: usize) -> bool {
        match &self.layers {
            Layers::All => true,
            Layers::From(first) => layer >= *first,
            Layers::AllButEvery(count) => !(layer + 1).is_multiple_of(*count),
            Layers::Listed(listed) => listed.get(layer) == Some(&true),
        }
    }
}

impl Layers {
    /// Those of `layer_types`, if it is there.
    fn listed(fields: &Fields<'_>, layers: usize) -> Result<Option<Self>> {
        let types = &fields.json["layer_types"];
        if types.is_null() {
            return Ok(None);
        }
        let windowed = |kind: &Value| match kind.as_str() {
            Some("sliding_attention") => Some(true),
            Some("full_attention") => Some(false),
            _ => None,
        };
        let listed: Option<Vec<bool>> =
            types.as_array().and_then(|types| types.iter().map(windowed).collect());
        let listed = listed.filter(|listed| listed.len() == layers).ok_or_else(|| {
            let expected = r#""full_attention" or "sliding_attention" for each"#;
            fields.error(format!("layer_types: expected {expected} of {layers} layers, got {types}"))
        })?;
        Ok(Some(Self::Listed(listed)))
    }
}
