//! Batches of sequences by kernels: masks, lengths and places of their own, padding, pages of any
//! length.

use crate::backend::Backend;
use crate::call::{kernel_dims, on_each_device, run_plan};
use crate::common::{Rng, Tensor, aligned};
use crate::engine::Engine;
use crate::properties::backend::On;
use crate::properties::batches::{
    BatchCase, a_request_keeps_its_bits_among_others, batches, each_sequence_of_a_batch_stands_alone,
    keys_in_pages_of_48_and_528_keep_their_bits, many_packed_keys_of_one_head,
};
use crate::properties::cases::{Inputs, RUBBISH};
use proptest::prelude::*;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Device, HalfElement, Properties};
use star_attention::{Batch, Element, Keys, Mask, PlanConfig, Sequence, bf16, f16};

fn stands_alone<B: Engine, T: HalfElement, O: Element>(case: &BatchCase) -> Result<(), TestCaseError> {
    let by = On(B::cuda(case.seed));
    each_sequence_of_a_batch_stands_alone::<T, T, O>(case, |batch, score, inputs, out, lse| {
        let sinks = case.sinks();
        let call = inputs.call(sinks.as_deref(), &None);
        by.run_call(&(*score).into(), batch, call, out, lse).unwrap();
    })
}

/// Output and log-sum-exp of a batch, in memory that held rubbish.
fn attend<B: Backend>(batch: &Batch, inputs: &Inputs<bf16>, splits: bool) -> (Tensor<f32>, Vec<f32>) {
    let backend = B::open(5);
    let plan = Plan::for_batch(&backend.device().properties(), &PlanConfig::new(), batch).unwrap();
    assert_eq!(plan.splits() > 1, splits);
    let mut out = Tensor::contiguous("out", batch.query_shape(), |_| RUBBISH);
    let mut lse = vec![RUBBISH; batch.lse_len()];
    run_plan(&backend, &plan, inputs, &mut out, Some(&mut lse)).unwrap();
    (out, lse)
}

on_each_device! {
    fn sequences_of_a_batch_stand_alone(case in batches(kernel_dims()), dtypes in 0..4usize) {
        let mut case = case;
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        match dtypes {
            0 => stands_alone::<B, f16, f16>(&case)?,
            1 => stands_alone::<B, f16, f32>(&case)?,
            2 => stands_alone::<B, bf16, bf16>(&case)?,
            _ => stands_alone::<B, bf16, f32>(&case)?,
        }
    }

    fn pages_of_hybrid_models_change_no_bit() {
        keys_in_pages_of_48_and_528_keep_their_bits::<_, bf16, bf16>(&On(B::cuda(5)), 64);
        keys_in_pages_of_48_and_528_keep_their_bits::<_, f16, f16>(&On(B::cuda(6)), 32);
    }

    fn a_long_request_keeps_its_bits_among_others() {
        a_request_keeps_its_bits_among_others::<_, bf16, bf16>(&On(B::cuda(7)), 700, 9, 128);
        a_request_keeps_its_bits_among_others::<_, f16, f16>(&On(B::cuda(8)), 700, 3, 256);
    }

    /// Decodes whose keys are split, between rows of padding: the merge leaves these alone.
    fn splits_do_not_write_padding() {
        let mut rng = Rng::new(6);
        let mut tensor = |name, shape| Tensor::<bf16>::normal(name, shape, &mut rng);
        let inputs = Inputs {
            query: tensor("query", [2, 3, 2, 64]),
            key: tensor("key", [1, 3000, 1, 64]),
            value: tensor("value", [1, 3000, 1, 64]),
        };
        let mut batch = Batch::new([2, 3, 2, 64], [1, 3000, 1, 64]).unwrap();
        batch.push(Sequence::new(0, 1..2, Keys::rows(0, 0..2900), Mask::Causal)).unwrap();
        batch.push(Sequence::new(1, 2..3, Keys::rows(0, 7..40), Mask::Full)).unwrap();
        batch.push(Sequence::new(1, 0..1, Keys::rows(0, 5..5), Mask::Full)).unwrap();
        let (out, lse) = attend::<B>(&batch, &inputs, true);
        for (b, row) in [(0, 0), (0, 2), (1, 1)] {
            for head in 0..2 {
                assert!((0..64).all(|d| out.get([b, row, head, d]) == RUBBISH), "{b} {row}");
                assert_eq!(lse[(b * 2 + head) * 3 + row], RUBBISH, "{b} {row}");
            }
        }
        for head in 0..2 {
            assert!((0..64).all(|d| out.get([1, 0, head, d]) == 0.0));
            assert_eq!(lse[(2 + head) * 3], f32::NEG_INFINITY);
            assert!(lse[(2 + head) * 3 + 2] < 33f32.ln() + 6.0 && lse[head * 3 + 1] > 2900f32.ln() - 1.0);
        }
    }

    fn a_batch_without_sequences_writes_nothing() {
        let batch = Batch::new([2, 3, 2, 64], [4, 5, 1, 64]).unwrap();
        let [query, key] = [batch.query_shape(), batch.key_shape()].map(|s| Tensor::contiguous("x", s, |_| 1.0));
        let inputs = Inputs { query, value: key.clone(), key };
        let (out, lse) = attend::<B>(&batch, &inputs, false);
        assert!(out.values().all(|x| x == RUBBISH) && lse.iter().all(|&x| x == RUBBISH));
    }
}

/// 128 query heads on one KV head, and 16,777,216 packed keys of 64 sequences: 2³¹ elements of
/// keys, and positions that no 32-bit product with the head dim holds.
#[test]
fn many_packed_keys_of_one_head_can_be_planned() {
    let batch = many_packed_keys_of_one_head();
    let h100 = Properties::new(132, 228 * 1024, 50 << 20);
    let plan = Plan::for_batch(&h100, &PlanConfig::new(), &batch).unwrap();
    // Each row of each head takes 4 · head_dim operations a key, and sees all keys of its sequence.
    assert_eq!(plan.flops(), 4 * 128 * 128 * 16_777_216);
}
