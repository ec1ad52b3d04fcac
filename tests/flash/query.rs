//! Phase 2: partial attention over shards, merged, against the dense softmax; and both phases together.

use crate::cases::{Inputs, head_dims};
use crate::common::Layout;
use crate::common::{Rng, Tensor, layouts};
use crate::expected::Expected;
use crate::star::{Context, contexts};
use proptest::prelude::*;
use star_attention::cpu::flash;
use star_attention::merge::{Partial, merge, merge_into};
use star_attention::{AttentionConfig, Element, KvShard, Mask, TensorView, bf16, f16};

/// One shard's share of the attention, in f32 whatever the type of the keys.
struct ShardPartial {
    out: Tensor<f32>,
    lse: Vec<f32>,
}

impl ShardPartial {
    /// Query rows are the last keys of the shard that holds their KV, and see all of any other.
    fn of<T: Element>(
        config: &AttentionConfig,
        query: &Tensor<T>,
        key: TensorView<'_, T>,
        value: TensorView<'_, T>,
        holds_query: bool,
        layout: &Layout,
    ) -> Self {
        let [batch, seq, heads, _] = query.shape();
        let mask = if holds_query { Mask::Causal } else { Mask::Full };
        let config = AttentionConfig { mask, ..*config };
        let mut out = Tensor::new("out", query.shape(), layout, f32::NAN, |_| f32::NAN);
        let mut lse = vec![f32::NAN; batch * heads * seq];
        flash::attention(&config, query.view(), key, value, out.view_mut(), Some(&mut lse)).unwrap();
        Self { out, lse }
    }

    fn partial(&self) -> Partial<'_, f32> {
        Partial { out: self.out.view(), lse: &self.lse }
    }
}

/// Merges n-way and one after another, and compares both with the dense softmax.
fn check_merged(partials: &[ShardPartial], expected: &Expected) -> Result<(), TestCaseError> {
    let [batch, seq, heads, _] = expected.shape;
    // The partials' own rounding, and the merge's.
    let expected = expected.clone().widened(2.0);
    let mut out = Tensor::<f32>::contiguous("out", expected.shape, |_| f32::NAN);
    let mut lse = vec![f32::NAN; batch * heads * seq];
    let all: Vec<_> = partials.iter().map(ShardPartial::partial).collect();
    merge(&all, out.view_mut(), &mut lse).unwrap();
    expected.check_out(out.values())?;
    expected.check_lse(&lse)?;

    let mut out = Tensor::<f32>::contiguous("out", expected.shape, |_| f32::NAN);
    let mut lse = vec![f32::NEG_INFINITY; batch * heads * seq];
    for partial in &all {
        merge_into(out.view_mut(), &mut lse, partial).unwrap();
    }
    // A row that no partial sees is never written; what it holds is then of no account.
    if expected.lse.iter().all(|&lse| lse != f64::NEG_INFINITY) {
        expected.check_out(out.values())?;
    }
    expected.check_lse(&lse)
}

#[derive(Clone, Debug)]
struct Split {
    /// Context keys of each shard.
    shards: Vec<usize>,
    /// Which of them holds the KV of the query tokens.
    query_host: prop::sample::Index,
    query_len: usize,
    batch: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    softcap: Option<f32>,
    /// Factor of the queries: with 1000 the shards' log-sum-exps lie thousands apart.
    factor: f32,
    layout: Layout,
    seed: u64,
}

fn splits() -> impl Strategy<Value = Split> {
    let shard = prop_oneof![1 => Just(0usize), 1 => 1..=4usize, 3 => 0..=120usize];
    let query_len = prop_oneof![1 => Just(1usize), 2 => 1..=16usize, 2 => 1..=130usize];
    let softcap = prop_oneof![4 => Just(None), 1 => (1f32..50.0).prop_map(Some)];
    let factor = prop_oneof![3 => Just(1f32), 1 => Just(30.0), 1 => Just(1000.0)];
    let shards = (prop::collection::vec(shard, 1..=8), any::<prop::sample::Index>());
    (
        shards,
        query_len,
        (1..=2usize, 1..=2usize, 1..=8usize, head_dims()),
        softcap,
        factor,
        layouts(),
        any::<u64>(),
    )
        .prop_map(
            |(
                (shards, query_host),
                query_len,
                (batch, kv_heads, group, head_dim),
                softcap,
                factor,
                layout,
                seed,
            )| {
                // Keeps the oracle's work small.
                let (batch, group) =
                    if head_dim * query_len > 1000 { (1, group.min(2)) } else { (batch, group) };
                Split {
                    shards,
                    query_host,
                    query_len,
                    batch,
                    kv_heads,
                    group,
                    head_dim,
                    softcap,
                    factor,
                    layout,
                    seed,
                }
            },
        )
}

fn merged_shards_equal_dense<T: Element>(split: &Split) -> Result<(), TestCaseError> {
    let Split { query_len, batch, kv_heads, group, head_dim, factor, ref layout, .. } = *split;
    let query_host = split.query_host.index(split.shards.len());
    let context_len: usize = split.shards.iter().sum();
    let mut rng = Rng::new(split.seed);
    let query_shape = [batch, query_len, kv_heads * group, head_dim];
    let key_shape = [batch, context_len + query_len, kv_heads, head_dim];
    let query = Tensor::<T>::contiguous("query", query_shape, |_| factor * rng.normal());
    let key = Tensor::<T>::normal("key", key_shape, &mut rng);
    let value = Tensor::<T>::normal("value", key_shape, &mut rng);
    let config = AttentionConfig { mask: Mask::Causal, softcap: split.softcap, ..Default::default() };
    let expected = Expected::of(&config, &query, &key, &value, false);

    let mut start = 0;
    let mut partials = Vec::new();
    for (rank, &len) in split.shards.iter().enumerate() {
        let holds_query = rank == query_host;
        let mut tokens: Vec<usize> = (start..start + len).collect();
        if holds_query {
            tokens.extend(context_len..context_len + query_len);
        }
        start += len;
        let (key, value) = (key.gather(tokens.clone()), value.gather(tokens));
        partials.push(ShardPartial::of(&config, &query, key.view(), value.view(), holds_query, layout));
    }
    check_merged(&partials, &expected)
}

/// Encodes a random context, keeps the KV of a next layer made from the outputs, and asks random queries of it.
fn both_phases<T: Element>(context: &Context, query_len: usize) -> Result<(), TestCaseError> {
    let Context { layout, batch, kv_heads, head_dim, .. } = *context;
    let len = layout.context_len();
    let mut rng = Rng::new(context.seed);
    let Inputs { query, key, value } = context.inputs::<T>(&mut rng, len, len);
    let asked = context.inputs::<T>(&mut rng, query_len, query_len);

    // Phase 1. What stands for the next layer's keys and values are the outputs of the first query heads.
    let next_shape = [batch, len, kv_heads, head_dim];
    let mut next = Tensor::<T>::contiguous("next", next_shape, |_| f32::NAN);
    let mut shards = Vec::new();
    for host in context.hosts() {
        let [query, key, value] = [&query, &key, &value].map(|x| x.gather(host.tokens()));
        let config = AttentionConfig::new(host.mask());
        let mut out = Tensor::<T>::contiguous("out", query.shape(), |_| f32::NAN);
        flash::attention(&config, query.view(), key.view(), value.view(), out.view_mut(), None).unwrap();
        Expected::of(&config, &query, &key, &value, false).check_out(out.values())?;

        let room = host.kept().len() + if host.rank() == layout.query_host() { query_len } else { 0 };
        let mut shard = KvShard::<T>::new(batch, kv_heads, head_dim, room).unwrap();
        let kept = host.kept();
        let rows = out.view().narrow(1, kept.start, kept.len()).unwrap().narrow(2, 0, kv_heads).unwrap();
        shard.append(value.view().narrow(1, kept.start, kept.len()).unwrap(), rows).unwrap();
        shards.push(shard);
        for (row, token) in host.tokens().enumerate().skip(kept.start) {
            for (b, head, d) in (0..batch)
                .flat_map(|b| (0..kv_heads).flat_map(move |head| (0..head_dim).map(move |d| (b, head, d))))
            {
                next.set([b, token, head, d], out.get([b, row, head, d]));
            }
        }
    }
    let query_host = layout.query_host();
    shards[query_host].append(asked.key.view(), asked.value.view()).unwrap();

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
        .iter()
        .enumerate()
        .map(|(rank, shard)| {
            let holds_query = rank == query_host;
            let layout = &Layout::CONTIGUOUS;
            ShardPartial::of(&config, &asked.query, shard.keys(), shard.values(), holds_query, layout)
        })
        .collect();
    check_merged(&partials, &expected)
}

proptest! {
    #[test]
    fn merged_shards_equal_the_dense_softmax(split in splits(), dtype in 0..4) {
        match dtype {
            0 | 1 => merged_shards_equal_dense::<f32>(&split)?,
            2 => merged_shards_equal_dense::<f16>(&split)?,
            _ => merged_shards_equal_dense::<bf16>(&split)?,
        }
    }

    #[test]
    fn both_phases_equal_their_definition(context in contexts(), query_len in 1..=40usize, dtype in 0..4) {
        match dtype {
            0 | 1 => both_phases::<f32>(&context, query_len)?,
            2 => both_phases::<f16>(&context, query_len)?,
            _ => both_phases::<bf16>(&context, query_len)?,
        }
    }
}
