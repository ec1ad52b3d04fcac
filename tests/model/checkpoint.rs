//! Tiny random checkpoints in the Hugging Face layout.

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A directory that goes away with its owner.
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("star-attention-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The `config.json` of a small Llama.
pub fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 50,
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 1000.0, "tie_word_embeddings": false
    })
}

/// `config` with some fields replaced.
pub fn config_with(changes: Value) -> Value {
    merged(&config(), changes)
}

/// An object with some fields replaced.
pub fn merged(object: &Value, changes: Value) -> Value {
    let mut object = object.clone();
    object.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    object
}

/// Random weights that fit a config.
pub fn tensors(config: &Value, dtype: DType) -> HashMap<String, Tensor> {
    let extent = |name: &str| config[name].as_u64().map(|extent| extent as usize);
    let get = |name: &str| extent(name).unwrap();
    let (vocab, hidden, inner) = (get("vocab_size"), get("hidden_size"), get("intermediate_size"));
    let heads = get("num_attention_heads");
    let dim = extent("head_dim").unwrap_or(hidden / heads);
    let kv = extent("num_key_value_heads").unwrap_or(heads) * dim;
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if config["tie_word_embeddings"] != true {
        shapes.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    }
    for layer in 0..get("num_hidden_layers") {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![heads * dim, hidden]),
            ("self_attn.k_proj", vec![kv, hidden]),
            ("self_attn.v_proj", vec![kv, hidden]),
            ("self_attn.o_proj", vec![hidden, heads * dim]),
            ("post_attention_layernorm", vec![hidden]),
            ("mlp.gate_proj", vec![inner, hidden]),
            ("mlp.up_proj", vec![inner, hidden]),
            ("mlp.down_proj", vec![hidden, inner]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
        let qwen2 = config["model_type"] == "qwen2";
        if qwen2 || config["attention_bias"] == true {
            for (name, extent) in [("q_proj", heads * dim), ("k_proj", kv), ("v_proj", kv)] {
                shapes.push((format!("model.layers.{layer}.self_attn.{name}.bias"), vec![extent]));
            }
        }
        if !qwen2 && config["attention_bias"] == true {
            shapes.push((format!("model.layers.{layer}.self_attn.o_proj.bias"), vec![hidden]));
        }
    }
    let mut state = 7u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let tensor = |(name, shape): (String, Vec<usize>)| {
        // Norms around 1; queries and keys large, so that attention is far from uniform.
        let (shift, scale) = match name.as_str() {
            name if name.contains("norm") => (1.0, 0.3),
            name if name.contains("q_proj") || name.contains("k_proj") => (0.0, 0.7),
            _ => (0.0, 0.3),
        };
        let data: Vec<f32> = (0..shape.iter().product()).map(|_| shift + scale * random()).collect();
        (name, Tensor::from_vec(data, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap())
    };
    shapes.into_iter().map(tensor).collect()
}

/// Writes `config.json` and `model.safetensors`.
pub fn write(config: &Value, tensors: &HashMap<String, Tensor>) -> Directory {
    let directory = Directory::new();
    std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    candle_core::safetensors::save(tensors, directory.path().join("model.safetensors")).unwrap();
    directory
}

/// Writes the tensors into two files with an index.
pub fn write_sharded(config: &Value, tensors: &HashMap<String, Tensor>) -> Directory {
    let directory = write(config, tensors);
    std::fs::remove_file(directory.path().join("model.safetensors")).unwrap();
    let mut shards = [HashMap::new(), HashMap::new()];
    let mut map = serde_json::Map::new();
    for (index, (name, tensor)) in tensors.iter().enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", index % 2 + 1);
        map.insert(name.clone(), file.into());
        shards[index % 2].insert(name.clone(), tensor.clone());
    }
    for (index, shard) in shards.iter().enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", index + 1);
        candle_core::safetensors::save(shard, directory.path().join(file)).unwrap();
    }
    let index = json!({ "metadata": {}, "weight_map": map }).to_string();
    std::fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    directory
}
