//! Phase 1 at a fixed block over growing contexts: time per token should not grow, and time should
//! fall behind dense attention's by the ratio of their FLOPs. One layer of 8/2 heads of 64, `b = a
//! = 4096`, one rank.
//!
//!     cargo bench --bench context_len -- [--max-len N] [--dense-max N]

use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Inputs, Mask, TensorView, TensorViewMut};
use std::time::Instant;

const BLOCK: usize = 4096;
const SHORTEST: usize = 64 * 1024;

struct Tensors {
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    out: Vec<f32>,
}

fn shape(tokens: usize) -> AttentionShape {
    AttentionShape {
        batch: 1,
        query_len: tokens,
        key_len: tokens,
        query_heads: 8,
        kv_heads: 2,
        head_dim: 64,
        value_dim: 64,
    }
}

impl Tensors {
    fn new(tokens: usize) -> Self {
        let fill = |len: usize| -> Vec<f32> {
            (0..len).map(|i| ((i.wrapping_mul(2_654_435_761)) % 2001) as f32 / 1000.0 - 1.0).collect()
        };
        let len = |shape: [usize; 4]| shape.iter().product::<usize>();
        let shape = shape(tokens);
        let (queries, keys) = (len(shape.query_shape()), len(shape.key_shape()));
        Self { query: fill(queries), key: fill(keys), value: fill(keys), out: vec![0.0; queries] }
    }

    fn bytes(&self) -> usize {
        4 * (2 * self.query.len() + 2 * self.key.len())
    }

    /// The least seconds of some runs of `plan`.
    fn seconds(&mut self, shape: &AttentionShape, plan: &Plan, runs: usize) -> f64 {
        let mut workspace = Vec::with_capacity(plan.workspace_bytes());
        let mut once = || {
            let start = Instant::now();
            let query = TensorView::contiguous("query", &self.query, shape.query_shape()).unwrap();
            let key = TensorView::contiguous("key", &self.key, shape.key_shape()).unwrap();
            let value = TensorView::contiguous("value", &self.value, shape.key_shape()).unwrap();
            let out = TensorViewMut::contiguous("out", &mut self.out, shape.query_shape()).unwrap();
            plan.run(Inputs::new(query, key, value), out, None, &mut workspace).unwrap();
            start.elapsed().as_secs_f64()
        };
        (0..runs).map(|_| once()).fold(f64::INFINITY, f64::min)
    }
}

/// The process's largest resident memory so far, in bytes, where the system tells.
fn peak_memory() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM"))?;
    line.split_whitespace().nth(1)?.parse::<usize>().ok().map(|kib| 1024 * kib)
}

fn option(name: &str, default: usize) -> usize {
    let args: Vec<String> = std::env::args().collect();
    let value = args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1));
    value.map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}: expected a number")))
}

fn main() {
    // `cargo test --benches` only wants to see it start.
    let test = std::env::args().any(|arg| arg == "--test");
    let shortest = if test { 2 * BLOCK } else { SHORTEST };
    let max_len = option("--max-len", if test { shortest } else { 1 << 20 });
    let dense_max = option("--dense-max", if test { 0 } else { SHORTEST });
    let lengths: Vec<usize> = std::iter::successors(Some(shortest), |len| Some(2 * len))
        .take_while(|&len| len <= max_len)
        .collect();
    let bar = indicatif::ProgressBar::new(lengths.len() as u64);
    let star = Mask::Star { anchor_len: BLOCK, block_len: BLOCK, first_block_len: BLOCK, left: None };

    println!("{} threads, f32, 8/2 heads of 64, b = a = {BLOCK}", rayon::current_num_threads());
    println!(
        "| tokens | star | per token | to the first | dense FLOPs / star's | dense time / star's | extra memory |"
    );
    println!("|---:|---:|---:|---:|---:|---:|---:|");
    let mut first = None;
    for tokens in lengths {
        let shape = shape(tokens);
        let mut tensors = Tensors::new(tokens);
        let plan = Plan::new(&AttentionConfig::new(star.clone()), &shape).unwrap();
        let seconds = tensors.seconds(&shape, &plan, if test { 1 } else { 2 });
        // Longer runs come later, so that the largest memory so far is this run's.
        let extra = peak_memory().map(|peak| peak.saturating_sub(tensors.bytes()) as f64 / (1 << 20) as f64);
        let dense = Plan::new(&AttentionConfig::new(Mask::Causal), &shape).unwrap();
        let ratio = dense.flops() as f64 / plan.flops() as f64;
        let dense = (tokens <= dense_max).then(|| tensors.seconds(&shape, &dense, 1) / seconds);
        let per_token = seconds / tokens as f64;
        let growth = per_token / *first.get_or_insert(per_token);
        let dense = dense.map_or("not run".into(), |ratio| format!("{ratio:.2}"));
        let extra = extra.map_or("unknown".into(), |mib| format!("{mib:.0} MiB"));
        println!(
            "| {tokens} | {seconds:.2} s | {:.2} us | {growth:.3} | {ratio:.2} | {dense} | {extra} |",
            per_token * 1e6
        );
        bar.inc(1);
    }
    bar.finish_and_clear();
}
