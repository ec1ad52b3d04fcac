//! What `config.json` says, as transformers reads it.

use super::checkpoint::{Directory, config, config_with, tensors, write};
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

/// A window is no window for what fits it; the rest is refused.
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
        let answers = answers(model, Mode::Dense, &ids(len, 50, 1), &query, 1)?;
        Ok::<_, super::Error>(answers[0].logits.as_ref().unwrap().to_vec2::<f32>().unwrap())
    };
    assert_eq!(logits(&windowed, 16).unwrap(), logits(&full, 16).unwrap());
    let error = logits(&windowed, 17).unwrap_err().to_string();
    assert!(error.contains("window of 20 tokens") && error.contains("21"), "{error}");
    // Where a file tells none.
    let without = |name: &str| {
        let mut config = with_window(Value::Null);
        config.as_object_mut().unwrap().remove("sliding_window");
        config["model_type"] = name.into();
        read_text(&config.to_string()).window
    };
    assert_eq!([without("mistral"), without("qwen2"), without("llama")], [Some(4096), None, None]);
    let qwen2 =
        |used: Value| read(json!({ "model_type": "qwen2", "use_sliding_window": used, "sliding_window": 9 }));
    assert_eq!(
        [json!(null), json!(false), json!(true)].map(|used| qwen2(used).window),
        [None, None, Some(9)]
    );
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
