//! Batches by plans: packed, in pages, with prefixes; a plan that is kept over the steps of an
//! engine.

use crate::common::*;
use candle_core::{DType, Device, Tensor};
use star_attention::{
    Append, Batch, Capacity, Error, Inputs, Keys, LEFT_OUT, Mask, PlanConfig, Rotation, Sequence, candle,
};

/// Every kind of batch, by a plan of its own.
pub fn every_sequence_equals_the_oracle_on(device: &Device, dtypes: &[(DType, f32)]) {
    for &(dtype, unit) in dtypes {
        for paged in [true, false] {
            let on = |shape| random(shape).to_dtype(dtype).unwrap().to_device(device).unwrap();
            let keys = if paged { PAGES } else { ROWS };
            let (query, key, value) = (on(QUERY), on(keys), on(keys));
            let (prefix_key, prefix_value) = (on(PREFIX), on(PREFIX));
            let batch = batch(paged);
            let mut plan = candle::Plan::for_batch(device, &PlanConfig::new(), &batch).unwrap();
            let inputs = Inputs::new(&query, &key, &value).with_prefix(&prefix_key, &prefix_value);
            let pair = plan.attend(inputs).unwrap();
            assert_eq!((pair.0.dtype(), pair.1.dtype()), (dtype, DType::F32));
            assert_batch(&batch, inputs, &pair, unit);
            let sinks = sinks(device);
            let with_sinks = inputs.with_sinks(&sinks);
            assert_batch(&batch, with_sinks, &plan.attend(with_sinks).unwrap(), unit);
            let pair = plan.partial(inputs).unwrap();
            assert_eq!((pair.0.dtype(), pair.1.dtype()), (DType::F32, DType::F32));
            assert_batch(&batch, inputs, &pair, unit);

            // Tensors with heads before tokens are read where they lie.
            let [query, key, value] = [&query, &key, &value].map(heads_first);
            let prefix = [&prefix_key, &prefix_value].map(heads_first);
            let inputs = Inputs::new(&query, &key, &value).with_prefix(&prefix[0], &prefix[1]);
            assert_batch(&batch, inputs, &plan.attend(inputs).unwrap(), unit);
        }
    }
}

#[test]
fn every_sequence_equals_the_oracle() {
    every_sequence_equals_the_oracle_on(&Device::Cpu, &DTYPES);
}

/// The keys' own type, or f32 over half-precision keys.
#[test]
fn queries_may_be_of_another_type_than_keys() {
    for (of_query, unit) in DTYPES {
        for (of_keys, unit_of_keys) in DTYPES {
            let query = random(QUERY).to_dtype(of_query).unwrap();
            let [key, value, prefix] = [PAGES, PAGES, PREFIX].map(|x| random(x).to_dtype(of_keys).unwrap());
            let inputs = Inputs::new(&query, &key, &value).with_prefix(&prefix, &prefix);
            let batch = batch(true);
            let mut plan = candle::Plan::for_batch(&Device::Cpu, &PlanConfig::new(), &batch).unwrap();
            let result = plan.attend(inputs);
            if of_query == of_keys || of_query == DType::F32 {
                let (out, lse) = result.unwrap();
                assert_eq!(out.dtype(), of_query);
                assert_batch(&batch, inputs, &(out, lse), unit.max(unit_of_keys));
            } else {
                assert!(matches!(result, Err(Error::DType { argument: "key", .. })), "{result:?}");
            }
        }
    }
}

/// By a plan for the batch, and by one that was made before it.
#[test]
fn values_may_have_another_dim_than_keys() {
    for paged in [true, false] {
        let keys = if paged { PAGES } else { ROWS };
        let of_dim = |[batch, seq, heads, _]: [usize; 4]| random([batch, seq, heads, 20]);
        let (query, key, prefix_key) = (random(QUERY), random(keys), random(PREFIX));
        let (value, prefix_value) = (of_dim(keys), of_dim(PREFIX));
        let batch = batch(paged).with_value_dim(20).unwrap();
        let inputs = Inputs::new(&query, &key, &value).with_prefix(&prefix_key, &prefix_value);
        let capacity = Capacity::new(QUERY, keys, 4, 7).with_value_dim(20).with_prefix(PREFIX[0], PREFIX[1]);
        let capacity = if paged { capacity.with_pages(8) } else { capacity };
        let config = PlanConfig::new();
        let mut made_before = candle::Plan::new(&Device::Cpu, &config, &capacity).unwrap();
        made_before.update(&batch).unwrap();
        for plan in [&mut made_before, &mut candle::Plan::for_batch(&Device::Cpu, &config, &batch).unwrap()] {
            assert_batch(&batch, inputs, &plan.attend(inputs).unwrap(), 1e-5);
            let refused =
                plan.attend(Inputs::new(&query, &key, &key).with_prefix(&prefix_key, &prefix_value));
            assert!(matches!(refused, Err(Error::Shape { argument: "value", .. })), "{refused:?}");
        }
    }
}

/// A batch without padding leaves nothing of what memory held before.
#[test]
fn rows_of_a_full_batch_are_all_written() {
    let (query, key) = (random([2, 3, 4, 32]), random([1, 40, 2, 32]));
    let mut batch = Batch::new(shape(&query), shape(&key)).unwrap();
    for (at, rows, keys) in [(0, 0..3, 0..9), (1, 0..1, 9..9), (1, 1..3, 4..40)] {
        batch.push(Sequence::new(at, rows, Keys::rows(0, keys), Mask::Full)).unwrap();
    }
    let mut plan = candle::Plan::for_batch(&Device::Cpu, &PlanConfig::new(), &batch).unwrap();
    let inputs = Inputs::new(&query, &key, &key);
    assert_batch(&batch, inputs, &plan.attend(inputs).unwrap(), 1e-5);
}

#[test]
fn a_plan_may_move_to_another_thread() {
    let capacity = Capacity::new([1, 2, 2, 16], [1, 8, 2, 16], 1, 2);
    let mut plan = candle::Plan::new(&Device::Cpu, &PlanConfig::new(), &capacity).unwrap();
    std::thread::spawn(move || {
        // No sequence yet: all rows are of none.
        let (query, key) = (random([1, 2, 2, 16]), random([1, 8, 2, 16]));
        let (out, lse) = plan.attend(Inputs::new(&query, &key, &key)).unwrap();
        assert!(flat(&out).iter().all(|&x| x == 0.0));
        assert!(flat(&lse).iter().all(|&x| x == f32::NEG_INFINITY));
    })
    .join()
    .unwrap();
}

const DIM: usize = 64;
const ROTATED: usize = 32;

/// cos and sin `[positions, ROTATED / 2]`.
fn angles(positions: usize) -> [Tensor; 2] {
    let angle = |i: usize| (i / (ROTATED / 2)) as f32 * 0.37f32.powi((i % (ROTATED / 2)) as i32);
    [f32::cos as fn(f32) -> f32, f32::sin].map(|of| {
        let table = (0..positions * ROTATED / 2).map(|i| of(angle(i))).collect();
        Tensor::from_vec(table, (positions, ROTATED / 2), &Device::Cpu).unwrap()
    })
}

/// Keys `[1, n, heads, DIM]` at positions from `start` on, rotated in candle's own words.
fn rotated(key: &Tensor, start: usize, [cos, sin]: &[Tensor; 2]) -> Tensor {
    let key = key.to_dtype(DType::F32).unwrap();
    let n = key.dims()[1];
    let table = |of: &Tensor| of.narrow(0, start, n).unwrap().reshape((1, n, 1, ROTATED / 2)).unwrap();
    let (cos, sin) = (table(cos), table(sin));
    let part = |start, len| key.narrow(3, start, len).unwrap();
    let (x, y) = (part(0, ROTATED / 2), part(ROTATED / 2, ROTATED / 2));
    let times = |a: &Tensor, b: &Tensor| a.broadcast_mul(b).unwrap();
    let first = (times(&x, &cos) - times(&y, &sin)).unwrap();
    let second = (times(&x, &sin) + times(&y, &cos)).unwrap();
    Tensor::cat(&[first, second, part(ROTATED, DIM - ROTATED)], 3).unwrap()
}

/// An engine with two sequences, a prefill and a decode in each step, over one plan and one cache:
/// what was appended is what is attended to.
pub fn a_plan_lasts_over_steps_on(device: &Device, dtypes: &[(DType, f32)]) {
    for &(dtype, unit) in dtypes {
        let zeros = || Tensor::zeros((6, 8, 2, DIM), dtype, device).unwrap();
        let (cache_key, cache_value) = (zeros(), zeros());
        let capacity = Capacity::new([1, 5, 4, DIM], [6, 8, 2, DIM], 2, 4).with_pages(6);
        let mut plan = candle::Plan::new(device, &PlanConfig::new(), &capacity).unwrap();
        let tables = angles(40);
        let [cos, sin] = tables.each_ref().map(|table| table.to_device(device).unwrap());
        let pages: [&[u32]; 2] = [&[4, 0, 2], &[5, 1, 3]];
        let mut held: [Vec<[Tensor; 2]>; 2] = Default::default();
        let mut lens = [0usize; 2];
        for rows in [[4, 1], [1, 4], [1, 1], [3, 2], [1, 0], [4, 1]] {
            let mut batch = Batch::new(capacity.query, capacity.key).unwrap();
            let (mut places, mut positions) = (vec![LEFT_OUT; 5], vec![u32::MAX; 5]);
            let new = [(); 2].map(|()| random([1, 5, 2, DIM]).to_dtype(dtype).unwrap());
            let mut first = 0;
            for (sequence, &count) in rows.iter().enumerate() {
                for row in 0..count {
                    let key = lens[sequence] + row;
                    places[first + row] = pages[sequence][key / 8] * 8 + (key % 8) as u32;
                    positions[first + row] = key as u32;
                }
                let of = |x: &Tensor| x.narrow(1, first, count).unwrap();
                if count > 0 {
                    let key = rotated(&of(&new[0]), lens[sequence], &tables).to_dtype(dtype).unwrap();
                    held[sequence].push([key, of(&new[1])]);
                }
                lens[sequence] += count;
                let keys = Keys::pages(lens[sequence], pages[sequence]);
                batch.push(Sequence::new(0, first..first + count, keys, Mask::Causal)).unwrap();
                first += count;
            }
            plan.update(&batch).unwrap();
            let indices = |of: Vec<u32>| Tensor::from_vec(of, (1, 5), device).unwrap();
            let (places, positions) = (indices(places), indices(positions));
            let [key, value] = new.map(|new| new.to_device(device).unwrap());
            let rotation = Rotation {
                cos: &cos,
                sin: &sin,
                positions: &positions,
                rotated: ROTATED,
                interleaved: false,
            };
            let new = Append::new(&key, &value, &places).with_rotation(rotation);
            candle::append(new, &cache_key, &cache_value).unwrap();
            // What the cache holds is what was appended to it, in order.
            for (held, (pages, len)) in held.iter().zip(pages.iter().zip(lens)) {
                for (index, cache) in [&cache_key, &cache_value].into_iter().enumerate() {
                    let parts: Vec<_> = held.iter().map(|pair| pair[index].clone()).collect();
                    let expected = Tensor::cat(&parts, 1).unwrap();
                    let pages = Tensor::new(*pages, device).unwrap();
                    let rows = cache.index_select(&pages, 0).unwrap().reshape((1, 24, 2, DIM)).unwrap();
                    let rounding = if index == 0 { unit } else { 0.0 };
                    assert_close(&flat(&rows.narrow(1, 0, len).unwrap()), &flat(&expected), rounding);
                }
            }
            // A layer attends by the same plan more than once.
            for _ in 0..2 {
                let query = random(capacity.query).to_dtype(dtype).unwrap().to_device(device).unwrap();
                let inputs = Inputs::new(&query, &cache_key, &cache_value);
                assert_batch(&batch, inputs, &plan.attend(inputs).unwrap(), unit);
            }
        }
    }
}

#[test]
fn a_plan_lasts_over_steps() {
    a_plan_lasts_over_steps_on(&Device::Cpu, &DTYPES);
}

/// A cache inside a larger tensor, with heads before tokens: in place, and nothing around it.
#[test]
fn a_strided_cache_is_written_in_place() {
    let all = [(); 2].map(|()| Tensor::ones((3, 2, 8, 16), DType::F16, &Device::Cpu).unwrap());
    // `[pages 2, page_len 4, kv_heads 2, dim 16]` within `[3, heads, 8, 16]`.
    let caches = all
        .each_ref()
        .map(|all| all.narrow(0, 1, 2).unwrap().narrow(2, 3, 4).unwrap().transpose(1, 2).unwrap());
    let [key, value] = [(); 2].map(|()| random([1, 3, 2, 16]));
    let places = Tensor::new(&[[6u32, LEFT_OUT, 1]], &Device::Cpu).unwrap();
    candle::append(Append::new(&key, &value, &places), &caches[0], &caches[1]).unwrap();
    for (all, new) in all.iter().zip([&key, &value]) {
        let mut expected = vec![1f32; 3 * 2 * 8 * 16];
        // Rows are of f32, the cache of f16: rounded once.
        let new = flat(&new.to_dtype(DType::F16).unwrap());
        for (row, (page, place)) in [(0, (1, 2)), (2, (0, 1))] {
            for head in 0..2 {
                let to = (((1 + page) * 2 + head) * 8 + 3 + place) * 16;
                expected[to..to + 16].copy_from_slice(&new[(row * 2 + head) * 16..][..16]);
            }
        }
        assert_eq!(flat(all), expected);
    }
}

/// Threads that append to one cache and attend to it, each to pages of its own, do not wait for
/// each other for ever, whichever of the two tensors each calls keys.
#[test]
fn threads_share_a_cache() {
    let [one, other] = [(); 2].map(|()| Tensor::zeros((2, 8, 1, 16), DType::F32, &Device::Cpu).unwrap());
    let (done, all_done) = std::sync::mpsc::channel();
    for page in 0..2u32 {
        let (done, one, other) = (done.clone(), one.clone(), other.clone());
        std::thread::spawn(move || {
            let (key, value) = if page == 0 { (one, other) } else { (other, one) };
            let capacity = Capacity::new([1, 1, 2, 16], [2, 8, 1, 16], 1, 1).with_pages(1);
            let mut plan = candle::Plan::new(&Device::Cpu, &PlanConfig::new(), &capacity).unwrap();
            for step in 0..400 {
                let len = step % 8 + 1;
                let mut batch = Batch::new(capacity.query, capacity.key).unwrap();
                let keys = Keys::pages(len, [page]);
                batch.push(Sequence::new(0, 0..1, keys, Mask::Causal)).unwrap();
                plan.update(&batch).unwrap();
                let [query, new] = [[1, 1, 2, 16], [1, 1, 1, 16]].map(random);
                let place = Tensor::new(&[[page * 8 + len as u32 - 1]], &Device::Cpu).unwrap();
                let inputs = Inputs::new(&query, &key, &value);
                // So often that the threads meet.
                for _ in 0..100 {
                    candle::append(Append::new(&new, &new, &place), &key, &value).unwrap();
                }
                let pair = plan.attend(inputs).unwrap();
                assert_batch(&batch, inputs, &pair, 1e-5);
            }
            done.send(()).unwrap();
        });
    }
    for _ in 0..2 {
        let time = std::time::Duration::from_secs(120);
        all_done.recv_timeout(time).expect("a thread waits for ever, or has failed");
    }
}
