//! GGUF files as llama.cpp's converter makes them, of tiny checkpoints.

use super::byte_level::{BOS, EOS, tokenizer as byte_level};
use super::checkpoint::Directory;
use candle_core::Tensor;
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use serde_json::Value as Json;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

/// The content of a file, to be changed and written.
#[derive(Clone)]
pub struct File {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, Tensor>,
    dtype: GgmlDType,
}

/// The tokens of the byte-level `tokenizer.json` by id, and their types.
fn vocabulary() -> (Vec<Value>, Vec<Value>) {
    let json = byte_level();
    let mut tokens: Vec<(u64, String, i32)> = json["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(token, id)| (id.as_u64().unwrap(), token.clone(), 1))
        .collect();
    tokens.push((BOS.into(), "<s>".into(), 3));
    tokens.push((EOS.into(), "</s>".into(), 3));
    tokens.sort();
    tokens.into_iter().map(|(_, token, kind)| (Value::String(token), Value::I32(kind))).unzip()
}

impl File {
    /// The file that llama.cpp's converter makes of a checkpoint.
    pub fn of(config: &Json, tensors: &HashMap<String, Tensor>, dtype: GgmlDType) -> Self {
        let architecture = config["model_type"].as_str().unwrap();
        let extent = |name: &str| Value::U32(config[name].as_u64().unwrap() as u32);
        let number = |name: &str| Value::F32(config[name].as_f64().unwrap() as f32);
        let (tokens, types) = vocabulary();
        let text = |text: &str| Value::String(text.into());
        let mut metadata: BTreeMap<String, Value> = [
            ("general.architecture", text(architecture)),
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("gpt-2")),
            ("tokenizer.ggml.tokens", Value::Array(tokens)),
            ("tokenizer.ggml.token_type", Value::Array(types)),
            ("tokenizer.ggml.merges", Value::Array(vec![text("h e")])),
            ("tokenizer.ggml.bos_token_id", Value::U32(BOS)),
            ("tokenizer.ggml.eos_token_id", Value::U32(EOS)),
            ("tokenizer.ggml.add_bos_token", Value::Bool(true)),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        metadata.extend(
            [
                ("block_count", extent("num_hidden_layers")),
                ("embedding_length", extent("hidden_size")),
                ("feed_forward_length", extent("intermediate_size")),
                ("attention.head_count", extent("num_attention_heads")),
                ("attention.head_count_kv", extent("num_key_value_heads")),
                ("attention.layer_norm_rms_epsilon", number("rms_norm_eps")),
                ("rope.freq_base", number("rope_theta")),
                ("context_length", Value::U32(4096)),
                ("vocab_size", extent("vocab_size")),
            ]
            .map(|(name, value)| (format!("{architecture}.{name}"), value)),
        );
        let heads = |name: &str| config[name].as_u64().unwrap() as usize;
        let tensors = tensors.iter().map(|(name, tensor)| {
            let permuted = |heads: usize| {
                let shape = tensor.dims();
                let pairs = tensor.reshape((heads, 2, shape[0] / heads / 2, ())).unwrap();
                pairs.transpose(1, 2).unwrap().contiguous().unwrap().reshape(shape).unwrap()
            };
            let tensor = match name {
                name if architecture != "llama" || !name.contains("self_attn") => tensor.clone(),
                name if name.contains("q_proj") => permuted(heads("num_attention_heads")),
                name if name.contains("k_proj") => permuted(heads("num_key_value_heads")),
                _ => tensor.clone(),
            };
            (renamed(name), tensor)
        });
        Self { metadata, tensors: tensors.collect(), dtype }
    }

    pub fn set(&mut self, name: &str, value: Value) -> &mut Self {
        self.metadata.insert(name.into(), value);
        self
    }

    pub fn without(&mut self, name: &str) -> &mut Self {
        assert!(self.metadata.remove(name).is_some() | self.tensors.remove(name).is_some());
        self
    }

    fn quantised(&self) -> BTreeMap<&str, QTensor> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), quantised(tensor, self.dtype))).collect()
    }

    pub fn bytes(&self) -> Vec<u8> {
        let quantised = self.quantised();
        let metadata: Vec<_> = self.metadata.iter().map(|(name, value)| (name.as_str(), value)).collect();
        let tensors: Vec<_> = quantised.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let mut bytes = std::io::Cursor::new(Vec::new());
        gguf_file::write(&mut bytes, &metadata, &tensors).unwrap();
        bytes.into_inner()
    }

    pub fn write(&self) -> (Directory, PathBuf) {
        written(&self.bytes())
    }
}

pub fn written(bytes: &[u8]) -> (Directory, PathBuf) {
    let directory = Directory::new();
    let path = directory.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    (directory, path)
}

/// Vectors stay as they are.
pub fn quantised(tensor: &Tensor, dtype: GgmlDType) -> QTensor {
    QTensor::quantize(tensor, if tensor.rank() == 2 { dtype } else { GgmlDType::F32 }).unwrap()
}

/// The name of a tensor in a GGUF file.
fn renamed(name: &str) -> String {
    const PARTS: [(&str, &str); 12] = [
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.", "ffn_"),
        ("_proj", ""),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ];
    PARTS.iter().fold(name.to_owned(), |name, (part, other)| name.replace(part, other))
}
