//! Text to ids and back, and where generation ends.

use super::byte_level::{BOS, EOS, HE, tokenizer};
use super::chat::Chat;
use super::checkpoint::{Directory, config, tensors, write};
use super::ids;
use super::llama::config::eos_ids;
use super::llama::error::{Error, Result};
use super::llama::model::Llama;
use super::llama::run::{Job, Mode, run};
use super::llama::tokenizer::Tokenizer;
use candle_core::DType;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use star_attention::StarLayout;
use std::path::Path;

/// A model's template is known by the tokens that it is written in.
#[test]
fn chat_templates_are_known_by_their_tokens() {
    let with = |tokens: &[&str]| {
        let mut json = tokenizer();
        let added = json["added_tokens"].as_array_mut().unwrap();
        for (id, &token) in (EOS + 1..).zip(tokens) {
            let mut entry = added[0].clone();
            entry["id"] = id.into();
            entry["content"] = token.into();
            added.push(entry);
        }
        Chat::of(&read(&json).unwrap())
    };
    for (tokens, user, assistant) in [
        (["<|im_start|>", "<|im_end|>"], "<|im_start|>user\n", "\n<|im_start|>assistant\n"),
        (
            ["<|start_header_id|>", "<|eot_id|>"],
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (["<start_of_turn>", "<end_of_turn>"], "<start_of_turn>user\n", "\n<start_of_turn>model\n"),
        (["<|assistant|>", "<|end|>"], "<|user|>\n", "\n<|assistant|>\n"),
    ] {
        assert_eq!(with(&tokens).unwrap(), Chat { user, end: tokens[1], assistant });
        // One of the two is not enough.
        for token in tokens {
            let error = with(&[token]).unwrap_err().to_string();
            assert!(error.contains("--chat") && error.contains("<|im_start|>"), "{error}");
        }
    }
}

/// A directory with one JSON file.
fn directory(name: &str, content: &Value) -> Directory {
    let directory = Directory::new();
    std::fs::write(directory.path().join(name), content.to_string()).unwrap();
    directory
}

fn read(content: &Value) -> Result<Tokenizer> {
    Tokenizer::read(directory("tokenizer.json", content).path())
}

#[test]
fn a_context_begins_a_sequence_and_a_query_goes_on() {
    let tokenizer = read(&tokenizer()).unwrap();
    let hello = [HE, 108, 108, 111];
    assert_eq!(tokenizer.query("hello").unwrap(), hello);
    assert_eq!(tokenizer.context("hello").unwrap(), [&[BOS][..], &hello].concat());
    assert!(tokenizer.query("").unwrap().is_empty());
    assert_eq!(tokenizer.context("").unwrap(), [BOS]);
    // A special token of the text itself stays.
    assert_eq!(tokenizer.context("a</s>").unwrap(), [BOS, 97, EOS]);
}

#[test]
fn a_tokenizer_that_puts_nothing_before_a_text_is_left_alone() {
    let mut json = tokenizer();
    json["post_processor"]["single"] = json!([
        { "Sequence": { "id": "A", "type_id": 0 } }, { "SpecialToken": { "id": "</s>", "type_id": 0 } }
    ]);
    assert_eq!(read(&json).unwrap().context("a").unwrap(), [97]);
    json["post_processor"] = Value::Null;
    assert_eq!(read(&json).unwrap().context("a").unwrap(), [97]);
}

/// A tokenizer that puts nothing before a text may be told to by `tokenizer_config.json`.
#[test]
fn a_sequence_begins_once_with_its_token() {
    let plain = || {
        let mut json = tokenizer();
        json["post_processor"] = Value::Null;
        directory("tokenizer.json", &json)
    };
    let context = |told: &Value, text: &str| {
        let directory = plain();
        std::fs::write(directory.path().join("tokenizer_config.json"), told.to_string()).unwrap();
        Tokenizer::read(directory.path()).and_then(|tokenizer| tokenizer.context(text))
    };
    for token in [json!("<s>"), json!({ "content": "<s>", "lstrip": false })] {
        let told = json!({ "add_bos_token": true, "bos_token": token });
        assert_eq!(context(&told, "a").unwrap(), [BOS, 97]);
        assert_eq!(context(&told, "<s>a").unwrap(), [BOS, 97]);
        assert_eq!(context(&json!({ "add_bos_token": false, "bos_token": token }), "a").unwrap(), [97]);
    }
    for token in [json!("<none>"), Value::Null, json!({})] {
        let error = context(&json!({ "add_bos_token": true, "bos_token": token }), "a").unwrap_err();
        assert!(error.to_string().contains("bos_token"), "{error}");
    }
    // The post-processor's token too comes once.
    assert_eq!(read(&tokenizer()).unwrap().context("<s>a").unwrap(), [BOS, 97]);
}

#[test]
fn ids_become_the_text_that_they_came_from() {
    let tokenizer = read(&tokenizer()).unwrap();
    for text in ["hello there", "two\nlines\t", "  Ünï ©ödé 語 🦀", ""] {
        let context = tokenizer.context(text).unwrap();
        assert_eq!(tokenizer.text(&context, true).unwrap(), text);
        assert_eq!(tokenizer.text(&context, false).unwrap(), format!("<s>{text}"));
    }
    assert_eq!(tokenizer.word(HE).as_deref(), Some("he"));
    assert_eq!(tokenizer.word(EOS).as_deref(), Some("</s>"));
    assert_eq!(tokenizer.word(EOS + 1), None);
}

#[test]
fn no_text_is_cut_or_padded() {
    let mut json = tokenizer();
    json["truncation"] =
        json!({ "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0 });
    json["padding"] = json!({
        "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null, "pad_id": EOS,
        "pad_type_id": 0, "pad_token": "</s>"
    });
    assert_eq!(read(&json).unwrap().context(&"a".repeat(20)).unwrap().len(), 21);
}

#[test]
fn the_retrieval_llama_has_words() {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/retrieval-llama");
    let tokenizer = Tokenizer::read(&assets).unwrap();
    assert_eq!(tokenizer.context("<bos> grass sky").unwrap(), [0, 16, 17]);
    assert_eq!(tokenizer.text(&[0, 16, 17], false).unwrap(), "<bos> grass sky");
    assert_eq!(tokenizer.word(2).as_deref(), Some("<query>"));
    assert_eq!(eos_ids(&assets).unwrap(), [3]);
}

#[test]
fn bad_tokenizers_are_refused() {
    let refused = |directory: &Directory| {
        let error = Tokenizer::read(directory.path()).err().expect("an error");
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    };
    refused(&Directory::new());
    for content in [json!({}), json!([1]), json!({ "model": { "type": "Nothing" } })] {
        refused(&directory("tokenizer.json", &content));
    }
}

#[test]
fn ends_of_answers_are_read_from_the_checkpoint() {
    for (value, expected) in [(json!(7), vec![7]), (json!([7, 9]), vec![7, 9]), (json!(null), vec![])] {
        let files = directory("config.json", &json!({ "eos_token_id": value }));
        assert_eq!(eos_ids(files.path()).unwrap(), expected);
        // Those of generation come first, if there are any.
        let generation = files.path().join("generation_config.json");
        std::fs::write(&generation, "{}").unwrap();
        assert_eq!(eos_ids(files.path()).unwrap(), expected);
        std::fs::write(&generation, r#"{ "eos_token_id": [1, 2] }"#).unwrap();
        assert_eq!(eos_ids(files.path()).unwrap(), [1, 2]);
    }
    for value in [json!("</s>"), json!(-1), json!([1, 0.5])] {
        let error = eos_ids(directory("config.json", &json!({ "eos_token_id": value })).path()).unwrap_err();
        assert!(matches!(&error, Error::Input { reason, .. } if reason.contains("eos_token_id")), "{error}");
    }
    assert!(eos_ids(directory("config.json", &json!([])).path()).unwrap().is_empty());
}

#[test]
fn an_answer_ends_with_the_first_token_that_stops_it() {
    let config = config();
    let directory = write(&config, &tensors(&config, DType::F32));
    let model = Llama::load(directory.path(), None).unwrap();
    let (context, queries) = (ids(40, 50, 1), [ids(3, 50, 2), ids(2, 50, 3)]);
    let mode =
        Mode::Star(StarLayout::builder(40).block_len(16).anchor_len(8).ranks(3).build().unwrap().into());
    let answers = |stop: &[u32], all_logits| {
        let job = Job { context: &context, queries: &queries, generate: 12, stop, all_logits };
        run(&model, None, mode, &job, &ProgressBar::hidden()).unwrap().answers
    };
    let whole = answers(&[], false);
    assert!(whole.iter().all(|answer| answer.tokens.len() == 12));
    let stop = whole[0].tokens[4];
    for all_logits in [false, true] {
        for ((answer, whole), query) in answers(&[49, stop], all_logits).iter().zip(&whole).zip(&queries) {
            let end = whole.tokens.iter().position(|token| [49, stop].contains(token));
            let expected = &whole.tokens[..end.map_or(12, |end| end + 1)];
            assert_eq!(answer.tokens, expected);
            if all_logits {
                let rows = answer.logits.as_ref().unwrap().dim(0).unwrap();
                assert_eq!(rows, query.len() + expected.len());
            }
        }
    }
}
