//! The examples' model: star attention through the crate against Star Attention to the letter, on
//! the same weights; its loader, its tokenizer, and its haystacks.
#![cfg(feature = "candle")]

mod byte_level;
mod checkpoint;
mod gguf_file;
mod literal;

#[path = "../../examples/star_attention/chat.rs"]
mod chat;
#[allow(dead_code)]
#[path = "../../examples/star_attention/haystack.rs"]
mod haystack;
#[path = "../../examples/llama/mod.rs"]
mod llama;

mod anchors;
mod configs;
mod families;
mod gguf;
mod haystacks;
mod loading;
mod tokens;

use candle_core::DType;
use checkpoint::{config, config_with, tensors, write};
use indicatif::ProgressBar;
use literal::Literal;
use llama::error::{Error, Result};
use llama::fields::read_json;
use llama::model::Llama;
use llama::run::{Answer, Job, Mode, Scheme, run};
use serde_json::json;
use star_attention::comm::AnchorKv;
use star_attention::{GeneratedKv, StarLayout};
use std::path::Path;

/// Token ids without a pattern, the same for the same seed.
fn ids(count: usize, vocab: u32, seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) % u64::from(vocab)) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// The answers of one mode, with all logits.
fn answers(
    model: &Llama,
    mode: Mode,
    context: &[u32],
    queries: &[Vec<u32>],
    generate: usize,
) -> Result<Vec<Answer>> {
    let job = Job { context, queries, generate, stop: &[], all_logits: true };
    Ok(run(model, None, mode, &job, &ProgressBar::hidden())?.answers)
}

/// Each row of the logits against the literal implementation's, run on the query and the answer's
/// tokens.
fn assert_logits(answer: &Answer, query: &[u32], tolerance: f64, literal: impl Fn(&[u32]) -> Vec<Vec<f64>>) {
    let inputs = [query, &answer.tokens].concat();
    let logits = answer.logits.as_ref().unwrap().to_vec2::<f32>().unwrap();
    let expected = literal(&inputs);
    assert_eq!(logits.len(), expected.len());
    for (row, (got, expected)) in logits.iter().zip(&expected).enumerate() {
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(expected) {
            let difference = (f64::from(*got) - expected).abs();
            assert!(difference <= tolerance, "row {row}: {got} is not {expected}");
        }
    }
    // Each token generated is the most likely one after the row before it.
    for (index, &token) in answer.tokens.iter().enumerate() {
        let row = &logits[query.len() + index - 1];
        assert!(
            row.iter().all(|&logit| logit <= row[token as usize]),
            "token {index} is not the most likely"
        );
    }
}

#[test]
fn star_equals_the_literal_per_block_encoding() {
    let config = config();
    let tensors = tensors(&config, DType::F32);
    let directory = write(&config, &tensors);
    let model = Llama::load(directory.path(), None).unwrap();
    let literal = Literal::new(&config, &tensors);
    let queries = [ids(1, 50, 1), ids(2, 50, 2), ids(7, 50, 3)];
    // Context, block and anchor: even, uneven tails, short anchors, none, one block, a block of one
    // token, no context.
    for (context_len, block_len, anchor_len) in [
        (64, 16, 16),
        (61, 16, 16),
        (61, 16, 5),
        (50, 7, 3),
        (33, 8, 1),
        (40, 8, 0),
        (20, 20, 20),
        (20, 64, 8),
        (5, 1, 1),
        (0, 4, 2),
    ] {
        let context = ids(context_len, 50, context_len as u64);
        for ranks in [1, 2, 3, 4, 9] {
            let layout = StarLayout::builder(context_len)
                .block_len(block_len)
                .anchor_len(anchor_len)
                .ranks(ranks)
                .build()
                .unwrap();
            let answers = answers(&model, Mode::Star(layout.into()), &context, &queries, 3).unwrap();
            for (answer, query) in answers.iter().zip(&queries) {
                assert_eq!(answer.tokens.len(), 3);
                assert_logits(answer, query, 1e-4, |inputs| {
                    literal.star(&context, block_len, anchor_len, inputs)
                });
            }
        }
    }
}

/// The anchor encoded or received, and new keys on one rank or dealt: with fewer blocks than ranks,
/// without an anchor, without a context.
#[test]
fn every_scheme_equals_the_literal_per_block_encoding() {
    let config = config();
    let tensors = tensors(&config, DType::F32);
    let directory = write(&config, &tensors);
    let model = Llama::load(directory.path(), None).unwrap();
    let literal = Literal::new(&config, &tensors);
    let queries = [ids(1, 50, 1), ids(7, 50, 3)];
    for (context_len, block_len, anchor_len, ranks) in
        [(61, 16, 16, 3), (61, 16, 5, 4), (40, 8, 0, 2), (20, 64, 8, 3), (5, 1, 1, 9), (0, 4, 2, 2)]
    {
        let context = ids(context_len, 50, context_len as u64);
        let layout =
            StarLayout::builder(context_len).block_len(block_len).anchor_len(anchor_len).ranks(ranks);
        for anchor in [AnchorKv::Encoded, AnchorKv::Received] {
            for (query_rank, generated) in [
                (ranks - 1, GeneratedKv::QueryRank),
                (0, GeneratedKv::QueryRank),
                (1, GeneratedKv::RoundRobin),
            ] {
                let layout = layout.query_rank(query_rank).generated(generated).build().unwrap();
                let scheme = Scheme { anchor, ..layout.into() };
                let answers = answers(&model, Mode::Star(scheme), &context, &queries, 5).unwrap();
                for (answer, query) in answers.iter().zip(&queries) {
                    assert_logits(answer, query, 1e-4, |inputs| {
                        literal.star(&context, block_len, anchor_len, inputs)
                    });
                }
            }
        }
    }
}

#[test]
fn dense_equals_the_literal_causal_model() {
    let config = config();
    let tensors = tensors(&config, DType::F32);
    let directory = write(&config, &tensors);
    let model = Llama::load(directory.path(), None).unwrap();
    let literal = Literal::new(&config, &tensors);
    let queries = [ids(1, 50, 1), ids(5, 50, 2)];
    for context_len in [0, 1, 37, 64] {
        let context = ids(context_len, 50, 9);
        let answers = answers(&model, Mode::Dense, &context, &queries, 3).unwrap();
        for (answer, query) in answers.iter().zip(&queries) {
            assert_logits(answer, query, 1e-4, |inputs| literal.dense(&context, inputs));
        }
    }
}

#[test]
fn the_retrieval_llama_equals_the_literal_one() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/retrieval-llama");
    let config = read_json(&directory.join("config.json")).unwrap();
    let tensors =
        candle_core::safetensors::load(directory.join("model.safetensors"), &candle_core::Device::Cpu)
            .unwrap();
    let model = Llama::load(&directory, None).unwrap();
    let literal = Literal::new(&config, &tensors);
    let haystack = haystack::Haystack::new(300, 3, 5).unwrap();
    let queries: Vec<Vec<u32>> = haystack.needles.iter().map(|needle| needle.query()).collect();
    for (block_len, anchor_len, ranks) in [(75, 75, 4), (64, 20, 3)] {
        let layout = StarLayout::builder(300)
            .block_len(block_len)
            .anchor_len(anchor_len)
            .ranks(ranks)
            .build()
            .unwrap();
        let star = answers(&model, Mode::Star(layout.into()), &haystack.context, &queries, 2).unwrap();
        for (answer, query) in star.iter().zip(&queries) {
            assert_logits(answer, query, 1e-4, |inputs| {
                literal.star(&haystack.context, block_len, anchor_len, inputs)
            });
        }
    }
    let dense = answers(&model, Mode::Dense, &haystack.context, &queries, 2).unwrap();
    for ((answer, query), needle) in dense.iter().zip(&queries).zip(&haystack.needles) {
        assert_logits(answer, query, 1e-4, |inputs| literal.dense(&haystack.context, inputs));
        assert_eq!(answer.tokens, needle.values);
    }
}

/// More rows than go through the linear layers at a time.
#[test]
fn long_sequences_equal_the_literal_model() {
    let config = config_with(json!({ "num_hidden_layers": 1 }));
    let tensors = tensors(&config, DType::F32);
    let directory = write(&config, &tensors);
    let model = Llama::load(directory.path(), None).unwrap();
    let literal = Literal::new(&config, &tensors);
    let (context, query) = (ids(1300, 50, 4), ids(600, 50, 5));
    let layout = StarLayout::builder(1300).block_len(700).anchor_len(600).ranks(2).build().unwrap();
    let star = answers(&model, Mode::Star(layout.into()), &context, std::slice::from_ref(&query), 1).unwrap();
    assert_logits(&star[0], &query, 1e-4, |inputs| literal.star(&context, 700, 600, inputs));
}

#[test]
fn every_run_gives_the_same_bits() {
    let config = config();
    let directory = write(&config, &tensors(&config, DType::F32));
    let model = Llama::load(directory.path(), None).unwrap();
    let (context, queries) = (ids(90, 50, 3), [ids(4, 50, 1)]);
    let layout = StarLayout::builder(90).block_len(16).anchor_len(8).ranks(4).build().unwrap();
    let run = || {
        let answers = answers(&model, Mode::Star(layout.into()), &context, &queries, 4).unwrap();
        (answers[0].tokens.clone(), answers[0].logits.as_ref().unwrap().to_vec2::<f32>().unwrap())
    };
    let first = run();
    for _ in 0..3 {
        assert_eq!(run(), first);
    }
}

#[test]
fn a_shard_holds_the_host_s_own_tokens_only() {
    let config = config();
    let directory = write(&config, &tensors(&config, DType::F32));
    let model = Llama::load(directory.path(), None).unwrap();
    let context = ids(61, 50, 3);
    let job = Job { context: &context, queries: &[ids(2, 50, 1)], generate: 2, stop: &[], all_logits: false };
    let layout = StarLayout::builder(61).block_len(16).anchor_len(16).ranks(3).build().unwrap();
    let run = run(&model, None, Mode::Star(layout.into()), &job, &ProgressBar::hidden()).unwrap();
    // Keys and values of 2 layers, 2 heads of 8 elements, 4 bytes each.
    let token = 2 * 2 * 2 * 8 * 4;
    assert_eq!(run.kv_bytes, [32 * token, 16 * token, 13 * token]);
    assert!(run.answers[0].logits.is_none());
}

#[test]
fn bad_jobs_are_refused() {
    let config = config();
    let directory = write(&config, &tensors(&config, DType::F32));
    let model = Llama::load(directory.path(), None).unwrap();
    let layout = StarLayout::builder(8).block_len(4).anchor_len(4).ranks(2).build().unwrap();
    let good = ids(8, 50, 1);
    for (context, query, named) in [
        (vec![1, 2, 3, 4, 5, 6, 7, 50], vec![1], "context"),
        (good.clone(), vec![1, 50], "query"),
        (good.clone(), vec![], "query"),
        (good[1..].to_vec(), vec![1], "context"),
    ] {
        let error =
            answers(&model, Mode::Star(layout.into()), &context, &[query], 1).err().expect("an error");
        assert!(matches!(&error, Error::Input { argument, .. } if argument == named), "{error}");
    }
}
