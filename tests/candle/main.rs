//! The calls on candle tensors against the oracle, over dtypes and strides, and their errors.
#![cfg(feature = "candle")]

mod batches;
mod common;
mod errors;
mod merges;

use candle_core::{DType, Device, IndexOp, Tensor};
use common::*;
#[cfg(feature = "candle-cuda")]
use star_attention::Error;
use star_attention::{AttentionConfig, Mask, candle};

const CONFIG: AttentionConfig = AttentionConfig { mask: Mask::Causal, scale: None, softcap: None };

#[test]
fn every_dtype_equals_the_oracle() {
    for (dtype, unit) in DTYPES {
        let q = random([2, 5, 4, 32]).to_dtype(dtype).unwrap();
        let k = random([2, 9, 2, 32]).to_dtype(dtype).unwrap();
        let v = random([2, 9, 2, 32]).to_dtype(dtype).unwrap();
        let (out, lse) = candle::attention(&CONFIG, &q, &k, &v).unwrap();
        assert_eq!((out.dtype(), out.dims()), (dtype, [2, 5, 4, 32].as_slice()));
        assert_eq!((lse.dtype(), lse.dims()), (DType::F32, [2, 4, 5].as_slice()));
        let (expected, expected_lse) = oracle(&CONFIG, &q, &k, &v);
        assert_close(&flat(&out), &expected, unit);
        assert_close(&flat(&lse), &expected_lse, unit);
        let (partial, _) = candle::partial(&CONFIG, &q, &k, &v).unwrap();
        assert_eq!(partial.dtype(), DType::F32);
        assert_close(&flat(&partial), &expected, unit);
    }
}

#[test]
fn outputs_have_the_values_dim() {
    for (dtype, unit) in DTYPES {
        let [q, k, v] =
            [[2, 5, 4, 32], [2, 9, 2, 32], [2, 9, 2, 20]].map(|x| random(x).to_dtype(dtype).unwrap());
        let (out, lse) = candle::attention(&CONFIG, &q, &k, &v).unwrap();
        assert_eq!((out.dtype(), out.dims()), (dtype, [2, 5, 4, 20].as_slice()));
        let (expected, expected_lse) = oracle(&CONFIG, &q, &k, &v);
        assert_close(&flat(&out), &expected, unit);
        assert_close(&flat(&lse), &expected_lse, unit);
        let merged = candle::merge(&[candle::partial(&CONFIG, &q, &k, &v).unwrap()]).unwrap();
        assert_close(&flat(&merged.0), &expected, unit);
    }
}

#[test]
fn strides_do_not_matter() {
    let (q, k, v) = (random([2, 6, 4, 16]), random([2, 6, 2, 16]), random([2, 6, 2, 16]));
    let (expected, expected_lse) = candle::attention(&CONFIG, &q, &k, &v).unwrap();
    // One fused projection, of which each is a part.
    let fused = Tensor::cat(&[&q, &k, &v], 2).unwrap();
    let part = |start, len| fused.narrow(2, start, len).unwrap();
    // Inside a larger tensor, with an offset in every axis but the last.
    let padded = |x: &Tensor| {
        let [b, s, h, d] = shape(x);
        let big = x.pad_with_zeros(0, 1, 1).unwrap().pad_with_zeros(1, 3, 2).unwrap();
        let big = big.pad_with_zeros(2, 1, 0).unwrap().pad_with_zeros(3, 0, 8).unwrap();
        big.i((1..=b, 3..s + 3, 1..=h, ..d)).unwrap()
    };
    for [q, k, v] in [
        [heads_first(&q), heads_first(&k), heads_first(&v)],
        [part(0, 4), part(4, 2), part(6, 2)],
        [padded(&q), padded(&k), padded(&v)],
    ] {
        let (out, lse) = candle::attention(&CONFIG, &q, &k, &v).unwrap();
        assert_close(&flat(&out), &flat(&expected), 1e-6);
        assert_close(&flat(&lse), &flat(&expected_lse), 1e-6);
    }
}

#[test]
fn a_broadcast_tensor_counts_as_its_copy() {
    let (q, k, v) = (random([1, 4, 2, 8]), random([1, 4, 1, 8]), random([1, 4, 1, 8]));
    let q = q.broadcast_as((3, 4, 2, 8)).unwrap();
    let k = k.broadcast_as((3, 4, 2, 8)).unwrap();
    let v = v.broadcast_as((3, 4, 2, 8)).unwrap();
    let (out, _) = candle::attention(&CONFIG, &q, &k, &v).unwrap();
    assert_close(&flat(&out), &oracle(&CONFIG, &q, &k, &v).0, 1e-5);
}

#[test]
fn no_keys_give_the_identity() {
    let empty = Tensor::zeros((1, 0, 2, 8), DType::F32, &Device::Cpu).unwrap();
    let (out, lse) =
        candle::attention(&AttentionConfig::default(), &random([1, 3, 2, 8]), &empty, &empty).unwrap();
    assert!(flat(&out).iter().all(|&x| x == 0.0));
    assert!(flat(&lse).iter().all(|&x| x == f32::NEG_INFINITY));
}

/// The same on tensors of a GPU, whose kernels take f16 and bf16.
#[cfg(feature = "candle-cuda")]
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tensors_of_a_gpu() {
    let device = Device::new_cuda(0).unwrap();
    let dtypes = &DTYPES[1..];
    batches::every_sequence_equals_the_oracle_on(&device, dtypes);
    batches::a_plan_lasts_over_steps_on(&device, dtypes);
    merges::partials_merge_on(&device, dtypes);
    merges::ranks_merge_on(&device, dtypes);
    merges::sinks_join_the_last_merge_on(&device, dtypes);
    for &(dtype, unit) in dtypes {
        let gpu = |x: &Tensor| x.to_device(&device).unwrap().to_dtype(dtype).unwrap();
        let (q, k, v) = (random([2, 5, 4, 64]), random([2, 90, 2, 64]), random([2, 90, 2, 64]));
        let (q, k, v) = (gpu(&q), gpu(&k), gpu(&v));
        let (expected, expected_lse) = oracle(&CONFIG, &q, &k, &v);
        let (out, lse) = candle::attention(&CONFIG, &q, &k, &v).unwrap();
        assert_eq!((out.dtype(), out.dims()), (dtype, [2, 5, 4, 64].as_slice()));
        assert_close(&flat(&out), &expected, unit);
        assert_close(&flat(&lse), &expected_lse, 1e-4);

        // Heads before tokens, and rows that start where no 16 bytes do.
        let odd = Tensor::cat(&[&v, &v.narrow(3, 0, 1).unwrap()], 3).unwrap().narrow(3, 0, 64).unwrap();
        let (again, _) = candle::attention(&CONFIG, &heads_first(&q), &heads_first(&k), &odd).unwrap();
        assert_eq!(flat(&again), flat(&out));

        let error = candle::attention(&CONFIG, &q, &k.to_device(&Device::Cpu).unwrap(), &v).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "key", .. }), "{error}");
        let error = candle::merge(&[(out.clone(), lse.i(1..).unwrap())]).unwrap_err();
        assert!(matches!(error, Error::Shape { argument: "lse", .. }), "{error}");
    }
    let f32s = random([1, 1, 1, 64]).to_device(&device).unwrap();
    let error = candle::attention(&CONFIG, &f32s, &f32s, &f32s).unwrap_err();
    assert!(matches!(error, Error::DType { argument: "key", .. }), "{error}");
}
