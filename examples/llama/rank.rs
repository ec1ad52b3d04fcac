//! One rank: it encodes its share of the context, then attends queries to what it kept.

use super::error::{Error, Result};
use super::model::Llama;
use super::run::Scheme;
use candle_core::{Device, Tensor, WithDType};
use star_attention::comm::{AnchorKv, Collective, MergePlan, anchor_scratch_len, share_anchor};
use star_attention::cpu::{Cpu, flash::Plan};
use star_attention::{
    Append, AttentionConfig, AttentionShape, BlockList, Element, Inputs, KvConfig, KvStore, Mask, RankLayout,
    SequenceId, StepLayout, TensorView, TensorViewMut, candle::Borrowed,
};
use std::ops::Range;

/// Where attention runs, and keys and values lie.
static CPU: Cpu = Cpu::new();

/// One rank of a group, its KV shard in `T`.
pub struct Rank<'a, T: Element, C: ?Sized> {
    model: &'a Llama,
    scheme: Scheme,
    layout: RankLayout,
    group: &'a C,
    /// Of one sequence: the context tokens kept, and behind them query and generated tokens.
    shard: KvStore<Cpu, T>,
    sequence: SequenceId,
    workspace: Vec<u8>,
    checksum: u64,
}

impl<'a, T: Element + WithDType, C: Collective + ?Sized> Rank<'a, T, C> {
    /// A rank with room for its context tokens and its share of `tokens` of query and generation,
    /// in steps of at most `step`. The scheme is one that was [`checked`](Scheme::checked).
    ///
    /// # Errors
    /// Those of a rank that the layout has not.
    pub fn new(model: &'a Llama, scheme: Scheme, tokens: usize, step: usize, group: &'a C) -> Result<Self> {
        let layout = scheme.layout.rank(group.rank())?;
        let capacity = layout.room(tokens, step);
        let config = &model.config;
        let room =
            KvConfig::new(config.kv_heads, config.head_dim).with_layers(config.layers).in_rows(1, capacity);
        let mut shard = KvStore::new(&CPU, room)?;
        let sequence = shard.open()?;
        Ok(Self {
            model,
            scheme,
            layout,
            group,
            shard,
            sequence,
            workspace: Vec::new(),
            checksum: 0xcbf2_9ce4_8422_2325,
        })
    }

    /// Phase 1: runs the local sequence under `mask` once and keeps the KV of the rank's own
    /// tokens. Calls `tick` after each layer.
    pub fn encode(&mut self, context: &[u32], mask: Mask, tick: impl Fn()) -> Result<()> {
        let mut anchor = Anchor::new(self.model, &self.scheme, &self.layout)?;
        let Self { model, scheme, layout, group, shard, sequence, workspace, .. } = self;
        let (mut tokens, mut positions) = match scheme.anchor {
            AnchorKv::Encoded => {
                scheme.anchor_block.rows(&scheme.layout, layout, context, model.config.vocab_size)
            }
            AnchorKv::Received => (Vec::new(), Vec::new()),
        };
        tokens.extend(&context[layout.own_tokens()]);
        positions.extend(layout.own_tokens());
        let shape = shape(model, tokens.len(), layout.local_len());
        let plans = Plans::new(model, &shape, &mask, |window| {
            // What fits the window is not cut.
            let fits = layout.local_len() <= window;
            Ok(if fits { mask.clone() } else { mask.clone().with_sliding_window(window)? })
        })?;
        workspace.reserve(plans.workspace_bytes());
        let kept = layout.kept();
        shard.extend(&CPU, *sequence, kept.len())?;
        let mut layers = 0;
        model.forward(&tokens, &positions, 0, &mut |layer, [q, k, v]| {
            let (q, k, v) =
                (Borrowed::new("query", &q)?, Borrowed::new("key", &k)?, Borrowed::new("value", &v)?);
            let (q, mut k, mut v) = (q.view::<T>()?, k.view::<T>()?, v.view::<T>()?);
            if scheme.anchor == AnchorKv::Received {
                (k, v) = anchor.share(*group, k, v)?;
            }
            let mut out = vec![T::default(); q.shape().iter().product()];
            let view = TensorViewMut::contiguous("out", &mut out, q.shape())?;
            plans.of(model, layer).run(Inputs::new(q, k, v), view, None, &mut *workspace)?;
            let own = [k.narrow(1, kept.start, kept.len())?, v.narrow(1, kept.start, kept.len())?];
            shard.put(&CPU, layer, *sequence, 0..kept.len(), own)?;
            tick();
            layers += 1;
            Ok(Tensor::from_vec(out, q.shape().as_slice(), &Device::Cpu)?)
        })?;
        // A rank without tokens runs no layer, and takes part in their messages all the same.
        for _ in layers..model.config.layers {
            if scheme.anchor == AnchorKv::Received {
                anchor.pass(*group)?;
            }
            tick();
        }
        Ok(())
    }

    /// Phase 2 for `tokens` that come behind `before` others of query and generation: attention
    /// over the shards of all ranks. Returns the logits of the last `logit_rows` tokens on the
    /// query rank, and no rows on the others.
    pub fn attend(&mut self, tokens: &[u32], before: usize, logit_rows: usize) -> Result<Tensor> {
        let is_query_rank = self.is_query_rank();
        let Self { model, layout, group, shard, sequence, workspace, checksum, .. } = self;
        let step = layout.step(before..before + tokens.len());
        let positions: Vec<usize> = step.positions().collect();
        let new = shard.begin_step(&CPU, *sequence, &step)?;
        let shape = shape(model, tokens.len(), new.attended);
        let mask = step.mask();
        let plans = Plans::new(model, &shape, &mask, |window| window_mask(layout, &step, window))?;
        let extents = shape.query_shape();
        let mut merge = MergePlan::<f32, f32>::new(extents, group.size(), &group.link())?.on_cpu();
        workspace.reserve(plans.workspace_bytes());
        let logit_rows = if is_query_rank { logit_rows } else { 0 };
        let logits = model.forward(tokens, &positions, logit_rows, &mut |layer, [q, k, v]| {
            let (q, k, v) =
                (Borrowed::new("query", &q)?, Borrowed::new("key", &k)?, Borrowed::new("value", &v)?);
            let (q, k, v) = (q.view::<T>()?, k.view::<T>()?, v.view::<T>()?);
            shard.append(&CPU, layer, Append::new(k, v, &new.appended_places))?;
            let [key, value] = shard.rows_of(&CPU, layer, *sequence, new.attended)?;
            // Into the message itself.
            let (partial, lse) = merge.partial()?;
            plans.of(model, layer).run(Inputs::new(q, key, value), partial, Some(lse), &mut *workspace)?;
            if !step.keeps_appended() {
                shard.append(&CPU, layer, Append::new(k, v, &new.kept_places))?;
            }
            let mut out = vec![0f32; extents.iter().product()];
            let view = TensorViewMut::contiguous("out", &mut out, extents)?;
            merge.run(*group, view, None)?;
            *checksum = out.iter().fold(*checksum, |sum, x| fold(sum, u64::from(x.to_bits())));
            Ok(Tensor::from_vec(out, extents.as_slice(), &Device::Cpu)?)
        })?;
        shard.truncate(*sequence, new.kept)?;
        Ok(logits)
    }

    /// The most likely token of the last row of `logits`: chosen on the query rank, and sent to
    /// all.
    pub fn choose(&self, logits: &Tensor) -> Result<u32> {
        let mut token = [0; 4];
        if self.is_query_rank() {
            let last = logits.get(logits.dim(0)? - 1)?;
            token = last.argmax(0)?.to_scalar::<u32>()?.to_le_bytes();
        }
        self.group.broadcast(self.scheme.layout.query_rank(), &mut token)?;
        Ok(u32::from_le_bytes(token))
    }

    /// Forgets query and generated tokens.
    pub fn forget_query(&mut self) -> Result<()> {
        Ok(self.shard.truncate(self.sequence, self.layout.kept().len())?)
    }

    /// Returns when every rank of the group has come here.
    pub fn wait_for_all(&self) -> Result<()> {
        Ok(self.group.all_gather(&[], &mut [])?)
    }

    /// Bytes of the KV held, over all layers.
    pub fn kv_bytes(&self) -> Result<usize> {
        Ok(self.shard.len(self.sequence)? * self.shard.row_bytes())
    }

    /// Whether this rank computes the logits.
    pub fn is_query_rank(&self) -> bool {
        self.layout.rank() == self.scheme.layout.query_rank()
    }

    /// Of the bits of all merged outputs so far: the same on every rank.
    pub fn checksum(&self) -> u64 {
        self.checksum
    }

    /// The group this rank is a rank of.
    pub fn group(&self) -> &C {
        self.group
    }
}

/// Plans for the layers without a window, and for those with one.
struct Plans {
    full: Plan,
    windowed: Option<Plan>,
}

impl Plans {
    /// Plans under `mask`, and under what `windowed` makes of a window.
    fn new(
        model: &Llama,
        shape: &AttentionShape,
        mask: &Mask,
        windowed: impl FnOnce(usize) -> Result<Mask>,
    ) -> Result<Self> {
        let plan = |mask| Ok::<_, Error>(Plan::new(&attention(model, mask), shape)?);
        let window = model.config.windowed.as_ref().map(|windowed| windowed.window);
        Ok(Self {
            full: plan(mask.clone())?,
            windowed: window.map(|window| plan(windowed(window)?)).transpose()?,
        })
    }

    fn of(&self, model: &Llama, layer: usize) -> &Plan {
        let windowed = self.windowed.as_ref().filter(|_| model.config.window(layer).is_some());
        windowed.unwrap_or(&self.full)
    }

    fn workspace_bytes(&self) -> usize {
        let windowed = self.windowed.as_ref().map_or(0, Plan::workspace_bytes);
        self.full.workspace_bytes().max(windowed)
    }
}

/// The mask of a step of phase 2 where a row sees a window: the last `window` tokens up to itself,
/// of which a rank has those that it holds.
fn window_mask(layout: &RankLayout, step: &StepLayout, window: usize) -> Result<Mask> {
    let (rows, before) = (step.positions(), step.tokens().start);
    let query_position = rows.start - before;
    // In the order of the rank's keys, which ascends.
    let kept = layout.step(0..before).kept().map(|token| query_position + token);
    let appended = step.appended().map(|row| rows.start + row);
    let held: Vec<usize> = layout.own_tokens().chain(kept).chain(appended).collect();
    let first = |position: usize| held.partition_point(|&key| key + window <= position);
    if first(rows.end) == 0 {
        return Ok(step.mask());
    }
    let seen = rows.map(|position| first(position)..held.partition_point(|&key| key <= position));
    let seen: Vec<Range<usize>> = seen.collect();
    // A row that sees nothing has no range.
    let offsets = seen.iter().scan(0, |sum, range| {
        *sum += usize::from(!range.is_empty());
        Some(*sum)
    });
    let offsets: Vec<usize> = std::iter::once(0).chain(offsets).collect();
    let ranges: Vec<Range<usize>> = seen.iter().filter(|range| !range.is_empty()).cloned().collect();
    Ok(BlockList::new(1, &offsets, &ranges)?.into())
}

/// The attention of a model under a mask.
pub fn attention(model: &Llama, mask: Mask) -> AttentionConfig {
    AttentionConfig { scale: model.config.score_scale, ..AttentionConfig::new(mask) }
}

/// The anchor's keys and values of one layer, and behind them the rank's own.
struct Anchor<T: Element> {
    shape: [usize; 4],
    key: Vec<T>,
    value: Vec<T>,
    scratch: Vec<T>,
    /// One sequence in rows: all of the rank's local one.
    local: KvStore<Cpu, T>,
    sequence: SequenceId,
}

impl<T: Element> Anchor<T> {
    fn new(model: &Llama, scheme: &Scheme, layout: &RankLayout) -> Result<Self> {
        let config = &model.config;
        let (tokens, local) = match scheme.anchor {
            AnchorKv::Encoded => (0, 0),
            AnchorKv::Received => {
                (scheme.layout.anchor_len().min(scheme.layout.context_len()), layout.local_len())
            }
        };
        let shape = [1, tokens, config.kv_heads, config.head_dim];
        let buffer = || vec![T::default(); shape.iter().product()];
        let room = KvConfig::new(config.kv_heads, config.head_dim).in_rows(1, local);
        let mut store = KvStore::new(&CPU, room)?;
        let sequence = store.open()?;
        store.extend(&CPU, sequence, local)?;
        Ok(Self {
            shape,
            key: buffer(),
            value: buffer(),
            scratch: vec![T::default(); anchor_scratch_len(shape, shape[3])],
            local: store,
            sequence,
        })
    }

    /// Sends the head of rank 0's keys and values, or receives them; returns those of this rank's
    /// local sequence.
    fn share<'a>(
        &'a mut self,
        group: &(impl Collective + ?Sized),
        key: TensorView<'a, T>,
        value: TensorView<'a, T>,
    ) -> Result<(TensorView<'a, T>, TensorView<'a, T>)> {
        if group.rank() == 0 {
            for (to, from) in [(&mut self.key, key), (&mut self.value, value)] {
                let len = to.len();
                to.copy_from_slice(&from.data()[..len]);
            }
        }
        self.pass(group)?;
        if group.rank() == 0 {
            return Ok((key, value));
        }
        let view = |data| TensorView::contiguous("anchor", data, self.shape);
        let anchor = [view(&self.key)?, view(&self.value)?];
        let (tokens, own) = (self.shape[1], key.shape()[1]);
        self.local.put(&CPU, 0, self.sequence, 0..tokens, anchor)?;
        self.local.put(&CPU, 0, self.sequence, tokens..tokens + own, [key, value])?;
        let [key, value] = self.local.rows(&CPU, 0, self.sequence)?;
        Ok((key, value))
    }

    /// Takes part in a layer's message.
    fn pass(&mut self, group: &(impl Collective + ?Sized)) -> Result<()> {
        let view = |data| TensorViewMut::contiguous("anchor", data, self.shape);
        Ok(share_anchor(group, view(&mut self.key)?, view(&mut self.value)?, &mut self.scratch)?)
    }
}

/// FNV-1a, a word at a time.
pub fn fold(sum: u64, word: u64) -> u64 {
    (sum ^ word).wrapping_mul(0x0000_0100_0000_01b3)
}

pub fn shape(model: &Llama, query_len: usize, key_len: usize) -> AttentionShape {
    let config = &model.config;
    AttentionShape {
        batch: 1,
        query_len,
        key_len,
        query_heads: config.heads,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        value_dim: config.head_dim,
    }
}
