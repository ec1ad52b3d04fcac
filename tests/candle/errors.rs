//! What is refused, by name, and leaves everything as it was.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use star_attention::comm::ThreadGroup;
use star_attention::{Append, AttentionConfig, Capacity, Error, Inputs, Mask, PlanConfig, Rotation, candle};

const CONFIG: AttentionConfig = AttentionConfig { mask: Mask::Causal, scale: None, softcap: None };

/// Asserts that a call is refused with the given error.
macro_rules! assert_refused {
    ($result:expr, $pattern:pat) => {
        let (error, text) = refused($result);
        assert!(matches!(error, $pattern), "{text}");
    };
}

#[test]
fn tensors_of_a_call() {
    let (q, k) = (random([1, 4, 2, 8]), random([1, 4, 2, 8]));
    let attend = |q: &Tensor, k: &Tensor, v: &Tensor| candle::attention(&CONFIG, q, k, v);
    assert_refused!(attend(&q.squeeze(0).unwrap(), &k, &k), Error::Shape { argument: "query", .. });
    assert_refused!(attend(&q, &k.squeeze(0).unwrap(), &k), Error::Shape { argument: "key", .. });
    assert_refused!(attend(&q, &k, &k.squeeze(0).unwrap()), Error::Shape { argument: "value", .. });
    assert_refused!(attend(&q, &k, &random([1, 5, 2, 8])), Error::Shape { argument: "value", .. });
    assert_refused!(attend(&q, &random([2, 4, 2, 8]), &k), Error::Shape { argument: "key", .. });
    let half = k.to_dtype(DType::F16).unwrap();
    assert_refused!(attend(&q, &half, &k), Error::DType { argument: "value", .. });
    let half_query = q.to_dtype(DType::F16).unwrap();
    assert_refused!(attend(&half_query, &k, &k), Error::DType { argument: "key", .. });
    let doubles = q.to_dtype(DType::F64).unwrap();
    assert_refused!(attend(&doubles, &k, &k), Error::Value { argument: "query", .. });
    assert_refused!(attend(&q, &doubles, &k), Error::Value { argument: "key", .. });
    let integers = k.to_dtype(DType::U32).unwrap();
    assert_refused!(attend(&q, &k, &integers), Error::Value { argument: "value", .. });
    let transposed = random([1, 4, 8, 2]).transpose(2, 3).unwrap();
    assert_refused!(attend(&q, &transposed, &k), Error::Stride { argument: "key", .. });
    let bad = AttentionConfig { scale: Some(f32::NAN), ..CONFIG };
    assert_refused!(candle::attention(&bad, &q, &k, &k), Error::Value { argument: "scale", .. });
}

#[test]
fn batches_and_tensors_of_a_plan() {
    let new = |config: &PlanConfig, capacity: &Capacity| candle::Plan::new(&Device::Cpu, config, capacity);
    let room = |query, sequences| {
        Capacity::new(query, PAGES, sequences, 7).with_pages(9).with_prefix(PREFIX[0], PREFIX[1])
    };
    let (capacity, odd_heads, few) = (room(QUERY, 4), room([2, 12, 3, 64], 4), room(QUERY, 3));
    assert_refused!(new(&PlanConfig::new(), &odd_heads), Error::Shape { .. });
    let no_split = PlanConfig::new().with_split_keys(0);
    assert_refused!(new(&no_split, &capacity), Error::Value { argument: "split_keys", .. });

    let whole = batch(true);
    let mut alone = candle::Plan::for_batch(&Device::Cpu, &PlanConfig::new(), &whole).unwrap();
    assert_refused!(alone.update(&whole), Error::Value { argument: "plan", .. });

    let mut plan = new(&PlanConfig::new(), &few).unwrap();
    assert_refused!(plan.update(&whole), Error::Value { argument: "sequences", .. });
    let mut plan = new(&PlanConfig::new(), &capacity).unwrap();
    assert_refused!(plan.update(&batch(false)), Error::Shape { argument: "key", .. });
    plan.update(&whole).unwrap();

    let [query, key, prefix] = [QUERY, PAGES, PREFIX].map(random);
    let inputs = Inputs::new(&query, &key, &key).with_prefix(&prefix, &prefix);
    let short = query.narrow(1, 0, 11).unwrap();
    assert_refused!(
        plan.attend(Inputs::new(&short, &key, &key).with_prefix(&prefix, &prefix)),
        Error::Shape { argument: "query", .. }
    );
    let short = key.narrow(0, 0, 8).unwrap();
    assert_refused!(
        plan.attend(Inputs::new(&query, &short, &key).with_prefix(&prefix, &prefix)),
        Error::Shape { argument: "key", .. }
    );
    assert_refused!(plan.attend(Inputs::new(&query, &key, &key)), Error::Value { argument: "prefix", .. });
    let half = prefix.to_dtype(DType::F16).unwrap();
    let mixed = inputs.with_prefix(&prefix, &half);
    assert_refused!(plan.attend(mixed), Error::DType { argument: "prefix", .. });
    let flat = prefix.flatten_from(2).unwrap();
    let flat = inputs.with_prefix(&flat, &prefix);
    assert_refused!(plan.attend(flat), Error::Shape { argument: "prefix", .. });
    let sinks = |of: &[f32]| Tensor::new(of, &Device::Cpu).unwrap();
    let (three, nan) = (sinks(&[0.0; 3]), sinks(&[0.0, f32::NAN, 0.0, 0.0]));
    let half = sinks(&[0.0; 4]).to_dtype(DType::BF16).unwrap();
    assert_refused!(plan.attend(inputs.with_sinks(&three)), Error::Shape { argument: "sinks", .. });
    assert_refused!(plan.attend(inputs.with_sinks(&half)), Error::DType { argument: "sinks", .. });
    assert_refused!(plan.attend(inputs.with_sinks(&nan)), Error::Value { argument: "sinks", .. });
    // After all this it attends to the batch that it had.
    assert_batch(&whole, inputs, &plan.attend(inputs).unwrap(), 1e-5);
}

#[test]
fn rows_and_caches_of_an_append() {
    let zeros = || Tensor::zeros((3, 4, 2, 8), DType::F32, &Device::Cpu).unwrap();
    let (cache_key, cache_value) = (zeros(), zeros());
    let (key, value) = (random([1, 2, 2, 8]), random([1, 2, 2, 8]));
    let table = |of: [u32; 2]| Tensor::new(&[of], &Device::Cpu).unwrap();
    let places = table([4, 11]);
    let append = |key: &Tensor, value: &Tensor, places: &Tensor| {
        candle::append(Append::new(key, value, places), &cache_key, &cache_value)
    };
    assert_refused!(append(&key.squeeze(0).unwrap(), &value, &places), Error::Shape { argument: "key", .. });
    let short = value.narrow(1, 0, 1).unwrap();
    assert_refused!(append(&key, &short, &places), Error::Shape { argument: "value", .. });
    let half = value.to_dtype(DType::F16).unwrap();
    assert_refused!(append(&key, &half, &places), Error::DType { argument: "value", .. });
    let doubles = key.to_dtype(DType::F64).unwrap();
    assert_refused!(append(&doubles, &value, &places), Error::Value { argument: "key", .. });
    let flat_places = places.flatten_all().unwrap();
    assert_refused!(append(&key, &value, &flat_places), Error::Shape { argument: "places", .. });
    let signed = places.to_dtype(DType::I64).unwrap();
    assert_refused!(append(&key, &value, &signed), Error::Value { argument: "places", .. });
    for wrong in [[4, 12], [4, 4]] {
        assert_refused!(append(&key, &value, &table(wrong)), Error::Sequence { index: 0, .. });
    }

    let to = |of_key: &Tensor, of_value: &Tensor| {
        candle::append(Append::new(&key, &value, &places), of_key, of_value)
    };
    assert_refused!(to(&cache_key.get(0).unwrap(), &cache_value), Error::Shape { argument: "cache_key", .. });
    let short = cache_value.narrow(0, 0, 2).unwrap();
    assert_refused!(to(&cache_key, &short), Error::Shape { argument: "cache_value", .. });
    let half = cache_value.to_dtype(DType::F16).unwrap();
    assert_refused!(to(&cache_key, &half), Error::DType { argument: "cache_value", .. });
    let integers = cache_key.to_dtype(DType::U32).unwrap();
    assert_refused!(to(&integers, &cache_value), Error::Value { argument: "cache_key", .. });
    let one = Tensor::zeros((1, 4, 2, 8), DType::F32, &Device::Cpu).unwrap();
    let broadcast = one.broadcast_as((3, 4, 2, 8)).unwrap();
    assert_refused!(to(&cache_key, &broadcast), Error::Stride { argument: "cache_value", .. });
    // Candle has one lock for a tensor and all its views.
    assert_refused!(to(&cache_key, &cache_key), Error::Value { argument: "cache_value", .. });
    let (first, second) = (cache_key.narrow(0, 0, 1).unwrap(), cache_key.narrow(0, 1, 1).unwrap());
    assert_refused!(to(&first, &second), Error::Value { argument: "cache_value", .. });
    let own = cache_key.narrow(0, 0, 1).unwrap().narrow(1, 0, 2).unwrap();
    assert_refused!(append(&own, &value, &places), Error::Value { argument: "key", .. });

    let positions = table([0, 2]);
    let angles = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
    let rotate = |cos: &Tensor, sin: &Tensor, positions: &Tensor, rotated: usize| {
        let rotation = Rotation { cos, sin, positions, rotated, interleaved: true };
        candle::append(Append::new(&key, &value, &places).with_rotation(rotation), &cache_key, &cache_value)
    };
    assert_refused!(rotate(&angles, &angles, &positions, 5), Error::Value { argument: "rotated", .. });
    assert_refused!(rotate(&angles, &angles, &positions, 6), Error::Shape { argument: "cos", .. });
    let short = angles.narrow(0, 0, 2).unwrap();
    assert_refused!(rotate(&angles, &short, &positions, 4), Error::Shape { argument: "sin", .. });
    let half = angles.to_dtype(DType::F16).unwrap();
    assert_refused!(rotate(&half, &angles, &positions, 4), Error::DType { argument: "cos", .. });
    let short = positions.narrow(1, 0, 1).unwrap();
    assert_refused!(rotate(&angles, &angles, &short, 4), Error::Shape { argument: "positions", .. });
    assert_refused!(rotate(&angles, &angles, &table([0, 3]), 4), Error::Sequence { index: 0, .. });

    // Nothing was written, and nothing is locked.
    assert!(flat(&cache_key).iter().chain(&flat(&cache_value)).all(|&x| x == 0.0));
    append(&key, &value, &places).unwrap();
    assert_eq!(flat(&cache_value.narrow(0, 1, 1).unwrap().narrow(1, 0, 1).unwrap()), flat(&value)[..16]);
}

#[test]
fn partials_of_a_merge() {
    assert_refused!(candle::merge(&[]), Error::Value { argument: "partials", .. });
    let (q, k) = (random([1, 4, 2, 8]), random([1, 4, 2, 8]));
    let (out, lse) = candle::partial(&CONFIG, &q, &k, &k).unwrap();
    let pair = || (out.clone(), lse.clone());
    let half = out.to_dtype(DType::F16).unwrap();
    let mixed = [pair(), (half, lse.clone())];
    assert_refused!(candle::merge(&mixed), Error::DType { argument: "partial", .. });
    let shorter = [pair(), (out.narrow(1, 0, 3).unwrap(), lse.clone())];
    assert_refused!(candle::merge(&shorter), Error::Shape { argument: "partial", .. });
    let group = &ThreadGroup::ranks(1).unwrap()[0];
    let one = Tensor::zeros(1, DType::F32, &Device::Cpu).unwrap();
    assert_refused!(candle::merge_with_sinks(&[pair()], &one), Error::Shape { argument: "sinks", .. });
    let refused_over = candle::merge_over_with_sinks(group, &pair(), &one);
    assert_refused!(refused_over, Error::Shape { argument: "sinks", .. });
    for merge in
        [|pair, _| candle::merge(&[pair]), |pair, group: &ThreadGroup| candle::merge_over(group, &pair)]
    {
        let pair_of = |out: &Tensor, lse: &Tensor| (out.clone(), lse.clone());
        let swapped = pair_of(&out, &lse.transpose(1, 2).unwrap());
        assert_refused!(merge(swapped, group), Error::Shape { argument: "lse", .. });
        let doubles = pair_of(&out, &lse.to_dtype(DType::F64).unwrap());
        assert_refused!(merge(doubles, group), Error::Value { argument: "lse", .. });
        let doubles = pair_of(&out.to_dtype(DType::F64).unwrap(), &lse);
        assert_refused!(merge(doubles, group), Error::Value { argument: "partial", .. });
        let rows = pair_of(&out.squeeze(0).unwrap(), &lse);
        assert_refused!(merge(rows, group), Error::Shape { argument: "partial", .. });
        let transposed = pair_of(&random([1, 4, 8, 2]).transpose(2, 3).unwrap(), &lse);
        assert_refused!(merge(transposed, group), Error::Stride { argument: "partial", .. });
    }
}

/// A rank whose tensors differ from the others' is found, and named.
#[test]
fn ranks_that_differ() {
    let (out, lse) =
        candle::partial(&CONFIG, &random([1, 4, 2, 8]), &random([1, 4, 2, 8]), &random([1, 4, 2, 8]))
            .unwrap();
    let shorter = (out.narrow(1, 0, 3).unwrap(), lse.narrow(2, 0, 3).unwrap());
    let pairs = [(out, lse), shorter];
    std::thread::scope(|scope| {
        let ranks = ThreadGroup::ranks(2).unwrap().into_iter().zip(&pairs);
        let ranks: Vec<_> =
            ranks.map(|(group, pair)| scope.spawn(move || candle::merge_over(&group, pair))).collect();
        for rank in ranks {
            assert_refused!(rank.join().unwrap(), Error::Peer { .. } | Error::Disconnected { .. });
        }
    });
}
