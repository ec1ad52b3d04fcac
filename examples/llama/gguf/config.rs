//! A GGUF file's hyperparameters as a `config.json`.

use super::super::error::Result;
use super::metadata::Metadata;
use super::tensors::EMBEDDING;
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// The architectures that are read, which are also the `model_type`s.
const ARCHITECTURES: [&str; 2] = ["llama", "qwen2"];

/// What a `config.json` says of the same model.
pub fn config(metadata: &Metadata<'_>, shapes: &HashMap<&str, &[usize]>) -> Result<Value> {
    let architecture = metadata.architecture()?;
    if !ARCHITECTURES.contains(&architecture) {
        return Err(metadata.unexpected("general.architecture", &format!("one of {ARCHITECTURES:?}")));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let optional = |name: &str| metadata.whole(&key(name));
    let extent = |name: &str| optional(name)?.ok_or_else(|| metadata.missing(&key(name)));
    for (key, expected) in [(key("expert_count"), 0), ("split.count".into(), 1)] {
        if metadata.whole(&key)?.is_some_and(|count| count > expected) {
            return Err(metadata.unexpected(&key, &format!("at most {expected}")));
        }
    }
    let embedding = shapes.get(EMBEDDING).and_then(|shape| shape.first());
    let vocab_size = *embedding.ok_or_else(|| metadata.missing(EMBEDDING))? as u64;
    if optional("vocab_size")?.is_some_and(|told| told != vocab_size) {
        let expected = format!("the {vocab_size} rows of {EMBEDDING}");
        return Err(metadata.unexpected(&key("vocab_size"), &expected));
    }
    let heads = extent("attention.head_count")?;
    let hidden_size = extent("embedding_length")?;
    let told_dim = optional("attention.key_length")?;
    let head_dim = told_dim.or(hidden_size.checked_div(heads));
    for name in ["attention.value_length", "rope.dimension_count"] {
        if optional(name)?.is_some_and(|told| Some(told) != head_dim) {
            let expected = format!("the head dim {}", head_dim.unwrap_or(0));
            return Err(metadata.unexpected(&key(name), &expected));
        }
    }
    let window = optional("attention.sliding_window")?;
    let has = |name: &str| shapes.contains_key(name);
    let eps = key("attention.layer_norm_rms_epsilon");
    Ok(json!({
        // Of Llamas those with a window are called Mistral.
        "model_type": if architecture == "llama" && window.is_some() { "mistral" } else { architecture },
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": extent("feed_forward_length")?,
        "num_hidden_layers": extent("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv")?,
        "head_dim": told_dim,
        "rms_norm_eps": metadata.number(&eps)?.ok_or_else(|| metadata.missing(&eps))?,
        "max_position_embeddings": optional("context_length")?,
        "sliding_window": window,
        "use_sliding_window": window.is_some(),
        "rope_theta": metadata.number(&key("rope.freq_base"))?,
        "rope_scaling": rope_scaling(metadata, &key)?,
        "tie_word_embeddings": !has("output.weight"),
        "attention_bias": has("blk.0.attn_q.bias"),
        "mlp_bias": has("blk.0.ffn_up.bias"),
    }))
}

/// How rotations are slowed: none, linear or YaRN. A Llama 3's divisors are a tensor instead.
fn rope_scaling(metadata: &Metadata<'_>, key: &impl Fn(&str) -> String) -> Result<Value> {
    let number = |name: &str| metadata.number(&key(&format!("rope.{name}")));
    let factor = match number("scaling.factor")? {
        // As older files call it.
        None => number("scale_linear")?,
        factor => factor,
    };
    let factor = factor.filter(|&factor| factor != 0.0 && factor != 1.0);
    let type_key = key("rope.scaling.type");
    let (name, factor) = match (metadata.text(&type_key)?, factor) {
        (Some("none"), _) | (None | Some("linear" | "yarn"), None) => return Ok(Value::Null),
        (None | Some("linear"), Some(factor)) => ("linear", factor),
        (Some("yarn"), Some(factor)) => ("yarn", factor),
        _ => return Err(metadata.unexpected(&type_key, r#""none", "linear" or "yarn""#)),
    };
    let mut scaling = Map::from_iter([("rope_type".into(), name.into()), ("factor".into(), factor.into())]);
    if name == "yarn" {
        let log_multiplier = key("rope.scaling.yarn_log_multiplier");
        if metadata.number(&log_multiplier)?.is_some_and(|times| times != 0.0) {
            return Err(metadata.unexpected(&log_multiplier, "none"));
        }
        let original = metadata.whole(&key("rope.scaling.original_context_length"))?;
        scaling.insert("original_max_position_embeddings".into(), original.into());
        scaling.insert("beta_fast".into(), number("scaling.yarn_beta_fast")?.into());
        scaling.insert("beta_slow".into(), number("scaling.yarn_beta_slow")?.into());
        // On top of YaRN's own magnitude here, in its place there.
        let attention = number("scaling.attn_factor")?.map(|times| times * (1.0 + 0.1 * factor.ln()));
        scaling.insert("attention_factor".into(), attention.into());
    }
    Ok(Value::Object(scaling))
}
