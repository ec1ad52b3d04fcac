//! Phase 1: one call under the star mask against the paper's definition, which encodes every
//! (anchor, block) pair by itself.

use super::Attend;
use super::cases::Inputs;
use super::expected::Expected;
use crate::common::{Rng, Tensor};
use proptest::prelude::*;
use star_attention::cpu::reference;
use star_attention::{AttentionConfig, Element, Mask, RankLayout, StarLayout};

/// A context over ranks, and the heads of one layer.
#[derive(Clone, Debug)]
pub struct Context {
    pub layout: StarLayout,
    pub batch: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub seed: u64,
}

impl Context {
    pub fn query_heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// Random queries of `query_len` tokens, and keys and values of `key_len`.
    pub fn inputs<T: Element>(&self, rng: &mut Rng, query_len: usize, key_len: usize) -> Inputs<T> {
        let Self { batch, kv_heads, head_dim, .. } = *self;
        Inputs {
            query: Tensor::normal("query", [batch, query_len, self.query_heads(), head_dim], rng),
            key: Tensor::normal("key", [batch, key_len, kv_heads, head_dim], rng),
            value: Tensor::normal("value", [batch, key_len, kv_heads, head_dim], rng),
        }
    }

    pub fn ranks(&self) -> impl Iterator<Item = RankLayout> + '_ {
        (0..self.layout.ranks()).map(|rank| self.layout.rank(rank).unwrap())
    }
}

/// Any length, block and anchor; at most seven ranks, more than there are blocks included.
pub fn contexts(head_dims: impl Strategy<Value = usize>) -> impl Strategy<Value = Context> {
    let block_len = prop_oneof![1 => Just(1usize), 5 => 1..=80usize, 1 => 100..=400usize];
    let anchor_len = (0..4usize, any::<prop::sample::Index>());
    let heads = (1..=2usize, 1..=2usize, 1..=4usize, head_dims);
    (0..=260usize, block_len, anchor_len, 1..=7usize, heads, any::<u64>()).prop_map(
        |(context_len, block_len, (anchor, index), ranks, (batch, kv_heads, group, head_dim), seed)| {
            let anchor_len = match anchor {
                0 => 0,
                1 => block_len,
                _ => index.index(block_len + 1),
            };
            let layout = StarLayout::builder(context_len)
                .block_len(block_len)
                .anchor_len(anchor_len)
                .ranks(ranks)
                .build()
                .unwrap();
            // Keeps the oracle's work small.
            let (batch, group) = if head_dim > 64 { (1, group.min(2)) } else { (batch, group) };
            Context { layout, batch, kv_heads, group, head_dim, seed }
        },
    )
}

/// One way to encode, as the output `[batch, seq, heads, dim]` and log-sum-exp `[batch, heads,
/// seq]`.
type Encode<'a, T, F> = &'a dyn Fn(Mask, &Inputs<T>) -> (Vec<F>, Vec<F>);

fn by_oracle<T: Element>(mask: Mask, Inputs { query, key, value }: &Inputs<T>) -> (Vec<f64>, Vec<f64>) {
    let config = AttentionConfig::new(mask);
    let result = reference::attention(&config, query.view(), key.view(), value.view()).unwrap();
    (result.out, result.lse)
}

fn gather<T: Element>(inputs: &Inputs<T>, tokens: impl Iterator<Item = usize> + Clone) -> Inputs<T> {
    Inputs {
        query: inputs.query.gather(tokens.clone()),
        key: inputs.key.gather(tokens.clone()),
        value: inputs.value.gather(tokens),
    }
}

/// The paper's section 2.1 word for word: block `i` is encoded causally behind a copy of the
/// anchor, whose rows are then dropped. Gives the local sequence's rows: the anchor's, where this
/// rank has one, and each block's.
fn literally<T: Element, F: Copy + Default>(
    layout: &StarLayout,
    local: &RankLayout,
    context: &Inputs<T>,
    encode: Encode<'_, T, F>,
) -> (Vec<F>, Vec<F>) {
    let [batch, _, heads, dim] = context.query.shape();
    let local_len = local.local_len();
    let mut out = vec![F::default(); batch * local_len * heads * dim];
    let mut lse = vec![F::default(); batch * heads * local_len];
    let mut put = |row: usize, anchor_len: usize, rows: usize, (from_out, from_lse): (Vec<F>, Vec<F>)| {
        for b in 0..batch {
            for i in 0..rows - anchor_len {
                let to = ((b * local_len + row + i) * heads) * dim;
                let from = ((b * rows + anchor_len + i) * heads) * dim;
                out[to..to + heads * dim].copy_from_slice(&from_out[from..from + heads * dim]);
                for head in 0..heads {
                    lse[(b * heads + head) * local_len + row + i] =
                        from_lse[(b * heads + head) * rows + anchor_len + i];
                }
            }
        }
    };
    let mut row = local.anchor_tokens().len();
    if row > 0 {
        put(0, 0, row, encode(Mask::Causal, &gather(context, local.anchor_tokens())));
    }
    for block in local.blocks() {
        let start = block * layout.block_len();
        let end = (start + layout.block_len()).min(layout.context_len());
        let anchor_len = if block == 0 { 0 } else { layout.anchor_len() };
        let tokens = (0..anchor_len).chain(start..end);
        let rows = anchor_len + end - start;
        put(row, anchor_len, rows, encode(Mask::Causal, &gather(context, tokens)));
        row += end - start;
    }
    assert_eq!(row, local_len);
    (out, lse)
}

/// One call under the star mask gives what encoding each block by itself gives.
pub fn star_equals_re_encoding<T: Element>(
    by: &impl Attend<T>,
    context: &Context,
) -> Result<(), TestCaseError> {
    let encode = |mask: Mask, inputs: &Inputs<T>| {
        let [batch, seq, heads, _] = inputs.query.shape();
        let mut out = Tensor::<f32>::contiguous("out", inputs.query.shape(), |_| f32::NAN);
        let mut lse = vec![f32::NAN; batch * heads * seq];
        by.attend(&AttentionConfig::new(mask), None, inputs, &mut out, Some(&mut lse));
        (out.values().collect::<Vec<f32>>(), lse)
    };
    let len = context.layout.context_len();
    let inputs = context.inputs::<T>(&mut Rng::new(context.seed), len, len);
    let mut kept = vec![0; len];
    for rank in context.ranks() {
        let local = gather(&inputs, rank.tokens());
        rank.tokens().skip(rank.kept().start).for_each(|token| kept[token] += 1);

        // In f64 the very same terms are summed in the same order.
        let star = by_oracle(rank.mask(), &local);
        let literal = literally(&context.layout, &rank, &inputs, &by_oracle);
        prop_assert!(star == literal, "the oracle's star mask on rank {}", rank.rank());

        let config = AttentionConfig::new(rank.mask());
        let expected = Expected::of(&config, &local.query, &local.key, &local.value, false);
        let (out, lse) = encode(rank.mask(), &local);
        let (literal_out, literal_lse) = literally(&context.layout, &rank, &inputs, &encode);
        expected.check_out(out.iter().copied())?;
        expected.check_lse(&lse)?;
        expected.check_pairs(&out, &literal_out)?;
        expected.check_lse(&literal_lse)?;
    }
    prop_assert!(kept.iter().all(|&times| times == 1), "every context token is kept on one rank");
    Ok(())
}
