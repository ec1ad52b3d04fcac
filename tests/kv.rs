//! Shards keep what was appended, and nothing else.

use proptest::prelude::*;
use star_attention::{Error, KvShard, StarLayout, TensorView, bf16};

const HEADS: usize = 2;
const DIM: usize = 3;

/// Rows that tell their batch, token and head; with gaps of NaN between them.
fn rows(batches: usize, tokens: std::ops::Range<usize>, sign: f32) -> Vec<f32> {
    let mut data = vec![];
    for batch in 0..batches {
        for token in tokens.clone() {
            for head in 0..HEADS {
                data.extend((0..DIM).map(|d| sign * (1000 * batch + 100 * token + 10 * head + d) as f32));
                data.push(f32::NAN);
            }
        }
    }
    data
}

fn view(data: &[f32], batches: usize, tokens: usize) -> TensorView<'_, f32> {
    let row = DIM + 1;
    let strides = [tokens * HEADS * row, HEADS * row, row, 1];
    TensorView::new("key", data, [batches, tokens, HEADS, DIM], strides).unwrap()
}

fn assert_holds(shard: &KvShard<f32>, batches: usize, tokens: &[usize]) {
    assert_eq!((shard.len(), shard.is_empty()), (tokens.len(), tokens.is_empty()));
    assert_eq!(shard.keys().shape(), [batches, tokens.len(), HEADS, DIM]);
    assert_eq!(shard.values().shape(), [batches, tokens.len(), HEADS, DIM]);
    assert_eq!(shard.bytes(), 2 * 4 * batches * tokens.len() * HEADS * DIM);
    for batch in 0..batches {
        for (i, token) in tokens.iter().enumerate() {
            for head in 0..HEADS {
                for d in 0..DIM {
                    let expected = (1000 * batch + 100 * token + 10 * head + d) as f32;
                    assert_eq!(shard.keys().at([batch, i, head, d]), expected);
                    assert_eq!(shard.values().at([batch, i, head, d]), -expected);
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn appends_add_up_until_the_capacity(
        batches in 1..3usize, capacity in 0..12usize, appends in prop::collection::vec(0..5usize, 0..6),
    ) {
        let mut shard = KvShard::<f32>::new(batches, HEADS, DIM, capacity).unwrap();
        prop_assert_eq!(shard.capacity(), capacity);
        let mut held = 0;
        for tokens in appends {
            let (key, value) = (rows(batches, held..held + tokens, 1.0), rows(batches, held..held + tokens, -1.0));
            let result = shard.append(view(&key, batches, tokens), view(&value, batches, tokens));
            if held + tokens <= capacity {
                result.unwrap();
                held += tokens;
            } else {
                let full = matches!(result, Err(Error::Capacity { capacity: c, len, requested })
                    if (c, len, requested) == (capacity, held, tokens));
                prop_assert!(full);
            }
            assert_holds(&shard, batches, &(0..held).collect::<Vec<_>>());
        }
    }
}

#[test]
fn the_anchor_is_dropped_by_never_appending_it() {
    let layout = StarLayout::builder(20).block_len(5).anchor_len(3).ranks(2).build().unwrap();
    for rank in 0..2 {
        let local = layout.rank(rank).unwrap();
        let tokens: Vec<usize> = local.tokens().collect();
        let gather = |sign| tokens.iter().flat_map(|&t| rows(1, t..t + 1, sign)).collect::<Vec<_>>();
        let (key, value) = (gather(1.0), gather(-1.0));
        let kept = local.kept();
        let mut shard = KvShard::new(1, HEADS, DIM, kept.len()).unwrap();
        let narrow = |data| view(data, 1, tokens.len()).narrow(1, kept.start, kept.len()).unwrap();
        shard.append(narrow(&key), narrow(&value)).unwrap();
        assert_holds(&shard, 1, &local.own_tokens().collect::<Vec<_>>());
    }
}

#[test]
fn truncating_makes_room_again() {
    let mut shard = KvShard::<f32>::new(1, HEADS, DIM, 4).unwrap();
    let append = |shard: &mut KvShard<f32>, tokens: std::ops::Range<usize>| {
        let (key, value) = (rows(1, tokens.clone(), 1.0), rows(1, tokens.clone(), -1.0));
        shard.append(view(&key, 1, tokens.len()), view(&value, 1, tokens.len())).unwrap();
    };
    append(&mut shard, 0..4);
    shard.truncate(9);
    assert_eq!(shard.len(), 4);
    shard.truncate(1);
    append(&mut shard, 7..10);
    assert_holds(&shard, 1, &[0, 7, 8, 9]);
    shard.truncate(0);
    assert_holds(&shard, 1, &[]);
}

#[test]
fn what_does_not_fit_is_named_and_the_shard_is_as_it_was() {
    let mut shard = KvShard::<f32>::new(1, HEADS, DIM, 4).unwrap();
    let data = vec![0.5; 64];
    let contiguous = |tokens, heads, dim| {
        TensorView::contiguous("key", &data[..tokens * heads * dim], [1, tokens, heads, dim]).unwrap()
    };
    let good = contiguous(2, HEADS, DIM);
    shard.append(good, good).unwrap();
    for (key, value, name) in [
        (contiguous(2, 1, DIM), good, "key"),
        (contiguous(2, HEADS, 4), good, "key"),
        (good, contiguous(1, HEADS, DIM), "value"),
    ] {
        assert!(matches!(shard.append(key, value), Err(Error::Shape { argument, .. }) if argument == name));
    }
    let scattered = TensorView::new("key", &data, [1, 2, HEADS, DIM], [24, 1, 12, 4]).unwrap();
    assert!(matches!(shard.append(good, scattered), Err(Error::Stride { argument: "value", .. })));
    assert_eq!(shard.len(), 2);

    for (extents, name) in [([0, 1, 1, 1], "batch"), ([1, 0, 1, 1], "kv_heads"), ([1, 1, 0, 1], "head_dim")] {
        let [batch, heads, dim, capacity] = extents;
        let result = KvShard::<bf16>::new(batch, heads, dim, capacity);
        assert!(matches!(result, Err(Error::Value { argument, .. }) if argument == name));
    }
    for capacity in [usize::MAX, usize::MAX / 64, 1 << 60] {
        let result = KvShard::<bf16>::new(1, 8, 64, capacity);
        assert!(matches!(result, Err(Error::Value { argument: "capacity", .. })));
    }
}
