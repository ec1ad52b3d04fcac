//! A group of hosts, as threads of this process, that answers queries about a context.

use super::error::{Error, Result};
use super::host::Host;
use super::model::Llama;
use candle_core::{DType, Tensor, WithDType};
use indicatif::ProgressBar;
use star_attention::comm::{Collective, ThreadGroup, Traffic};
use star_attention::{Element, Mask, StarLayout, bf16, f16};
use std::num::NonZero;
use std::time::{Duration, Instant};

/// What is asked of a model.
pub struct Job<'a> {
    pub context: &'a [u32],
    /// Each asked on its own, behind the context.
    pub queries: &'a [Vec<u32>],
    /// Tokens to generate for each query.
    pub generate: usize,
    /// Whether the logits of all query and generated tokens are wanted.
    pub all_logits: bool,
}

/// How the context is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Star Attention over the hosts of a layout.
    Star(StarLayout),
    /// Plain causal attention on one host.
    Dense,
}

/// What came of a job.
pub struct Run {
    /// One for each query.
    pub answers: Vec<Answer>,
    /// Phase 1: from the start until the last host was done.
    pub encode_time: Duration,
    /// Phase 2: all queries, encoding and generation.
    pub query_time: Duration,
    /// Of each host: the KV it holds for the context, over all layers.
    pub kv_bytes: Vec<usize>,
    /// What the query host sent and received in phase 2.
    pub traffic: Traffic,
}

/// The tokens generated for a query.
pub struct Answer {
    pub tokens: Vec<u32>,
    /// `[query and generated tokens, vocab]`, if asked for.
    pub logits: Option<Tensor>,
}

/// How long a host waits for another: one with a shorter share of a long context is done much earlier. One that fails or
/// panics is noticed at once.
const PATIENCE: Duration = Duration::from_secs(24 * 60 * 60);

/// Threads each of `hosts` may use: an equal share of the cores.
pub fn threads_per_host(hosts: usize) -> usize {
    (std::thread::available_parallelism().map_or(1, NonZero::get) / hosts).max(1)
}

/// Steps of the progress bar for a job.
pub fn ticks(model: &Llama, mode: Mode, job: &Job) -> u64 {
    let hosts = match mode {
        Mode::Star(layout) => layout.hosts(),
        Mode::Dense => 1,
    };
    (hosts * model.config.layers + job.queries.len()) as u64
}

/// Runs a job.
///
/// # Errors
/// Those of the model, or of the first host that failed.
pub fn run(model: &Llama, mode: Mode, job: &Job, bar: &ProgressBar) -> Result<Run> {
    match model.dtype {
        DType::F16 => run_as::<f16>(model, mode, job, bar),
        DType::BF16 => run_as::<bf16>(model, mode, job, bar),
        _ => run_as::<f32>(model, mode, job, bar),
    }
}

fn run_as<T: Element + WithDType>(model: &Llama, mode: Mode, job: &Job, bar: &ProgressBar) -> Result<Run> {
    model.check_ids("context", job.context)?;
    for query in job.queries {
        model.check_ids("query", query)?;
        if query.is_empty() {
            return Err(Error::input("query", "expected at least 1 token, got none"));
        }
    }
    let layout = match mode {
        Mode::Star(layout) => layout,
        Mode::Dense => StarLayout::new(job.context.len(), job.context.len().max(1), 0, 1)?,
    };
    if layout.context_len() != job.context.len() {
        let reason =
            format!("expected the layout's {} tokens, got {}", layout.context_len(), job.context.len());
        return Err(Error::input("context", reason));
    }
    let start = Instant::now();
    let reports: Vec<Result<Report>> = std::thread::scope(|scope| {
        let host = |(rank, group)| {
            let work = move || {
                // Each host has cores of its own, as far as there are enough.
                let threads = threads_per_host(layout.hosts());
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                let pool = pool.map_err(|error| Error::Host { rank, reason: error.to_string() })?;
                pool.install(|| answer::<T>(model, mode, layout, job, group, start, bar))
            };
            (rank, std::thread::Builder::new().spawn_scoped(scope, work))
        };
        let group = ThreadGroup::ranks_with_timeout(layout.hosts(), PATIENCE)?;
        let threads: Vec<_> = group.into_iter().enumerate().map(host).collect();
        let join = |(rank, thread): (usize, std::io::Result<std::thread::ScopedJoinHandle<'_, _>>)| {
            let thread = thread.map_err(|error| Error::Host { rank, reason: error.to_string() })?;
            thread.join().unwrap_or_else(|_| Err(Error::Host { rank, reason: "panicked".into() }))
        };
        Ok::<_, Error>(threads.into_iter().map(join).collect())
    })?;
    gather(reports, layout.query_host())
}

/// What one host has to tell.
struct Report {
    encode_time: Duration,
    query_time: Duration,
    kv_bytes: usize,
    traffic: Traffic,
    answers: Vec<Answer>,
}

/// The program of every host.
fn answer<T: Element + WithDType>(
    model: &Llama,
    mode: Mode,
    layout: StarLayout,
    job: &Job,
    group: ThreadGroup,
    start: Instant,
    bar: &ProgressBar,
) -> Result<Report> {
    let local = layout.host(group.rank())?;
    let mask = match mode {
        Mode::Star(_) => local.mask(),
        Mode::Dense => Mask::Causal,
    };
    let longest = job.queries.iter().map(Vec::len).max().unwrap_or(0) + job.generate;
    let mut host = Host::<T, _>::new(model, local, layout.query_host(), longest, group)?;
    host.encode(job.context, mask, || bar.inc(1))?;
    let (encode_time, kv_bytes) = (start.elapsed(), host.kv_bytes());
    host.wait_for_all()?;
    let (start, before) = (Instant::now(), host.group().traffic());
    let mut answers = Vec::new();
    for query in job.queries {
        host.forget_query();
        let rows = if job.all_logits { query.len() } else { 1 };
        let mut logits = vec![host.attend(query, layout.query_position(), rows)?];
        let mut tokens = Vec::new();
        while tokens.len() < job.generate {
            let token = host.choose(&logits[logits.len() - 1])?;
            let position = layout.query_position() + query.len() + tokens.len();
            tokens.push(token);
            // The last token is run through the model only if its logits are wanted.
            if tokens.len() < job.generate || job.all_logits {
                logits.push(host.attend(&[token], position, 1)?);
            }
        }
        if host.is_query_host() {
            let logits = job.all_logits.then(|| Tensor::cat(&logits, 0)).transpose()?;
            answers.push(Answer { tokens, logits });
            bar.inc(1);
        }
    }
    let traffic = host.group().traffic() - before;
    Ok(Report { encode_time, query_time: start.elapsed(), kv_bytes, traffic, answers })
}

/// One run from the reports of all hosts; or the error that made the others fail.
fn gather(reports: Vec<Result<Report>>, query_host: usize) -> Result<Run> {
    let mut hosts = Vec::new();
    let mut failure = None;
    for report in reports {
        match report {
            Ok(report) => hosts.push(report),
            Err(error @ Error::Attention(star_attention::Error::Disconnected { .. })) => {
                failure = failure.or(Some(error));
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(error) = failure {
        return Err(error);
    }
    let encode_time = hosts.iter().map(|host| host.encode_time).max().unwrap_or_default();
    let kv_bytes = hosts.iter().map(|host| host.kv_bytes).collect();
    let Report { query_time, traffic, answers, .. } = hosts.swap_remove(query_host);
    Ok(Run { answers, encode_time, query_time, kv_bytes, traffic })
}
