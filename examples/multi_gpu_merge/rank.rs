//! One rank: attention over its shard, and the merge with all others, layer after layer.

use crate::Sizes;
use star_attention::comm::{Ranks, Traffic};
use star_attention::{
    Backend, Batch, Element, Inputs, KvConfig, KvStore, Mask, PlanConfig, Result, Sequence,
};
use std::time::{Duration, Instant};

/// What came of a rank.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// `[1, query_len, heads, head_dim]`.
    pub out: Vec<f32>,
    /// `[1, heads, query_len]`.
    pub lse: Vec<f32>,
    /// Of one layer: the median of each.
    pub attention: Duration,
    pub message: Duration,
    pub merge: Duration,
    /// What one layer has sent, and what the plan said.
    pub traffic: Traffic,
    pub planned: Traffic,
    /// Of the merge.
    pub way: String,
}

/// Times of attention, message, and all that comes behind attention.
#[derive(Default)]
struct Times(Vec<[Duration; 3]>);

impl Times {
    /// The median of each: attention, message, merge.
    fn medians(&self) -> [Duration; 3] {
        [0, 1, 2].map(|step| {
            let mut times: Vec<Duration> = self.0.iter().map(|times| times[step]).collect();
            times.sort_unstable();
            times[times.len() / 2]
        })
    }
}

/// What the messages of a group have cost.
pub struct Meter<'a> {
    /// Time since it was last asked.
    pub spent: &'a dyn Fn() -> Duration,
    /// All that was sent.
    pub traffic: &'a dyn Fn() -> Traffic,
}

/// On any backend.
pub fn on_backend<B: Backend, R: Ranks<B>, T: Element>(
    sizes: &Sizes,
    backend: &B,
    ranks: &R,
    meter: &Meter<'_>,
    tick: &dyn Fn(),
) -> Result<Outcome> {
    let (rank, _) = ranks.rank_and_size();
    let (query, shard) = (sizes.query::<T>(), sizes.shard::<T>(rank));
    let shape = sizes.shape(shard.len);
    let extents = shape.query_shape();
    let room = KvConfig::new(sizes.kv_heads, sizes.head_dim).in_rows(1, shard.len);
    let mut store = KvStore::<B, T>::new(backend, room)?;
    let sequence = store.open()?;
    store.extend(backend, sequence, shard.len)?;
    let [new_key, new_value] = [backend.buffer_of(&shard.key.data)?, backend.buffer_of(&shard.value.data)?];
    let view = |name, buffer| backend.whole(name, buffer, shape.key_shape());
    store.put(backend, 0, sequence, 0..shard.len, [view("key", &new_key)?, view("value", &new_value)?])?;
    let mut batch = Batch::new(extents, store.shape())?;
    batch.push(Sequence::new(0, 0..sizes.query_len, store.keys(sequence)?, Mask::Full))?;
    let mut plan = backend.plan_for(&PlanConfig::new(), &batch)?;
    let mut plan_of_ranks = ranks.plan::<f32, f32>(extents)?;
    if let Some(way) = sizes.way {
        plan_of_ranks = plan_of_ranks.with_way(way);
    }
    let mut merge = ranks.prepare(backend, &plan_of_ranks)?;
    let query = backend.buffer_of(&query.data)?;
    let mut workspace = backend.buffer(backend.workspace_bytes(&plan))?;
    let mut out = backend.buffer::<f32>(extents.iter().product())?;
    let mut lse = backend.buffer::<f32>(batch.lse_len())?;
    // To read it is to wait for all work before.
    let sync = backend.buffer_of(&[0u32])?;
    let (mut times, before) = (Times::default(), (meter.traffic)());
    for _ in 0..sizes.layers {
        backend.read(&sync)?;
        let start = Instant::now();
        let inputs = Inputs::new(
            backend.whole("query", &query, extents)?,
            store.key(backend, 0)?,
            store.value(backend, 0)?,
        );
        // Into the message itself.
        let (partial, partial_lse) = ranks.partial(backend, &mut merge)?;
        let to = backend.slice_mut(&mut workspace, ..);
        backend.attend(&mut plan, inputs, partial, Some(partial_lse), to)?;
        backend.read(&sync)?;
        let attention = start.elapsed();
        let start = Instant::now();
        (meter.spent)();
        let to = backend.whole_mut("out", &mut out, extents)?;
        ranks.run(backend, &mut merge, to, Some(backend.slice_mut(&mut lse, ..)))?;
        backend.read(&sync)?;
        let message = (meter.spent)();
        times.0.push([attention, message, start.elapsed() - message]);
        tick();
    }
    let [attention, message, merging] = times.medians();
    Ok(Outcome {
        out: backend.read(&out)?,
        lse: backend.read(&lse)?,
        attention,
        message,
        merge: merging,
        traffic: per_layer((meter.traffic)() - before, sizes.layers),
        planned: plan_of_ranks.traffic(),
        way: format!("{:?}", plan_of_ranks.way()),
    })
}

fn per_layer(traffic: Traffic, layers: usize) -> Traffic {
    let layers = layers as u64;
    Traffic {
        collectives: traffic.collectives / layers,
        messages: traffic.messages / layers,
        bytes: traffic.bytes / layers,
    }
}
