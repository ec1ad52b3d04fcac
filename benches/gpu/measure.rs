//! Runs the cases and prints them.

use crate::cases::{Case, all as cases};
use cudarc::driver::sys::CUevent_flags;
use cudarc::driver::{CudaSlice, CudaStream, DriverError};
use half::bf16;
use serde_json::{Value, json};
use star_attention::cuda::driver::Driver;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Device, DeviceTensor, DeviceTensorMut, Partials, Span, SpanMut, merge};
use star_attention::{AttentionConfig, AttentionShape, Error, Mask};
use std::sync::Arc;

/// Why nothing more was measured.
pub enum Stop {
    NoGpu(Error),
    Failed(Box<dyn std::error::Error>),
}

impl<E: std::error::Error + 'static> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// More than twice the L2 cache of any GPU (50 MB on Hopper, 126 MB on Blackwell).
const ROTATED_BYTES: usize = 256 << 20;
/// Of each measurement, in milliseconds: enough launches that events resolve them...
const ROUND_MS: f32 = 20.0;
/// ...and enough rounds for a median.
const ROUNDS: usize = 9;

/// Milliseconds of one launch: the median over rounds, and the fastest and slowest round.
struct Times {
    median: f64,
    least: f64,
    most: f64,
}

fn measure(
    stream: &Arc<CudaStream>,
    mut launch: impl FnMut(usize) -> Result<(), Stop>,
) -> Result<Times, Stop> {
    let mut next = 0;
    let mut round = |launches: usize| -> Result<f32, Stop> {
        let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
        let start = stream.record_event(flags)?;
        for _ in 0..launches {
            launch(next)?;
            next += 1;
        }
        let end = stream.record_event(flags)?;
        Ok(start.elapsed_ms(&end)?)
    };
    // Loads the kernel and lets the clocks rise.
    let mut warm = 0.0;
    for _ in 0..50 {
        warm += round(1)?;
        if warm > 5.0 * ROUND_MS {
            break;
        }
    }
    let one = round(4)? / 4.0;
    let launches = ((ROUND_MS / one) as usize).clamp(1, 2000);
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        times.push(f64::from(round(launches)?) / launches as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(Times { median: times[ROUNDS / 2], least: times[0], most: times[ROUNDS - 1] })
}

/// Numbers that spread as a normal distribution's do: products of equal numbers draw less power and flatter the clock.
fn random(stream: &Arc<CudaStream>, elements: usize, seed: u64) -> Result<CudaSlice<bf16>, DriverError> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    // One period is drawn; its copies start at odd places, so that no two rows are equal.
    let period: Vec<bf16> =
        (0..65_537).map(|_| bf16::from_f32((uniform() + uniform() + uniform()) * 2.0)).collect();
    let mut data = Vec::with_capacity(elements);
    while data.len() < elements {
        data.extend_from_slice(&period[..period.len().min(elements - data.len())]);
    }
    stream.clone_htod(&data)
}

/// Measures all cases.
pub fn all() -> Result<(), Stop> {
    let device = Driver::open(0).map_err(|error| match error {
        Error::Unavailable { .. } => Stop::NoGpu(error),
        error => Stop::Failed(error.into()),
    })?;
    let arguments: Vec<String> = std::env::args().collect();
    let option =
        |name| arguments.iter().position(|argument| argument == name).and_then(|at| arguments.get(at + 1));
    let stream = device.context().new_stream()?;
    let name = device.context().name()?;
    println!("{name}, {} multiprocessors", device.properties().multiprocessors);
    println!("{:44} {:>10} {:>8} {:>9} {:>8}  of the copy", "", "ms", "± %", "TFLOP/s", "GB/s");
    let mut rows: Vec<Value> = Vec::new();
    let mut copy_rate = f64::NAN;
    for case in cases() {
        let (label, times, flops, bytes, extra) = match &case {
            Case::Copy { bytes } => {
                let times = copy(&stream, *bytes)?;
                copy_rate = 2.0 * *bytes as f64 / times.median / 1e6;
                ("copy".to_string(), times, 0, 2 * bytes, json!({ "kind": "copy" }))
            }
            Case::Attention { name, config, shape } => {
                let (times, flops) = attention(&device, &stream, config, shape)?;
                let AttentionShape { batch, query_len, key_len, query_heads, kv_heads, head_dim } = *shape;
                let bytes = 4 * batch * head_dim * (query_len * query_heads + key_len * kv_heads);
                let label = format!("{name}, {batch} x {query_len} x {key_len}, d {head_dim}");
                let (anchor, block) = match config.mask {
                    Mask::Star { anchor_len, block_len, .. } => (anchor_len, block_len),
                    _ => (0, 0),
                };
                let extra = json!({
                    "kind": "attention", "name": name, "batch": batch, "query_len": query_len, "key_len": key_len,
                    "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim,
                    "causal": config.mask == Mask::Causal, "anchor_len": anchor, "block_len": block,
                });
                (label, times, flops, bytes, extra)
            }
            Case::Merge { n, tokens } => {
                let (times, bytes) = merging(&device, &stream, *n, *tokens)?;
                let label = format!("merge of {n}, {tokens} x 32 x 128, f32");
                (label, times, 0, bytes, json!({ "kind": "merge", "n": n, "tokens": tokens }))
            }
        };
        let Times { median, least, most } = times;
        let tflops = flops as f64 / median / 1e9;
        let rate = bytes as f64 / median / 1e6;
        let spread = 100.0 * (most - least) / 2.0 / median;
        let tflops_text = if flops == 0 { "-".into() } else { format!("{tflops:.1}") };
        println!(
            "{label:44} {median:10.4} {spread:8.1} {tflops_text:>9} {rate:8.0}  {:.2}",
            rate / copy_rate
        );
        let mut row = extra;
        row["label"] = label.into();
        row["ms"] = json!({ "median": median, "least": least, "most": most });
        row["tflops"] = tflops.into();
        row["gb_per_s"] = rate.into();
        rows.push(row);
    }
    if let Some(path) = option("--json") {
        // As `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06 ...`.
        let driver = std::fs::read_to_string("/proc/driver/nvidia/version").unwrap_or_default();
        let driver = driver.lines().next().unwrap_or_default();
        let all = json!({ "device": name, "driver": driver, "commit": option("--commit"), "rows": rows });
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}

fn copy(stream: &Arc<CudaStream>, bytes: usize) -> Result<Times, Stop> {
    let from = stream.alloc_zeros::<u8>(bytes)?;
    let mut to = stream.alloc_zeros::<u8>(bytes)?;
    measure(stream, |_| Ok(stream.memcpy_dtod(&from, &mut to)?))
}

/// One call's times, and its FLOPs.
fn attention(
    device: &Driver,
    stream: &Arc<CudaStream>,
    config: &AttentionConfig,
    shape: &AttentionShape,
) -> Result<(Times, u64), Stop> {
    let plan = Plan::new(&device.properties(), config, shape)?;
    let count = |extents: [usize; 4]| extents.iter().product::<usize>();
    let (queries, keys) = (count(shape.query_shape()), count(shape.key_shape()));
    let sets = (ROTATED_BYTES / (4 * keys)).clamp(1, 64) + 1;
    let query = random(stream, queries, 1)?;
    let kv: Vec<_> = (0..sets as u64)
        .map(|set| {
            Ok::<_, DriverError>((random(stream, keys, 2 * set + 2)?, random(stream, keys, 2 * set + 3)?))
        })
        .collect::<Result<_, _>>()?;
    let mut out = stream.alloc_zeros::<bf16>(queries)?;
    let mut lse = stream.alloc_zeros::<f32>(shape.lse_len())?;
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_len())?;
    let mut prepared = plan.prepare(device, stream, SpanMut::of(&mut workspace, stream))?;
    let query = DeviceTensor::contiguous("query", Span::of(&query, stream), shape.query_shape())?;
    let kv: Vec<_> = kv
        .iter()
        .map(|(key, value)| {
            let key = DeviceTensor::contiguous("key", Span::of(key, stream), shape.key_shape())?;
            let value = DeviceTensor::contiguous("value", Span::of(value, stream), shape.key_shape())?;
            Ok::<_, Error>((key, value))
        })
        .collect::<Result<_, _>>()?;
    let mut out = DeviceTensorMut::contiguous("out", SpanMut::of(&mut out, stream), shape.query_shape())?;
    let mut lse = SpanMut::of(&mut lse, stream);
    let times = measure(stream, |round| {
        let (key, value) = &kv[round % kv.len()];
        Ok(prepared.run(&query, key, value, &mut out, Some(&mut lse))?)
    })?;
    Ok((times, plan.flops()))
}

/// One merge's times, and the bytes it reads and writes.
fn merging(
    device: &Driver,
    stream: &Arc<CudaStream>,
    n: usize,
    tokens: usize,
) -> Result<(Times, usize), Stop> {
    let (heads, dim) = (32, 128);
    let (rows, elements) = (tokens * heads, tokens * heads * dim);
    let bytes = 4 * (n + 1) * (elements + rows);
    let sets = ROTATED_BYTES / (4 * n * elements) + 1;
    let partials: Vec<_> = (0..sets)
        .map(|_| {
            Ok::<_, DriverError>((
                stream.alloc_zeros::<f32>(n * elements)?,
                stream.alloc_zeros::<f32>(n * rows)?,
            ))
        })
        .collect::<Result<_, _>>()?;
    let partials: Vec<_> = partials
        .iter()
        .map(|(out, lse)| {
            let out = DeviceTensor::contiguous("partials", Span::of(out, stream), [n, tokens, heads, dim])?;
            Ok::<_, Error>(Partials { out, lse: Span::of(lse, stream), lse_stride: rows })
        })
        .collect::<Result<_, _>>()?;
    let mut out = stream.alloc_zeros::<f32>(elements)?;
    let mut lse = stream.alloc_zeros::<f32>(rows)?;
    let mut out = DeviceTensorMut::contiguous("out", SpanMut::of(&mut out, stream), [1, tokens, heads, dim])?;
    let mut lse = SpanMut::of(&mut lse, stream);
    let times = measure(stream, |round| {
        Ok(merge(device, stream, &partials[round % sets], &mut out, Some(&mut lse))?)
    })?;
    Ok((times, bytes))
}
