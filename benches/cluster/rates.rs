//! Rates of one host: of the crate's CPU kernels, measured, or given.

use super::model::{HEAD_DIM, HEADS, KV_HEADS};
use super::tokens;
use indicatif::ProgressBar;
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Mask, TensorView, TensorViewMut, bf16};
use std::fmt;
use std::time::{Duration, Instant};

/// Rates that are not to be measured.
pub struct Given {
    /// FLOP/s of attention, under every mask.
    pub attention: Option<f64>,
    /// FLOP/s of linear layers.
    pub linear: Option<f64>,
    /// Bytes per second of keys and values.
    pub bandwidth: Option<f64>,
}

/// What one host does in a second.
pub struct Rates {
    /// FLOP/s of context encoding, by tokens of a block, ascending.
    star: Vec<(usize, f64)>,
    /// FLOP/s of causal attention, by tokens, ascending.
    causal: Vec<(usize, f64)>,
    /// FLOP/s of the query's tokens over a shard.
    pub query: f64,
    /// FLOP/s of linear layers.
    pub linear: f64,
    /// Bytes per second of keys and values read for one token.
    pub bandwidth: f64,
    /// For each rate a line of the table: what it is of, and how much.
    lines: Vec<[String; 2]>,
}

impl Rates {
    /// Measures what is not given; tiny extents if it is a `test`.
    pub fn new(given: &Given, query_len: usize, test: bool) -> Self {
        let blocks = if test { [16, 32, 64] } else { [1024, 4096, 8192] };
        let shard = if test { 256 } else { 32 * 1024 };
        let each = Duration::from_secs(if test { 0 } else { 5 });
        let bar = ProgressBar::new(2 * blocks.len() as u64 + 2);
        let mut runs = Runs { each, bar, lines: Vec::new() };
        let star = blocks.map(|block| {
            let mask = Mask::Star { anchor_len: block, block_len: block, first_block_len: block };
            let what = format!("context encoding, anchor and block of {}", tokens(block));
            (block, runs.rate(&what, mask, shape(2 * block, 2 * block, 1), Work::Flops, given.attention))
        });
        let causal = blocks.map(|block| {
            let what = format!("causal attention of {} tokens", tokens(block));
            (block, runs.rate(&what, Mask::Causal, shape(block, block, 1), Work::Flops, given.attention))
        });
        // All heads of a layer, so that keys and values lie in memory and not in a cache.
        let mut over_shard = |query_len, work, given| {
            let what = format!("queries of {query_len} over {} keys", tokens(shard));
            runs.rate(&what, Mask::Full, shape(query_len, shard, KV_HEADS), work, given)
        };
        let query = over_shard(query_len, Work::Flops, given.attention);
        let bandwidth = over_shard(1, Work::KeyBytes, given.bandwidth);
        runs.bar.finish_and_clear();

        let linear = given.linear.unwrap_or_else(|| at(&causal, usize::MAX));
        let how = if given.linear.is_some() { "given" } else { "that of the longest causal attention" };
        let mut lines = runs.lines;
        lines.push(["linear layers".into(), format!("{:.1} GFLOP/s ({how})", linear / 1e9)]);
        Self { star: star.into(), causal: causal.into(), query, linear, bandwidth, lines }
    }

    /// FLOP/s of context encoding at blocks of so many tokens.
    pub fn star(&self, block: usize) -> f64 {
        at(&self.star, block)
    }

    /// FLOP/s of causal attention at so many tokens.
    pub fn causal(&self, tokens: usize) -> f64 {
        at(&self.causal, tokens)
    }
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = rayon::current_num_threads();
        writeln!(f, "Rates of one host; measured on {threads} threads in bf16, unless given:\n")?;
        writeln!(f, "| what | rate |\n|---|---:|")?;
        self.lines.iter().try_for_each(|[what, rate]| writeln!(f, "| {what} | {rate} |"))
    }
}

/// The rate of the longest run of at most so many tokens, or of the shortest.
fn at(rates: &[(usize, f64)], tokens: usize) -> f64 {
    rates.iter().rfind(|(len, _)| *len <= tokens).unwrap_or(&rates[0]).1
}

/// What a rate counts.
#[derive(Clone, Copy)]
enum Work {
    Flops,
    KeyBytes,
}

/// The runs so far.
struct Runs {
    /// How long each goes on, for one that nothing disturbs to be among them.
    each: Duration,
    bar: ProgressBar,
    lines: Vec<[String; 2]>,
}

impl Runs {
    /// Work per second of an attention: what is given, or measured.
    fn rate(&mut self, what: &str, mask: Mask, shape: AttentionShape, work: Work, given: Option<f64>) -> f64 {
        let plan = Plan::new(&AttentionConfig::new(mask), &shape).unwrap();
        let (amount, unit) = match work {
            Work::Flops => (plan.flops() as f64, "GFLOP/s"),
            Work::KeyBytes => ((2 * size_of::<bf16>() * len(shape.key_shape())) as f64, "GB/s"),
        };
        let rate = given.unwrap_or_else(|| amount / seconds(&plan, &shape, self.each));
        let what = format!("{what}, {}/{} heads of {}", shape.query_heads, shape.kv_heads, shape.head_dim);
        let how = if given.is_some() { " (given)" } else { "" };
        self.lines.push([what, format!("{:.1} {unit}{how}", rate / 1e9)]);
        self.bar.inc(1);
        rate
    }
}

/// The model's attention, or that of some of its KV heads: rates of products do not depend on their number.
fn shape(query_len: usize, key_len: usize, kv_heads: usize) -> AttentionShape {
    let query_heads = HEADS / KV_HEADS * kv_heads;
    AttentionShape { batch: 1, query_len, key_len, query_heads, kv_heads, head_dim: HEAD_DIM }
}

fn len(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

/// The seconds of the fastest of runs that go on for `at_least`, to an f32 output as a partial has.
fn seconds(plan: &Plan, shape: &AttentionShape, at_least: Duration) -> f64 {
    let fill = |len: usize| -> Vec<bf16> {
        (0..len)
            .map(|i| bf16::from_f32((i.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0))
            .collect()
    };
    let [query, key, value] =
        [shape.query_shape(), shape.key_shape(), shape.key_shape()].map(|shape| fill(len(shape)));
    let (mut out, mut lse) = (vec![0f32; query.len()], vec![0f32; shape.lse_len()]);
    let mut workspace = vec![0.0; plan.workspace_len()];
    let mut once = || {
        let start = Instant::now();
        let query = TensorView::contiguous("query", &query, shape.query_shape()).unwrap();
        let key = TensorView::contiguous("key", &key, shape.key_shape()).unwrap();
        let value = TensorView::contiguous("value", &value, shape.key_shape()).unwrap();
        let out = TensorViewMut::contiguous("out", &mut out, shape.query_shape()).unwrap();
        plan.run(query, key, value, out, Some(&mut lse), &mut workspace).unwrap();
        start.elapsed().as_secs_f64()
    };
    let start = Instant::now();
    let mut least = once();
    while start.elapsed() < at_least {
        least = least.min(once());
    }
    least
}
