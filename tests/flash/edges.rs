//! Nothing to see, nothing to do, one of everything, and buffers far larger than what they hold.

use crate::common::{Layout, Rng, Tensor, extents};
use crate::phases::each_cpu;
use crate::properties::expected::Expected;
use crate::properties::models::ratios_and_dims_of_models;
use star_attention::cpu::InstructionSet;
use star_attention::cpu::flash::{self, Plan};
use star_attention::{AttentionConfig, AttentionShape, Error, Inputs, Mask, TensorView, TensorViewMut, bf16};

const STAR: Mask = Mask::Star { anchor_len: 3, block_len: 8, first_block_len: 3, left: None };
const MASKS: [Mask; 3] = [Mask::Full, Mask::Causal, STAR];

/// A call on normal f32 values on all instructions, compared with the oracle; gives output and
/// log-sum-exp of the last.
fn check(mask: &Mask, lens: [usize; 3], heads: [usize; 2], dim: usize) -> (Vec<f32>, Vec<f32>) {
    check_dims(mask, lens, heads, [dim, dim])
}

/// The same on values of another dim than queries and keys.
fn check_dims(
    mask: &Mask,
    [batch, query_len, key_len]: [usize; 3],
    heads: [usize; 2],
    [dim, value_dim]: [usize; 2],
) -> (Vec<f32>, Vec<f32>) {
    let mut rng = Rng::new(7);
    let query = Tensor::<f32>::normal("query", [batch, query_len, heads[0], dim], &mut rng);
    let key = Tensor::<f32>::normal("key", [batch, key_len, heads[1], dim], &mut rng);
    let value = Tensor::<f32>::normal("value", [batch, key_len, heads[1], value_dim], &mut rng);
    let config = AttentionConfig::new(mask.clone());
    let expected = Expected::of(&config, &query, &key, &value, false);
    let (q, k, v) = (query.view(), key.view(), value.view());
    let shape = AttentionShape::of(&q, &k, &v).unwrap();
    let results: Vec<_> = InstructionSet::available()
        .into_iter()
        .map(|instructions| {
            let plan = Plan::new(&config, &shape).unwrap().with_instructions(instructions).unwrap();
            let mut out = Tensor::<f32>::contiguous("out", shape.out_shape(), |_| f32::NAN);
            let mut lse = vec![f32::NAN; shape.lse_len()];
            let mut workspace = vec![0xffu8; plan.workspace_bytes()];
            plan.run(Inputs::new(q, k, v), out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
            expected.check_out(out.values()).unwrap();
            expected.check_lse(&lse).unwrap();
            (out.values().collect(), lse)
        })
        .collect();
    results.into_iter().next_back().unwrap()
}

#[test]
fn ratios_and_dims_of_models_are_right() {
    for by in each_cpu() {
        ratios_and_dims_of_models::<_, f32>(&by);
        ratios_and_dims_of_models::<_, bf16>(&by);
    }
}

#[test]
fn no_keys_give_the_identity() {
    for mask in MASKS {
        for query_len in [1, 5, 200] {
            let (out, lse) = check(&mask, [2, query_len, 0], [4, 2], 16);
            assert!(out.iter().all(|x| x.to_bits() == 0), "{mask:?}");
            assert!(lse.iter().all(|&x| x == f32::NEG_INFINITY), "{mask:?}");
        }
    }
}

#[test]
fn rows_before_the_first_key_give_the_identity() {
    for mask in [Mask::Causal, STAR] {
        for (query_len, key_len) in [(2, 1), (20, 7), (150, 1), (150, 90), (130, 129)] {
            let blind = query_len - key_len;
            let (out, lse) = check(&mask, [1, query_len, key_len], [2, 1], 16);
            assert!(out[..blind * 32].iter().all(|x| x.to_bits() == 0), "{mask:?}");
            for head in lse.chunks(query_len) {
                assert!(head[..blind].iter().all(|&x| x == f32::NEG_INFINITY), "{mask:?}");
                assert!(head[blind..].iter().all(|x| x.is_finite()), "{mask:?}");
            }
        }
    }
}

#[test]
fn no_queries_and_no_sequences_are_no_work() {
    for mask in MASKS {
        check(&mask, [2, 0, 50], [4, 2], 16);
        check(&mask, [0, 5, 5], [4, 2], 16);
        check(&mask, [0, 0, 0], [4, 2], 16);
        check(&mask, [3, 0, 0], [4, 2], 16);
    }
}

#[test]
fn one_key_gives_its_value() {
    let (out, lse) = check(&Mask::Full, [1, 1, 1], [1, 1], 1);
    assert!(out[0].is_finite() && lse[0].is_finite());
    check(&Mask::Full, [1, 1, 1], [8, 1], 300);
    check(&Mask::Causal, [1, 1, 1], [3, 3], 128);
    check_dims(&Mask::Full, [1, 1, 1], [2, 1], [300, 1]);
    check_dims(&Mask::Full, [1, 20, 1], [2, 1], [1, 300]);
}

/// Around the sizes that tiles are likely to have, and head dims around those of vectors.
#[test]
fn every_length_around_a_tile() {
    for mask in MASKS {
        for len in [15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257] {
            check(&mask, [1, len, len], [2, 1], 16);
            check(&mask, [1, 1, len], [2, 1], 64);
            check(&mask, [1, len, 65], [2, 1], 17);
        }
        for dim in (1..=40).chain([63, 65, 127, 129, 255, 257, 320]) {
            check(&mask, [1, 19, 37], [2, 1], dim);
            check_dims(&mask, [1, 19, 37], [2, 1], [24, dim]);
            check_dims(&mask, [1, 1, 37], [2, 1], [dim, 24]);
        }
    }
}

#[test]
fn many_heads_and_many_sequences() {
    check(&Mask::Causal, [1, 9, 33], [128, 1], 24);
    check(&Mask::Causal, [1, 3, 40], [96, 96], 16);
    check(&Mask::Causal, [200, 2, 5], [2, 1], 8);
}

/// Few rows over many keys, as in decoding: also when the keys are shared out between threads.
#[test]
fn few_rows_over_many_keys() {
    for query_len in [1, 2, 16] {
        for mask in MASKS {
            check(&mask, [1, query_len, 9000], [8, 2], 64);
        }
    }
}

#[test]
fn strides_of_millions() {
    let shape = [2, 6, 2, 16];
    let far = Layout { order: [1, 2, 0], padding: [1 << 21, 1 << 12, 1 << 17], offset: 3 };
    let mut rng = Rng::new(1);
    let mut normal = |name| Tensor::<f32>::new(name, shape, &far, 0.0, |_| rng.normal());
    let (query, key, value) = (normal("query"), normal("key"), normal("value"));
    let mut out = Tensor::<f32>::new("out", shape, &far, 0.0, |_| f32::NAN);
    let config = AttentionConfig::new(Mask::Causal);
    flash::attention(&config, query.view(), key.view(), value.view(), out.view_mut(), None).unwrap();
    Expected::of(&config, &query, &key, &value, false).check_out(out.values()).unwrap();
    assert!(out.padding_is(0.0));
}

/// The stride of an axis of one element, and any stride of an empty tensor, is never taken.
#[test]
fn strides_that_are_never_taken_may_be_anything() {
    const ANY: usize = usize::MAX;
    let data: Vec<f32> = (0..16).map(|x| x as f32 / 16.0).collect();
    let view = |name| TensorView::new(name, &data, [1, 1, 1, 16], [ANY, ANY - 1, ANY / 2, 1]).unwrap();
    let mut rows = vec![f32::NAN; 16];
    let mut lse = [f32::NAN];
    for mask in MASKS {
        let out = TensorViewMut::new("out", &mut rows, [1, 1, 1, 16], [ANY, ANY, ANY, 1]).unwrap();
        let config = AttentionConfig::new(mask.clone());
        flash::attention(&config, view("query"), view("key"), view("value"), out, Some(&mut lse)).unwrap();
        assert!(rows.iter().zip(&data).all(|(out, x)| (out - x).abs() < 1e-6));
    }

    let empty: [f32; 0] = [];
    let nothing = |name, shape| TensorView::new(name, &empty, shape, [ANY, ANY, ANY, 1]).unwrap();
    for mask in MASKS {
        for [batch, query_len, key_len] in [[3, 0, 5], [3, 0, 0], [0, 4, 5]] {
            let (query, key) = ([batch, query_len, 4, 16], [batch, key_len, 2, 16]);
            let (keys, key_strides) =
                if batch == 0 { (vec![], [ANY; 4]) } else { (vec![0.5; 480], [160, 32, 16, 1]) };
            let key = TensorView::new("key", &keys, key, key_strides).unwrap();
            let mut none: [f32; 0] = [];
            let out = TensorViewMut::new("out", &mut none, query, [ANY; 4]).unwrap();
            let config = AttentionConfig::new(mask.clone());
            flash::attention(&config, nothing("query", query), key, key, out, Some(&mut [])).unwrap();
        }
        // Queries but no keys.
        let query = TensorView::new("query", &data, [2, 2, 4, 1], [8, 4, 1, 1]).unwrap();
        let key = nothing("key", [2, 0, 2, 1]);
        let mut rows = [f32::NAN; 16];
        let out = TensorViewMut::new("out", &mut rows, [2, 2, 4, 1], [8, 4, 1, 1]).unwrap();
        flash::attention(&AttentionConfig::new(mask.clone()), query, key, key, out, None).unwrap();
        assert_eq!(rows, [0.0; 16]);
    }
}

/// Extents are numbers until tensors come with them: those that no tensor can have are refused,
/// without overflow and without planning work for them.
#[test]
fn extents_that_no_tensor_can_have_are_refused() {
    const MAX: usize = usize::MAX;
    for [batch, query_len, key_len] in
        [[MAX, 1, 1], [MAX; 3], [1, MAX, 1], [1, 1, MAX], [0, MAX, MAX], [MAX, 0, MAX]]
    {
        for (query_heads, kv_heads, head_dim, value_dim) in
            [(MAX, MAX, MAX, MAX), (2, 1, MAX, 1), (2, 1, 1, MAX), (MAX, 1, 64, 64), (4, 2, 8, 8)]
        {
            let shape = extents([batch, query_len, key_len], [query_heads, kv_heads], [head_dim, value_dim]);
            for mask in MASKS {
                let plan = Plan::new(&AttentionConfig::new(mask.clone()), &shape);
                assert!(matches!(plan, Err(Error::Shape { .. })), "{shape:?}");
            }
        }
    }
}

#[test]
fn views_of_nothing_never_overflow() {
    const MAX: usize = usize::MAX;
    for shape in [[0, MAX, MAX, 1], [MAX, MAX, 0, 1], [MAX, 0, MAX, 1], [2, MAX, MAX, 0]] {
        let nothing: [f32; 0] = [];
        // Either is fine: an error, or a view of no element.
        if let Ok(view) = TensorView::contiguous("query", &nothing, shape) {
            assert_eq!(view.shape(), shape);
        }
    }
}

/// Keys and values of stride 0 on the batch axis are those of every sequence.
#[test]
fn one_context_serves_many_queries_without_a_copy() {
    let mut rng = Rng::new(5);
    let query = Tensor::<f32>::normal("query", [3, 5, 4, 24], &mut rng);
    let one = Tensor::<f32>::normal("key", [1, 40, 2, 24], &mut rng);
    let copies = Tensor::<f32>::contiguous("key", [3, 40, 2, 24], |[_, s, h, d]| one.get([0, s, h, d]));
    let repeated = TensorView::new("key", one.buffer(), copies.shape(), [0, 48, 24, 1]).unwrap();
    for mask in MASKS {
        let [first, second] = [repeated, copies.view()].map(|keys| {
            let mut out = Tensor::<f32>::contiguous("out", query.shape(), |_| f32::NAN);
            let config = AttentionConfig::new(mask.clone());
            flash::attention(&config, query.view(), keys, keys, out.view_mut(), None).unwrap();
            out.bits()
        });
        assert_eq!(first, second, "{mask:?}");
    }
}
