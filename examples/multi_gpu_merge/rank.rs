//! One rank: attention over its shard, and the merge with all others, layer after layer.

use crate::Sizes;
use crate::backend::Backend;
use crate::timed::Timed;
use star_attention::comm::{Collective, DeviceCollective, MergePlan, Traffic};
use star_attention::cpu;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Device, DeviceTensor, DeviceTensorMut, HalfElement};
use star_attention::{AttentionConfig, Element, Inputs, KvConfig, KvStore, Result, TensorView, TensorViewMut};
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

/// With the CPU backend.
pub fn on_cpu<T: Element>(sizes: &Sizes, group: &Timed<impl Collective>, tick: &dyn Fn()) -> Result<Outcome> {
    let (query, shard) = (sizes.query::<T>(), sizes.shard::<T>(group.rank()));
    let shape = sizes.shape(shard.len);
    let backend = cpu::Cpu::new();
    let room = KvConfig::new(sizes.kv_heads, sizes.head_dim).in_rows(1, shard.len);
    let mut kv = KvStore::<_, T>::new(&backend, room)?;
    let sequence = kv.open()?;
    kv.extend(&backend, sequence, shard.len)?;
    let view = |name, data| TensorView::contiguous(name, data, shape.key_shape());
    let rows = [view("key", &shard.key.data)?, view("value", &shard.value.data)?];
    kv.put(&backend, 0, sequence, 0..shard.len, rows)?;
    let [key, value] = kv.rows(&backend, 0, sequence)?;
    let plan = cpu::flash::Plan::new(&AttentionConfig::default(), &shape)?;
    let extents = shape.query_shape();
    let mut plan_of_ranks = MergePlan::<f32, f32>::new(extents, group.size(), &group.link())?;
    if let Some(way) = sizes.way {
        plan_of_ranks = plan_of_ranks.with_way(way);
    }
    let mut merge = plan_of_ranks.on_cpu();
    let mut workspace = Vec::with_capacity(plan.workspace_bytes());
    let query = TensorView::contiguous("query", &query.data, extents)?;
    let elements: usize = extents.iter().product();
    let (mut out, mut merged_lse) = (vec![0f32; elements], vec![0f32; shape.lse_len()]);
    let (mut times, before) = (Times::default(), group.traffic());
    for _ in 0..sizes.layers {
        let start = Instant::now();
        // Into the message itself.
        let (partial, lse) = merge.partial()?;
        plan.run(Inputs::new(query, key, value), partial, Some(lse), &mut workspace)?;
        let attention = start.elapsed();
        let start = Instant::now();
        group.take();
        let view = TensorViewMut::contiguous("out", &mut out, extents)?;
        merge.run(group, view, Some(&mut merged_lse))?;
        let message = group.take();
        times.0.push([attention, message, start.elapsed() - message]);
        tick();
    }
    let [attention, message, merging] = times.medians();
    Ok(Outcome {
        out,
        lse: merged_lse,
        attention,
        message,
        merge: merging,
        traffic: per_layer(group.traffic() - before, sizes.layers),
        planned: plan_of_ranks.traffic(),
        way: format!("{:?}", plan_of_ranks.way()),
    })
}

/// With the kernels, on a device; `message` tells how long messages took since it was last asked.
pub fn on_device<B: Backend, T: HalfElement>(
    sizes: &Sizes,
    backend: &B,
    group: &impl DeviceCollective<B::Device>,
    message: &dyn Fn() -> Duration,
    tick: &dyn Fn(),
) -> Result<Outcome> {
    let (query, shard) = (sizes.query::<T>(), sizes.shard::<T>(group.rank()));
    let shape = sizes.shape(shard.len);
    let (device, stream) = (backend.device(), backend.stream());
    let plan = Plan::new(&device.properties(), &AttentionConfig::default(), &shape)?;
    let extents = shape.query_shape();
    let mut plan_of_ranks = MergePlan::<f32, f32>::new(extents, group.size(), &group.link())?;
    if let Some(way) = sizes.way {
        plan_of_ranks = plan_of_ranks.with_way(way);
    }
    let elements: usize = extents.iter().product();
    let [query, key, value] =
        [&query.data, &shard.key.data, &shard.value.data].map(|data| backend.memory(data));
    let mut workspace = backend.memory(&vec![0u8; plan.workspace_bytes()]);
    let mut scratch = backend.memory(&vec![0u8; plan_of_ranks.device_scratch_bytes()]);
    let (mut out, mut merged_lse) =
        (backend.memory(&vec![0f32; elements]), backend.memory(&vec![0f32; shape.lse_len()]));
    let mut merge = plan_of_ranks.on_device(device, stream, backend.span_mut(&mut scratch))?;
    let sync = backend.memory(&[0u32]);
    let (mut times, before) = (Times::default(), group.traffic());
    for _ in 0..sizes.layers {
        backend.read(&sync);
        let start = Instant::now();
        {
            let tensor = |memory, shape| DeviceTensor::contiguous("input", backend.span(memory), shape);
            // Into the message itself.
            let (mut to, mut lse) = merge.partial()?;
            plan.prepare(device, stream, backend.span_mut(&mut workspace))?.run(
                Inputs::new(
                    &tensor(&query, extents)?,
                    &tensor(&key, shape.key_shape())?,
                    &tensor(&value, shape.key_shape())?,
                ),
                &mut to,
                Some(&mut lse),
            )?;
        }
        backend.read(&sync);
        let attention = start.elapsed();
        let start = Instant::now();
        message();
        merge.run(
            group,
            &mut DeviceTensorMut::contiguous("out", backend.span_mut(&mut out), extents)?,
            Some(&mut backend.span_mut(&mut merged_lse)),
        )?;
        backend.read(&sync);
        let spent = message();
        times.0.push([attention, spent, start.elapsed() - spent]);
        tick();
    }
    let [attention, message, merging] = times.medians();
    Ok(Outcome {
        out: backend.read(&out),
        lse: backend.read(&merged_lse),
        attention,
        message,
        merge: merging,
        traffic: per_layer(group.traffic() - before, sizes.layers),
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
