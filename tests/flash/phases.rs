//! Packed sequences, the two phases and their merge on the CPU, against their definitions.

use crate::common::Tensor;
use crate::properties::Attend;
use crate::properties::backend::On;
use crate::properties::cases::{Inputs, dims, head_dims};
use crate::properties::packed::{each_sequence_stands_alone, packed};
use crate::properties::query::{both_phases, merged_shards_equal_dense, splits};
use crate::properties::star::{contexts, star_equals_re_encoding};
use proptest::prelude::*;
use star_attention::cpu::flash::Plan;
use star_attention::cpu::{Cpu, InstructionSet};
use star_attention::merge::{Partial, merge, merge_into, merge_with_sinks};
use star_attention::{AttentionConfig, AttentionShape, Element, Keys, KvConfig, KvStore, bf16, f16};

/// Plans, shards and both merges of rank memory, on given instructions.
#[derive(Debug)]
struct Flash(pub InstructionSet);

impl<T: Element> Attend<T> for Flash {
    fn attend<O: Element>(
        &self,
        config: &AttentionConfig,
        offsets: Option<[&[usize]; 2]>,
        Inputs { query, key, value }: &Inputs<T>,
        out: &mut Tensor<O>,
        lse: Option<&mut [f32]>,
    ) {
        let (query, key, value) = (query.view(), key.view(), value.view());
        let shape = AttentionShape::of(&query, &key, &value).unwrap();
        let plan = match offsets {
            None => Plan::new(config, &shape),
            Some([query, key]) => Plan::packed(config, &shape, query, key),
        };
        let plan = plan.and_then(|plan| plan.with_instructions(self.0)).unwrap();
        let inputs = star_attention::Inputs::new(query, key, value);
        let mut workspace = vec![0xffu8; plan.workspace_bytes()];
        plan.run(inputs, out.view_mut(), lse, &mut workspace).unwrap();
        let mut again = out.clone();
        plan.run(inputs, again.view_mut(), None, &mut workspace).unwrap();
        assert_eq!(out.bits(), again.bits(), "a used workspace changes the output");
    }

    /// A store with rows for each sequence.
    fn shard(&self, appended: &[[Tensor<T>; 2]]) -> [Tensor<T>; 2] {
        let cpu = Cpu::new();
        let [batch, _, kv_heads, head_dim] = appended[0][0].shape();
        let len = appended.iter().map(|[key, _]| key.shape()[1]).sum();
        let config = KvConfig::new(kv_heads, head_dim).in_rows(batch, len);
        let mut store = KvStore::<_, T>::new(&cpu, config).unwrap();
        for index in 0..batch {
            let sequence = store.open().unwrap();
            for rows in appended {
                let held = store.len(sequence).unwrap();
                let end = held + rows[0].shape()[1];
                store.extend(&cpu, sequence, end - held).unwrap();
                let own = rows.each_ref().map(|rows| rows.view().narrow(0, index, 1).unwrap());
                store.put(&cpu, 0, sequence, held..end, own).unwrap();
            }
            // Sequences lie in the order in which they were opened.
            assert_eq!(store.keys(sequence).unwrap(), Keys::rows(index, 0..len));
        }
        [store.key(&cpu, 0).unwrap(), store.value(&cpu, 0).unwrap()].map(Tensor::of)
    }

    /// All at once, and one after another.
    fn merge(
        &self,
        partials: &[(Tensor<f32>, Vec<f32>)],
        sinks: Option<&[f32]>,
    ) -> Vec<(Tensor<f32>, Vec<f32>)> {
        let all: Vec<_> = partials.iter().map(|(out, lse)| Partial { out: out.view(), lse }).collect();
        let new = |out: f32, lse: f32| {
            let (like, like_lse) = &partials[0];
            (Tensor::contiguous("out", like.shape(), |_| out), vec![lse; like_lse.len()])
        };
        let finish = |partials: &[Partial<'_, f32>]| {
            let (mut out, mut lse) = new(f32::NAN, f32::NAN);
            match sinks {
                Some(sinks) => merge_with_sinks(partials, sinks, out.view_mut(), &mut lse),
                None => merge(partials, out.view_mut(), &mut lse),
            }
            .unwrap();
            (out, lse)
        };
        let (mut pairwise, mut pairwise_lse) = new(0.0, f32::NEG_INFINITY);
        for partial in &all {
            merge_into(pairwise.view_mut(), &mut pairwise_lse, partial).unwrap();
        }
        vec![finish(&all), finish(&[Partial { out: pairwise.view(), lse: &pairwise_lse }])]
    }
}

/// The backend on each instruction set.
pub fn each_cpu() -> impl Iterator<Item = On<Cpu>> {
    let on = |instructions| On(Cpu::new().with_instructions(instructions).unwrap());
    InstructionSet::available().into_iter().map(on)
}

fn cpu() -> impl Strategy<Value = On<Cpu>> {
    prop::sample::select(InstructionSet::available())
        .prop_map(|instructions| On(Cpu::new().with_instructions(instructions).unwrap()))
}

proptest! {
    #[test]
    fn the_star_mask_equals_re_encoding_each_block(by in cpu(), context in contexts(head_dims()), dtype in 0..4) {
        match dtype {
            0 | 1 => star_equals_re_encoding::<f32>(&by, &context)?,
            2 => star_equals_re_encoding::<f16>(&by, &context)?,
            _ => star_equals_re_encoding::<bf16>(&by, &context)?,
        }
    }

    #[test]
    fn merged_shards_equal_the_dense_softmax(by in cpu(), split in splits(dims()), dtype in 0..4) {
        match dtype {
            0 | 1 => merged_shards_equal_dense::<f32>(&by, &split)?,
            2 => merged_shards_equal_dense::<f16>(&by, &split)?,
            _ => merged_shards_equal_dense::<bf16>(&by, &split)?,
        }
    }

    #[test]
    fn both_phases_equal_their_definition(
        by in cpu(),
        context in contexts(head_dims()),
        query_len in 1..=40usize,
        dtype in 0..4,
    ) {
        match dtype {
            0 | 1 => both_phases::<f32>(&by, &context, query_len)?,
            2 => both_phases::<f16>(&by, &context, query_len)?,
            _ => both_phases::<bf16>(&by, &context, query_len)?,
        }
    }

    #[test]
    fn both_phases_without_a_backend(
        instructions in prop::sample::select(InstructionSet::available()),
        context in contexts(head_dims()),
        query_len in 1..=40usize,
        bf in any::<bool>(),
    ) {
        let by = Flash(instructions);
        if bf {
            both_phases::<bf16>(&by, &context, query_len)?;
        } else {
            both_phases::<f32>(&by, &context, query_len)?;
        }
    }

    #[test]
    fn packed_sequences_stand_alone(by in cpu(), packed in packed(dims()), dtype in 0..4) {
        match dtype {
            0 | 1 => each_sequence_stands_alone::<f32, f32>(&by, &packed)?,
            2 => each_sequence_stands_alone::<f16, f32>(&by, &packed)?,
            _ => each_sequence_stands_alone::<bf16, bf16>(&by, &packed)?,
        }
    }
}
