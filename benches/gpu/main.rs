//! The speed of the kernels: context encoding dense and star, query attention, ragged batches,
//! merge and append.
//!
//! ```sh
//! cargo bench --features cuda --bench gpu      # on the first GPU, timed by events
//! cargo bench --bench gpu -- --device simt     # a rehearsal: the same rows, tiny, on the emulator
//! ```
//!
//! Every row is printed, and with `--json` appended to a file, as soon as it is measured. A row
//! that fails is a row with an error; the rows after it are measured.

#[path = "../../tests/common/backend.rs"]
#[allow(dead_code, reason = "shared with the tests")]
mod backend;
mod cases;
mod device;
mod launch;
mod measure;
mod results;
mod table;
mod variants;

use cases::{Case, Work};
use clap::{Parser, ValueEnum};
use device::Bench;
use measure::{Effort, Failure, Rates};
use results::Results;
use serde_json::json;
use star_attention::cuda::simt::Simt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Times the kernels.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// Where kernels run: an NVIDIA GPU, or the SIMT emulator (tiny shapes, whose times mean
    /// nothing)
    #[arg(long, value_enum, default_value_t = Kind::Cuda)]
    device: Kind,
    /// Measure only the rows whose label contains this text
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// One launch of each row, without warm-up: for profilers
    #[arg(long)]
    once: bool,
    /// Begin no row after so many seconds; the rows left become errors
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Append the rows to this file of results
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Time the variants of each kernel side by side instead
    #[arg(long)]
    variants: bool,
    /// Print what would be measured, one JSON object per line, and measure nothing
    #[arg(long)]
    list: bool,
    /// What cargo says to a bench
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Cuda,
    Simt,
}

fn main() -> ExitCode {
    // `cargo bench` says --bench; `cargo test --benches` does not, and tests never time.
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("gpu: nothing to test");
        return ExitCode::SUCCESS;
    }
    let args = Args::parse();
    let sizes = match args.device {
        Kind::Cuda => cases::Sizes::GPU,
        Kind::Simt => cases::Sizes::REHEARSAL,
    };
    let mut cases = if args.variants { variants::cases(&sizes) } else { cases::all(&sizes) };
    cases.retain(|case| case.label.contains(&args.filter));
    if cases.is_empty() {
        eprintln!("gpu: no row's label contains {:?}", args.filter);
        return ExitCode::FAILURE;
    }
    if args.list {
        cases.iter().for_each(|case| println!("{}", case.describe()));
        return ExitCode::SUCCESS;
    }
    let outcome = match args.device {
        Kind::Simt => run::<Simt>(&args, &cases),
        #[cfg(feature = "cuda")]
        Kind::Cuda => run::<backend::Gpu>(&args, &cases),
        #[cfg(not(feature = "cuda"))]
        Kind::Cuda => Err(star_attention::Error::Unavailable {
            what: "the GPU",
            reason: "built without the feature `cuda`".into(),
        }
        .into()),
    };
    match outcome {
        Ok(0) => ExitCode::SUCCESS,
        Ok(failed) => {
            eprintln!("gpu: {failed} rows failed");
            ExitCode::FAILURE
        }
        // `cargo bench` runs everywhere; whoever asks for a file expects rows.
        Err(error) if args.json.is_none() => {
            println!("gpu: nothing measured: {error}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("gpu: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Measures the cases and returns how many failed.
fn run<B: Bench>(args: &Args, cases: &[Case]) -> Result<usize, Failure> {
    let backend = B::first()?;
    let name = backend.name()?;
    let results = Results::open(args.json.clone(), &name)?;
    let deadline = args.seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let effort = if args.once { Effort::ONCE } else { B::EFFORT };
    if args.variants {
        return variants::run(&backend, &effort, cases, &results, deadline);
    }
    println!("{name}\n{}", table::heading());
    let mut rates = Rates { matmul_tflops: results.figure("rate", "matmul", "tflops"), copy_gb_per_s: None };
    let mut failed = 0;
    for case in cases {
        let mut row = case.describe();
        let measured = if passed(deadline) {
            Err(NOT_RUN.into())
        } else {
            launch::figures(&backend, if case.once { &Effort::ONCE } else { &effort }, &case.work)
        };
        match measured {
            Ok(figures) => {
                if let Work::Copy { .. } = case.work {
                    rates.copy_gb_per_s = Some(figures.gb_per_s());
                }
                figures.describe(&rates, &mut row);
            }
            Err(error) => {
                failed += 1;
                row["error"] = json!(error.to_string());
            }
        }
        println!("{}", table::line(&row));
        results.append(&row)?;
    }
    Ok(failed)
}

/// The error of a row that was not begun.
const NOT_RUN: &str = "not run: deadline";

fn passed(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| Instant::now() >= deadline)
}
