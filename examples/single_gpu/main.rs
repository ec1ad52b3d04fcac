//! Both phases of Star Attention on one device that plays several ranks, for one layer of random
//! queries, keys and values.
//!
//! Phase 1 encodes each rank's blocks under its star mask and appends what the rank keeps to its
//! shard. Phase 2 lets query tokens attend to every shard and merges the partials. Rows of both are
//! checked against the oracle in f64.

mod check;
#[path = "../llama/fail.rs"]
mod fail;
mod inputs;
mod phases;
mod report;
#[allow(dead_code, reason = "shared with another example")]
mod rows;
#[path = "../llama/table.rs"]
#[allow(dead_code, reason = "shared with the other example")]
mod table;

use clap::{Parser, ValueEnum};
use fail::fail;
use star_attention::cpu::Cpu;
use star_attention::cuda::{Cuda, simt::Simt};
use star_attention::{DType, Element, bf16, f16};
use std::process::ExitCode;

/// Both phases of Star Attention on one device, checked against the oracle.
#[derive(Clone, Debug, Parser)]
pub struct Args {
    /// Where attention runs: an NVIDIA GPU, the CPU, or the kernels on the SIMT emulator (slow,
    /// with every access checked)
    #[arg(long, value_enum, default_value_t = Kind::Cuda)]
    device: Kind,
    /// Element type of queries, keys and values
    #[arg(long, value_enum, default_value_t = Dtype::Bf16)]
    dtype: Dtype,
    /// Tokens of the context [default: 131072 on a GPU, 8192 on the CPU, 640 on the emulator]
    #[arg(long)]
    context_len: Option<usize>,
    /// Tokens of a block [default: a quarter of the context]
    #[arg(long)]
    block_len: Option<usize>,
    /// Tokens of the anchor [default: the block's]
    #[arg(long)]
    anchor_len: Option<usize>,
    /// Ranks that the device plays, one after another
    #[arg(long, alias = "hosts", default_value_t = 4)]
    ranks: usize,
    /// Query tokens
    #[arg(long, default_value_t = 16)]
    query_len: usize,
    /// Query heads [default: 32, 4 on the emulator]
    #[arg(long)]
    heads: Option<usize>,
    /// Heads of keys and values [default: 8, 2 on the emulator]
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Elements of a head: 64, 96, 128, 192 or 256; on the CPU any
    #[arg(long, default_value_t = 128)]
    head_dim: usize,
    /// Times each step is measured [default: 10, 1 on the emulator]
    #[arg(long)]
    repeats: Option<usize>,
    /// Of the random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    Cuda,
    Cpu,
    Simt,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Dtype {
    Bf16,
    F16,
}

/// The sizes of a run.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub context_len: usize,
    pub block_len: usize,
    pub anchor_len: usize,
    pub ranks: usize,
    pub query_len: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub repeats: usize,
    pub seed: u64,
}

impl Sizes {
    fn describe(&self, dtype: DType) -> String {
        let Self { context_len, block_len, anchor_len, ranks, query_len, heads, kv_heads, head_dim, .. } =
            self;
        format!(
            "{context_len} tokens, block {block_len}, anchor {anchor_len}, {ranks} ranks, {heads}/{kv_heads} heads \
             of {head_dim}, {dtype}, {query_len} query tokens"
        )
    }

    /// FLOPs of attention over so many pairs of a row and a key: two products of each head.
    fn flops(&self, pairs: usize) -> u64 {
        (4 * self.heads * self.head_dim * pairs) as u64
    }
}

impl Args {
    fn sizes(&self) -> Sizes {
        let of = |fast: usize, emulated: usize| if self.device == Kind::Simt { emulated } else { fast };
        let context_len = self.context_len.unwrap_or(match self.device {
            Kind::Cuda => 131_072,
            Kind::Cpu => 8192,
            Kind::Simt => 640,
        });
        let block_len = self.block_len.unwrap_or(context_len.div_ceil(4).max(1));
        Sizes {
            context_len,
            block_len,
            anchor_len: self.anchor_len.unwrap_or(block_len),
            ranks: self.ranks,
            query_len: self.query_len,
            heads: self.heads.unwrap_or(of(32, 4)),
            kv_heads: self.kv_heads.unwrap_or(of(8, 2)),
            head_dim: self.head_dim,
            repeats: self.repeats.unwrap_or(of(10, 1)).max(1),
            seed: self.seed,
        }
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
        Dtype::Bf16 => run::<bf16>(&args),
        Dtype::F16 => run::<f16>(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => fail(&format!("error: {error}")),
    }
}

/// Whether all errors were within the bound.
fn run<T: Element>(args: &Args) -> star_attention::Result<bool> {
    let sizes = args.sizes();
    match args.device {
        Kind::Cpu => phases::run::<_, T>(&Cpu::new(), "CPU", &sizes),
        Kind::Simt => phases::run::<_, T>(&Cuda::new(Simt::new(args.seed), ()), "SIMT emulator", &sizes),
        Kind::Cuda => cuda::<T>(&sizes),
    }
}

#[cfg(feature = "cuda")]
fn cuda<T: Element>(sizes: &Sizes) -> star_attention::Result<bool> {
    let driver = star_attention::cuda::driver::Driver::open(0)?;
    let name = driver.name()?;
    let stream = driver
        .context()
        .new_stream()
        .map_err(|source| star_attention::Error::Driver { operation: "make a stream", source })?;
    phases::run::<_, T>(&Cuda::new(driver, stream), &name, sizes)
}

#[cfg(not(feature = "cuda"))]
#[allow(clippy::extra_unused_type_parameters, reason = "as with the feature")]
fn cuda<T: Element>(_: &Sizes) -> star_attention::Result<bool> {
    let reason = "this build has not the feature `cuda`; try --device cpu or simt".into();
    Err(star_attention::Error::Unavailable { what: "the GPU", reason })
}
