//! Query attention over many ranks: each rank attends to a shard of its own, and one merge makes
//! the softmax over all of them, on every rank.
//!
//!     cargo run --release --example multi_gpu_merge -- --engine threads --device cpu
//!     mpirun -n 4 target/release/examples/multi_gpu_merge --engine mpi --device cpu
//!
//! Rank 0 compares rows of the merged output with one attention over all keys, in f64, and all
//! ranks compare their bits.

#[path = "../single_gpu/check.rs"]
#[allow(dead_code, reason = "shared with another example")]
mod check;
mod engines;
#[path = "../llama/fail.rs"]
mod fail;
mod inputs;
mod rank;
mod report;
#[path = "../single_gpu/rows.rs"]
#[allow(dead_code, reason = "shared with another example")]
mod rows;
#[path = "../llama/table.rs"]
#[allow(dead_code, reason = "shared with another example")]
mod table;
mod timed;

use clap::{Parser, ValueEnum};
use fail::fail;
use star_attention::comm::MergeWay;
use star_attention::{bf16, f16};
use std::process::ExitCode;
use std::time::Duration;

/// Attention over the shards of many ranks, merged on each, checked and timed.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// What carries messages between ranks
    #[arg(long, value_enum, default_value_t = Engine::Threads)]
    engine: Engine,
    /// Where attention and merges run
    #[arg(long, value_enum, default_value_t = Kind::Cpu)]
    device: Kind,
    /// What starts the ranks of NCCL: threads of this process, one for each GPU, or processes
    #[arg(long, value_enum, default_value_t = Start::Threads)]
    start: Start,
    /// Ranks, where they are threads [default: 4, or all GPUs]
    #[arg(long, alias = "hosts", value_name = "N")]
    ranks: Option<usize>,
    /// Keys of each rank's shard, in turn [default: 8192 each; 96, 64, 0 on simt; 131072 on a GPU]
    #[arg(long, value_delimiter = ',', value_name = "N,...")]
    shards: Option<Vec<usize>>,
    /// Query tokens
    #[arg(long, default_value_t = 1, value_name = "T")]
    query_len: usize,
    /// Query heads [default: 32; 4 on simt]
    #[arg(long)]
    heads: Option<usize>,
    /// Heads of keys and values [default: 8; 2 on simt]
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Elements of a head
    #[arg(long, default_value_t = 128)]
    head_dim: usize,
    /// Element type of queries, keys and values
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Layers: how often all of it is done, and timed [default: 16; 2 on simt]
    #[arg(long)]
    layers: Option<usize>,
    /// How the partials become one
    #[arg(long, value_enum, default_value_t = Way::Cheapest)]
    way: Way,
    /// Seconds that a rank waits for the others
    #[arg(long, default_value_t = 30.0, value_name = "S")]
    timeout: f64,
    /// Of the random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Engine {
    Threads,
    Mpi,
    Nccl,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// The CPU backend
    Cpu,
    /// The kernels on the SIMT emulator: slow, with every access checked
    Simt,
    /// The kernels on NVIDIA GPUs
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Start {
    Threads,
    Mpi,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Dtype {
    Bf16,
    F16,
    /// On the CPU
    F32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// What the cost model finds
    Cheapest,
    AllGather,
    ByRows,
}

/// The sizes of a run.
#[derive(Clone, Debug)]
pub struct Sizes {
    /// Keys of the ranks' shards, in turn.
    pub shards: Vec<usize>,
    pub query_len: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub layers: usize,
    /// The cheapest if `None`.
    pub way: Option<MergeWay>,
    pub seed: u64,
}

impl Args {
    fn sizes(&self) -> Sizes {
        let simt = self.device == Kind::Simt;
        let of = |others: usize, on_simt: usize| if simt { on_simt } else { others };
        let shards = match self.device {
            Kind::Cpu => vec![8192],
            Kind::Simt => vec![96, 64, 0],
            Kind::Cuda => vec![131_072],
        };
        Sizes {
            shards: self.shards.clone().unwrap_or(shards),
            query_len: self.query_len,
            heads: self.heads.unwrap_or(of(32, 4)),
            kv_heads: self.kv_heads.unwrap_or(of(8, 2)),
            head_dim: self.head_dim,
            layers: self.layers.unwrap_or(of(16, 2)).max(1),
            way: match self.way {
                Way::Cheapest => None,
                Way::AllGather => Some(MergeWay::AllGather),
                Way::ByRows => Some(MergeWay::ByRows),
            },
            seed: self.seed,
        }
    }

    fn timeout(&self) -> star_attention::Result<Duration> {
        Duration::try_from_secs_f64(self.timeout).map_err(|error| star_attention::Error::Value {
            argument: "--timeout",
            expected: error.to_string(),
            got: self.timeout.to_string(),
        })
    }
}

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            print!("{error}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(error.to_string().split("\n\n").next().unwrap_or_default()),
    };
    let result = match args.dtype {
        Dtype::Bf16 => engines::run::<bf16>(&args),
        Dtype::F16 => engines::run::<f16>(&args),
        Dtype::F32 => engines::run_f32(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => fail(&format!("error: {error}")),
    }
}
