//! The kernels' calls on inputs of their own, timed.

use crate::backend::Plain;
use crate::cases::{Call, Order, Work};
use crate::device::Bench;
use crate::measure::{Effort, Failure, Figures, Times, measure};
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Device, DeviceTensor, DeviceTensorMut, Partials, append, merge};
use star_attention::{Append, Element, Inputs, Result, Rotation, bf16};

/// Measures one row.
pub fn figures<B: Bench>(backend: &B, effort: &Effort, work: &Work) -> std::result::Result<Figures, Failure> {
    let figures = match work {
        Work::Copy { bytes } => {
            let period: Vec<u8> = (0..65_537.min(*bytes)).map(|i| (i * 167) as u8).collect();
            let from = backend.repeat(&period, *bytes)?;
            let mut to = backend.empty::<u8>(*bytes)?;
            let times = measure(backend, effort, |_| backend.copy(&from, &mut to))?;
            Figures { times, flops: 0, bytes: 2 * bytes }
        }
        Work::Attention(call) => {
            let plan = call.plan(&backend.device().properties())?;
            let flops = plan.flops();
            let times = with_launcher(backend, effort, call, &[plan], |launch| {
                measure(backend, effort, |n| launch(0, n))
            })?;
            let elements = |shape: [usize; 4]| shape.iter().product::<usize>();
            let (queries, keys) = (elements(call.shape.query_shape()), elements(call.shape.key_shape()));
            Figures { times, flops, bytes: 4 * (queries + keys) }
        }
        &Work::Merge { n, tokens, heads, dim } => {
            let times = merging(backend, effort, n, [1, tokens, heads, dim])?;
            Figures { times, flops: 0, bytes: 4 * (n + 1) * tokens * heads * (dim + 1) }
        }
        &Work::Append { tokens, heads, dim, rotated } => {
            let times = appending(backend, effort, [1, tokens, heads, dim], rotated)?;
            // Of each token: keys and values, read and written; its place; its position and angles.
            let angles = if rotated > 0 { 4 + 4 * rotated } else { 0 };
            Figures { times, flops: 0, bytes: tokens * (8 * heads * dim + 4 + angles) }
        }
    };
    Ok(figures)
}

/// Numbers that spread as a normal distribution's do: products of equal numbers draw less power and
/// flatter the clock.
fn random<B: Bench, T: Element + Plain>(backend: &B, len: usize, seed: u64) -> Result<B::Memory<T>> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    // Copies of an odd period start at odd places of the rows, so that no two rows are equal.
    let period: Vec<T> =
        (0..len.min(65_537)).map(|_| T::from_f32((uniform() + uniform() + uniform()) * 2.0)).collect();
    backend.repeat(&period, len)
}

/// Sets of inputs, of so many bytes each, that together are larger than the cache.
fn sets(effort: &Effort, bytes: usize) -> usize {
    (effort.rotated_bytes / bytes.max(1)).min(64) + 1
}

/// Calls `body` with a function `launch(plan, n)` that launches one of `plans`, which are all for
/// `call`, on the n-th of the inputs that rotate.
pub fn with_launcher<B: Bench, R>(
    backend: &B,
    effort: &Effort,
    call: &Call,
    plans: &[Plan],
    body: impl FnOnce(&mut dyn FnMut(usize, usize) -> Result<()>) -> Result<R>,
) -> Result<R> {
    let [queries, keys] = [call.shape.query_shape(), call.shape.key_shape()].map(|s| s.iter().product());
    let query = random::<B, bf16>(backend, queries, 1)?;
    let kv: Vec<_> = (0..sets(effort, 4 * keys) as u64)
        .map(|set| Ok([random::<B, bf16>(backend, keys, 2 * set + 2)?, random(backend, keys, 2 * set + 3)?]))
        .collect::<Result<_>>()?;
    // One of them has elements.
    let mut out = backend.empty::<bf16>(if call.f32_out { 0 } else { queries })?;
    let mut wide = backend.empty::<f32>(if call.f32_out { queries } else { 0 })?;
    let mut lse = backend.empty::<f32>(call.shape.lse_len())?;
    let mut workspaces: Vec<_> =
        plans.iter().map(|plan| backend.empty::<u8>(plan.workspace_bytes())).collect::<Result<_>>()?;
    let mut prepared: Vec<_> = plans
        .iter()
        .zip(&mut workspaces)
        .map(|(plan, workspace)| {
            plan.prepare(backend.device(), backend.stream(), backend.span_mut(workspace))
        })
        .collect::<Result<_>>()?;
    let query = DeviceTensor::contiguous("query", backend.span(&query), call.shape.query_shape())?;
    let [batch, seq, heads, dim] = call.shape.key_shape();
    let tensor = |name, memory| match call.order {
        Order::SeqHeads => DeviceTensor::contiguous(name, backend.span(memory), [batch, seq, heads, dim]),
        Order::HeadsSeq => {
            let tensor = DeviceTensor::contiguous(name, backend.span(memory), [batch, heads, seq, dim])?;
            Ok(tensor.swap_seq_heads())
        }
    };
    let kv: Vec<_> = kv
        .iter()
        .map(|[key, value]| Ok((tensor("key", key)?, tensor("value", value)?)))
        .collect::<Result<_>>()?;
    let shape = call.shape.query_shape();
    let none = [0; 4];
    let [shape, wide_shape] = if call.f32_out { [none, shape] } else { [shape, none] };
    let mut out = DeviceTensorMut::contiguous("out", backend.span_mut(&mut out), shape)?;
    let mut wide = DeviceTensorMut::contiguous("out", backend.span_mut(&mut wide), wide_shape)?;
    let mut lse = backend.span_mut(&mut lse);
    body(&mut |plan, n| {
        let (key, value) = &kv[n % kv.len()];
        if call.f32_out {
            prepared[plan].run(Inputs::new(&query, key, value), &mut wide, Some(&mut lse))
        } else {
            prepared[plan].run(Inputs::new(&query, key, value), &mut out, Some(&mut lse))
        }
    })
}

fn merging<B: Bench>(backend: &B, effort: &Effort, n: usize, shape: [usize; 4]) -> Result<Times> {
    let [batch, tokens, heads, dim] = shape;
    let (elements, rows) = (shape.iter().product::<usize>(), batch * tokens * heads);
    let partials: Vec<_> = (0..sets(effort, 4 * n * elements) as u64)
        .map(|set| {
            let out = random::<B, f32>(backend, n * elements, 2 * set)?;
            Ok((out, random::<B, f32>(backend, n * rows, 2 * set + 1)?))
        })
        .collect::<Result<_>>()?;
    let partials: Vec<_> = partials
        .iter()
        .map(|(out, lse)| {
            let stacked = [n * batch, tokens, heads, dim];
            let out = DeviceTensor::contiguous("partials", backend.span(out), stacked)?;
            Ok(Partials { out, lse: backend.span(lse), lse_stride: rows })
        })
        .collect::<Result<_>>()?;
    let mut out = backend.empty::<f32>(elements)?;
    let mut lse = backend.empty::<f32>(rows)?;
    let mut out = DeviceTensorMut::contiguous("out", backend.span_mut(&mut out), shape)?;
    let mut lse = backend.span_mut(&mut lse);
    measure(backend, effort, |launch| {
        let partials = &partials[launch % partials.len()];
        merge(backend.device(), backend.stream(), partials, None, &mut out, Some(&mut lse))
    })
}

/// To places in order, in a cache that has as many.
fn appending<B: Bench>(backend: &B, effort: &Effort, shape: [usize; 4], rotated: usize) -> Result<Times> {
    let (elements, tokens) = (shape.iter().product(), shape[0] * shape[1]);
    let sources: Vec<_> = (0..sets(effort, 8 * elements) as u64)
        .map(|set| {
            Ok([random::<B, bf16>(backend, elements, 2 * set)?, random(backend, elements, 2 * set + 1)?])
        })
        .collect::<Result<_>>()?;
    let mut stored = [backend.empty::<bf16>(elements)?, backend.empty(elements)?];
    let [key, value] = stored.each_mut().map(|memory| backend.span_mut(memory));
    let mut cache_key = DeviceTensorMut::contiguous("cache_key", key, shape)?;
    let mut cache_value = DeviceTensorMut::contiguous("cache_value", value, shape)?;
    let places = backend.memory(&(0..tokens as u32).collect::<Vec<_>>());
    // Any numbers take as long as cosines and sines.
    let [cos, sin] =
        [random::<B, f32>(backend, tokens * rotated / 2, 1)?, random(backend, tokens * rotated / 2, 2)?];
    let sources: Vec<_> = sources
        .iter()
        .map(|[key, value]| {
            let key = DeviceTensor::contiguous("key", backend.span(key), shape)?;
            let value = DeviceTensor::contiguous("value", backend.span(value), shape)?;
            let new = Append::new(key, value, backend.span(&places));
            Ok(match rotated {
                0 => new,
                _ => new.with_rotation(Rotation {
                    cos: backend.span(&cos),
                    sin: backend.span(&sin),
                    positions: backend.span(&places),
                    rotated,
                    interleaved: false,
                }),
            })
        })
        .collect::<Result<_>>()?;
    measure(backend, effort, |launch| {
        let new = &sources[launch % sources.len()];
        append(backend.device(), backend.stream(), new, &mut cache_key, &mut cache_value)
    })
}
