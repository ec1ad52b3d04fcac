//! The calls on candle tensors against the oracle, over dtypes and strides, and their errors.
#![cfg(feature = "candle")]

use candle_core::{DType, Device, IndexOp, Tensor};
use star_attention::cpu::reference;
use star_attention::{AttentionConfig, Error, Mask, TensorView, candle};

const CONFIG: AttentionConfig = AttentionConfig { mask: Mask::Causal, scale: None, softcap: None };

fn random(shape: [usize; 4]) -> Tensor {
    Tensor::randn(0f32, 1.0, &shape, &Device::Cpu).unwrap()
}

fn flat(x: &Tensor) -> Vec<f32> {
    x.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn shape(x: &Tensor) -> [usize; 4] {
    x.dims().try_into().unwrap()
}

/// The oracle's output and log-sum-exp.
fn oracle(config: &AttentionConfig, q: &Tensor, k: &Tensor, v: &Tensor) -> (Vec<f32>, Vec<f32>) {
    let [q, k, v] = [q, k, v].map(|x| (flat(x), shape(x)));
    let view = |x: &'static str, y: &(Vec<f32>, [usize; 4])| {
        TensorView::contiguous(x, Vec::leak(y.0.clone()), y.1).unwrap()
    };
    let r = reference::attention(config, view("q", &q), view("k", &k), view("v", &v)).unwrap();
    (r.out.iter().map(|&x| x as f32).collect(), r.lse.iter().map(|&x| x as f32).collect())
}

fn assert_close(got: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(got.len(), expected.len());
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((got - expected).abs() <= tolerance, "{index}: {got} is not {expected}");
    }
}

#[test]
fn every_dtype_equals_the_oracle() {
    for (dtype, unit) in [(DType::F32, 1e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
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
fn strides_do_not_matter() {
    let (q, k, v) = (random([2, 6, 4, 16]), random([2, 6, 2, 16]), random([2, 6, 2, 16]));
    let (expected, expected_lse) = candle::attention(&CONFIG, &q, &k, &v).unwrap();
    // Heads before tokens in memory, as model code often has it.
    let heads_first = |x: &Tensor| x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
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

#[test]
fn merged_partials_equal_attention_over_all_keys() {
    let full = AttentionConfig::default();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let [q, k, v] = [[1, 3, 4, 16], [1, 11, 2, 16], [1, 11, 2, 16]]
            .map(|shape| random(shape).to_dtype(dtype).unwrap());
        let partials: Vec<_> = [(0, 4), (4, 0), (4, 7)]
            .into_iter()
            .map(|(start, len)| {
                let part = |x: &Tensor| x.narrow(1, start, len).unwrap();
                candle::partial(&full, &q, &part(&k), &part(&v)).unwrap()
            })
            .collect();
        let (out, lse) = candle::merge(&partials).unwrap();
        let (expected, expected_lse) = oracle(&full, &q, &k, &v);
        assert_eq!(out.dtype(), DType::F32);
        assert_close(&flat(&out), &expected, 1e-4);
        assert_close(&flat(&lse), &expected_lse, 1e-4);
    }
}

/// The message of the error, which names the argument first.
fn refused<T>(result: Result<T, Error>) -> (Error, String) {
    let error = result.err().expect("an error");
    let text = error.to_string();
    (error, text)
}

#[test]
fn bad_tensors_are_refused_by_name() {
    let (q, k) = (random([1, 4, 2, 8]), random([1, 4, 2, 8]));
    let attend = |q: &Tensor, k: &Tensor, v: &Tensor| refused(candle::attention(&CONFIG, q, k, v));

    let (error, text) = attend(&q.squeeze(0).unwrap(), &k, &k);
    assert!(matches!(error, Error::Shape { argument: "query", .. }), "{text}");
    let (error, text) = attend(&q, &k, &random([1, 5, 2, 8]));
    assert!(matches!(error, Error::Shape { argument: "value", .. }), "{text}");
    let (error, text) = attend(&q, &k.to_dtype(DType::F16).unwrap(), &k);
    assert!(matches!(error, Error::DType { argument: "key", .. }), "{text}");
    let (error, text) = attend(&q.to_dtype(DType::F64).unwrap(), &k, &k);
    assert!(matches!(error, Error::Value { argument: "query", .. }), "{text}");
    let (error, text) = attend(&q, &k, &k.to_dtype(DType::U32).unwrap());
    assert!(matches!(error, Error::Value { argument: "value", .. }), "{text}");
    let (error, text) = attend(&q, &random([1, 4, 8, 2]).transpose(2, 3).unwrap(), &k);
    assert!(matches!(error, Error::Stride { argument: "key", .. }), "{text}");
    let bad = AttentionConfig { scale: Some(f32::NAN), ..CONFIG };
    let (error, text) = refused(candle::attention(&bad, &q, &k, &k));
    assert!(matches!(error, Error::Value { argument: "scale", .. }), "{text}");
}

#[test]
fn bad_partials_are_refused_by_name() {
    let (error, text) = refused(candle::merge(&[]));
    assert!(matches!(error, Error::Value { argument: "partials", .. }), "{text}");
    let (q, k) = (random([1, 4, 2, 8]), random([1, 4, 2, 8]));
    let (out, lse) = candle::partial(&CONFIG, &q, &k, &k).unwrap();
    let half = out.to_dtype(DType::F16).unwrap();
    let (error, text) = refused(candle::merge(&[(out.clone(), lse.clone()), (half, lse.clone())]));
    assert!(matches!(error, Error::DType { argument: "partial", .. }), "{text}");
    let (error, text) = refused(candle::merge(&[(out.clone(), lse.transpose(1, 2).unwrap())]));
    assert!(matches!(error, Error::Shape { argument: "lse", .. }), "{text}");
    let (error, text) = refused(candle::merge(&[(out, lse.to_dtype(DType::F64).unwrap())]));
    assert!(matches!(error, Error::Value { argument: "lse", .. }), "{text}");
}

/// On a GPU, tensors of any strides give what the oracle gives, and partials merge.
#[cfg(feature = "candle-cuda")]
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tensors_of_a_gpu() {
    let device = Device::new_cuda(0).unwrap();
    for (dtype, unit) in [(DType::F16, 4e-3), (DType::BF16, 3e-2)] {
        let gpu = |x: &Tensor| x.to_device(&device).unwrap().to_dtype(dtype).unwrap();
        let (q, k, v) = (random([2, 5, 4, 64]), random([2, 90, 2, 64]), random([2, 90, 2, 64]));
        let (q, k, v) = (gpu(&q), gpu(&k), gpu(&v));
        let (expected, expected_lse) = oracle(&CONFIG, &q, &k, &v);
        let (out, lse) = candle::attention(&CONFIG, &q, &k, &v).unwrap();
        assert_eq!((out.dtype(), out.dims()), (dtype, [2, 5, 4, 64].as_slice()));
        assert_close(&flat(&out), &expected, unit);
        assert_close(&flat(&lse), &expected_lse, 1e-4);

        // Heads before tokens, and rows that start where no 16 bytes do.
        let permuted = |x: &Tensor| x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
        let odd = Tensor::cat(&[&v, &v.narrow(3, 0, 1).unwrap()], 3).unwrap().narrow(3, 0, 64).unwrap();
        let (again, _) = candle::attention(&CONFIG, &permuted(&q), &permuted(&k), &odd).unwrap();
        assert_eq!(flat(&again), flat(&out));

        let full = AttentionConfig { mask: Mask::Full, ..CONFIG };
        let part = |start, len| {
            let rows = |x: &Tensor| x.narrow(1, start, len).unwrap();
            candle::partial(&full, &q, &rows(&k), &rows(&v)).unwrap()
        };
        let (merged, merged_lse) = candle::merge(&[part(0, 30), part(30, 60)]).unwrap();
        let (expected, expected_lse) = oracle(&full, &q, &k, &v);
        assert_close(&flat(&merged), &expected, unit);
        assert_close(&flat(&merged_lse), &expected_lse, 1e-4);

        let error = candle::attention(&CONFIG, &q, &k.to_device(&Device::Cpu).unwrap(), &v).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "key", .. }), "{error}");
        let error = candle::merge(&[(out.clone(), lse.i(1..).unwrap())]).unwrap_err();
        assert!(matches!(error, Error::Shape { argument: "lse", .. }), "{error}");
    }
    let f32s = random([1, 1, 1, 64]).to_device(&device).unwrap();
    let error = candle::attention(&CONFIG, &f32s, &f32s, &f32s).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "query", .. }), "{error}");
}
