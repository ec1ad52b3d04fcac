//! A group of ranks that answers queries about a context: threads of this process, or processes of
//! which this is one.

use super::anchor::AnchorBlock;
use super::error::{Error, Result};
use super::model::Llama;
use super::rank::{Rank, fold, shape};
use super::threads::threads_per_rank;
use candle_core::{DType, Tensor, WithDType};
use indicatif::ProgressBar;
use star_attention::comm::{Agreement, AnchorKv, Collective, GroupConfig, ThreadGroup, Traffic, agree};
use star_attention::{Element, Mask, StarLayout, bf16, f16};
use std::time::{Duration, Instant};

/// What is asked of a model.
pub struct Job<'a> {
    pub context: &'a [u32],
    /// Each asked on its own, behind the context.
    pub queries: &'a [Vec<u32>],
    /// Tokens to generate for each query, at most.
    pub generate: usize,
    /// Tokens that end an answer: it stops behind the first of them.
    pub stop: &'a [u32],
    /// Whether the logits of all query and generated tokens are wanted.
    pub all_logits: bool,
}

/// How the context is encoded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// Star Attention.
    Star(Scheme),
    /// Plain causal attention on one rank.
    Dense,
}

/// Star Attention over the ranks of a layout.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scheme {
    pub layout: StarLayout,
    pub anchor: AnchorKv,
    pub anchor_block: AnchorBlock,
}

impl From<StarLayout> for Scheme {
    fn from(layout: StarLayout) -> Self {
        Self { layout, anchor: AnchorKv::default(), anchor_block: AnchorBlock::default() }
    }
}

/// What came of a job.
pub struct Run {
    /// One for each query.
    pub answers: Vec<Answer>,
    /// Phase 1: from the start until the last rank was done.
    pub encode_time: Duration,
    /// Phase 2: all queries, encoding and generation.
    pub query_time: Duration,
    /// Of each rank: the KV it holds for the context, over all layers.
    pub kv_bytes: Vec<usize>,
    /// What the query rank sent in phase 2.
    pub traffic: Traffic,
    /// Of the bits of all merged outputs: the same on every rank.
    pub checksum: u64,
}

/// The tokens generated for a query.
pub struct Answer {
    pub tokens: Vec<u32>,
    /// `[query and generated tokens, vocab]`, if asked for.
    pub logits: Option<Tensor>,
}

/// How long threads wait for each other: one with a shorter share of a long context is done much
/// earlier. One that fails or panics is noticed at once.
const PATIENCE: Duration = Duration::from_secs(24 * 60 * 60);

/// Steps of the progress bar for a job: those of all threads, or of one process.
pub fn ticks(model: &Llama, processes: bool, mode: Mode, job: &Job) -> u64 {
    let ranks = match mode {
        Mode::Star(scheme) if !processes => scheme.layout.ranks(),
        _ => 1,
    };
    (ranks * model.config.layers + job.queries.len()) as u64
}

/// Runs a job: as one process of a group, or with threads as ranks.
///
/// # Errors
/// Those of the model and of [`Scheme::checked`], or of the first rank that failed.
pub fn run(
    model: &Llama,
    processes: Option<&dyn Collective>,
    mode: Mode,
    job: &Job,
    bar: &ProgressBar,
) -> Result<Run> {
    match model.dtype {
        DType::F16 => run_as::<f16>(model, processes, mode, job, bar),
        DType::BF16 => run_as::<bf16>(model, processes, mode, job, bar),
        _ => run_as::<f32>(model, processes, mode, job, bar),
    }
}

fn run_as<T: Element + WithDType>(
    model: &Llama,
    processes: Option<&dyn Collective>,
    mode: Mode,
    job: &Job,
    bar: &ProgressBar,
) -> Result<Run> {
    model.check_ids("context", job.context)?;
    for query in job.queries {
        model.check_ids("query", query)?;
        if query.is_empty() {
            return Err(Error::input("query", "expected at least 1 token, got none"));
        }
    }
    let query_len = job.queries.iter().map(Vec::len).max().unwrap_or(0);
    let len = job.context.len() + query_len + job.generate;
    if let Some(reach) = model.config.rope.reach().filter(|&reach| len > reach) {
        let reason = format!(
            "expected at most original_max_position_embeddings = {reach} tokens, behind which the model \
             turns by other factors, got up to {len}"
        );
        return Err(Error::input("context", reason));
    }
    let scheme = match mode {
        Mode::Star(scheme) => scheme.checked(model)?,
        Mode::Dense => StarLayout::builder(job.context.len()).anchor_len(0).build()?.into(),
    };
    let (layout, start) = (scheme.layout, Instant::now());
    if layout.context_len() != job.context.len() {
        let reason =
            format!("expected the layout's {} tokens, got {}", layout.context_len(), job.context.len());
        return Err(Error::input("context", reason));
    }
    if let (Some(group), Mode::Star(_)) = (processes, mode) {
        let report = answer::<T, _>(model, mode, scheme, job, group, start, bar)?;
        return gather(gather_costs(group, report, layout.query_rank())?, layout.query_rank());
    }
    let reports: Vec<Result<Report>> = std::thread::scope(|scope| {
        let rank = |(rank, group)| {
            let work = move || {
                // Each rank has cores of its own, as far as there are enough.
                let threads = threads_per_rank(layout.ranks());
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                let pool = pool.map_err(|error| Error::Rank { rank, reason: error.to_string() })?;
                pool.install(|| {
                    let group: ThreadGroup = group;
                    answer::<T, _>(model, mode, scheme, job, &group, start, bar)
                })
            };
            (rank, std::thread::Builder::new().spawn_scoped(scope, work))
        };
        let config = GroupConfig { timeout: PATIENCE, ..GroupConfig::default() };
        let group = ThreadGroup::ranks_with(layout.ranks(), &config)?;
        let threads: Vec<_> = group.into_iter().enumerate().map(rank).collect();
        let join = |(rank, thread): (usize, std::io::Result<std::thread::ScopedJoinHandle<'_, _>>)| {
            let thread = thread.map_err(|error| Error::Rank { rank, reason: error.to_string() })?;
            thread.join().unwrap_or_else(|_| Err(Error::Rank { rank, reason: "panicked".into() }))
        };
        Ok::<_, Error>(threads.into_iter().map(join).collect())
    })?;
    gather(whole(reports)?, layout.query_rank())
}

/// What one rank has to tell.
struct Report {
    costs: Costs,
    answers: Vec<Answer>,
}

#[derive(Clone, Copy)]
struct Costs {
    encode_time: Duration,
    query_time: Duration,
    kv_bytes: usize,
    traffic: Traffic,
    checksum: u64,
}

/// The program of every rank.
fn answer<T: Element + WithDType, C: Collective + ?Sized>(
    model: &Llama,
    mode: Mode,
    scheme: Scheme,
    job: &Job,
    group: &C,
    start: Instant,
    bar: &ProgressBar,
) -> Result<Report> {
    agree(group, &agreement(model, scheme, job)?)?;
    let local = scheme.layout.rank(group.rank())?;
    let mask = match mode {
        Mode::Star(_) => local.mask(),
        Mode::Dense => Mask::Causal,
    };
    let longest = job.queries.iter().map(Vec::len).max().unwrap_or(0);
    let mut rank = Rank::<T, _>::new(model, scheme, longest + job.generate, longest, group)?;
    rank.encode(job.context, mask, || bar.inc(1))?;
    let (encode_time, kv_bytes) = (start.elapsed(), rank.kv_bytes()?);
    rank.wait_for_all()?;
    let (start, before) = (Instant::now(), rank.group().traffic());
    let mut answers = Vec::new();
    for query in job.queries {
        rank.forget_query()?;
        let rows = if job.all_logits { query.len() } else { 1 };
        let mut logits = vec![rank.attend(query, 0, rows)?];
        let mut tokens = Vec::new();
        let mut done = job.generate == 0;
        while !done {
            let token = rank.choose(&logits[logits.len() - 1])?;
            let before = query.len() + tokens.len();
            tokens.push(token);
            done = tokens.len() == job.generate || job.stop.contains(&token);
            // The last token is run through the model only if its logits are wanted.
            if !done || job.all_logits {
                logits.push(rank.attend(&[token], before, 1)?);
            }
        }
        let logits = (job.all_logits && rank.is_query_rank()).then(|| Tensor::cat(&logits, 0)).transpose()?;
        answers.push(Answer { tokens, logits });
        if rank.is_query_rank() {
            bar.inc(1);
        }
    }
    let traffic = rank.group().traffic() - before;
    let costs =
        Costs { encode_time, query_time: start.elapsed(), kv_bytes, traffic, checksum: rank.checksum() };
    Ok(Report { costs, answers })
}

fn agreement(model: &Llama, scheme: Scheme, job: &Job) -> Result<Agreement> {
    let ids = job.queries.iter().flatten().chain(job.context).chain(job.stop).map(|&id| u64::from(id));
    let sizes = [job.generate as u64, job.queries.len() as u64, model.fingerprint()?];
    let anchor_block = format!("{:?}", scheme.anchor_block);
    Ok(Agreement {
        layout: scheme.layout,
        shape: shape(model, 0, 0),
        layers: model.config.layers,
        dtype: match model.dtype {
            DType::F16 => star_attention::DType::F16,
            DType::BF16 => star_attention::DType::BF16,
            _ => star_attention::DType::F32,
        },
        anchor: scheme.anchor,
        model: sizes.into_iter().chain(ids).chain(anchor_block.bytes().map(u64::from)).fold(0, fold),
    })
}

/// The reports of all threads; or the error that made the others fail.
fn whole(reports: Vec<Result<Report>>) -> Result<Vec<Report>> {
    let mut ranks = Vec::new();
    let mut failure = None;
    for report in reports {
        match report {
            Ok(report) => ranks.push(report),
            Err(error @ Error::Attention(star_attention::Error::Disconnected { .. })) => {
                failure = failure.or(Some(error));
            }
            Err(error) => return Err(error),
        }
    }
    failure.map_or(Ok(ranks), Err)
}

/// This process's report, and the costs of all others, which have the same answers.
fn gather_costs(group: &dyn Collective, report: Report, query_rank: usize) -> Result<Vec<Report>> {
    const WORDS: usize = 7;
    let Costs { encode_time, query_time, kv_bytes, traffic, checksum } = report.costs;
    let times = [encode_time, query_time].map(|time| time.as_nanos() as u64);
    let sent = [traffic.collectives, traffic.messages, traffic.bytes];
    let words = [&times[..], &[kv_bytes as u64], &sent, &[checksum]].concat();
    let mine: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut all = vec![0; group.size() * mine.len()];
    group.all_gather(&mine, &mut all)?;
    let words: Vec<u64> =
        all.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes"))).collect();
    let mut answers = Some(report.answers);
    Ok(words
        .chunks_exact(WORDS)
        .enumerate()
        .map(|(rank, words)| Report {
            costs: Costs {
                encode_time: Duration::from_nanos(words[0]),
                query_time: Duration::from_nanos(words[1]),
                kv_bytes: words[2] as usize,
                traffic: Traffic { collectives: words[3], messages: words[4], bytes: words[5] },
                checksum: words[6],
            },
            answers: if rank == query_rank { answers.take().unwrap_or_default() } else { Vec::new() },
        })
        .collect())
}

/// One run from the reports of all ranks.
fn gather(mut ranks: Vec<Report>, query_rank: usize) -> Result<Run> {
    let checksum = ranks[query_rank].costs.checksum;
    if let Some(rank) = ranks.iter().position(|rank| rank.costs.checksum != checksum) {
        let reason = "its merged outputs have other bits than the query rank's".into();
        return Err(Error::Rank { rank, reason });
    }
    let encode_time = ranks.iter().map(|rank| rank.costs.encode_time).max().unwrap_or_default();
    let kv_bytes = ranks.iter().map(|rank| rank.costs.kv_bytes).collect();
    let Report { costs, answers } = ranks.swap_remove(query_rank);
    let Costs { query_time, traffic, .. } = costs;
    Ok(Run { answers, encode_time, query_time, kv_bytes, traffic, checksum })
}
