//! The families of models that are read, and in what they differ from Llama.

use super::error::Result;
use super::fields::Fields;
use serde_json::{Value, json};

/// A family of models, by `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma3,
    Phi3,
}

/// By `model_type`.
const FAMILIES: [(&str, Family); 6] = [
    ("llama", Family::Llama),
    ("mistral", Family::Mistral),
    ("qwen2", Family::Qwen2),
    ("qwen3", Family::Qwen3),
    ("gemma3_text", Family::Gemma3),
    ("phi3", Family::Phi3),
];

impl Family {
    /// The family by `model_type`; a Llama where none is told. Of the classes one must be a
    /// language model.
    pub fn of(fields: &Fields<'_>) -> Result<Self> {
        let model_type = &fields.json["model_type"];
        let name = if model_type.is_null() { Some("llama") } else { model_type.as_str() };
        let found = FAMILIES.into_iter().find(|&(known, _)| name == Some(known));
        let (_, family) = found.ok_or_else(|| {
            let names = FAMILIES.map(|(name, _)| name);
            fields.error(format!("model_type: expected one of {names:?}, got {model_type}"))
        })?;
        let is_language_model =
            |class: &Value| class.as_str().is_some_and(|name| name.ends_with("ForCausalLM"));
        match fields.json["architectures"].as_array() {
            Some(classes) if !classes.is_empty() && !classes.iter().any(is_language_model) => {
                Err(fields.error(format!("architectures: expected a class ForCausalLM, got {classes:?}")))
            }
            _ => Ok(family),
        }
    }

    /// The field that names the MLP's activation, and its value.
    pub fn activation(self) -> (&'static str, &'static str) {
        match self {
            Self::Gemma3 => ("hidden_activation", "gelu_pytorch_tanh"),
            _ => ("hidden_act", "silu"),
        }
    }

    /// The head dim where a file tells none; by default the heads' share of the hidden size.
    pub fn head_dim(self) -> Option<usize> {
        match self {
            Self::Qwen3 => Some(128),
            Self::Gemma3 => Some(256),
            _ => None,
        }
    }

    /// Where a file tells none.
    pub fn rms_norm_eps(self) -> f64 {
        if self == Self::Phi3 { 1e-5 } else { 1e-6 }
    }

    /// Whether the embeddings are the head where a file does not tell.
    pub fn ties(self) -> bool {
        self == Self::Gemma3
    }

    /// Whether `attention_bias` counts.
    pub fn may_have_biases(self) -> bool {
        matches!(self, Self::Llama | Self::Qwen3 | Self::Gemma3)
    }

    /// Whether queries, keys and values come of one matrix, and gate and up of another.
    pub fn is_fused(self) -> bool {
        self == Self::Phi3
    }

    /// Whether each head's queries and keys pass a norm.
    pub fn has_head_norms(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Gemma3)
    }

    /// Whether what attention and MLP add passes a norm, too.
    pub fn has_output_norms(self) -> bool {
        self == Self::Gemma3
    }

    /// What is added to the weights of norms.
    pub fn norm_offset(self) -> f64 {
        if self == Self::Gemma3 { 1.0 } else { 0.0 }
    }

    /// The factor of embedded tokens.
    pub fn embedding_scale(self, hidden_size: usize) -> f64 {
        if self == Self::Gemma3 { (hidden_size as f64).sqrt() } else { 1.0 }
    }

    /// The factor of the scores, where it is not that of the head dim.
    pub fn score_scale(self, fields: &Fields<'_>) -> Result<Option<f32>> {
        if self != Self::Gemma3 {
            return Ok(None);
        }
        for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
            fields.only(name, Value::Null)?;
        }
        fields.only("use_bidirectional_attention", json!(false))?;
        let scalar = fields.optional("query_pre_attn_scalar")?.unwrap_or(256.0);
        Ok(Some(scalar.sqrt().recip() as f32))
    }
}
