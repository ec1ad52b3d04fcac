//! Every kernel by name; nothing to see, nothing to do, one of everything, uneven tails, and
//! strides far larger than the data.

use crate::backend::Backend;
use crate::call::{Memory, Variant, merge_on, on_each_device};
use crate::common::{Layout, Rng, Tensor, extents};
use crate::engine::Engine;
use crate::properties::Attend;
use crate::properties::backend::On;
use crate::properties::cases::Inputs;
use crate::properties::expected::Expected;
use crate::properties::models::{normal_values_equal_the_oracle, ratios_and_dims_of_models};
use crate::properties::quantised::{a_store_keeps_its_codes, appended_codes_are_those_of_the_quotients};
use star_attention::cuda::flash::{Plan, variants};
use star_attention::cuda::simt::{self, Simt};
use star_attention::cuda::{Device, DeviceTensor, HEAD_DIMS, HalfElement};
use star_attention::{AttentionConfig, Element, F8E4M3, Mask, bf16, f16};

const STAR: Mask = Mask::Star { anchor_len: 33, block_len: 80, first_block_len: 33, left: None };
const MASKS: [Mask; 3] = [Mask::Full, Mask::Causal, STAR];

/// A call on normal values, compared with the oracle; gives output and log-sum-exp.
fn check<B: Engine, T: HalfElement>(
    mask: &Mask,
    lens: [usize; 3],
    heads: [usize; 2],
    dim: usize,
) -> (Vec<f32>, Vec<f32>) {
    check_by::<T>(&On(B::cuda(7)), mask, lens, heads, dim)
}

/// The same by any kernels.
fn check_by<T: HalfElement>(
    by: &impl Attend<T>,
    mask: &Mask,
    [batch, query_len, key_len]: [usize; 3],
    heads: [usize; 2],
    dim: usize,
) -> (Vec<f32>, Vec<f32>) {
    let mut rng = Rng::new(7);
    let inputs = Inputs::<T> {
        query: Tensor::normal("query", [batch, query_len, heads[0], dim], &mut rng),
        key: Tensor::normal("key", [batch, key_len, heads[1], dim], &mut rng),
        value: Tensor::normal("value", [batch, key_len, heads[1], dim], &mut rng),
    };
    let config = AttentionConfig::new(mask.clone());
    let mut out = Tensor::<T>::contiguous("out", inputs.query.shape(), |_| f32::NAN);
    let mut lse = vec![f32::NAN; batch * heads[0] * query_len];
    by.attend(&config, None, &inputs, &mut out, Some(&mut lse));
    let expected = Expected::of(&config, &inputs.query, &inputs.key, &inputs.value, false);
    expected.check_out(out.values()).unwrap();
    expected.check_lse(&lse).unwrap();
    (out.values().collect(), lse)
}

/// Few rows, some and many on every head dim under every mask, over keys of 16 bits and of 8.
fn every_attention_kernel<B: Engine, T: HalfElement>() {
    let by = On(B::cuda(7));
    for lens in [[3, 150], [20, 150], [100, 100]] {
        normal_values_equal_the_oracle::<_, T, T>(&by, &STAR, lens, [4, 2], [192, 128]);
        normal_values_equal_the_oracle::<_, T, F8E4M3>(&by, &STAR, lens, [4, 2], [192, 128]);
        for dim in HEAD_DIMS {
            normal_values_equal_the_oracle::<_, T, F8E4M3>(&by, &STAR, lens, [4, 2], [dim, dim]);
        }
    }
    for lens in [[3, 40], [40, 40]] {
        normal_values_equal_the_oracle::<_, T, T>(&by, &Mask::Causal, lens, [2, 1], [576, 512]);
    }
    appended_codes_are_those_of_the_quotients::<_, T>(&by.0, false);
    a_store_keeps_its_codes(&by.0);
    for dim in HEAD_DIMS {
        for mask in MASKS {
            for query_len in [3, 20, 70] {
                check::<B, T>(&mask, [1, query_len, 150], [4, 2], dim);
            }
            for name in variants(dim) {
                check_by::<T>(&Variant(B::open(7), name), &mask, [1, 200, 200], [4, 2], dim);
            }
        }
    }
    let rows = Tensor::<T>::normal("rows", [2, 5, 3, 64], &mut Rng::new(3));
    let [key, value] = On(B::cuda(3)).shard(&[[rows.clone(), rows.clone()]]);
    assert!(key.bits() == rows.bits() && value.bits() == rows.bits());
}

/// Of one partial, of dims that are copied 16 bytes at a time and of others.
fn every_merge_kernel<B: Backend, T: Element, O: Element>() {
    for dim in [64, 9] {
        let rows =
            Tensor::<T>::contiguous("rows", [2, 3, 5, dim], |[b, s, h, d]| ((b + s + h + d) % 8) as f32);
        let mut out = Tensor::<O>::contiguous("out", rows.shape(), |_| f32::NAN);
        let mut lse = vec![f32::NAN; 30];
        merge_on(&B::open(0), &[(rows.clone(), vec![0.5; 30])], None, &mut out, &mut lse).unwrap();
        assert!(out.bits() == rows.bits() && lse == [0.5; 30]);
    }
}

on_each_device! {
    fn every_kernel_gives_what_the_definition_says() {
        every_attention_kernel::<B, f16>();
        every_attention_kernel::<B, bf16>();
        every_merge_kernel::<B, f32, f32>();
        every_merge_kernel::<B, f32, f16>();
        every_merge_kernel::<B, f32, bf16>();
        every_merge_kernel::<B, f16, f32>();
        every_merge_kernel::<B, f16, f16>();
        every_merge_kernel::<B, bf16, f32>();
        every_merge_kernel::<B, bf16, bf16>();
        if std::any::type_name::<B>() == std::any::type_name::<Simt>() {
            // Those for Hopper GPUs have a test of their own.
            let mut kernels = simt::launches().filter(|(name, _)| !name.contains("hopper"));
            assert!(kernels.all(|(_, launches)| launches > 0));
        }
    }

    fn ratios_and_dims_of_models_are_right() {
        ratios_and_dims_of_models::<_, bf16>(&On(B::cuda(1)));
        ratios_and_dims_of_models::<_, f16>(&On(B::cuda(2)));
    }

    fn no_keys_give_the_identity() {
        for mask in MASKS {
            for query_len in [1, 5, 200] {
                let (out, lse) = check::<B, bf16>(&mask, [2, query_len, 0], [4, 2], 64);
                assert!(out.iter().all(|x| x.to_bits() == 0), "{mask:?}");
                assert!(lse.iter().all(|&x| x == f32::NEG_INFINITY), "{mask:?}");
            }
        }
    }

    fn rows_before_the_first_key_give_the_identity() {
        for mask in [Mask::Causal, STAR] {
            for (query_len, key_len) in [(2, 1), (20, 7), (150, 1), (150, 90), (130, 129)] {
                let blind = query_len - key_len;
                let (out, lse) = check::<B, f16>(&mask, [1, query_len, key_len], [2, 1], 64);
                assert!(out[..blind * 128].iter().all(|x| x.to_bits() == 0), "{mask:?}");
                for head in lse.chunks(query_len) {
                    assert!(head[..blind].iter().all(|&x| x == f32::NEG_INFINITY), "{mask:?}");
                    assert!(head[blind..].iter().all(|x| x.is_finite()), "{mask:?}");
                }
            }
        }
    }

    fn no_queries_and_no_sequences_are_no_work() {
        for mask in MASKS {
            check::<B, bf16>(&mask, [2, 0, 50], [4, 2], 128);
            check::<B, bf16>(&mask, [0, 5, 5], [4, 2], 128);
            check::<B, bf16>(&mask, [0, 0, 0], [4, 2], 128);
            check::<B, bf16>(&mask, [3, 0, 0], [4, 2], 128);
        }
    }

    /// One row, one key, and one more or less than tiles of rows (128, 16) and keys (128, 64, 32,
    /// 16) hold.
    fn extents_around_the_tiles() {
        for (query_len, key_len) in [(1, 1), (1, 63), (1, 65), (16, 64), (17, 257), (127, 127), (129, 129), (129, 191)] {
            for mask in MASKS {
                check::<B, f16>(&mask, [1, query_len, key_len], [1, 1], 64);
                check::<B, bf16>(&mask, [1, query_len, key_len], [2, 1], 128);
            }
        }
    }

    fn many_heads_and_many_sequences() {
        check::<B, bf16>(&Mask::Causal, [1, 2, 33], [128, 1], 64);
        check::<B, bf16>(&Mask::Causal, [1, 3, 40], [96, 96], 64);
        check::<B, bf16>(&Mask::Causal, [100, 2, 5], [2, 1], 64);
    }

    /// As in decoding: the keys are split, also under masks.
    fn few_rows_over_many_keys() {
        let properties = B::open(0).device().properties();
        for query_len in [1, 2, 16] {
            for mask in MASKS {
                let shape = extents([1, query_len, 3000], [4, 1], [64, 64]);
                let plan = Plan::new(&properties, &AttentionConfig::new(mask.clone()), &shape).unwrap();
                assert!(mask == STAR || plan.splits() > 1);
                check::<B, bf16>(&mask, [1, query_len, 3000], [4, 1], 64);
            }
        }
    }

    fn strides_of_millions() {
        let (shape, keys) = ([2, 40, 2, 64], [2, 40, 1, 64]);
        let far = Layout { order: [1, 2, 0], padding: [1 << 21, 1 << 12, 1 << 16], offset: 8 };
        let mut rng = Rng::new(1);
        let mut normal = |name, shape| Tensor::<f16>::new(name, shape, &far, 0.0, |_| rng.normal());
        let inputs = Inputs { query: normal("query", shape), key: normal("key", keys), value: normal("value", keys) };
        let mut out = Tensor::<f16>::new("out", shape, &far, 0.0, |_| f32::NAN);
        let config = AttentionConfig::new(Mask::Causal);
        On(B::cuda(0)).attend(&config, None, &inputs, &mut out, None);
        let expected = Expected::of(&config, &inputs.query, &inputs.key, &inputs.value, false);
        expected.check_out(out.values()).unwrap();
        assert!(out.padding_is(0.0));
    }

    /// Keys and values of stride 0 on the batch axis are those of every sequence.
    fn one_context_serves_many_queries_without_a_copy() {
        let (backend, mut rng) = (B::open(5), Rng::new(5));
        for query_len in [2, 40] {
            let query = Tensor::<bf16>::normal("query", [3, query_len, 4, 64], &mut rng);
            let one = Tensor::<bf16>::normal("key", [1, 40, 2, 64], &mut rng);
            let keys = Tensor::<bf16>::contiguous("key", [3, 40, 2, 64], |[_, s, h, d]| one.get([0, s, h, d]).to_f32());
            let mut copied = Tensor::<f32>::contiguous("out", query.shape(), |_| f32::NAN);
            let config = AttentionConfig::new(Mask::Causal);
            let inputs = Inputs { query: query.clone(), key: keys.clone(), value: keys.clone() };
            On(B::cuda(5)).attend(&config, None, &inputs, &mut copied, None);

            let [batch, _, query_heads, head_dim] = query.shape();
            let shape = extents([batch, query_len, 40], [query_heads, 2], [head_dim, head_dim]);
            let plan = Plan::new(&backend.device().properties(), &config, &shape).unwrap();
            let (query, one) = (Memory::of(&backend, &query), Memory::of(&backend, &one));
            let repeated = DeviceTensor::new("key", backend.span(&one.memory), keys.shape(), [0, 128, 64, 1]).unwrap();
            let mut out = Memory::of(&backend, &copied);
            let mut workspace = backend.memory(&vec![0xffu8; plan.workspace_bytes()]);
            let workspace = backend.span_mut(&mut workspace);
            let query = query.view(&backend, "query");
            let mut prepared = plan.prepare(backend.device(), backend.stream(), workspace).unwrap();
            let inputs = star_attention::Inputs::new(&query, &repeated, &repeated);
            prepared.run(inputs, &mut out.view_mut(&backend, "out"), None).unwrap();
            let bits: Vec<u32> = backend.read(&out.memory).into_iter().map(f32::to_bits).collect();
            assert_eq!(bits, copied.bits());
        }
    }
}
