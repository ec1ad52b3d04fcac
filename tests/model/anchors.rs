//! Anchor blocks of any content and positions, each against the literal model.

use super::checkpoint::{config, tensors, write};
use super::literal::{Anchor, Literal};
use super::llama::anchor::AnchorBlock;
use super::llama::error::Error;
use super::llama::model::Llama;
use super::llama::run::{Mode, Scheme};
use super::{answers, assert_logits, ids};
use candle_core::DType;
use star_attention::StarLayout;
use star_attention::comm::AnchorKv;

const VOCAB: u32 = 50;

/// The anchor of every block after the first, as the crate's example makes it.
fn rows(anchor_block: AnchorBlock, context: &[u32], block_len: usize, anchor_len: usize) -> Vec<Anchor> {
    let blocks = context.len().div_ceil(block_len);
    let layout = StarLayout::builder(context.len())
        .block_len(block_len)
        .anchor_len(anchor_len)
        .ranks(blocks)
        .build()
        .unwrap();
    let of = |rank| anchor_block.rows(&layout, &layout.rank(rank).unwrap(), context, VOCAB as usize);
    assert_eq!(of(0), Anchor::default());
    (1..blocks).map(of).collect()
}

/// The same for what needs no random numbers, by the definition.
fn defined(
    context: &[u32],
    block_len: usize,
    anchor: impl Fn(usize) -> (Vec<u32>, std::ops::Range<usize>),
) -> Vec<Anchor> {
    let starts = (block_len..context.len()).step_by(block_len);
    starts.map(|start| (anchor(start).0, anchor(start).1.collect())).collect()
}

/// Every setting, with its anchors.
fn settings(context: &[u32], b: usize, a: usize) -> Vec<(AnchorBlock, Vec<Anchor>)> {
    let first = || context[..a].to_vec();
    let made = |anchor_block| (anchor_block, rows(anchor_block, context, b, a));
    vec![
        (AnchorBlock::First, defined(context, b, |_| (first(), 0..a))),
        (AnchorBlock::None, defined(context, b, |_| (vec![], 0..0))),
        (AnchorBlock::FirstAtPrevious, defined(context, b, |start| (first(), start - b..start - b + a))),
        (AnchorBlock::Constant(7), defined(context, b, |_| (vec![7; a], 0..a))),
        (
            AnchorBlock::Previous,
            defined(context, b, |start| {
                (context[start - b..start - b + a].to_vec(), start - b..start - b + a)
            }),
        ),
        made(AnchorBlock::FirstAtRandom { seed: 5 }),
        made(AnchorBlock::Random { seed: 5, from: 0 }),
        made(AnchorBlock::Shuffled { seed: 5 }),
    ]
}

#[test]
fn every_anchor_block_equals_the_literal_encoding() {
    let config = config();
    let tensors = tensors(&config, DType::F32);
    let directory = write(&config, &tensors);
    let model = Llama::load(directory.path(), None).unwrap();
    let literal = Literal::new(&config, &tensors);
    let queries = [ids(1, VOCAB, 1), ids(4, VOCAB, 3)];
    // A block for each rank, a rank without one, a short last block, a short anchor; several blocks
    // on a rank.
    for (context_len, block_len, anchor_len, ranks) in
        [(64, 16, 16, 4), (61, 16, 16, 6), (61, 16, 5, 4), (20, 20, 20, 1), (61, 16, 5, 2)]
    {
        let context = ids(context_len, VOCAB, 8);
        let layout = StarLayout::builder(context_len)
            .block_len(block_len)
            .anchor_len(anchor_len)
            .ranks(ranks)
            .build()
            .unwrap();
        for (anchor_block, anchors) in settings(&context, block_len, anchor_len) {
            let mode = Mode::Star(Scheme { anchor_block, ..layout.into() });
            let star = answers(&model, mode, &context, &queries, 2);
            let shared = matches!(anchor_block, AnchorBlock::First | AnchorBlock::None);
            if !shared && layout.blocks() > ranks {
                let error = star.err().expect("an error");
                assert!(matches!(&error, Error::Input { argument, .. } if argument == "anchor block"));
                continue;
            }
            for (answer, query) in star.unwrap().iter().zip(&queries) {
                assert_logits(answer, query, 1e-4, |inputs| {
                    literal.star_with(&context, block_len, &anchors, inputs)
                });
            }
        }
    }
}

#[test]
fn a_seed_gives_one_anchor() {
    let context = ids(61, VOCAB, 8);
    let with = |seed: u64| {
        let kinds = [
            AnchorBlock::FirstAtRandom { seed },
            AnchorBlock::Random { seed, from: 3 },
            AnchorBlock::Shuffled { seed },
        ];
        kinds.map(|kind| rows(kind, &context, 16, 9))
    };
    assert_eq!(with(3), with(3));
    for seed in 0..50 {
        let [random_positions, random_tokens, shuffled] = with(seed);
        for (one, other) in with(seed).iter().zip(with(seed + 1)) {
            assert_ne!(*one, other);
        }
        for (index, (tokens, positions)) in random_positions.iter().enumerate() {
            assert_eq!((tokens.as_slice(), positions.len()), (&context[..9], 9));
            assert!(positions.is_sorted_by(|a, b| a < b) && positions[8] < 16 * (index + 1), "{positions:?}");
        }
        for anchors in [&random_tokens, &shuffled] {
            assert!(anchors.iter().all(|anchor| *anchor == anchors[0]), "the same before every block");
            assert!(anchors[0].1.iter().copied().eq(0..9));
        }
        assert!(random_tokens[0].0.iter().all(|token| (3..VOCAB).contains(token)));
        let sorted = |tokens: &[u32]| {
            let mut tokens = tokens.to_vec();
            tokens.sort_unstable();
            tokens
        };
        assert_eq!(sorted(&shuffled[0].0), sorted(&context[..9]));
    }
}

#[test]
fn anchor_blocks_that_cannot_be_are_refused() {
    let config = config();
    let directory = write(&config, &tensors(&config, DType::F32));
    let model = Llama::load(directory.path(), None).unwrap();
    let star = |ranks, anchor, anchor_block| {
        let layout = StarLayout::builder(64).block_len(16).anchor_len(16).ranks(ranks).build().unwrap();
        Scheme { anchor, anchor_block, ..layout.into() }.checked(&model)
    };
    let (encoded, received) = (AnchorKv::Encoded, AnchorKv::Received);
    for (ranks, anchor, anchor_block) in [
        (4, received, AnchorBlock::None),
        (4, received, AnchorBlock::Previous),
        (4, encoded, AnchorBlock::Constant(VOCAB)),
        (3, encoded, AnchorBlock::Previous),
        (3, encoded, AnchorBlock::FirstAtPrevious),
        (1, encoded, AnchorBlock::FirstAtRandom { seed: 0 }),
        (3, encoded, AnchorBlock::Constant(7)),
        (4, encoded, AnchorBlock::Random { seed: 0, from: VOCAB }),
        (3, encoded, AnchorBlock::Random { seed: 0, from: 0 }),
        (3, encoded, AnchorBlock::Shuffled { seed: 0 }),
    ] {
        let error = star(ranks, anchor, anchor_block).unwrap_err();
        assert!(matches!(&error, Error::Input { argument, .. } if argument == "anchor block"), "{error}");
    }
    for (ranks, anchor, anchor_block) in [
        (3, received, AnchorBlock::First),
        (3, encoded, AnchorBlock::None),
        (4, encoded, AnchorBlock::Shuffled { seed: 0 }),
        (5, encoded, AnchorBlock::Previous),
    ] {
        star(ranks, anchor, anchor_block).unwrap();
    }
}
