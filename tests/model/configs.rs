//! What `config.json` says, as transformers reads it.

use super::checkpoint::{Directory, config, config_with, merged, tensors, write};
use super::llama::config::Config;
use super::llama::model::Llama;
use super::{Mode, answers, ids};
use candle_core::DType;
use serde_json::{Value, json};

fn read(changes: Value) -> Config {
    read_text(&config_with(changes).to_string())
}

fn read_text(text: &str) -> Config {
    let directory = Directory::new();
    let path = directory.path().join("config.json");
    std::fs::write(&path, text).unwrap();
    Config::read(&path).unwrap()
}

/// `rope_scaling` comes before `rope_parameters`, and what stands there before the top level.
#[test]
fn theta_is_the_one_that_transformers_takes() {
    let [plain, linear] = [
        json!({ "rope_type": "default", "rope_theta": 5e5 }),
        json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 7e4 }),
    ];
    for (changes, theta) in [
        (json!({ "rope_theta": 1e4, "rope_parameters": plain }), 5e5),
        (json!({ "rope_theta": 1e4, "rope_scaling": plain }), 5e5),
        (json!({ "rope_theta": 3e4, "rope_parameters": { "rope_type": "default" } }), 3e4),
        (json!({ "rope_theta": null, "rope_parameters": { "rope_type": "default" } }), 1e4),
        (json!({ "rope_theta": null, "rope_parameters": null }), 1e4),
        (json!({ "rope_scaling": linear, "rope_parameters": plain }), 7e4),
        // By type of layer: here all are of full attention.
        (
            json!({ "rope_parameters": {
                "full_attention": { "rope_type": "default", "rope_theta": 1e6 },
                "sliding_attention": { "rope_type": "default", "rope_theta": 1e4 }
            } }),
            1e6,
        ),
    ] {
        assert_eq!(read(changes.clone()).rope.theta, theta, "{changes}");
    }
}

#[test]
fn scaling_beside_parameters_is_obeyed() {
    let scaling = json!({ "type": "linear", "factor": 4.0 });
    let both = read(json!({ "rope_scaling": scaling, "rope_parameters": { "rope_type": "default" } }));
    let one = read(json!({ "rope_scaling": scaling }));
    assert_eq!(both.rope, one.rope);
    assert_ne!(both.rope, read(json!({})).rope);
}

/// Qwen2.5's, four times as long: values of transformers.
#[test]
fn yarn_turns_as_transformers_does() {
    for original in [
        json!({ "rope_scaling": { "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768 } }),
        json!({ "rope_scaling": { "type": "yarn", "factor": 4.0 }, "max_position_embeddings": 32768 }),
    ] {
        let mut changes = json!({ "rope_theta": 1e6, "head_dim": 128 });
        changes.as_object_mut().unwrap().extend(original.as_object().unwrap().clone());
        let rope = read(changes).rope;
        let frequencies = rope.frequencies(128);
        for (pair, expected) in [
            (0, 1.0),
            (20, 1.333_521_4e-2),
            (30, 1.064_361e-3),
            (31, 8.029_597_3e-4),
            (35, 2.462_584_1e-4),
            (40, 4.445_698_5e-5),
            (63, 3.102_344_4e-7),
        ] {
            let difference = (frequencies[pair] / expected - 1.0_f64).abs();
            assert!(difference < 1e-6, "pair {pair}: {} is not {expected}", frequencies[pair]);
        }
        assert!((rope.magnitude() - 1.138_629_4).abs() < 1e-7);
    }
    let told = json!({
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.5
    });
    assert_eq!(read(json!({ "rope_scaling": told })).rope.magnitude(), 0.5);
    let balanced = json!({
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.7
    });
    assert_eq!(read(json!({ "rope_scaling": balanced })).rope.magnitude(), 1.0);
}

/// A window is no window for what fits it.
#[test]
fn what_fits_a_window_equals_full_attention() {
    let with_window = |window: Value| {
        config_with(json!({
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window
        }))
    };
    let tensors = tensors(&config(), DType::F32);
    let load = |config: &Value| Llama::load(write(config, &tensors).path(), None).unwrap();
    let (windowed, full) = (load(&with_window(json!(20))), load(&with_window(Value::Null)));
    let query = [ids(3, 50, 2)];
    let logits = |model: &Llama, len: usize| {
        let answers = answers(model, Mode::Dense, &ids(len, 50, 1), &query, 1).unwrap();
        answers[0].logits.as_ref().unwrap().to_vec2::<f32>().unwrap()
    };
    assert_eq!(logits(&windowed, 16), logits(&full, 16));
    assert_ne!(logits(&windowed, 17), logits(&full, 17));
}

/// Which layers have a window, as transformers reads it.
#[test]
fn windows_are_those_that_transformers_takes() {
    let windows = |changes: Value| {
        let config = read(merged(&json!({ "num_hidden_layers": 4, "sliding_window": 9 }), changes));
        (0..4).map(|layer| config.window(layer)).collect::<Vec<_>>()
    };
    let (none, nine) = (None, Some(9));
    // Where a file tells none.
    let without = |name: &str| {
        let mut config =
            config_with(json!({ "model_type": name, "use_sliding_window": true, "max_window_layers": 0 }));
        config.as_object_mut().unwrap().remove("sliding_window");
        read_text(&config.to_string()).window(0)
    };
    assert_eq!(["mistral", "qwen2", "llama", "phi3"].map(without), [Some(4096), Some(4096), None, None]);
    for (changes, expected) in [
        (json!({ "model_type": "llama" }), [none; 4]),
        (json!({ "model_type": "mistral" }), [nine; 4]),
        (json!({ "model_type": "mistral", "sliding_window": null }), [none; 4]),
        (json!({ "model_type": "phi3" }), [nine; 4]),
        (json!({ "model_type": "phi3", "sliding_window": null }), [none; 4]),
        (json!({ "model_type": "qwen2" }), [none; 4]),
        (json!({ "model_type": "qwen2", "use_sliding_window": null, "max_window_layers": 0 }), [none; 4]),
        (json!({ "model_type": "qwen2", "use_sliding_window": true }), [none; 4]),
        (
            json!({ "model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 0, "sliding_window": null }),
            [none; 4],
        ),
        (
            json!({ "model_type": "qwen3", "use_sliding_window": true, "max_window_layers": 3 }),
            [none, none, none, nine],
        ),
        (json!({ "model_type": "gemma3_text", "hidden_act": null }), [nine; 4]),
        (
            json!({ "model_type": "gemma3_text", "hidden_act": null, "sliding_window_pattern": 2 }),
            [nine, none, nine, none],
        ),
        (
            json!({
                "model_type": "gemma3_text", "hidden_act": null,
                "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"]
            }),
            [none, nine, none, none],
        ),
    ] {
        assert_eq!(windows(changes.clone()), expected, "{changes}");
    }
}

/// Models are told by their type, whatever their classes are called.
#[test]
fn a_model_is_told_by_its_type() {
    for classes in [json!([]), json!(["LLaMAForCausalLM"]), json!(["MistralForCausalLM"]), json!(null)] {
        assert_eq!(read(json!({ "architectures": classes })), read(json!({})));
    }
}

/// Python writes numbers that JSON has not.
#[test]
fn nan_and_infinity_are_read_as_nothing() {
    let text = config().to_string();
    let more = r#"{ "a": NaN, "b": [Infinity, -Infinity], "c\"NaN": "NaN, \\", "d": NaN, "#;
    assert_eq!(read_text(&text.replacen('{', more, 1)), read(json!({})));
    let theta = text.replace("1000.0", "Infinity");
    assert_eq!(read_text(&theta).rope.theta, 10_000.0);
}
