//! Sequences whose first keys lie in prefix tensors: the bits of the same sequences without.

use crate::backend::Backend;
use crate::call::{kernel_dims, on_each_device, run_call, run_plan};
use crate::common::{Rng, Tensor, aligned, named};
use crate::properties::batches::batches;
use crate::properties::cases::{Inputs, RUBBISH};
use proptest::prelude::*;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Device, HEAD_DIMS, HalfElement};
use star_attention::{Batch, Keys, Mask, PlanConfig, Sequence, bf16};

/// Calls on a batch whose keys are rows, and on the same with the first `cuts[i]` keys of sequence
/// i (at most all) in prefix tensors and the others in rows or, where given, in pages of
/// `page_len`. What no one may read is NaN.
pub fn prefixes_change_nothing<B: Backend, T: HalfElement>(
    rows: &Batch,
    inputs: &Inputs<T>,
    cuts: &[usize],
    page_len: Option<usize>,
) {
    let (backend, config) = (B::open(cuts.len() as u64), PlanConfig::new());
    let [_, seq, kv_heads, dim] = rows.key_shape();
    let properties = backend.device().properties();
    let results = |run: &dyn Fn(&mut Tensor<f32>, &mut [f32])| {
        let mut out = Tensor::contiguous("out", rows.out_shape(), |_| RUBBISH);
        let mut lse = vec![RUBBISH; rows.lse_len()];
        run(&mut out, &mut lse);
        (out.bits(), lse.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let plan = Plan::for_batch(&properties, &config, rows).unwrap();
    let expected = results(&|out, lse| run_plan(&backend, &plan, inputs, out, Some(lse)).unwrap());

    // Where each key of the main tensors comes from.
    let (mut main, mut in_prefix, mut places) = (vec![], vec![false; seq], vec![]);
    for (sequence, &cut) in rows.sequences().iter().zip(cuts) {
        let Keys::Rows { rows, .. } = &sequence.keys else { panic!("keys in rows") };
        let cut = rows.start + cut.min(rows.len());
        (rows.start..cut).for_each(|key| in_prefix[key] = true);
        let start = main.len();
        main.extend((cut..rows.end).map(Some));
        let end = main.len();
        let keys = match page_len {
            None => Keys::rows(0, start..end),
            Some(page_len) => {
                main.resize(end.next_multiple_of(page_len), None);
                let pages = (start / page_len..main.len() / page_len).map(|page| page as u32);
                Keys::pages(end - start, pages.collect::<Vec<u32>>())
            }
        };
        places.push((keys, rows.start..cut));
    }
    let shape = page_len.map_or([1, main.len(), kv_heads, dim], |len| [main.len() / len, len, kv_heads, dim]);
    let batch = Batch::new(rows.query_shape(), shape).unwrap().with_value_dim(rows.value_dim()).unwrap();
    let mut batch = batch.with_prefix(1, seq).unwrap();
    for (sequence, (keys, prefix)) in rows.sequences().iter().zip(places) {
        let Sequence { batch: b, rows, mask, .. } = sequence.clone();
        batch.push(Sequence::new(b, rows, keys, mask).with_prefix(0, prefix)).unwrap();
    }
    let [key, value] = [&inputs.key, &inputs.value].map(|from| {
        let shape = [shape[0], shape[1], kv_heads, from.shape()[3]];
        Tensor::contiguous("main", shape, |[b, s, head, d]| {
            main[b * shape[1] + s].map_or(f32::NAN, |key| from.get([0, key, head, d]).to_f32())
        })
    });
    let [prefix_key, prefix_value] = [&inputs.key, &inputs.value].map(|from| {
        Tensor::contiguous("prefix", from.shape(), |[_, key, head, d]| {
            if in_prefix[key] { from.get([0, key, head, d]).to_f32() } else { f32::NAN }
        })
    });
    let inputs = Inputs { query: inputs.query.clone(), key, value };
    let plan = Plan::for_batch(&properties, &config, &batch).unwrap();
    let got = results(&|out, lse| {
        let call = inputs.call(None, &None).with_prefix(&prefix_key, &prefix_value);
        run_call(&backend, &plan, call, out, Some(lse)).unwrap();
    });
    assert!(got == expected, "other bits with a prefix");
}

on_each_device! {
    fn prefixes_change_no_bit(
        case in batches(kernel_dims()),
        cuts in prop::collection::vec(prop_oneof![Just(0usize), 0..60usize, 0..900usize], 6),
        page_len in prop::option::of(1..40usize),
    ) {
        let mut case = case;
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        let batch = case.batch();
        let (rows, inputs) = case.in_rows(&batch, &case.inputs::<bf16, bf16>(&batch));
        prefixes_change_nothing::<B, bf16>(&rows, &inputs, &cuts, page_len);
    }

    /// Several tiles of keys in the prefix and several behind it, by each kernel.
    fn whole_tiles_of_prefixes_change_no_bit() {
        let star = Mask::Star { anchor_len: 290, block_len: 300, first_block_len: 290, left: None };
        for dim in HEAD_DIMS {
            for (mask, query_len) in [(Mask::Causal, 3), (Mask::Causal, 50), (star.clone(), 330), (Mask::Full, 70)] {
                let (query, key) = ([1, query_len, 1, dim], [1, 620, 1, dim]);
                let mut rng = Rng::new(dim as u64);
                let mut tensor = |name, shape| Tensor::<bf16>::normal(name, shape, &mut rng);
                let inputs = Inputs { query: tensor("query", query), key: tensor("key", key), value: tensor("value", key) };
                let mut batch = Batch::new(query, key).unwrap();
                batch.push(Sequence::new(0, 0..query_len, Keys::rows(0, 0..620), mask)).unwrap();
                for (cut, page_len) in [(290, None), (256, None), (300, Some(16)), (620, None)] {
                    prefixes_change_nothing::<B, bf16>(&batch, &inputs, &[cut], page_len);
                }
            }
        }
    }

    fn a_prefix_that_is_missing_or_of_another_shape_is_an_error() {
        let (backend, shape) = (B::open(0), [1, 4, 1, 64]);
        let mut batch = Batch::new(shape, shape).unwrap().with_prefix(2, 3).unwrap();
        batch.push(Sequence::new(0, 0..2, Keys::rows(0, 0..4), Mask::Full).with_prefix(1, 0..2)).unwrap();
        let plan = Plan::for_batch(&backend.device().properties(), &PlanConfig::new(), &batch).unwrap();
        let tensor = |shape| Tensor::<bf16>::contiguous("x", shape, |_| 1.0);
        let inputs = Inputs { query: tensor(shape), key: tensor(shape), value: tensor(shape) };
        let mut out = Tensor::<f32>::contiguous("out", shape, |_| RUBBISH);
        let mut run = |prefix: Option<[[usize; 4]; 2]>| {
            let prefix = prefix.map(|shapes| shapes.map(tensor));
            let mut call = inputs.call(None, &None);
            call.prefix = prefix.as_ref().map(|[key, value]| [key, value]);
            let result = run_call(&backend, &plan, call, &mut out, None);
            assert_eq!(result.is_err(), out.values().all(|x| x == RUBBISH));
            result
        };
        assert_eq!(named(run(None).unwrap_err()), ("value", "prefix"));
        assert_eq!(named(run(Some([[2, 3, 1, 64], [2, 2, 1, 64]])).unwrap_err()), ("shape", "prefix"));
        assert_eq!(named(run(Some([[1, 3, 1, 64]; 2])).unwrap_err()), ("shape", "prefix"));
        run(Some([[2, 3, 1, 64]; 2])).unwrap();
    }
}
