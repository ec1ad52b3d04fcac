//! Tiny checkpoints of each family, written by `scripts/make-logits.py`, give the logits that
//! transformers computes; and what layers with a window see under star attention.

use super::checkpoint::{Directory, config_with, merged, tensors, write};
use super::literal::Literal;
use super::llama::fields::read_json;
use super::llama::model::Llama;
use super::llama::run::Scheme;
use super::{Mode, answers, assert_logits, ids};
use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};
use star_attention::comm::AnchorKv;
use star_attention::{GeneratedKv, StarLayout};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

const FAMILIES: [&str; 6] = ["llama3", "mistral", "qwen2", "qwen3", "gemma3", "phi3"];

fn folder(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model/families").join(family)
}

/// The ids that transformers was given, and a row of logits for each.
fn expected(family: &str) -> (Vec<u32>, Vec<Vec<f32>>) {
    let file = folder(family).join("logits.safetensors");
    let tensors = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    let ids = tensors["ids"].to_dtype(DType::U32).unwrap().to_vec1().unwrap();
    (ids, tensors["logits"].to_vec2().unwrap())
}

/// The logits of the tokens behind a context.
fn logits(model: &Llama, mode: Mode, ids: &[u32], context: usize) -> Vec<Vec<f32>> {
    let query = ids[context..].to_vec();
    let answers = answers(model, mode, &ids[..context], &[query], 0).unwrap();
    answers[0].logits.as_ref().unwrap().to_vec2().unwrap()
}

fn assert_close(got: &[Vec<f32>], expected: &[Vec<f32>], tolerance: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (row, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.len(), expected.len(), "{what}");
        for (got, expected) in got.iter().zip(expected) {
            assert!((got - expected).abs() <= tolerance, "{what}, row {row}: {got} is not {expected}");
        }
    }
}

/// All tokens behind no context, and some behind a context of the others: windows cut both.
#[test]
fn logits_are_those_of_transformers() {
    for family in FAMILIES {
        let model = Llama::load(&folder(family), Some(DType::F32)).unwrap();
        let (ids, expected) = expected(family);
        for context in [0, 25, ids.len() - 1] {
            let got = logits(&model, Mode::Dense, &ids, context);
            assert_close(&got, &expected[context..], 1e-4, family);
        }
    }
}

/// Star over one block is dense, and how blocks are spread over ranks changes nothing.
#[test]
fn families_answer_alike_over_any_ranks() {
    for family in FAMILIES {
        let model = Llama::load(&folder(family), Some(DType::F32)).unwrap();
        let (ids, expected) = expected(family);
        let layout = |block_len, ranks| StarLayout::builder(25).block_len(block_len).ranks(ranks);
        let one = Mode::Star(layout(25, 3).anchor_len(0).build().unwrap().into());
        assert_close(&logits(&model, one, &ids, 25), &expected[25..], 1e-4, family);
        let whole = logits(&model, Mode::Star(layout(5, 1).build().unwrap().into()), &ids, 25);
        for ranks in [2, 3, 5, 7] {
            for generated in [GeneratedKv::QueryRank, GeneratedKv::RoundRobin] {
                for anchor in [AnchorKv::Encoded, AnchorKv::Received] {
                    let layout = layout(5, ranks).generated(generated).build().unwrap();
                    let scheme = Scheme { anchor, ..layout.into() };
                    let got = logits(&model, Mode::Star(scheme), &ids, 25);
                    assert_close(&got, &whole, 1e-4, &format!("{family}, {ranks} ranks"));
                }
            }
        }
    }
}

/// A layer with a window sees the anchor and the window in phase 1, and the window in phase 2.
#[test]
fn windows_equal_the_literal_per_block_encoding() {
    let config = config_with(json!({ "model_type": "mistral", "sliding_window": 11 }));
    let tensors = tensors(&config, DType::F32);
    let directory = write(&config, &tensors);
    let model = Llama::load(directory.path(), None).unwrap();
    let literal = Literal::new(&config, &tensors);
    let queries = [ids(1, 50, 1), ids(17, 50, 3)];
    for (context_len, block_len, anchor_len) in [(64, 16, 16), (61, 16, 5), (61, 7, 3), (40, 8, 0), (5, 9, 2)]
    {
        let context = ids(context_len, 50, context_len as u64);
        let layout = StarLayout::builder(context_len).block_len(block_len).anchor_len(anchor_len);
        for ranks in [1, 2, 3, 9] {
            for generated in [GeneratedKv::QueryRank, GeneratedKv::RoundRobin] {
                let layout = layout.ranks(ranks).generated(generated).build().unwrap();
                let answers = answers(&model, Mode::Star(layout.into()), &context, &queries, 4).unwrap();
                for (answer, query) in answers.iter().zip(&queries) {
                    assert_logits(answer, query, 1e-4, |inputs| {
                        literal.star(&context, block_len, anchor_len, inputs)
                    });
                }
            }
        }
        let dense = answers(&model, Mode::Dense, &context, &queries, 4).unwrap();
        for (answer, query) in dense.iter().zip(&queries) {
            assert_logits(answer, query, 1e-4, |inputs| literal.dense(&context, inputs));
        }
    }
}

/// A copy of a family's checkpoint with another config.
fn changed(family: &str, changes: Value) -> Directory {
    let config = merged(&read_json(&folder(family).join("config.json")).unwrap(), changes);
    let file = folder(family).join("model.safetensors");
    let tensors: HashMap<String, Tensor> = candle_core::safetensors::load(file, &Device::Cpu).unwrap();
    write(&config, &tensors)
}

/// Older files have other fields for the same.
#[test]
fn older_configs_give_the_same_logits() {
    let rope = |kind: &str| {
        json!({
            "type": kind, "short_factor": [1.0, 1.3], "long_factor": [2.0, 5.0]
        })
    };
    let linear = json!({ "rope_type": "linear", "factor": 8.0 });
    for (family, changes) in [
        (
            "gemma3",
            json!({
                "rope_parameters": null, "layer_types": null, "sliding_window_pattern": 6, "rope_theta": 1e6,
                "rope_local_base_freq": 100.0, "rope_scaling": linear
            }),
        ),
        (
            "gemma3",
            json!({
                "rope_parameters": null, "layer_types": null, "rope_local_base_freq": 100.0,
                "rope_scaling": linear, "tie_word_embeddings": null
            }),
        ),
        ("phi3", json!({ "rope_parameters": null, "rope_theta": 1000.0, "rope_scaling": rope("su") })),
        ("phi3", json!({ "rope_parameters": null, "rope_theta": 1000.0, "rope_scaling": rope("yarn") })),
        ("qwen2", json!({ "layer_types": null })),
        ("mistral", json!({ "use_sliding_window": null, "architectures": [] })),
    ] {
        let model = Llama::load(changed(family, changes).path(), Some(DType::F32)).unwrap();
        let (ids, expected) = expected(family);
        assert_close(&logits(&model, Mode::Dense, &ids, 25), &expected[25..], 1e-4, family);
    }
}

/// Each of what sets a family apart counts.
#[test]
fn other_configs_give_other_logits() {
    for (family, changes) in [
        ("llama3", json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 500.0 } })),
        ("mistral", json!({ "sliding_window": 10 })),
        ("qwen2", json!({ "layer_types": ["sliding_attention", "sliding_attention"] })),
        ("gemma3", json!({ "sliding_window": 7 })),
        ("gemma3", json!({ "query_pre_attn_scalar": 8 })),
        ("gemma3", json!({ "rope_parameters": null })),
        ("phi3", json!({ "rope_parameters": null, "rope_theta": 1000.0 })),
    ] {
        let model = Llama::load(changed(family, changes.clone()).path(), Some(DType::F32)).unwrap();
        let (ids, expected) = expected(family);
        let got = logits(&model, Mode::Dense, &ids, 25);
        let pairs = got.iter().flatten().zip(expected[25..].iter().flatten());
        let difference = pairs.map(|(got, expected)| (got - expected).abs()).fold(0.0, f32::max);
        assert!(difference > 1e-2, "{family} {changes}: {difference}");
    }
}

#[test]
fn what_a_family_has_not_is_refused() {
    for (family, changes, named) in [
        ("gemma3", json!({ "model_type": "gemma3" }), "model_type"),
        ("gemma3", json!({ "hidden_activation": "gelu" }), "hidden_activation"),
        ("gemma3", json!({ "attn_logit_softcapping": 50.0 }), "attn_logit_softcapping"),
        ("gemma3", json!({ "final_logit_softcapping": 30.0 }), "final_logit_softcapping"),
        ("gemma3", json!({ "use_bidirectional_attention": true }), "use_bidirectional_attention"),
        ("gemma3", json!({ "query_pre_attn_scalar": 0 }), "query_pre_attn_scalar"),
        ("gemma3", json!({ "layer_types": ["full_attention"] }), "layer_types"),
        ("gemma3", json!({ "layer_types": null, "sliding_window_pattern": 0 }), "sliding_window_pattern"),
        ("qwen2", json!({ "layer_types": ["full_attention", "chunked_attention"] }), "layer_types"),
        ("qwen2", json!({ "layer_types": null, "max_window_layers": -1 }), "max_window_layers"),
        ("qwen3", json!({ "attention_bias": false, "head_dim": null }), "self_attn"),
        ("qwen3", json!({ "hidden_act": "gelu" }), "hidden_act"),
        ("phi3", json!({ "rope_scaling": { "type": "longrope" } }), "short_factor"),
        ("phi3", json!({ "rope_scaling": { "type": "longrope", "short_factor": [1.0] } }), "short_factor"),
        ("phi3", json!({ "partial_rotary_factor": 0.75 }), "partial_rotary_factor"),
        ("phi3", json!({ "model_type": "llama" }), "q_proj"),
    ] {
        let error = Llama::load(changed(family, changes.clone()).path(), None).err();
        let error = error.unwrap_or_else(|| panic!("{family} {changes} loads")).to_string();
        assert!(error.contains(named) && !error.contains('\n'), "{named:?} is not in {error:?}");
    }
    // Longer sequences turn by other factors.
    let model = Llama::load(&folder("phi3"), Some(DType::F32)).unwrap();
    let run = |len| answers(&model, Mode::Dense, &ids(len, 48, 1), &[ids(4, 48, 2)], 0);
    assert!(run(60).is_ok());
    let error = run(61).err().expect("an error").to_string();
    assert!(error.contains("original_max_position_embeddings") && error.contains("65"), "{error}");
}
