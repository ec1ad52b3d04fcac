//! Sequences of different lengths in one call.

use super::Attend;
use super::cases::{Inputs, RUBBISH, configs};
use super::expected::Expected;
use crate::common::{Layout, Rng, Tensor, extents, layouts};
use proptest::prelude::*;
use star_attention::{AttentionConfig, AttentionShape, Element};

/// Sequences one after another.
#[derive(Clone, Debug)]
pub struct Packed {
    /// Query rows and keys of each sequence.
    pub lens: Vec<(usize, usize)>,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    value_dim: usize,
    pub config: AttentionConfig,
    /// Of q, k, v and out.
    pub layouts: [Layout; 4],
    seed: u64,
}

impl Packed {
    pub fn query_offsets(&self) -> Vec<usize> {
        offsets(self.lens.iter().map(|lens| lens.0))
    }

    pub fn key_offsets(&self) -> Vec<usize> {
        offsets(self.lens.iter().map(|lens| lens.1))
    }

    pub fn shape(&self) -> AttentionShape {
        extents(
            [1, self.lens.iter().map(|lens| lens.0).sum(), self.lens.iter().map(|lens| lens.1).sum()],
            [self.kv_heads * self.group, self.kv_heads],
            [self.head_dim, self.value_dim],
        )
    }

    pub fn inputs<T: Element>(&self) -> Inputs<T> {
        let (shape, mut rng) = (self.shape(), Rng::new(self.seed));
        let [query, key, value, _] = &self.layouts;
        let mut tensor = |name, shape, layout| Tensor::new(name, shape, layout, f32::NAN, |_| rng.normal());
        Inputs {
            query: tensor("query", shape.query_shape(), query),
            key: tensor("key", shape.key_shape(), key),
            value: tensor("value", shape.value_shape(), value),
        }
    }

    /// The output tensor, holding rubbish.
    pub fn output<O: Element>(&self) -> Tensor<O> {
        Tensor::new("out", self.shape().out_shape(), &self.layouts[3], RUBBISH, |_| f32::NAN)
    }
}

fn offsets(lens: impl Iterator<Item = usize>) -> Vec<usize> {
    let ends = lens.scan(0, |end, len| {
        *end += len;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// Up to seven sequences, none among them; one in three lengths is 0 or 1.
pub fn packed(dims: impl Strategy<Value = (usize, usize)>) -> impl Strategy<Value = Packed> {
    let len = || prop_oneof![1 => 0..=1usize, 2 => 0..=90usize];
    let long = prop_oneof![3 => Just((0, 0)), 1 => (0..=3usize, 300..=900usize)];
    let lens = (prop::collection::vec((len(), len()), 0..=6), long).prop_map(|(mut lens, long)| {
        if long.1 > 0 {
            lens.push(long);
        }
        lens
    });
    let layouts = [layouts(), layouts(), layouts(), layouts()];
    (lens, 1..=3usize, 1..=4usize, dims, configs(), layouts, any::<u64>()).prop_map(
        |(mut lens, kv_heads, group, (head_dim, value_dim), config, layouts, seed)| {
            // Keeps the oracle's work small.
            let (kv_heads, group) = match head_dim.midpoint(value_dim) {
                0..=64 => (kv_heads, group),
                65..=256 => (1 + kv_heads % 2, group.min(2)),
                _ => {
                    lens.truncate(2);
                    (1, group.min(2))
                }
            };
            Packed { lens, kv_heads, group, head_dim, value_dim, config, layouts, seed }
        },
    )
}

/// Each of the sequences gives what it gives alone.
pub fn each_sequence_stands_alone<T: Element, O: Element>(
    by: &impl Attend<T>,
    packed: &Packed,
) -> Result<(), TestCaseError> {
    let (query_offsets, key_offsets, shape) = (packed.query_offsets(), packed.key_offsets(), packed.shape());
    let inputs = packed.inputs::<T>();
    let mut out = packed.output::<O>();
    let mut lse = vec![RUBBISH; shape.lse_len()];
    let offsets = Some([&query_offsets[..], &key_offsets]);
    by.attend(&packed.config, offsets, &inputs, &mut out, Some(&mut lse));

    let Inputs { query, key, value } = &inputs;
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

    let mut again = packed.output::<O>();
    by.attend(&packed.config, offsets, &inputs, &mut again, None);
    prop_assert_eq!(out.bits(), again.bits(), "no log-sum-exp changes the output");
    Ok(())
}

/// What is not finite in the keys and values of one of the sequences changes no bit of another's
/// rows.
pub fn a_sequence_of_nan_stays_alone<T: Element, O: Element>(
    by: &impl Attend<T>,
    packed: &Packed,
    index: prop::sample::Index,
    value: f32,
) -> Result<(), TestCaseError> {
    if packed.lens.is_empty() {
        return Ok(());
    }
    let (query_offsets, key_offsets) = (packed.query_offsets(), packed.key_offsets());
    let hit = index.index(packed.lens.len());
    let run = |inputs: &Inputs<T>| {
        let mut out = packed.output::<O>();
        by.attend(&packed.config, Some([&query_offsets, &key_offsets]), inputs, &mut out, None);
        out
    };
    let mut inputs = packed.inputs::<T>();
    let clean = run(&inputs);
    inputs.poison(key_offsets[hit]..key_offsets[hit + 1], value);
    let poisoned = run(&inputs);
    for (sequence, rows) in query_offsets.windows(2).enumerate().filter(|(sequence, _)| *sequence != hit) {
        let [clean, poisoned] = [&clean, &poisoned].map(|out| out.gather(rows[0]..rows[1]).bits());
        prop_assert!(clean == poisoned, "sequence {sequence} sees what is not finite in sequence {hit}");
    }
    Ok(())
}
