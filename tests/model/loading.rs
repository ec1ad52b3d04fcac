//! Checkpoints that load, and those that are refused.

use super::checkpoint::{Directory, config, config_with, merged, tensors, write, write_sharded};
use super::literal::Literal;
use super::llama::model::Llama;
use super::{Mode, answers, assert_logits, ids};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use star_attention::StarLayout;
use std::collections::HashMap;

/// The checkpoint, as `dtype` or its own, gives the literal model's logits.
fn assert_loads(config: &Value, stored: DType, dtype: Option<DType>, tolerance: f64) {
    let tensors = tensors(config, stored);
    let directory = write(config, &tensors);
    assert_eq!(Llama::load(directory.path(), dtype).unwrap().dtype, dtype.unwrap_or(stored));
    assert_equals_literal(&directory, config, &tensors, dtype, tolerance);
}

/// Dense and star logits of a checkpoint are those of the literal model of the same config and
/// tensors.
fn assert_equals_literal(
    directory: &Directory,
    config: &Value,
    tensors: &HashMap<String, Tensor>,
    dtype: Option<DType>,
    tolerance: f64,
) {
    let model = Llama::load(directory.path(), dtype).unwrap();
    let literal = Literal::new(config, tensors);
    let (context, query) = (ids(70, 50, 6), ids(3, 50, 7));
    let queries = std::slice::from_ref(&query);
    let dense = answers(&model, Mode::Dense, &context, queries, 1).unwrap();
    assert_logits(&dense[0], &query, tolerance, |inputs| literal.dense(&context, inputs));
    let layout = StarLayout::builder(70).block_len(16).anchor_len(8).ranks(3).build().unwrap();
    let star = answers(&model, Mode::Star(layout.into()), &context, queries, 1).unwrap();
    assert_logits(&star[0], &query, tolerance, |inputs| literal.star(&context, 16, 8, inputs));
}

#[test]
fn every_head_arrangement_loads() {
    for changes in [
        json!({ "num_key_value_heads": 4 }),
        json!({ "num_key_value_heads": null }),
        json!({ "num_key_value_heads": 1 }),
        json!({ "head_dim": 12 }),
        json!({ "tie_word_embeddings": true }),
    ] {
        assert_loads(&config_with(changes), DType::F32, None, 1e-4);
    }
}

/// What `config.json` says of the published models, made small.
#[test]
fn every_published_shape_loads() {
    let llama3 = json!({
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512
    });
    let qwen2 = json!({ "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2" });
    let mistral =
        json!({ "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": null });
    for (name, changes) in [
        ("Llama 3", json!({ "rope_theta": 5e5 })),
        ("Llama 3.1", json!({ "rope_theta": 5e5, "rope_scaling": llama3 })),
        ("Llama 3.2", json!({ "rope_theta": 5e5, "rope_scaling": llama3, "tie_word_embeddings": true })),
        ("linear, older files", json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } })),
        ("linear, newer files", json!({ "rope_scaling": { "rope_type": "linear", "factor": 2.0 } })),
        ("Llama with biases", json!({ "attention_bias": true })),
        ("Mistral", mistral),
        ("Qwen2", qwen2),
        (
            "Qwen2.5",
            json!({
                "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": true,
                "rope_theta": 1e6, "use_sliding_window": false, "sliding_window": 32
            }),
        ),
    ] {
        println!("{name}");
        assert_loads(&config_with(changes), DType::F32, None, 1e-4);
    }
}

/// Llama 2 has neither theta nor KV heads in its file, and a buffer in its weights.
#[test]
fn llama_2_loads() {
    let mut config = config_with(json!({ "rope_scaling": null, "torch_dtype": "float16" }));
    for name in ["num_key_value_heads", "rope_theta"] {
        config.as_object_mut().unwrap().remove(name);
    }
    let mut tensors = tensors(&config, DType::F16);
    for layer in 0..2 {
        let buffer = Tensor::ones(4, DType::F32, &Device::Cpu).unwrap();
        tensors.insert(format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"), buffer);
    }
    let directory = write(&config, &tensors);
    assert_eq!(Llama::load(directory.path(), None).unwrap().dtype, DType::F16);
    assert_equals_literal(&directory, &config, &tensors, Some(DType::F32), 1e-4);
}

#[test]
fn half_checkpoints_load() {
    for (stored, unit) in [(DType::F16, 2f64.powi(-11)), (DType::BF16, 2f64.powi(-8))] {
        // Widened, only the weights as stored count.
        assert_loads(&config(), stored, Some(DType::F32), 1e-4);
        // As stored, queries, keys and values are rounded too, in each of two layers with steep
        // attention: the logits, of size 10, then move by several units.
        assert_loads(&config(), stored, None, 20.0 * unit);
    }
}

#[test]
fn llama_3_1_scaling_slows_the_slow_rotations() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256
    });
    let scaled = config_with(json!({ "rope_scaling": scaling }));
    assert_loads(&scaled, DType::F32, None, 1e-4);
    // Theta may lie beside the scaling, too.
    let mut beside = scaling.clone();
    beside["rope_theta"] = scaled["rope_theta"].clone();
    let newer = config_with(json!({ "rope_theta": null, "rope_parameters": beside }));
    let frequencies = |config: &Value| {
        let directory = write(config, &tensors(config, DType::F32));
        Llama::load(directory.path(), None).unwrap().config.rope.frequencies(8)
    };
    assert_eq!(frequencies(&scaled), frequencies(&newer));
    assert_ne!(frequencies(&scaled), frequencies(&config()));
    for plain in [json!(null), json!({ "rope_type": "default" })] {
        assert_eq!(frequencies(&config_with(json!({ "rope_scaling": plain }))), frequencies(&config()));
    }
}

#[test]
fn shards_load_as_one_file_does() {
    let (config, context, query) = (config(), ids(40, 50, 1), [ids(2, 50, 2)]);
    let tensors = tensors(&config, DType::F32);
    let (one, two) = (write(&config, &tensors), write_sharded(&config, &tensors));
    let logits = |directory: &Directory| {
        let model = Llama::load(directory.path(), None).unwrap();
        let answers = answers(&model, Mode::Dense, &context, &query, 1).unwrap();
        answers[0].logits.as_ref().unwrap().to_vec2::<f32>().unwrap()
    };
    assert_eq!(logits(&one), logits(&two));
}

/// The error of a checkpoint, which names what is wrong in one line.
fn refused(directory: &Directory, named: &str) {
    let error = Llama::load(directory.path(), None).err().expect("an error").to_string();
    assert!(error.contains(named) && !error.contains('\n'), "{named:?} is not in {error:?}");
}

#[test]
fn bad_configs_are_refused() {
    let weights = tensors(&config(), DType::F32);
    let mistral = json!({ "architectures": ["MistralForCausalLM"], "model_type": "mistral" });
    let qwen2 = json!({ "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2" });
    for (changes, named) in [
        (json!({ "architectures": ["LlamaForSequenceClassification"] }), "architectures"),
        (json!({ "model_type": "qwen2" }), "q_proj.bias"),
        (json!({ "model_type": "mamba" }), "model_type"),
        (json!({ "model_type": 3 }), "model_type"),
        (json!({ "hidden_act": "gelu" }), "hidden_act"),
        (json!({ "mlp_bias": true }), "mlp_bias"),
        (merged(&mistral, json!({ "sliding_window": 0 })), "sliding_window"),
        (merged(&qwen2, json!({ "use_sliding_window": "yes" })), "use_sliding_window"),
        (json!({ "quantization_config": { "quant_method": "awq" } }), "awq"),
        // Biases that the weights do not have.
        (json!({ "attention_bias": true }), "q_proj.bias"),
        (qwen2, "q_proj.bias"),
        (
            json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0 } }),
            "original_max_position_embeddings",
        ),
        (json!({ "rope_scaling": { "rope_type": "longrope" } }), "original_max_position_embeddings"),
        (json!({ "rope_scaling": { "rope_type": "ntk" } }), "rope scaling"),
        (json!({ "rope_scaling": "linear" }), "rope scaling"),
        (json!({ "rope_parameters": { "sliding_attention": { "rope_theta": 1e4 } } }), "full_attention"),
        (json!({ "rope_scaling": { "type": "dynamic", "factor": 4.0 } }), "rope scaling"),
        (json!({ "rope_scaling": { "factor": 4.0 } }), "rope scaling"),
        (json!({ "rope_scaling": { "type": "linear" } }), "factor"),
        (json!({ "rope_scaling": { "rope_type": "llama3", "factor": 4.0 } }), "low_freq_factor"),
        (json!({ "rope_theta": -1.0 }), "rope_theta"),
        (json!({ "vocab_size": null }), "vocab_size"),
        (json!({ "num_hidden_layers": 0 }), "num_hidden_layers"),
        (json!({ "num_attention_heads": "four" }), "num_attention_heads"),
        (json!({ "num_key_value_heads": 3 }), "num_key_value_heads"),
        (json!({ "head_dim": 7 }), "head_dim"),
        // Extents that the weights do not have.
        (json!({ "intermediate_size": 64 }), "mlp.gate_proj"),
        (json!({ "num_hidden_layers": 3 }), "model.layers.2"),
    ] {
        refused(&write(&config_with(changes), &weights), named);
    }
}

#[test]
fn bad_files_are_refused() {
    let (config, tensors) = (config(), tensors(&config(), DType::F32));
    let good = || write(&config, &tensors);

    let directory = good();
    std::fs::remove_file(directory.path().join("config.json")).unwrap();
    refused(&directory, "config.json");
    std::fs::write(directory.path().join("config.json"), "{ \"model_type\": ").unwrap();
    refused(&directory, "config.json");

    let directory = good();
    let file = directory.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for len in [0, 4, 100, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..len]).unwrap();
        refused(&directory, "model.safetensors");
    }
    std::fs::write(&file, vec![0xff; 4096]).unwrap();
    refused(&directory, "model.safetensors");
    std::fs::remove_file(&file).unwrap();
    refused(&directory, "model.safetensors");

    let mut integers = tensors.clone();
    integers.insert("model.norm.weight".into(), Tensor::ones(32, DType::I64, &Device::Cpu).unwrap());
    refused(&write(&config, &integers), "model.norm.weight");

    let directory = write_sharded(&config, &tensors);
    std::fs::remove_file(directory.path().join("model-00002-of-00002.safetensors")).unwrap();
    refused(&directory, "model-00002-of-00002.safetensors");
    let index = directory.path().join("model.safetensors.index.json");
    // An index that tells of other files than those that are there.
    let whole = good();
    std::fs::copy(&index, whole.path().join("model.safetensors.index.json")).unwrap();
    refused(&whole, "the index does not describe this directory");
    for map in [json!({}), json!({ "weight_map": { "x": 1 } }), json!({ "weight_map": { "x": "../x" } })] {
        std::fs::write(&index, map.to_string()).unwrap();
        refused(&directory, "weight_map");
    }
}

/// A tensor is taken from the file that the index maps it to.
#[test]
fn the_index_says_where_a_tensor_is() {
    let (config, tensors) = (config(), tensors(&config(), DType::F32));
    let directory = write_sharded(&config, &tensors);
    let index = directory.path().join("model.safetensors.index.json");
    let map: Value = serde_json::from_slice(&std::fs::read(index).unwrap()).unwrap();
    let mapped = map["weight_map"]["model.norm.weight"].as_str().unwrap();
    // The other file has one of the same name, and of another shape.
    let other = if mapped.contains("-00001-") {
        mapped.replace("-00001-", "-00002-")
    } else {
        mapped.replace("-00002-", "-00001-")
    };
    let other = directory.path().join(other);
    let mut shard = candle_core::safetensors::load(&other, &Device::Cpu).unwrap();
    shard.insert("model.norm.weight".into(), Tensor::ones(7, DType::F32, &Device::Cpu).unwrap());
    candle_core::safetensors::save(&shard, &other).unwrap();
    assert_equals_literal(&directory, &config, &tensors, None, 1e-4);
}

/// Tensors that no layer takes may have any type.
#[test]
fn only_tensors_that_are_used_matter() {
    let (config, mut tensors) = (config(), tensors(&config(), DType::F32));
    let directory = {
        let mut more = tensors.clone();
        more.insert("model.position_ids".into(), Tensor::ones(9, DType::I64, &Device::Cpu).unwrap());
        write(&config, &more)
    };
    assert_equals_literal(&directory, &config, &tensors, None, 1e-4);
    // Without a head the embeddings are in its place.
    tensors.remove("lm_head.weight");
    let directory = write(&config, &tensors);
    let tied = config_with(json!({ "tie_word_embeddings": true }));
    assert_equals_literal(&directory, &tied, &tensors, None, 1e-4);
}

/// Weights of norms are not rounded to the dtype of the others.
#[test]
fn norms_keep_their_precision() {
    let mut tensors = tensors(&config(), DType::BF16);
    for (name, tensor) in &mut tensors {
        if name.ends_with("norm.weight") {
            *tensor = (tensor.to_dtype(DType::F32).unwrap() * 1.0009).unwrap();
        }
    }
    let directory = write(&config(), &tensors);
    assert_eq!(Llama::load(directory.path(), None).unwrap().dtype, DType::BF16);
    assert_equals_literal(&directory, &config(), &tensors, Some(DType::F32), 1e-4);
    // All others are rounded: to f32's values of bf16, which they are.
    let rounded = |dtype| {
        let model = Llama::load(directory.path(), dtype).unwrap();
        model.fingerprint().unwrap()
    };
    assert_eq!(rounded(None), rounded(Some(DType::F32)));
}
