//! KV heads that are walked together, over many keys: each keeps the bits it has alone.

use crate::common::{Rng, Tensor};
use star_attention::cpu::InstructionSet;
use star_attention::cpu::flash::Plan;
use star_attention::{Batch, Element, Inputs, Keys, Mask, PlanConfig, Sequence, bf16, f16};

/// Enough of these splits, for each KV head, that heads go together.
const SPLIT_KEYS: usize = 96;
const KEYS: usize = 96 * 64;
const PAGE_LEN: usize = 16;
const PREFIX: usize = 50;

/// A long sequence and a short one with a prefix, both in pages in no order.
fn batch(kv_heads: usize, group: usize, head_dim: usize) -> Batch {
    let pages: usize = KEYS / PAGE_LEN + 44;
    let mut tables = (0..pages).map(|page| (page * 37 % pages) as u32);
    let mut batch =
        Batch::new([1, 4, kv_heads * group, head_dim], [pages, PAGE_LEN, kv_heads, head_dim]).unwrap();
    batch = batch.with_prefix(1, PREFIX).unwrap();
    let long: Vec<u32> = tables.by_ref().take(KEYS / PAGE_LEN).collect();
    batch.push(Sequence::new(0, 0..1, Keys::pages(KEYS - 5, long), Mask::Causal)).unwrap();
    let short = Keys::pages(700, tables.collect::<Vec<u32>>());
    let short = Sequence::new(0, 2..4, short, Mask::Full).with_prefix(0, 0..PREFIX);
    batch.push(short).unwrap();
    batch
}

/// Those heads of a tensor.
fn heads<T: Element>(tensor: &Tensor<T>, first: usize, count: usize) -> Tensor<T> {
    let [batch, seq, _, dim] = tensor.shape();
    Tensor::contiguous("part", [batch, seq, count, dim], |[b, s, h, d]| {
        tensor.get([b, s, first + h, d]).to_f32()
    })
}

fn results<T: Element>(
    batch: Batch,
    tensors: &[Tensor<T>; 5],
    instructions: InstructionSet,
) -> (Tensor<f32>, Vec<f32>) {
    let plan = Plan::for_batch(&PlanConfig::new().with_split_keys(SPLIT_KEYS), batch).unwrap();
    let plan = plan.with_instructions(instructions).unwrap();
    let mut out = Tensor::contiguous("out", plan.batch().query_shape(), |_| 0.0);
    let mut lse = vec![0.0; plan.batch().lse_len()];
    let [query, key, value, prefix_key, prefix_value] = tensors.each_ref().map(Tensor::view);
    let inputs = Inputs::new(query, key, value).with_prefix(prefix_key, prefix_value);
    let mut workspace = Vec::with_capacity(plan.workspace_bytes());
    plan.run(inputs, out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
    (out, lse)
}

fn heads_together_keep_their_bits<T: Element>(kv_heads: usize, group: usize, head_dim: usize) {
    let together = batch(kv_heads, group, head_dim);
    let mut rng = Rng::new(kv_heads as u64);
    let shapes = [together.query_shape(), together.key_shape(), together.prefix_shape()];
    let tensors = [0, 1, 1, 2, 2].map(|i| Tensor::<T>::normal("input", shapes[i], &mut rng));
    let [_, rows, query_heads, _] = shapes[0];
    for instructions in InstructionSet::available() {
        let (out, lse) = results(together.clone(), &tensors, instructions);
        for head in 0..kv_heads {
            let own = [group, 1, 1, 1, 1];
            let parts = [0, 1, 2, 3, 4].map(|i| heads(&tensors[i], head * own[i], own[i]));
            let (alone, own_lse) = results(batch(1, group, head_dim), &parts, instructions);
            let same = heads(&out, head * group, group).bits() == alone.bits();
            assert!(same, "{instructions:?}: KV head {head} of {kv_heads} has other bits alone");
            let lse = &lse[head * group * rows..][..group * rows];
            assert!(lse.iter().zip(&own_lse).all(|(a, b)| a.to_bits() == b.to_bits()));
        }
        assert_eq!(lse.len(), query_heads * rows);
    }
}

#[test]
fn heads_that_are_walked_together_keep_their_bits() {
    heads_together_keep_their_bits::<f32>(2, 3, 40);
    heads_together_keep_their_bits::<bf16>(3, 4, 24);
    heads_together_keep_their_bits::<f16>(8, 1, 16);
    // Nine go by threes.
    heads_together_keep_their_bits::<bf16>(9, 2, 8);
    // More than caches hold: the kernel reads ahead.
    heads_together_keep_their_bits::<bf16>(8, 1, 128);
}
