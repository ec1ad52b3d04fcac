//! How accurate Star Attention is beside dense attention: RULER's and bAbI's tasks, over lengths,
//! blocks, anchors and ranks.
//!
//! Without options of a checkpoint: the small Llama of this repository, in its own words. Any other
//! Llama is asked in English.

mod ablation;
mod chart;
mod english;
mod fit;
mod language;
#[path = "../llama/mod.rs"]
mod llama;
mod long;
mod mass;
mod plot;
mod record;
mod report;
mod sample;
mod samples;
mod setting;
mod small;
mod statistics;
mod suite;
mod task;
mod tasks;

use candle_core::DType;
use clap::{Parser, Subcommand, ValueEnum};
use llama::anchor::AnchorBlock;
use llama::error::{Error, Result};
use record::Log;
use report::Row;
use setting::{Extent, Setting, Star};
use star_attention::StarLayout;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use suite::{Subject, Suite};
use task::Task;

/// How accurate Star Attention is beside dense attention.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs tasks dense and with star, and tells how often each was right
    Run(Run),
    /// Runs the paper's nine settings of the anchor
    Ablation(Ablation),
    /// Tells how much attention the starts of blocks draw
    Mass(Mass),
    /// Measures time and memory up to a length that dense attention does not reach
    Long(Long),
    /// Writes samples in the small model's tokens as JSON lines
    Samples(samples::Samples),
    /// Writes the small model's words, in the order of their ids, as JSON
    Words,
}

#[derive(clap::Args)]
struct Checkpoint {
    /// Hugging Face directory or GGUF file [default: the small Llama of this repository]
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Type of queries, keys and values [default: f32]
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    dtype: Precision,
}

#[derive(Clone, Copy, ValueEnum)]
enum Precision {
    F32,
    F16,
    Bf16,
}

#[derive(clap::Args)]
struct Run {
    #[command(flatten)]
    checkpoint: Checkpoint,
    /// Tasks [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    tasks: Vec<Task>,
    /// Tokens of context, query and answer
    #[arg(long, value_delimiter = ',', default_value = "1024", value_name = "L")]
    len: Vec<usize>,
    /// Samples of each task and length
    #[arg(long, default_value_t = 20, value_name = "N")]
    samples: usize,
    /// Seed of the first sample
    #[arg(long, default_value_t = 1_000_000, value_name = "S")]
    seed: u64,
    /// Tokens of a block, or a part of the context
    #[arg(long, value_delimiter = ',', default_value = "/4", value_name = "B")]
    block: Vec<Extent>,
    /// Tokens of the anchor, or a part of the block
    #[arg(long, value_delimiter = ',', default_value = "/1", value_name = "A")]
    anchor: Vec<Extent>,
    /// Ranks
    #[arg(long, alias = "hosts", value_delimiter = ',', default_value = "4", value_name = "N")]
    ranks: Vec<usize>,
    /// Records, to which an interrupted run adds what is missing
    #[arg(long, default_value = "target/ruler/run.jsonl", value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    files: Files,
}

/// Where tables and plots go besides the terminal.
#[derive(clap::Args)]
struct Files {
    /// Writes the table as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Draws the accuracy of all tasks together, over lengths or what else differs, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Ablation {
    #[command(flatten)]
    checkpoint: Checkpoint,
    /// Tasks [default: all with needles]
    #[arg(long, value_enum, value_delimiter = ',')]
    tasks: Vec<Task>,
    /// Tokens of context, query and answer
    #[arg(long, default_value_t = 2048, value_name = "L")]
    len: usize,
    /// Samples of each task
    #[arg(long, default_value_t = 63, value_name = "N")]
    samples: usize,
    /// Seed of the first sample
    #[arg(long, default_value_t = 2_000_000, value_name = "S")]
    seed: u64,
    /// Records, to which an interrupted run adds what is missing
    #[arg(long, default_value = "target/ruler/ablation.jsonl", value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    files: Files,
}

#[derive(clap::Args)]
struct Mass {
    #[command(flatten)]
    checkpoint: Checkpoint,
    /// The task whose contexts are encoded
    #[arg(long, value_enum, default_value_t = Task::NiahMultikey1)]
    task: Task,
    /// Tokens of context, query and answer
    #[arg(long, default_value_t = 2048, value_name = "L")]
    len: usize,
    /// Contexts
    #[arg(long, default_value_t = 20, value_name = "N")]
    samples: usize,
    /// First tokens of a block that are its start
    #[arg(long, default_value_t = 1, value_name = "N")]
    width: usize,
}

#[derive(clap::Args)]
struct Long {
    #[command(flatten)]
    checkpoint: Checkpoint,
    /// What is asked
    #[arg(long, value_enum, default_value_t = Task::NiahSingle1)]
    task: Task,
    /// Tokens of context, query and answer
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "16384,32768,65536,131072,262144,524288,1048576",
        value_name = "L"
    )]
    len: Vec<usize>,
    /// Tokens of a block, or a part of the context
    #[arg(long, default_value = "4096", value_name = "B")]
    block: Extent,
    /// Tokens of the anchor, or a part of the block
    #[arg(long, default_value = "/1", value_name = "A")]
    anchor: Extent,
    /// Ranks
    #[arg(long, alias = "hosts", default_value_t = 4, value_name = "N")]
    ranks: usize,
    /// Seed of the sample
    #[arg(long, default_value_t = 3_000_000, value_name = "S")]
    seed: u64,
    /// Draws time over length as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
}

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { llama::cli::main(work) }
}

fn work(args: &Args) -> Result<()> {
    match &args.command {
        Command::Run(args) => run(args),
        Command::Ablation(args) => ablate(args),
        Command::Mass(args) => mass(args),
        Command::Long(args) => long(args),
        Command::Samples(args) => samples::write(args, &mut std::io::stdout().lock())
            .map_err(|error| Error::input("samples", error)),
        Command::Words => {
            println!("{}", serde_json::json!(small::Small::vocabulary()));
            Ok(())
        }
    }
}

impl Checkpoint {
    fn load(&self) -> Result<Subject> {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/assets/ruler-llama");
        let dtype = match self.dtype {
            Precision::F32 => DType::F32,
            Precision::F16 => DType::F16,
            Precision::Bf16 => DType::BF16,
        };
        Subject::load(self.model.as_deref().unwrap_or(&own), dtype)
    }
}

fn run(args: &Run) -> Result<()> {
    let subject = args.checkpoint.load()?;
    let mut settings = vec![Setting::Dense];
    for &ranks in &args.ranks {
        for &block in &args.block {
            for &anchor in &args.anchor {
                settings.push(Setting::Star(Star { block, anchor, ranks, anchor_block: AnchorBlock::First }));
            }
        }
    }
    let tasks = if args.tasks.is_empty() { &Task::ALL[..] } else { &args.tasks };
    let suite = Suite { tasks, lens: &args.len, settings: &settings, samples: args.samples, seed: args.seed };
    let rows = rows(&suite, &subject, &args.out)?;
    print!("{}", report::text(&rows));
    args.files.write(&rows, &settings)
}

fn ablate(args: &Ablation) -> Result<()> {
    let subject = args.checkpoint.load()?;
    let ablations = ablation::settings(subject.constant()?, subject.first_word());
    let settings: Vec<Setting> = ablations.iter().map(|ablation| ablation.setting).collect();
    let needles: Vec<Task> = Task::ALL.into_iter().filter(|task| task.niah().is_some()).collect();
    let tasks = if args.tasks.is_empty() { &needles } else { &args.tasks };
    let suite =
        Suite { tasks, lens: &[args.len], settings: &settings, samples: args.samples, seed: args.seed };
    let rows = rows(&suite, &subject, &args.out)?;
    print!("{}", ablation::text(&rows, &ablations));
    args.files.write(&rows, &settings)
}

/// Runs what the file does not hold yet, and reports what the suite asks for.
fn rows(suite: &Suite<'_>, subject: &Subject, out: &Path) -> Result<Vec<Row>> {
    let mut log = Log::open(out)?;
    suite.run(subject, &mut log)?;
    Ok(report::rows(&suite.records(subject, &log)))
}

fn mass(args: &Mass) -> Result<()> {
    let subject = args.checkpoint.load()?;
    let mut sums: [Vec<mass::Mass>; 2] = Default::default();
    let block = args.len.div_ceil(4);
    if !(1..block).contains(&args.width) {
        let reason = format!("expected less than the block's {block} tokens, got {}", args.width);
        return Err(Error::input("--width", reason));
    }
    for seed in 0..args.samples as u64 {
        let context = subject.tokenizer.context(&subject.sample(args.task, args.len, seed)?.text())?;
        for (sum, anchor) in sums.iter_mut().zip([0, block]) {
            let layout = StarLayout::builder(context.len())
                .block_len(block)
                .anchor_len(anchor)
                .ranks(context.len().div_ceil(block))
                .build()?;
            let masses = mass::masses(&subject.model, &layout, &context, args.width)?;
            sum.resize(masses.len(), mass::Mass::default());
            sum.iter_mut()
                .zip(masses)
                .for_each(|(sum, mass)| *sum = *sum + mass * (args.samples as f64).recip());
        }
    }
    print!("{}", mass::text(&sums[0], &sums[1], args.width, block));
    Ok(())
}

fn long(args: &Long) -> Result<()> {
    let subject = args.checkpoint.load()?;
    let star = Setting::Star(Star {
        block: args.block,
        anchor: args.anchor,
        ranks: args.ranks,
        anchor_block: AnchorBlock::First,
    });
    args.len.iter().try_for_each(|&len| star.check(len))?;
    let measured = long::measure(&subject, &star, &args.len, args.task, args.seed)?;
    let reckoned = long::reckoned(&measured, &subject.model.config, &args.len);
    print!("{}", long::text(&measured, &reckoned));
    if let (Some(path), Some(svg)) = (&args.plot, long::chart(&measured, &reckoned)) {
        write("--plot", path, &svg)?;
    }
    Ok(())
}

impl Files {
    fn write(&self, rows: &[Row], settings: &[Setting]) -> Result<()> {
        if let Some(path) = &self.csv {
            write("--csv", path, &report::csv(rows))?;
        }
        if let (Some(path), Some(svg)) = (&self.plot, plot::accuracy(rows, settings)) {
            write("--plot", path, &svg)?;
        }
        Ok(())
    }
}

fn write(argument: &str, path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).map_err(|error| Error::input(argument, format!("{}: {error}", path.display())))
}
