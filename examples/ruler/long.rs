//! The long end: how time and memory grow with the context, and where dense attention is left
//! behind.

use super::chart::{Chart, Point, Series};
use super::llama::config::Config;
use super::llama::error::Result;
use super::llama::run::{Job, Mode, run};
use super::llama::table::{bytes, table, time};
use super::setting::Setting;
use super::suite::Subject;
use super::task::Task;
use indicatif::{ProgressBar, ProgressStyle};
use star_attention::StarLayout;
use std::time::Duration;

/// One run.
#[derive(Clone, Debug)]
pub struct Measured {
    pub setting: String,
    pub len: usize,
    /// Floating-point operations of phase 1.
    pub flops: f64,
    /// Seconds of phase 1, and of phase 2.
    pub encode: f64,
    pub query: f64,
    /// Bytes that the process held at most; `None` where the system does not tell.
    pub memory: Option<f64>,
    pub answer: String,
    pub score: f64,
}

/// Star at each of `lens`, the shortest first, for what a longer one leaves behind is not given
/// back; then dense, until it takes as long as star took for the longest.
///
/// # Errors
/// Those of the samples and the model.
pub fn measure(
    subject: &Subject,
    star: &Setting,
    lens: &[usize],
    task: Task,
    seed: u64,
) -> Result<Vec<Measured>> {
    let mut lens = lens.to_vec();
    lens.sort_unstable();
    let mut measured = Vec::new();
    for &len in &lens {
        measured.push(once(subject, star, len, task, seed)?);
    }
    let most = measured.last().map_or(0.0, |longest| longest.encode);
    for &len in &lens {
        let dense = once(subject, &Setting::Dense, len, task, seed)?;
        let enough = dense.encode >= most;
        measured.push(dense);
        if enough {
            break;
        }
    }
    measured.sort_by_key(|run| (run.setting == "dense", run.len));
    Ok(measured)
}

fn once(subject: &Subject, setting: &Setting, len: usize, task: Task, seed: u64) -> Result<Measured> {
    let sample = subject.sample(task, len, seed)?;
    let question = &sample.questions[0];
    let context = subject.tokenizer.context(&sample.text())?;
    let query = subject.tokenizer.query(&question.query)?;
    let mode = setting.mode(len, context.len())?;
    let layers = subject.model.config.layers as u64;
    let style = ProgressStyle::with_template("{msg:40} [{elapsed_precise}] {wide_bar} {percent}% eta {eta}");
    let ranks = if let Mode::Star(scheme) = mode { scheme.layout.ranks() as u64 } else { 1 };
    let bar = ProgressBar::new(ranks * layers + 1)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(format!("{setting}, {len}"));
    bar.enable_steady_tick(Duration::from_millis(500));
    forget_peak();
    let job = Job {
        context: &context,
        queries: &[query],
        generate: subject.answer_len(task),
        stop: &subject.stop,
        all_logits: false,
    };
    let run = run(&subject.model, None, mode, &job, &bar)?;
    bar.finish_and_clear();
    let answer = subject.tokenizer.text(&run.answers[0].tokens, true)?;
    let config = &subject.model.config;
    Ok(Measured {
        setting: setting.to_string(),
        len,
        flops: match mode {
            Mode::Star(scheme) => star_flops(config, &scheme.layout)?,
            Mode::Dense => {
                linear_flops(config, context.len()) + attention_flops(config, causal(context.len()))
            }
        },
        encode: run.encode_time.as_secs_f64(),
        query: run.query_time.as_secs_f64(),
        memory: peak(),
        score: question.score(&answer),
        answer,
    })
}

/// Multiplications and additions of the linear layers for some tokens.
fn linear_flops(config: &Config, tokens: usize) -> f64 {
    let (hidden, heads) = (config.hidden_size, 2 * (config.heads + config.kv_heads) * config.head_dim);
    2.0 * (config.layers * hidden * (heads + 3 * config.intermediate_size)) as f64 * tokens as f64
}

/// Those of attention over some pairs of a query and a key that it sees.
fn attention_flops(config: &Config, pairs: f64) -> f64 {
    4.0 * (config.layers * config.heads * config.head_dim) as f64 * pairs
}

fn causal(tokens: usize) -> f64 {
    tokens as f64 * (tokens as f64 + 1.0) / 2.0
}

fn star_flops(config: &Config, layout: &StarLayout) -> Result<f64> {
    let mut flops = 0.0;
    for rank in 0..layout.ranks() {
        let local = layout.rank(rank)?;
        flops += linear_flops(config, local.local_len());
        // The anchor's own rows, then each block's with the anchor before it.
        let mut pairs = causal(local.anchor_tokens().len());
        for start in local.own_tokens().step_by(layout.block_len()) {
            let rows = layout.block_len().min(local.own_tokens().end - start);
            let anchor = if start == 0 { 0 } else { layout.anchor_len() };
            pairs += causal(rows) + (rows * anchor) as f64;
        }
        flops += attention_flops(config, pairs);
    }
    Ok(flops)
}

/// Dense's time at lengths that were not run: its longest run's, by FLOPs.
pub fn reckoned(measured: &[Measured], config: &Config, lens: &[usize]) -> Vec<(usize, f64)> {
    let Some(longest) = measured.iter().filter(|run| run.setting == "dense").max_by_key(|run| run.len) else {
        return Vec::new();
    };
    let flops = |len| linear_flops(config, len) + attention_flops(config, causal(len));
    let beyond = lens.iter().filter(|&&len| len > longest.len);
    beyond.map(|&len| (len, longest.encode * flops(len) / longest.flops)).collect()
}

/// All runs, and dense's reckoned times.
pub fn text(measured: &[Measured], reckoned: &[(usize, f64)]) -> String {
    let heading =
        ["tokens", "setting", "phase 1", "TFLOP", "GFLOP/s", "phase 2", "memory", "score", "answer"];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(measured.iter().map(|run| {
        vec![
            run.len.to_string(),
            run.setting.clone(),
            time(run.encode),
            format!("{:.3}", run.flops / 1e12),
            format!("{:.1}", run.flops / run.encode / 1e9),
            time(run.query),
            run.memory.map_or_else(|| "-".into(), bytes),
            format!("{:.2}", run.score),
            run.answer.clone(),
        ]
    }));
    rows.extend(
        reckoned
            .iter()
            .map(|&(len, seconds)| vec![len.to_string(), "dense, by its FLOPs".to_owned(), time(seconds)]),
    );
    table(&rows)
}

/// Time of phase 1 over the context's length.
pub fn chart(measured: &[Measured], reckoned: &[(usize, f64)]) -> Option<String> {
    let point = |len: usize, y: f64| Point { x: len as f64, y, low: y, high: y };
    let line = |dense: bool| {
        let runs = measured.iter().filter(|run| (run.setting == "dense") == dense);
        runs.map(|run| point(run.len, run.encode)).collect::<Vec<_>>()
    };
    let (star, dense) = (line(false), line(true));
    let beyond =
        dense.last().copied().into_iter().chain(reckoned.iter().map(|&(len, seconds)| point(len, seconds)));
    let star_name = measured
        .iter()
        .find(|run| run.setting != "dense")
        .map_or_else(String::new, |run| run.setting.clone());
    let mut series = vec![
        Series { name: "dense, by its FLOPs".into(), points: beyond.collect(), dashed: true },
        Series { name: "dense".into(), points: dense, dashed: false },
        Series { name: star_name, points: star, dashed: false },
    ];
    series.retain(|series| !series.points.is_empty());
    Chart { title: "Time to encode a context", x: "tokens", y: "seconds", log_y: true, series }.svg()
}

/// Starts the count of the most memory anew, where the system can.
fn forget_peak() {
    // A system without it keeps the old count, and `peak` says so by not falling.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// The most memory held since, in bytes.
fn peak() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0)
}
