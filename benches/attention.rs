//! Context encoding beside dense attention, query attention, and the merge: times, rates, and
//! shares of what the machine can do. At last, the rates of its instruction sets.

#[path = "common/call.rs"]
mod call;
#[path = "common/peak.rs"]
mod peak;
#[path = "common/random.rs"]
mod random;
#[path = "common/sets.rs"]
mod sets;
#[path = "common/turns.rs"]
#[allow(dead_code)] // the table of ratios is for other benches
mod turns;

use criterion::{BenchmarkGroup, Criterion, Throughput, measurement::WallTime};
use peak::Peaks;
use random::random;
use star_attention::cpu::{Cpu, flash::Plan};
use star_attention::merge::{Partial, merge};
use star_attention::{
    AttentionConfig, AttentionShape, DType, Element, Inputs, KvConfig, KvStore, Mask, TensorView,
    TensorViewMut, bf16,
};
use std::time::{Duration, Instant};
use turns::Turns;

/// What a case is measured against.
#[derive(Clone, Copy)]
enum Work {
    Flops(u64, DType),
    Bytes(u64),
}

/// A line of the table at the end.
struct Line {
    name: String,
    work: Work,
    seconds: f64,
}

struct Bench<'a> {
    group: BenchmarkGroup<'a, WallTime>,
    lines: &'a mut Vec<Line>,
}

impl Bench<'_> {
    fn case(&mut self, name: String, work: Work, mut run: impl FnMut()) {
        self.group.throughput(match work {
            Work::Flops(flops, _) => Throughput::Elements(flops),
            Work::Bytes(bytes) => Throughput::Bytes(bytes),
        });
        let mut samples = Vec::new();
        self.group.bench_function(&name, |bencher| {
            bencher.iter_custom(|rounds| {
                let start = Instant::now();
                (0..rounds).for_each(|_| run());
                let elapsed = start.elapsed();
                samples.push(elapsed.as_secs_f64() / rounds as f64);
                elapsed
            });
        });
        samples.sort_by(f64::total_cmp);
        if let Some(&seconds) = samples.get(samples.len() / 2) {
            self.lines.push(Line { name, work, seconds });
        }
    }
}

fn len(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

const TOKENS: usize = 8192;
const BLOCK: usize = TOKENS / 4;

/// Dense causal attention and context encoding with `a = b = L/4`, as on a single rank.
fn context<T: Element>(bench: &mut Bench<'_>, query_heads: usize, kv_heads: usize, head_dim: usize) {
    let star = Mask::Star { anchor_len: BLOCK, block_len: BLOCK, first_block_len: BLOCK, left: None };
    for (name, mask) in [("causal", Mask::Causal), ("star", star)] {
        let shape = AttentionShape {
            batch: 1,
            query_len: TOKENS,
            key_len: TOKENS,
            query_heads,
            kv_heads,
            head_dim,
            value_dim: head_dim,
        };
        let query = random::<T>(len(shape.query_shape()), 1);
        let (key, value) = (random::<T>(len(shape.key_shape()), 2), random::<T>(len(shape.key_shape()), 3));
        let plan = Plan::new(&AttentionConfig::new(mask), &shape).unwrap();
        let (mut out, mut workspace) =
            (vec![T::default(); query.len()], Vec::with_capacity(plan.workspace_bytes()));
        let work = Work::Flops(plan.flops(), T::DTYPE);
        bench.case(format!("{name} {} d{head_dim} {query_heads}/{kv_heads} heads", T::DTYPE), work, || {
            let query = TensorView::contiguous("query", &query, shape.query_shape()).unwrap();
            let key = TensorView::contiguous("key", &key, shape.key_shape()).unwrap();
            let value = TensorView::contiguous("value", &value, shape.key_shape()).unwrap();
            let out = TensorViewMut::contiguous("out", &mut out, shape.query_shape()).unwrap();
            plan.run(Inputs::new(query, key, value), out, None, &mut workspace).unwrap();
        });
    }
}

/// Queries of `query_len` tokens over a shard of 32K tokens, to an f32 partial.
fn query<T: Element>(bench: &mut Bench<'_>, query_len: usize) {
    const KEYS: usize = 32 * 1024;
    const CHUNK: usize = 1024;
    let cpu = Cpu::new();
    let mut shard = KvStore::<_, T>::new(&cpu, KvConfig::new(8, 128).in_rows(1, KEYS)).unwrap();
    let sequence = shard.open().unwrap();
    shard.extend(&cpu, sequence, KEYS).unwrap();
    let rows = random::<T>(CHUNK * 8 * 128, 1);
    for first in (0..KEYS).step_by(CHUNK) {
        let rows = TensorView::contiguous("key", &rows, [1, CHUNK, 8, 128]).unwrap();
        shard.put(&cpu, 0, sequence, first..first + CHUNK, [rows, rows]).unwrap();
    }
    let shape = AttentionShape {
        batch: 1,
        query_len,
        key_len: KEYS,
        query_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        value_dim: 128,
    };
    let query = random::<T>(len(shape.query_shape()), 2);
    let plan = Plan::new(&AttentionConfig::default(), &shape).unwrap();
    let (mut out, mut lse) = (vec![0f32; query.len()], vec![0f32; shape.lse_len()]);
    let mut workspace = Vec::with_capacity(plan.workspace_bytes());
    let work = match query_len {
        1 => Work::Bytes((KEYS * shard.row_bytes()) as u64),
        _ => Work::Flops(plan.flops(), T::DTYPE),
    };
    let [key, value] = shard.rows(&cpu, 0, sequence).unwrap();
    bench.case(format!("query {} T = {query_len}", T::DTYPE), work, || {
        let query = TensorView::contiguous("query", &query, shape.query_shape()).unwrap();
        let out = TensorViewMut::contiguous("out", &mut out, shape.query_shape()).unwrap();
        let inputs = Inputs::new(query, key, value);
        plan.run(inputs, out, Some(&mut lse), &mut workspace).unwrap();
    });
}

/// An n-way merge of f32 partials, larger than the caches in all.
fn merges(bench: &mut Bench<'_>, count: usize) {
    let shape = [1, 16384 / count, 32, 128];
    let outs: Vec<Vec<f32>> = (0..count).map(|i| random(len(shape), i as u64)).collect();
    let lses: Vec<Vec<f32>> = (0..count).map(|i| random(len(shape) / 128, i as u64)).collect();
    let partial = |i: usize| Partial {
        out: TensorView::contiguous("partial", &outs[i], shape).unwrap(),
        lse: &lses[i],
    };
    let partials: Vec<_> = (0..count).map(partial).collect();
    let (mut out, mut lse) = (vec![0f32; len(shape)], vec![0f32; len(shape) / 128]);
    let bytes = (count + 1) * (len(shape) + len(shape) / 128) * size_of::<f32>();
    bench.case(format!("merge of {count}"), Work::Bytes(bytes as u64), || {
        let out = TensorViewMut::contiguous("out", &mut out, shape).unwrap();
        merge(&partials, out, &mut lse).unwrap();
    });
}

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let mut lines = Vec::new();
    {
        let mut bench = Bench { group: criterion.benchmark_group("attention"), lines: &mut lines };
        for (query_heads, kv_heads, head_dim) in [(8, 8, 128), (32, 8, 128), (8, 8, 64)] {
            context::<f32>(&mut bench, query_heads, kv_heads, head_dim);
            context::<bf16>(&mut bench, query_heads, kv_heads, head_dim);
        }
        for query_len in [1, 16, 128] {
            query::<f32>(&mut bench, query_len);
            query::<bf16>(&mut bench, query_len);
        }
        for count in [2, 8, 64] {
            merges(&mut bench, count);
        }
    }
    criterion.final_summary();
    let turns = Turns::from_args();
    if !lines.is_empty() && !turns.quick {
        print_lines(&lines);
    }
    if turns.wants("instruction sets") {
        sets::print_table(turns.quick);
    }
}

/// The cases as shares of the machine's peaks.
fn print_lines(lines: &[Line]) {
    let peaks = Peaks::measure();
    let bf16_flops = peaks.amx_flops.or(peaks.bf16_flops).unwrap_or(peaks.f32_flops);
    println!("\n{} threads; {} tokens, star with a = b = {BLOCK}", rayon::current_num_threads(), TOKENS);
    println!("peaks: {:.0} GFLOP/s of f32 multiply-adds", peaks.f32_flops / 1e9);
    if let Some(flops) = peaks.bf16_flops {
        println!("       {:.0} GFLOP/s of bf16 pairs", flops / 1e9);
    }
    if let Some(flops) = peaks.amx_flops {
        println!("       {:.0} GFLOP/s of bf16 tiles", flops / 1e9);
    }
    println!("       {:.1} GB/s of read", peaks.read_bytes / 1e9);
    println!("       {:.1} GB/s of copy, bytes read and written added up\n", peaks.copy_bytes / 1e9);
    println!("| case | time | rate | share of peak |\n|---|---:|---:|---:|");
    for Line { name, work, seconds } in lines {
        let (rate, unit, peak) = match *work {
            Work::Flops(flops, DType::BF16) => (flops as f64 / seconds, "GFLOP/s", bf16_flops),
            Work::Flops(flops, _) => (flops as f64 / seconds, "GFLOP/s", peaks.f32_flops),
            Work::Bytes(bytes) => (bytes as f64 / seconds, "GB/s", peaks.copy_bytes),
        };
        let (ms, rate, share) = (seconds * 1e3, rate / 1e9, 100.0 * rate / peak);
        println!("| {name} | {ms:.2} ms | {rate:.1} {unit} | {share:.0}% |");
    }
}
