//! Answers from a long context with Star Attention, and with dense attention beside it.
//!
//! Loads a Llama (or a model of its shape) from a Hugging Face directory or a GGUF file, encodes a
//! context over several ranks (threads of this process, or processes that `mpirun` started), and
//! asks about it: a text, ids, or facts in a haystack. Without options: the retrieval Llama of this
//! repository, 8,192 tokens, 4 ranks.

mod advice;
mod args;
mod chat;
mod engine;
mod haystack;
#[path = "../llama/mod.rs"]
mod llama;
mod report;
mod task;

use args::{Anchor, Args, Generated, Modes, Precision};
use candle_core::{DType, Tensor};
use engine::Engine;
use indicatif::{ProgressBar, ProgressStyle};
use llama::checkpoint::Checkpoint;
use llama::error::{Error, Result};
use llama::model::Llama;
use llama::rank::fold;
use llama::run::{Job, Mode, Run, Scheme, run, ticks};
use report::{Total, answers, costs, headline, reading, texts};
use star_attention::comm::{AnchorKv, Collective, GroupConfig, Link, ThreadGroup, Traffic};
use star_attention::{GeneratedKv, StarLayout};
use std::collections::HashMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use task::{Task, tasks};

/// Each rank is a thread, with threads of its own.
const MOST_RANKS: usize = 1024;
/// The query rank's shards have room for all generated tokens from the start.
const MOST_GENERATED: usize = 1 << 20;
/// Every haystack is in memory from the start.
const MOST_QUERIES: usize = 1 << 16;

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { llama::cli::main(answer) }
}

fn answer(args: &Args) -> Result<()> {
    within("--generate", args.generate(), MOST_GENERATED)?;
    let timeout = Duration::try_from_secs_f64(args.timeout).map_err(|error| {
        Error::input("--timeout", format!("expected seconds, got {}: {error}", args.timeout))
    })?;
    if let Some(ranks) = args.ranks {
        within("--ranks", ranks, MOST_RANKS)?;
    }
    if let Some(queries) = args.queries {
        within("--queries", queries, MOST_QUERIES)?;
    }
    if args.engine != Engine::Threads && args.context.as_deref() == Some(Path::new("-")) {
        return Err(Error::input("--context", "only one of the processes has standard input; name a file"));
    }
    if let Some(path) = &args.save_logits {
        check_writable(path)?;
        if args.engine != Engine::Threads {
            return Err(Error::input(
                "--save-logits",
                "only one of the processes has logits; use --engine threads",
            ));
        }
    }
    let path = args
        .model
        .clone()
        .unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/retrieval-llama"));
    let checkpoint = Checkpoint::open(&path)?;
    // Ids need no tokenizer.
    let tokenizer = checkpoint.tokenizer()?;
    let dtype = args.dtype.map(|dtype| match dtype {
        Precision::F32 => DType::F32,
        Precision::F16 => DType::F16,
        Precision::Bf16 => DType::BF16,
    });
    let model = Llama::of(&checkpoint, dtype)?;
    let tasks = tasks(args, &checkpoint, &model, tokenizer.as_ref())?;
    let group = args.engine.group(&GroupConfig { timeout, ..GroupConfig::default() })?;
    let group = group.as_deref();
    let speaks = group.is_none_or(|group| group.rank() == 0);
    let scheme = scheme(args, &model, group, &tasks[0].context)?;
    let modes = match args.mode {
        Modes::Star => vec![("star", Mode::Star(scheme))],
        Modes::Dense => vec![("dense", Mode::Dense)],
        Modes::Both => vec![("star", Mode::Star(scheme)), ("dense", Mode::Dense)],
    };
    if speaks {
        println!("{}", headline(&model, &tasks, &scheme));
    }
    let results = modes
        .iter()
        // Dense attention is the work of one rank.
        .filter(|&&(_, mode)| speaks || mode != Mode::Dense)
        .map(|&(name, mode)| Ok((name, total(args, &model, group, name, mode, &tasks)?)))
        .collect::<Result<Vec<_>>>()?;
    if speaks {
        let answers = match &tokenizer {
            Some(tokenizer) if args.context.is_some() => texts(tokenizer, &results)?,
            tokenizer => answers(tokenizer.as_ref(), &tasks, &results)?,
        };
        print!("\n{answers}\n{}", costs(&model, &tasks, &results));
        println!("\n{}", reading(scheme.layout.ranks(), args.engine));
    }
    if let Some(path) = &args.save_logits {
        save_logits(path, &results)?;
    }
    Ok(())
}

/// Star Attention as the options ask for it.
fn scheme(args: &Args, model: &Llama, group: Option<&dyn Collective>, context: &[u32]) -> Result<Scheme> {
    let ranks = group.map_or(args.ranks.unwrap_or(4), |group| group.size());
    if args.ranks.is_some_and(|asked| asked != ranks) {
        return Err(Error::input("--ranks", format!("there are {ranks} processes")));
    }
    let mut layout = StarLayout::builder(context.len()).ranks(ranks).generated(match args.generated {
        Generated::QueryRank => GeneratedKv::QueryRank,
        Generated::RoundRobin => GeneratedKv::RoundRobin,
    });
    if let Some(block_len) = args.block_len {
        layout = layout.block_len(block_len);
    }
    if let Some(anchor_len) = args.anchor_len {
        layout = layout.anchor_len(anchor_len);
    }
    let layout = layout.build()?;
    let anchor = match args.anchor {
        Anchor::Encoded => AnchorKv::Encoded,
        Anchor::Received => AnchorKv::Received,
        Anchor::Cheapest => {
            let link = group
                .map_or_else(|| Ok::<_, Error>(ThreadGroup::ranks(1)?[0].link()), |group| Ok(group.link()))?;
            cheapest_anchor(model, group, &layout, &link, context)?
        }
    };
    Ok(Scheme { anchor, ..layout.into() })
}

/// What rank 0 finds cheaper: all must do the same.
fn cheapest_anchor(
    model: &Llama,
    group: Option<&dyn Collective>,
    layout: &StarLayout,
    link: &Link,
    context: &[u32],
) -> Result<AnchorKv> {
    let anchor = advice::cheapest_anchor(model, layout, link, context)?;
    let mut received = [u8::from(anchor == AnchorKv::Received)];
    if let Some(group) = group {
        group.broadcast(0, &mut received)?;
    }
    Ok(if received == [1] { AnchorKv::Received } else { AnchorKv::Encoded })
}

/// Refuses 0, and numbers that no run could end with.
fn within(argument: &str, number: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&number) {
        return Ok(());
    }
    Err(Error::input(argument, format!("expected 1 to {most}, got {number}")))
}

fn total(
    args: &Args,
    model: &Llama,
    group: Option<&dyn Collective>,
    name: &'static str,
    mode: Mode,
    tasks: &[Task],
) -> Result<Total> {
    let jobs: Vec<Job> = tasks
        .iter()
        .map(|task| Job {
            context: &task.context,
            queries: &task.queries,
            generate: args.generate(),
            stop: &task.stop,
            all_logits: args.save_logits.is_some(),
        })
        .collect();
    let style = ProgressStyle::with_template("{msg:5} [{elapsed_precise}] {wide_bar} {percent}% eta {eta}");
    let steps = jobs.iter().map(|job| ticks(model, group.is_some(), mode, job)).sum();
    let bar = if group.is_none_or(|group| group.rank() == 0) {
        ProgressBar::new(steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    } else {
        ProgressBar::hidden()
    };
    bar.set_message(name);
    bar.enable_steady_tick(Duration::from_millis(200));
    let runs = jobs.iter().map(|job| run(model, group, mode, job, &bar)).collect::<Result<Vec<Run>>>();
    bar.finish_and_clear();
    let runs = runs?;
    Ok(Total {
        encode_time: runs.iter().map(|run| run.encode_time).sum::<Duration>() / runs.len() as u32,
        query_time: runs.iter().map(|run| run.query_time).sum(),
        kv_bytes: runs[0].kv_bytes.clone(),
        traffic: runs.iter().fold(Traffic::default(), |sum, run| sum + run.traffic),
        checksum: runs.iter().fold(0, |sum, run| fold(sum, run.checksum)),
        answers: runs.into_iter().flat_map(|run| run.answers).collect(),
    })
}

/// Refuses a file that could not be written, before the work is done.
fn check_writable(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() || path.is_dir() {
        return Err(Error::input("--save-logits", format!("cannot write {}", path.display())));
    }
    Ok(())
}

fn save_logits(path: &Path, results: &[(&'static str, Total)]) -> Result<()> {
    let tensors: HashMap<&str, Tensor> = results
        .iter()
        .filter_map(|(name, total)| Some((*name, total.answers.first()?.logits.clone()?)))
        .collect();
    // Written beside it first, so that no half-written file takes its place.
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".part");
    candle_core::safetensors::save(&tensors, Path::new(&unfinished))
        .map_err(|error| Error::input("--save-logits", error))?;
    std::fs::rename(&unfinished, path).map_err(|error| Error::input("--save-logits", error))
}
