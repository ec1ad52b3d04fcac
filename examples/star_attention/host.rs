//! One host: it encodes its share of the context, then attends queries to what it kept.

use super::error::Result;
use super::model::Llama;
use candle_core::{Device, Tensor, WithDType};
use star_attention::comm::{self, Collective};
use star_attention::cpu::flash::Plan;
use star_attention::merge::Partial;
use star_attention::{
    AttentionConfig, AttentionShape, Element, HostLayout, KvShard, Mask, TensorView, TensorViewMut,
    candle::Borrowed,
};

/// One rank of a group, its KV shards in `T`.
pub struct Host<'a, T, C> {
    model: &'a Llama,
    layout: HostLayout,
    query_host: usize,
    group: C,
    /// One for each layer: the context tokens kept, and on the query host behind them the query and generated tokens.
    shards: Vec<KvShard<T>>,
    workspace: Vec<f32>,
}

impl<'a, T: Element + WithDType, C: Collective> Host<'a, T, C> {
    /// A host with room for its context tokens and, if it is the query host, `query_tokens` more.
    pub fn new(
        model: &'a Llama,
        layout: HostLayout,
        query_host: usize,
        query_tokens: usize,
        group: C,
    ) -> Result<Self> {
        let room = if layout.rank() == query_host { query_tokens } else { 0 };
        let capacity = layout.kept().len() + room;
        let config = &model.config;
        let shards = (0..config.layers)
            .map(|_| KvShard::new(1, config.kv_heads, config.head_dim, capacity))
            .collect::<star_attention::Result<_>>()?;
        Ok(Self { model, layout, query_host, group, shards, workspace: Vec::new() })
    }

    /// Phase 1: runs the local sequence under `mask` once and keeps the KV of the host's own tokens. Calls `tick` after each layer.
    pub fn encode(&mut self, context: &[u32], mask: Mask, tick: impl Fn()) -> Result<()> {
        let Self { model, layout, shards, workspace, .. } = self;
        let tokens: Vec<u32> = layout.tokens().map(|index| context[index]).collect();
        let positions: Vec<usize> = layout.positions().collect();
        let kept = layout.kept();
        let plan = Plan::new(&AttentionConfig::new(mask), &shape(model, tokens.len(), tokens.len()))?;
        workspace.resize(plan.workspace_len(), 0.0);
        model.forward(&tokens, &positions, 0, &mut |layer, [q, k, v]| {
            let (q, k, v) =
                (Borrowed::new("query", &q)?, Borrowed::new("key", &k)?, Borrowed::new("value", &v)?);
            let (q, k, v) = (q.view::<T>()?, k.view::<T>()?, v.view::<T>()?);
            let mut out = vec![T::default(); q.shape().iter().product()];
            let view = TensorViewMut::contiguous("out", &mut out, q.shape())?;
            plan.run(q, k, v, view, None, workspace)?;
            let own = (kept.start, kept.len());
            shards[layer].append(k.narrow(1, own.0, own.1)?, v.narrow(1, own.0, own.1)?)?;
            tick();
            Ok(Tensor::from_vec(out, q.shape().as_slice(), &Device::Cpu)?)
        })?;
        Ok(())
    }

    /// Phase 2 for `tokens` from `position` on: attention over the shards of all hosts. Returns the logits of the last
    /// `logit_rows` tokens on the query host, and no rows on the others.
    pub fn attend(&mut self, tokens: &[u32], position: usize, logit_rows: usize) -> Result<Tensor> {
        let is_query_host = self.is_query_host();
        let Self { model, group, shards, workspace, .. } = self;
        let positions: Vec<usize> = (position..position + tokens.len()).collect();
        // Only the query host's shard holds keys later than a query token; they are its last rows.
        let (mask, new_keys) = if is_query_host { (Mask::Causal, tokens.len()) } else { (Mask::Full, 0) };
        let shape = shape(model, tokens.len(), shards[0].len() + new_keys);
        let plan = Plan::new(&AttentionConfig::new(mask), &shape)?;
        workspace.resize(plan.workspace_len(), 0.0);
        let extents = shape.query_shape();
        let mut partial = vec![0f32; extents.iter().product()];
        let (mut lse, mut merged_lse) = (vec![0f32; shape.lse_len()], vec![0f32; shape.lse_len()]);
        let mut scratch = vec![0f32; comm::merge_scratch_len(extents, group.size())];
        let logit_rows = if is_query_host { logit_rows } else { 0 };
        model.forward(tokens, &positions, logit_rows, &mut |layer, [q, k, v]| {
            let (q, k, v) =
                (Borrowed::new("query", &q)?, Borrowed::new("key", &k)?, Borrowed::new("value", &v)?);
            let shard = &mut shards[layer];
            if is_query_host {
                shard.append(k.view()?, v.view()?)?;
            }
            let view = TensorViewMut::contiguous("partial", &mut partial, extents)?;
            plan.run(q.view::<T>()?, shard.keys(), shard.values(), view, Some(&mut lse), workspace)?;
            let partial = Partial { out: TensorView::contiguous("partial", &partial, extents)?, lse: &lse };
            let mut out = vec![0f32; extents.iter().product()];
            let view = TensorViewMut::contiguous("out", &mut out, extents)?;
            comm::merge(group, &partial, view, &mut merged_lse, &mut scratch)?;
            Ok(Tensor::from_vec(out, extents.as_slice(), &Device::Cpu)?)
        })
    }

    /// The most likely token of the last row of `logits`: chosen on the query host, and sent to all.
    pub fn choose(&self, logits: &Tensor) -> Result<u32> {
        let mut token = [0; 4];
        if self.is_query_host() {
            let last = logits.get(logits.dim(0)? - 1)?;
            token = last.argmax(0)?.to_scalar::<u32>()?.to_le_bytes();
        }
        self.group.broadcast(self.query_host, &mut token)?;
        Ok(u32::from_le_bytes(token))
    }

    /// Forgets query and generated tokens.
    pub fn forget_query(&mut self) {
        let kept = self.layout.kept().len();
        self.shards.iter_mut().for_each(|shard| shard.truncate(kept));
    }

    /// Returns when every host of the group has come here.
    pub fn wait_for_all(&self) -> Result<()> {
        Ok(self.group.all_gather(&[], &mut [])?)
    }

    /// Bytes of the KV held, over all layers.
    pub fn kv_bytes(&self) -> usize {
        self.shards.iter().map(KvShard::bytes).sum()
    }

    /// Whether this host stores the KV of query and generated tokens.
    pub fn is_query_host(&self) -> bool {
        self.layout.rank() == self.query_host
    }

    /// The group this host is a rank of.
    pub fn group(&self) -> &C {
        &self.group
    }
}

fn shape(model: &Llama, query_len: usize, key_len: usize) -> AttentionShape {
    let config = &model.config;
    AttentionShape {
        batch: 1,
        query_len,
        key_len,
        query_heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
    }
}
