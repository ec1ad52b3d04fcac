//! One attention call on a safetensors file, for cross-checks with other frameworks.
//!
//! Reads q `[batch, seq, heads, dim]`, k and v `[batch, keys, kv_heads, dim]`, all f32, f16 or bf16. Writes `out`, of q's shape and
//! type, and `lse` `[batch, heads, seq]`, f32, natural logarithm.

use clap::{Parser, ValueEnum};
use safetensors::tensor::{Dtype, SafeTensors, TensorView as Stored};
use star_attention::cpu::{flash, reference};
use star_attention::{AttentionConfig, Element, Mask, TensorView, TensorViewMut, bf16, f16};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Attention over the tensors q, k and v of a safetensors file.
#[derive(Debug, Parser)]
struct Args {
    /// File with q [batch, seq, heads, dim], k and v [batch, keys, kv_heads, dim]: f32, f16 or bf16
    #[arg(long)]
    input: PathBuf,
    /// File to write: out (like q) and lse [batch, heads, seq] (f32, natural logarithm)
    #[arg(long)]
    output: PathBuf,
    /// What computes it
    #[arg(long, value_enum, default_value_t = Backend::Flash)]
    backend: Backend,
    /// Which keys a query row sees; rows are aligned to the last keys
    #[arg(long, value_enum, default_value_t = MaskKind::Full)]
    mask: MaskKind,
    /// Star mask: keys that every row sees
    #[arg(long, allow_negative_numbers = true)]
    anchor_len: Option<usize>,
    /// Star mask: positions of every block but the first
    #[arg(long, allow_negative_numbers = true)]
    block_len: Option<usize>,
    /// Star mask: positions of the first block
    #[arg(long, allow_negative_numbers = true)]
    first_block_len: Option<usize>,
    /// Factor of the scores [default: 1/sqrt(dim)]
    #[arg(long, allow_negative_numbers = true)]
    scale: Option<f32>,
    /// Scores s become c·tanh(s/c)
    #[arg(long, value_name = "C", allow_negative_numbers = true)]
    softcap: Option<f32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Backend {
    /// The default backend of the library
    Flash,
    /// The f64 oracle, rounded
    Reference,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum MaskKind {
    Full,
    Causal,
    Star,
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
    let config = AttentionConfig { mask: mask(args)?, scale: args.scale, softcap: args.softcap };
    config.validate().map_err(|e| e.to_string())?;
    let input = |e: &dyn std::fmt::Display| format!("--input {}: {e}", args.input.display());
    let bytes = fs::read(&args.input).map_err(|e| input(&e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| input(&e))?;
    let tensor = |name| stored(&file, name).map_err(|e| input(&e));
    let tensors = [tensor("q")?, tensor("k")?, tensor("v")?];
    let dtype = tensors[0].data.dtype();
    if let Some(other) = tensors.iter().find(|tensor| tensor.data.dtype() != dtype) {
        let (name, got) = (other.name, other.data.dtype());
        return Err(input(&format!("{name}: expected dtype {dtype:?} as q has, got {got:?}")));
    }
    let bytes = match dtype {
        Dtype::F32 => run::<f32>(args.backend, &config, &tensors),
        Dtype::F16 => run::<f16>(args.backend, &config, &tensors),
        Dtype::BF16 => run::<bf16>(args.backend, &config, &tensors),
        other => Err(format!("q: expected dtype F32, F16 or BF16, got {other:?}")),
    };
    let bytes = bytes.map_err(|e| input(&e))?;
    write_whole(&args.output, &bytes).map_err(|e| format!("--output {}: {e}", args.output.display()))
}

/// A tensor `[batch, seq, heads, dim]` of the file.
struct Input<'a> {
    name: &'static str,
    shape: [usize; 4],
    data: Stored<'a>,
}

fn stored<'a>(file: &SafeTensors<'a>, name: &'static str) -> Result<Input<'a>> {
    let data = file.tensor(name).map_err(|_| format!("no tensor {name}"))?;
    let shape = data
        .shape()
        .try_into()
        .map_err(|_| format!("{name}: expected 4 axes [batch, seq, heads, dim], got {:?}", data.shape()))?;
    Ok(Input { name, shape, data })
}

fn mask(args: &Args) -> Result<Mask> {
    let lens = [
        ("--anchor-len", args.anchor_len),
        ("--block-len", args.block_len),
        ("--first-block-len", args.first_block_len),
    ];
    if args.mask != MaskKind::Star {
        return match lens.iter().find(|(_, len)| len.is_some()) {
            Some((name, _)) => Err(format!("{name}: only with --mask star")),
            None if args.mask == MaskKind::Causal => Ok(Mask::Causal),
            None => Ok(Mask::Full),
        };
    }
    let [anchor_len, block_len, first_block_len] =
        lens.map(|(name, len)| len.ok_or_else(|| format!("{name}: needed with --mask star")));
    Ok(Mask::Star { anchor_len: anchor_len?, block_len: block_len?, first_block_len: first_block_len? })
}

/// An element as it lies in a file: little-endian, at any address.
trait FileElement: Element {
    const STORED: Dtype;
    fn read(bytes: &[u8]) -> Vec<Self>;
    fn write(values: &[Self]) -> Vec<u8>;
}

macro_rules! file_element {
    ($type:ty, $stored:expr) => {
        impl FileElement for $type {
            const STORED: Dtype = $stored;
            fn read(bytes: &[u8]) -> Vec<Self> {
                bytes.as_chunks().0.iter().map(|&bytes| Self::from_le_bytes(bytes)).collect()
            }
            fn write(values: &[Self]) -> Vec<u8> {
                values.iter().flat_map(|x| x.to_le_bytes()).collect()
            }
        }
    };
}
file_element!(f32, Dtype::F32);
file_element!(f16, Dtype::F16);
file_element!(bf16, Dtype::BF16);

/// The call on the tensors q, k and v, of one type; gives the file to write.
fn run<T: FileElement>(
    backend: Backend,
    config: &AttentionConfig,
    tensors: &[Input<'_>; 3],
) -> Result<Vec<u8>> {
    let [q, k, v] = tensors.each_ref().map(|tensor| T::read(tensor.data.data()));
    let view = |i: usize, data| {
        let Input { name, shape, .. } = tensors[i];
        TensorView::contiguous(name, data, shape).map_err(|e| e.to_string())
    };
    let (query, key, value) = (view(0, &q)?, view(1, &k)?, view(2, &v)?);
    let shape @ [batch, seq, heads, _] = query.shape();
    let mut out = vec![T::default(); q.len()];
    let mut lse = vec![0f32; batch * heads * seq];
    match backend {
        Backend::Flash => {
            let out = TensorViewMut::contiguous("out", &mut out, shape).map_err(|e| e.to_string())?;
            flash::attention(config, query, key, value, out, Some(&mut lse)).map_err(|e| e.to_string())?;
        }
        Backend::Reference => {
            let exact = reference::attention(config, query, key, value).map_err(|e| e.to_string())?;
            out = exact.out.iter().map(|&x| T::from_f32(x as f32)).collect();
            lse = exact.lse.iter().map(|&x| x as f32).collect();
        }
    }
    let (out, lse) = (T::write(&out), f32::write(&lse));
    let out = Stored::new(T::STORED, shape.to_vec(), &out).map_err(|e| e.to_string())?;
    let lse = Stored::new(Dtype::F32, vec![batch, heads, seq], &lse).map_err(|e| e.to_string())?;
    safetensors::serialize([("out", out), ("lse", lse)], None).map_err(|e| e.to_string())
}

/// Writes beside `path` and renames, so that `path` never holds half a file.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().ok_or(std::io::ErrorKind::IsADirectory)?.to_string_lossy();
    let partial = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    let written = fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // What went wrong is reported; the partial file may not even exist.
        let _ = fs::remove_file(&partial);
    }
    written
}
