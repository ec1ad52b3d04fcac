//! GGUF files: the same weights, config and tokenizer as a Hugging Face directory of them, and
//! files that are refused.

use super::byte_level::{BOS, EOS, HE, symbol, tokenizer as byte_level};
use super::checkpoint::{Directory, config_with, merged, tensors, write};
use super::gguf_file::{File, quantised, written};
use super::llama::checkpoint::Checkpoint;
use super::llama::model::Llama;
use super::llama::tokenizer::Tokenizer;
use super::{Mode, answers, ids};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use serde_json::{Value as Json, json};
use std::path::Path;

/// A config whose rows fit every quantised block, of the byte-level vocabulary.
fn config(changes: Json) -> Json {
    let wide = json!({ "vocab_size": EOS + 1, "hidden_size": 256, "intermediate_size": 256 });
    merged(&config_with(wide), changes)
}

fn logits(path: &Path) -> Vec<Vec<f32>> {
    let model = Llama::load(path, None).unwrap();
    let answers = answers(&model, Mode::Dense, &ids(40, 259, 1), &[ids(3, 259, 2)], 1).unwrap();
    answers[0].logits.as_ref().unwrap().to_vec2().unwrap()
}

#[test]
fn f32_weights_give_the_bits_of_a_directory() {
    for changes in [
        json!({}),
        json!({ "tie_word_embeddings": true }),
        json!({ "attention_bias": true }),
        json!({ "model_type": "qwen2" }),
        json!({ "model_type": "qwen2", "tie_word_embeddings": true, "num_key_value_heads": 4 }),
    ] {
        let config = config(changes);
        let tensors = tensors(&config, DType::F32);
        let (_directory, file) = File::of(&config, &tensors, GgmlDType::F32).write();
        assert_eq!(logits(&file), logits(write(&config, &tensors).path()), "{config}");
    }
}

#[test]
fn quantised_weights_are_those_that_candle_dequantises() {
    use GgmlDType::{BF16, F16, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    let config = config(json!({ "num_hidden_layers": 1 }));
    let tensors = tensors(&config, DType::F32);
    let exact = logits(write(&config, &tensors).path());
    for dtype in [F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4K, Q5K, Q6K] {
        let (_directory, file) = File::of(&config, &tensors, dtype).write();
        let dequantised = |tensor: &Tensor| quantised(tensor, dtype).dequantize(&Device::Cpu).unwrap();
        let dequantised = tensors.iter().map(|(name, tensor)| (name.clone(), dequantised(tensor))).collect();
        let got = logits(&file);
        assert_eq!(got, logits(write(&config, &dequantised).path()), "{dtype:?}");
        assert_ne!(got, exact, "{dtype:?}");
        assert_eq!(Llama::load(&file, Some(DType::BF16)).unwrap().dtype, DType::BF16);
    }
}

/// What the header says of rotations and windows, as `config.json` would.
#[test]
fn rotations_and_windows_are_those_of_the_header() {
    let yarn = json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0,
        "beta_slow": 2.0, "attention_factor": 0.5 * (1.0 + 0.1 * 4f64.ln())
    });
    let f32 = Value::F32;
    for (fields, changes) in [
        (
            vec![("rope.scale_linear", f32(4.0))],
            json!({ "rope_scaling": { "type": "linear", "factor": 4.0 } }),
        ),
        (
            vec![("rope.scaling.factor", f32(2.0)), ("rope.scaling.type", Value::String("linear".into()))],
            json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } }),
        ),
        (
            vec![("rope.scaling.factor", f32(2.0)), ("rope.scaling.type", Value::String("none".into()))],
            json!({}),
        ),
        (
            vec![
                ("rope.scaling.factor", f32(4.0)),
                ("rope.scaling.type", Value::String("yarn".into())),
                ("rope.scaling.original_context_length", Value::U32(64)),
                ("rope.scaling.yarn_beta_fast", f32(16.0)),
                ("rope.scaling.yarn_beta_slow", f32(2.0)),
                ("rope.scaling.attn_factor", f32(0.5)),
            ],
            json!({ "rope_scaling": yarn }),
        ),
        (vec![("attention.key_length", Value::U32(64))], json!({})),
        (
            vec![("attention.sliding_window", Value::U32(50))],
            json!({ "model_type": "mistral", "sliding_window": 50 }),
        ),
    ] {
        let plain = config(json!({ "num_hidden_layers": 1 }));
        let tensors = tensors(&plain, DType::F32);
        let mut file = File::of(&plain, &tensors, GgmlDType::F32);
        for (name, value) in fields {
            file.set(&format!("llama.{name}"), value);
        }
        let (_directory, path) = file.write();
        let directory = write(&merged(&plain, changes.clone()), &tensors);
        let [gguf, json] = [&path, directory.path()].map(|path| Llama::load(path, None).unwrap().config);
        assert_eq!((gguf.rope, gguf.windowed), (json.rope, json.windowed), "{changes}");
    }
}

/// Llama 3's scaling is a tensor of divisors.
#[test]
fn llama_3_rotations_are_divided_by_a_tensor() {
    let plain = config(json!({ "num_hidden_layers": 1 }));
    let tensors = tensors(&plain, DType::F32);
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64
    });
    let directory = write(&merged(&plain, json!({ "rope_scaling": scaling })), &tensors);
    let rope = |path: &Path| Llama::load(path, None).unwrap().config.rope;
    let mut file = File::of(&plain, &tensors, GgmlDType::F32);
    let (_unscaled, path) = file.write();
    let (fast, slow) = (rope(&path).frequencies(64), rope(directory.path()).frequencies(64));
    let divisors: Vec<f32> = fast.iter().zip(&slow).map(|(fast, slow)| (fast / slow) as f32).collect();
    assert!(divisors.iter().any(|&divisor| divisor > 7.9));
    file.tensors.insert("rope_freqs.weight".into(), Tensor::new(divisors, &Device::Cpu).unwrap());
    let (_scaled, path) = file.write();
    for (got, expected) in logits(&path).iter().flatten().zip(logits(directory.path()).iter().flatten()) {
        assert!((got - expected).abs() < 1e-4, "{got} is not {expected}");
    }
}

fn read_tokenizer(file: &File) -> Tokenizer {
    let (_directory, path) = file.write();
    Checkpoint::open(&path).unwrap().tokenizer().unwrap().unwrap()
}

fn plain() -> File {
    let config = config(json!({ "num_hidden_layers": 1 }));
    File::of(&config, &tensors(&config, DType::F32), GgmlDType::F32)
}

#[test]
fn the_tokenizer_is_that_of_the_metadata() {
    let directory = Directory::new();
    std::fs::write(directory.path().join("tokenizer.json"), byte_level().to_string()).unwrap();
    let expected = Tokenizer::read(directory.path()).unwrap();
    let mut file = plain();
    let tokenizer = read_tokenizer(&file);
    for text in ["hello there", "two\nlines\t", "  Ünï ©ödé 語 🦀", "", "<s>a</s>he"] {
        let context = tokenizer.context(text).unwrap();
        assert_eq!(context, expected.context(text).unwrap());
        assert_eq!(tokenizer.text(&context, true).unwrap(), expected.text(&context, true).unwrap());
    }
    assert_eq!(tokenizer.context("he").unwrap(), [BOS, HE]);
    file.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    assert_eq!(read_tokenizer(&file).context("he").unwrap(), [HE]);
    file.without("tokenizer.ggml.add_bos_token");
    assert_eq!(read_tokenizer(&file).context("he").unwrap(), [HE]);
    let (_directory, path) = file.write();
    assert_eq!(Checkpoint::open(&path).unwrap().eos_ids().unwrap(), [EOS]);
    file.set("tokenizer.ggml.eot_token_id", Value::I32(7));
    let (_directory, path) = file.write();
    assert_eq!(Checkpoint::open(&path).unwrap().eos_ids().unwrap(), [EOS, 7]);
    // Ids need no tokenizer.
    file.without("tokenizer.ggml.tokens");
    let (_directory, path) = file.write();
    assert!(Checkpoint::open(&path).unwrap().tokenizer().unwrap().is_none());
}

/// Each cuts numbers in its own way, and what is cut is never merged.
#[test]
fn a_text_is_cut_as_the_pre_tokenizer_says() {
    let mut file = plain();
    file.without("tokenizer.ggml.add_bos_token");
    // Tokens in the place of control characters that no text here has.
    let Some(Value::Array(tokens)) = file.metadata.get_mut("tokenizer.ggml.tokens") else { panic!() };
    let space = symbol(b' ');
    for (id, token) in ["12", "123", "1234", &format!("{space}1")].into_iter().enumerate() {
        tokens[id] = Value::String(token.into());
    }
    let merges = ["1 2", "12 3", "123 4", &format!("{space} 1")].map(|pair| Value::String(pair.into()));
    file.set("tokenizer.ggml.merges", Value::Array(merges.into()));
    let digits = [49, 50, 51, 52, 53];
    for (pre, expected) in [
        ("gpt-2", vec![2, 53]),
        ("smollm", digits.to_vec()),
        ("llama-bpe", vec![1, 52, 53]),
        ("qwen2", digits.to_vec()),
    ] {
        file.set("tokenizer.ggml.pre", Value::String(pre.into()));
        file.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
        let tokenizer = read_tokenizer(&file);
        assert_eq!(tokenizer.query("12345").unwrap(), expected, "{pre}");
        assert_eq!(tokenizer.query(" 1").unwrap().len(), if pre == "gpt-2" { 1 } else { 2 }, "{pre}");
        // Qwen2 composes characters, others leave them in two.
        let composed = tokenizer.query("e\u{301}").unwrap() == tokenizer.query("é").unwrap();
        assert_eq!(composed, pre == "qwen2", "{pre}");
    }
    // Llama 3 begins a text where the file does not tell.
    file.set("tokenizer.ggml.pre", Value::String("llama-bpe".into())).without("tokenizer.ggml.add_bos_token");
    assert_eq!(read_tokenizer(&file).context("a").unwrap(), [BOS, 97]);
}

/// The error of a file, which names what is wrong in one line.
fn refused(bytes: &[u8], named: &str) {
    let (_directory, path) = written(bytes);
    let load = || {
        let checkpoint = Checkpoint::open(&path)?;
        checkpoint.tokenizer()?;
        checkpoint.eos_ids()?;
        Llama::of(&checkpoint, None)
    };
    let error = load().err().unwrap_or_else(|| panic!("expected an error that names {named:?}")).to_string();
    assert!(error.contains(named) && error.contains("model.gguf"), "{named:?} is not in {error:?}");
    assert!(!error.contains('\n'), "{error:?}");
}

#[test]
fn bad_metadata_is_refused() {
    let text = |text: &str| Value::String(text.into());
    for (name, value) in [
        ("general.architecture", text("mamba")),
        ("general.architecture", Value::U32(1)),
        ("general.alignment", Value::U32(0)),
        ("split.count", Value::U16(3)),
        ("llama.expert_count", Value::U32(8)),
        ("llama.block_count", Value::U32(0)),
        ("llama.block_count", text("two")),
        ("llama.attention.head_count", Value::I32(-4)),
        ("llama.attention.value_length", Value::U32(32)),
        ("llama.rope.dimension_count", Value::U32(32)),
        ("llama.rope.freq_base", text("fast")),
        ("llama.feed_forward_length", Value::Array(vec![Value::U32(256)])),
        ("llama.vocab_size", Value::U32(7)),
        ("tokenizer.ggml.model", text("llama")),
        ("tokenizer.ggml.pre", text("tekken")),
        ("tokenizer.ggml.tokens", Value::Array(vec![text("a"), text("b")])),
        ("tokenizer.ggml.tokens", Value::Array(vec![text("a"); 259])),
        ("tokenizer.ggml.tokens", Value::Array(vec![Value::U32(3)])),
        ("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1)])),
        ("tokenizer.ggml.merges", text("a b")),
        ("tokenizer.ggml.bos_token_id", Value::U32(259)),
        ("tokenizer.ggml.eos_token_id", Value::U32(259)),
        ("tokenizer.ggml.add_bos_token", Value::U32(1)),
    ] {
        println!("{name} {value:?}");
        let expected =
            if name == "llama.block_count" && value.to_u32().is_ok() { "num_hidden_layers" } else { name };
        refused(&plain().set(name, value).bytes(), expected);
    }
    for name in [
        "general.architecture",
        "llama.block_count",
        "llama.embedding_length",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.bos_token_id",
        "token_embd.weight",
        "output_norm.weight",
    ] {
        let named = if name == "output_norm.weight" { "model.norm.weight" } else { name };
        refused(&plain().without(name).bytes(), named);
    }
    // A merge of tokens that there are not.
    refused(&plain().set("tokenizer.ggml.merges", Value::Array(vec![text("q qq")])).bytes(), "qq");
    for scaling in ["longrope", "yarn"] {
        let mut file = plain();
        file.set("llama.rope.scaling.factor", Value::F32(4.0));
        file.set("llama.rope.scaling.type", text(scaling));
        let named = if scaling == "yarn" {
            file.set("llama.rope.scaling.yarn_log_multiplier", Value::F32(0.1));
            "yarn_log_multiplier"
        } else {
            "llama.rope.scaling.type"
        };
        refused(&file.bytes(), named);
    }
}

#[test]
fn truncated_files_are_refused() {
    let file = plain();
    let bytes = file.bytes();
    for len in [0, 3, 8, 24, 100, 2000, bytes.len() / 2, bytes.len() - 64] {
        refused(&bytes[..len], "");
    }
    refused(b"GGUF\x09\0\0\0", "version");
    refused(&[0xff; 4096], "magic");
}

/// Sizes of a header that lies are neither allocated nor computed with.
#[test]
fn sizes_that_overflow_are_refused() {
    let bytes = plain().bytes();
    let number = |at: usize, number: u64| {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        bytes
    };
    // Behind magic and version: the counts of tensors and of metadata.
    for count in [1 << 20, 1 << 29, u64::MAX] {
        refused(&number(8, count), "");
        refused(&number(16, count), "");
    }
    let name = b"blk.0.attn_output.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len();
    // Behind the name: the count of extents, two extents, the type, and the offset.
    for (at, size, named) in [
        (at + 4, u64::MAX, "blk.0.attn_output.weight: expected a shape"),
        (at + 4, 1 << 40, "blk.0.attn_output.weight"),
        (at + 4, 0, "blk.0.attn_output.weight: expected a shape"),
        (at + 4, 255, "self_attn.o_proj.weight"),
        (at + 24, u64::MAX, "blk.0.attn_output.weight"),
    ] {
        refused(&number(at, size), named);
    }
    let mut foreign = bytes.clone();
    foreign[at + 20..at + 24].copy_from_slice(&77u32.to_le_bytes());
    refused(&foreign, "77");
    // The length of the first key.
    for len in [1 << 20, u64::MAX] {
        refused(&number(24, len), "");
    }
    // The length of the vocabulary, behind its name, its type and its elements' type.
    let name = b"tokenizer.ggml.tokens";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len();
    for len in [1 << 28, u64::MAX] {
        refused(&number(at + 8, len), "");
    }
}

/// llama.cpp keeps other orders of rows than transformers: without undoing it nothing fits.
#[test]
fn rows_that_heads_do_not_divide_are_refused() {
    let mut file = plain();
    let odd = Tensor::zeros((255, 256), DType::F32, &Device::Cpu).unwrap();
    file.tensors.insert("blk.0.attn_q.weight".into(), odd);
    refused(&file.bytes(), "blk.0.attn_q.weight");
}
