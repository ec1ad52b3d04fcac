//! Sequences of different lengths in one call.

use crate::cases::{RUBBISH, configs, head_dims};
use crate::common::{Layout, Rng, Tensor, layouts};
use crate::expected::Expected;
use proptest::prelude::*;
use star_attention::cpu::InstructionSet;
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Element, bf16, f16};

#[derive(Clone, Debug)]
struct Packed {
    /// Query rows and keys of each sequence.
    lens: Vec<(usize, usize)>,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    config: AttentionConfig,
    layouts: [Layout; 4],
    instructions: InstructionSet,
    seed: u64,
}

fn offsets(lens: impl Iterator<Item = usize>) -> Vec<usize> {
    let ends = lens.scan(0, |end, len| {
        *end += len;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// Up to seven sequences, none among them; one in three lengths is 0 or 1.
fn packed() -> impl Strategy<Value = Packed> {
    let len = || prop_oneof![1 => 0..=1usize, 2 => 0..=90usize];
    let long = prop_oneof![3 => Just((0, 0)), 1 => (0..=3usize, 300..=900usize)];
    let lens = (prop::collection::vec((len(), len()), 0..=6), long).prop_map(|(mut lens, long)| {
        if long.1 > 0 {
            lens.push(long);
        }
        lens
    });
    let layouts = [layouts(), layouts(), layouts(), layouts()];
    (
        lens,
        1..=3usize,
        1..=4usize,
        head_dims(),
        configs(),
        (layouts, prop::sample::select(InstructionSet::available())),
        any::<u64>(),
    )
        .prop_map(|(lens, kv_heads, group, head_dim, config, (layouts, instructions), seed)| {
            // Keeps the oracle's work small.
            let (kv_heads, group) =
                if head_dim > 64 { (1 + kv_heads % 2, group.min(2)) } else { (kv_heads, group) };
            Packed { lens, kv_heads, group, head_dim, config, layouts, instructions, seed }
        })
}

fn each_sequence_stands_alone<T: Element, O: Element>(packed: &Packed) -> Result<(), TestCaseError> {
    let query_offsets = offsets(packed.lens.iter().map(|lens| lens.0));
    let key_offsets = offsets(packed.lens.iter().map(|lens| lens.1));
    let shape = AttentionShape {
        batch: 1,
        query_len: *query_offsets.last().unwrap(),
        key_len: *key_offsets.last().unwrap(),
        query_heads: packed.kv_heads * packed.group,
        kv_heads: packed.kv_heads,
        head_dim: packed.head_dim,
    };
    let mut rng = Rng::new(packed.seed);
    let [query_layout, key_layout, value_layout, out_layout] = &packed.layouts;
    let mut tensor = |name, shape, layout| Tensor::<T>::new(name, shape, layout, f32::NAN, |_| rng.normal());
    let query = tensor("query", shape.query_shape(), query_layout);
    let key = tensor("key", shape.key_shape(), key_layout);
    let value = tensor("value", shape.key_shape(), value_layout);
    let mut out = Tensor::<O>::new("out", shape.query_shape(), out_layout, RUBBISH, |_| f32::NAN);
    let mut lse = vec![RUBBISH; shape.lse_len()];

    let plan = Plan::packed(&packed.config, &shape, &query_offsets, &key_offsets)
        .and_then(|plan| plan.with_instructions(packed.instructions))
        .unwrap();
    let mut workspace = vec![f32::NAN; plan.workspace_len()];
    plan.run(query.view(), key.view(), value.view(), out.view_mut(), Some(&mut lse), &mut workspace).unwrap();

    for (rows, keys) in query_offsets.windows(2).zip(key_offsets.windows(2)) {
        let (rows, keys) = (rows[0]..rows[1], keys[0]..keys[1]);
        let (query, key, value) = (query.gather(rows.clone()), key.gather(keys.clone()), value.gather(keys));
        let expected = Expected::of(&packed.config, &query, &key, &value, false);
        expected.check_out(out.gather(rows.clone()).values())?;
        let lse: Vec<f32> =
            lse.chunks(shape.query_len.max(1)).flat_map(|head| &head[rows.clone()]).copied().collect();
        expected.check_lse(&lse)?;
    }
    prop_assert!(out.padding_is(RUBBISH), "wrote between the rows of out");

    let mut again = Tensor::<O>::new("out", shape.query_shape(), out_layout, RUBBISH, |_| f32::NAN);
    plan.run(query.view(), key.view(), value.view(), again.view_mut(), None, &mut workspace).unwrap();
    prop_assert_eq!(out.bits(), again.bits(), "a used workspace, or no log-sum-exp, changes the output");
    Ok(())
}

proptest! {
    #[test]
    fn packed_sequences_stand_alone(packed in packed(), dtype in 0..4) {
        match dtype {
            0 | 1 => each_sequence_stands_alone::<f32, f32>(&packed)?,
            2 => each_sequence_stands_alone::<f16, f32>(&packed)?,
            _ => each_sequence_stands_alone::<bf16, bf16>(&packed)?,
        }
    }
}
