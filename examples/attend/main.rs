//! One attention call on a safetensors file, for cross-checks with other frameworks.
//!
//! Reads q `[batch, seq, heads, dim]`, k `[batch, keys, kv_heads, dim]` and v `[batch, keys,
//! kv_heads, value_dim]`: f32, f16 or bf16, k and v of one type, which may be F8_E4M3 too. Writes
//! `out` `[batch, seq, heads, value_dim]`, of q's type, and `lse` `[batch, heads, seq]`, f32,
//! natural logarithm. Sequences of a batch may have lengths of their own, by i32 tensors of the
//! same file:
//!
//! | tensor | shape | |
//! |---|---|---|
//! | `query_offsets` | `[sequences + 1]` | q is `[1, rows, ..]`; a sequence has the rows from its offset to the next |
//! | `key_offsets` | `[sequences + 1]` | k and v are `[1, rows, ..]`, likewise |
//! | `key_lens` | `[sequences]` | keys of each sequence; the rows or pages behind them are not read |
//! | `page_table` | `[sequences, pages]` | k and v are `[pages, page_len, ..]`; the pages of each sequence, -1 where unused; needs `key_lens` |
//!
//! Rows of q behind the last offset are padding: their `out` is 0 and their `lse` -inf.
//!
//! An f32 tensor `sinks` `[heads]` has the attention sinks of the query heads, if there are any.
//! F32 tensors `k_scale` and `v_scale`, `[1]` or `[kv_heads]`, have what k and v of F8_E4M3 are
//! multiplied by; one that is missing is 1.

mod compute;
mod file;
mod masks;
mod sequences;

use clap::{Parser, ValueEnum};
use file::File;
use sequences::Sequences;
use star_attention::ScoreConfig;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Attention over the tensors q, k and v of a safetensors file.
#[derive(Debug, Parser)]
struct Args {
    /// File with q [batch, seq, heads, dim], k [batch, keys, kv_heads, dim] and v [batch, keys,
    /// kv_heads, value_dim]: f32, f16 or bf16; k and v may be F8_E4M3, with f32 tensors k_scale and
    /// v_scale, [1] or [kv_heads]; if sequences have lengths of their own, i32 tensors
    /// query_offsets, key_offsets, key_lens, page_table; with --mask blocks row_offsets [tiles +
    /// 1], row_ranges [n, 2]; with attention sinks an f32 tensor sinks [heads]
    #[arg(long)]
    input: PathBuf,
    /// File to write: out [batch, seq, heads, value_dim] (of q's type) and lse [batch, heads, seq]
    /// (f32, natural logarithm)
    #[arg(long)]
    output: PathBuf,
    /// What computes it
    #[arg(long, value_enum, default_value_t = Backend::Cpu)]
    backend: Backend,
    /// Which keys a query row sees; rows are aligned to the last keys [default: full]
    #[arg(long, value_enum)]
    mask: Option<masks::Kind>,
    /// JSON file with a mask for each sequence: a list of {"mask": "full|causal|star",
    /// "anchor_len", "block_len", "first_block_len", "window": [L, R]}
    #[arg(long, value_name = "FILE")]
    masks: Option<PathBuf>,
    /// Star mask: keys that every row sees
    #[arg(long, allow_negative_numbers = true)]
    anchor_len: Option<usize>,
    /// Star mask: positions of every block but the first
    #[arg(long, allow_negative_numbers = true)]
    block_len: Option<usize>,
    /// Star mask: positions of the first block
    #[arg(long, allow_negative_numbers = true)]
    first_block_len: Option<usize>,
    /// Keys before and behind a row's own that it sees, with an empty side for all of them: with
    /// the full mask both, else those before; under a star mask of its own block
    #[arg(long, value_name = "L,R", allow_hyphen_values = true)]
    window: Option<String>,
    /// Block mask: query rows of a tile, which has the ranges row_ranges[row_offsets[tile]] on
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    block_rows: Option<usize>,
    /// Block mask: of its ranges a row sees the keys up to its own
    #[arg(long)]
    block_causal: bool,
    /// Factor of the scores [default: 1/sqrt(dim)]
    #[arg(long, allow_negative_numbers = true)]
    scale: Option<f32>,
    /// Scores s become c·tanh(s/c)
    #[arg(long, value_name = "C", allow_negative_numbers = true)]
    softcap: Option<f32>,
    /// Split the keys of each row at multiples of N, so that bits do not depend on the batch
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    split_keys: Option<usize>,
    /// Bits that do not depend on how many rows of a sequence are in the call either
    #[arg(long)]
    row_invariant: bool,
    /// Instructions of the CPU: portable, neon, avx2, avx512, avx512bf16 [default: the best]
    #[arg(long, value_name = "SET")]
    instructions: Option<String>,
    /// Threads of the CPU [default: all]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    threads: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Backend {
    /// The CPU
    #[value(alias = "flash")]
    Cpu,
    /// The GPU's kernels on the CPU, slowly, every access checked
    Simt,
    /// The first NVIDIA GPU, if built with the feature cuda
    Cuda,
    /// The f64 oracle, rounded
    Reference,
}

/// Bad input, in one line that names the argument.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if !error.use_stderr() => {
            print!("{error}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(&first_paragraph(&error.to_string())),
    };
    match attend(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => fail(&first_paragraph(&format!("error: {message}"))),
    }
}

fn fail(line: &str) -> ExitCode {
    eprintln!("{line}");
    ExitCode::from(2)
}

/// The text up to its first empty line, in one line.
fn first_paragraph(text: &str) -> String {
    let lines = text.lines().map(str::trim).take_while(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join(" ")
}

fn attend(args: &Args) -> Result<()> {
    let mut score = ScoreConfig::new();
    (score.scale, score.softcap) = (args.scale, args.softcap);
    score.validate().map_err(|e| e.to_string())?;
    let masks = masks::Masks::of(args)?;
    let settings = compute::Settings::of(args, score)?;
    let input = |e: String| format!("--input {}: {e}", args.input.display());
    let bytes = fs::read(&args.input).map_err(|e| input(e.to_string()))?;
    let file = File::parse(&bytes).map_err(input)?;
    let sequences = Sequences::of(&file).map_err(input)?;
    let batch = sequences.batch(masks.for_each_of(sequences.len(), &file)?).map_err(input)?;
    let bytes = settings.run(&file, batch).map_err(input)?;
    write_whole(&args.output, &bytes).map_err(|e| format!("--output {}: {e}", args.output.display()))
}

/// Writes beside `path` and renames, so that a file never holds half of it. What is no plain file
/// (a link, a device, a pipe) is written to as it is.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let existing = fs::symlink_metadata(path).ok();
    if existing.as_ref().is_some_and(|existing| !existing.is_file()) {
        return fs::write(path, bytes);
    }
    let name = path.file_name().ok_or(std::io::ErrorKind::IsADirectory)?.to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    let written = fs::write(&partial, bytes)
        .and_then(|()| existing.map_or(Ok(()), |old| fs::set_permissions(&partial, old.permissions())))
        .and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // What went wrong is reported; the partial file may not even exist.
        let _ = fs::remove_file(&partial);
    }
    written
}
