//! Phase 2: partial attention over shards, merged, against the dense softmax; and both phases
//! together.

use super::Attend;
use super::cases::Inputs;
use super::expected::Expected;
use super::star::Context;
use crate::common::{Call, Layout, Rng, Tensor, indices, layouts, sinks};
use proptest::prelude::*;
use star_attention::{AttentionConfig, Element, Mask};

/// One shard's share of the attention, in f32 whatever the type of the keys. Query rows are the
/// last keys of the shard that holds their KV, and see all of any other.
fn partial<T: Element>(
    by: &impl Attend<T>,
    config: &AttentionConfig,
    inputs: &Inputs<T>,
    holds_query: bool,
    layout: &Layout,
) -> (Tensor<f32>, Vec<f32>) {
    let [batch, seq, heads, _] = inputs.query.shape();
    let [.., value_dim] = inputs.value.shape();
    let mask = if holds_query { Mask::Causal } else { Mask::Full };
    let mut out = Tensor::new("out", [batch, seq, heads, value_dim], layout, f32::NAN, |_| f32::NAN);
    let mut lse = vec![f32::NAN; batch * heads * seq];
    by.attend(&AttentionConfig { mask, ..*config }, None, inputs, &mut out, Some(&mut lse));
    (out, lse)
}

/// Merges and compares with the dense softmax.
fn check_merged<T: Element>(
    by: &impl Attend<T>,
    partials: &[(Tensor<f32>, Vec<f32>)],
    sinks: Option<&[f32]>,
    expected: &Expected,
) -> Result<(), TestCaseError> {
    // The partials' own rounding, and the merge's.
    let expected = expected.clone().widened(2.0);
    for (out, lse) in by.merge(partials, sinks) {
        expected.check_out(out.values())?;
        expected.check_lse(&lse)?;
    }
    Ok(())
}

/// A context divided over shards.
#[derive(Clone, Debug)]
pub struct Split {
    /// Context keys of each shard.
    shards: Vec<usize>,
    /// Which of them holds the KV of the query tokens.
    query_rank: prop::sample::Index,
    query_len: usize,
    batch: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    value_dim: usize,
    softcap: Option<f32>,
    /// Factor of the queries: with 1000 the shards' log-sum-exps lie thousands apart.
    factor: f32,
    /// Of the partials.
    pub layout: Layout,
    /// Whether the merge has attention sinks.
    sinks: bool,
    seed: u64,
}

pub fn splits(dims: impl Strategy<Value = (usize, usize)>) -> impl Strategy<Value = Split> {
    let shard = prop_oneof![1 => Just(0usize), 1 => 1..=4usize, 3 => 0..=120usize];
    let query_len = prop_oneof![1 => Just(1usize), 2 => 1..=16usize, 2 => 1..=130usize];
    let softcap = prop_oneof![4 => Just(None), 1 => (1f32..50.0).prop_map(Some)];
    let factor = prop_oneof![3 => Just(1f32), 1 => Just(30.0), 1 => Just(1000.0)];
    let shards = (prop::collection::vec(shard, 1..=8), any::<prop::sample::Index>());
    (
        shards,
        query_len,
        (1..=2usize, 1..=2usize, 1..=8usize, dims),
        softcap,
        factor,
        (layouts(), any::<bool>()),
        any::<u64>(),
    )
        .prop_map(
            |(
                (shards, query_rank),
                query_len,
                (batch, kv_heads, group, (head_dim, value_dim)),
                softcap,
                factor,
                (layout, sinks),
                seed,
            )| {
                // Keeps the oracle's work small.
                let dim = head_dim.midpoint(value_dim);
                let (batch, group) = if dim * query_len > 1000 { (1, group.min(2)) } else { (batch, group) };
                let (query_len, kv_heads) =
                    if dim > 256 { (query_len.min(20), 1) } else { (query_len, kv_heads) };
                Split {
                    shards,
                    query_rank,
                    query_len,
                    batch,
                    kv_heads,
                    group,
                    head_dim,
                    value_dim,
                    softcap,
                    factor,
                    layout,
                    sinks,
                    seed,
                }
            },
        )
}

/// Partials over any shards, merged, are the dense attention: sinks count in the merge alone.
pub fn merged_shards_equal_dense<T: Element>(
    by: &impl Attend<T>,
    split: &Split,
) -> Result<(), TestCaseError> {
    let Split { query_len, batch, kv_heads, group, head_dim, value_dim, factor, ref layout, .. } = *split;
    let query_rank = split.query_rank.index(split.shards.len());
    let context_len: usize = split.shards.iter().sum();
    let mut rng = Rng::new(split.seed);
    let query_shape = [batch, query_len, kv_heads * group, head_dim];
    let key_shape = |dim: usize| [batch, context_len + query_len, kv_heads, dim];
    let query = Tensor::<T>::contiguous("query", query_shape, |_| factor * rng.normal());
    let key = Tensor::<T>::normal("key", key_shape(head_dim), &mut rng);
    let value = Tensor::<T>::normal("value", key_shape(value_dim), &mut rng);
    let config = AttentionConfig { mask: Mask::Causal, softcap: split.softcap, ..Default::default() };
    let sinks = split.sinks.then(|| sinks(kv_heads * group, split.seed));
    let mut call = Call::new(&query, &key, &value);
    call.sinks = sinks.as_deref();
    let expected = Expected::of_call(&config, call, false);

    let mut start = 0;
    let mut partials = Vec::new();
    for (rank, &len) in split.shards.iter().enumerate() {
        let holds_query = rank == query_rank;
        let mut tokens: Vec<usize> = (start..start + len).collect();
        if holds_query {
            tokens.extend(context_len..context_len + query_len);
        }
        start += len;
        let (key, value) = (key.gather(tokens.clone()), value.gather(tokens));
        let inputs = Inputs { query: query.clone(), key, value };
        partials.push(partial(by, &config, &inputs, holds_query, layout));
    }
    check_merged(by, &partials, sinks.as_deref(), &expected)
}

/// Encodes a random context, keeps the KV of a next layer made from the outputs, and asks random
/// queries of it.
pub fn both_phases<T: Element>(
    by: &impl Attend<T>,
    context: &Context,
    query_len: usize,
) -> Result<(), TestCaseError> {
    let Context { layout, batch, kv_heads, head_dim, .. } = *context;
    let len = layout.context_len();
    let mut rng = Rng::new(context.seed);
    let Inputs { query, key, value } = context.inputs::<T>(&mut rng, len, len);
    let asked = context.inputs::<T>(&mut rng, query_len, query_len);

    // Phase 1. The next layer's keys and values are the values, and the outputs of the first query
    // heads.
    let next_shape = [batch, len, kv_heads, head_dim];
    let mut next = Tensor::<T>::contiguous("next", next_shape, |_| f32::NAN);
    let mut shards = Vec::new();
    for local in context.ranks() {
        let [query, key, value] = [&query, &key, &value].map(|x| x.gather(local.tokens()));
        let inputs = Inputs { query, key, value };
        let config = AttentionConfig::new(local.mask());
        let mut out = Tensor::<T>::contiguous("out", inputs.query.shape(), |_| f32::NAN);
        by.attend(&config, None, &inputs, &mut out, None);
        let Inputs { query, key, value } = &inputs;
        Expected::of(&config, query, key, value, false).check_out(out.values())?;

        let tokens: Vec<usize> = local.tokens().collect();
        let kept = local.kept();
        for [b, row, head, d] in indices([batch, kept.len(), kv_heads, head_dim]) {
            let row = kept.start + row;
            next.set([b, tokens[row], head, d], out.get([b, row, head, d]));
        }
        let mut rows = vec![[value.gather(kept.clone()), next.gather(tokens[kept].iter().copied())]];
        if local.rank() == layout.query_rank() {
            rows.push([asked.key.clone(), asked.value.clone()]);
        }
        shards.push(by.shard(&rows));
    }

    // Phase 2, against all of the context's KV and then the queries' own.
    let joined = |context: &Tensor<T>, own: &Tensor<T>| {
        let shape = [batch, len + query_len, kv_heads, head_dim];
        Tensor::<T>::contiguous("joined", shape, |[b, seq, head, d]| {
            let x = if seq < len { context.get([b, seq, head, d]) } else { own.get([b, seq - len, head, d]) };
            x.to_f32()
        })
    };
    let (keys, values) = (joined(&value, &asked.key), joined(&next, &asked.value));
    let config = AttentionConfig::new(Mask::Causal);
    let expected = Expected::of(&config, &asked.query, &keys, &values, false);
    let partials: Vec<_> = shards
        .into_iter()
        .enumerate()
        .map(|(rank, [key, value])| {
            let inputs = Inputs { query: asked.query.clone(), key, value };
            partial(by, &config, &inputs, rank == layout.query_rank(), &Layout::CONTIGUOUS)
        })
        .collect();
    check_merged(by, &partials, None, &expected)
}
