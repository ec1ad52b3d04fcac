//! Runs attention on request and says how long it took: the crate's side of
//! `scripts/compare-pytorch.sh`.
//!
//! Reads one command a line from standard input and answers with one line:
//!
//! - `{"folder": F, "dtype": "f32" | "f16" | "bf16", "mask": "full" | "causal", "query_heads": H,
//!   "kv_heads": K, "query_len": T, "key_len": S, "head_dim": D}` reads the tensors `F/query`,
//!   `F/key` and `F/value`, row-major `[heads, seq, dim]`; answers `ready` and the FLOPs of a call;
//! - `run` computes once, the plan included; answers the seconds;
//! - `save` writes the last output to `F/out` in f32; answers `saved`;
//! - `peaks` measures what the machine can do at best, on the threads that attention has; answers
//!   `{"f32": .., "bf16": .., "amx": .., "read": .., "copy": ..}`: FLOP/s, `null` where the CPU has
//!   no such instructions, and bytes per second.

#[path = "../benches/common/peak.rs"]
mod peak;

use peak::Peaks;
use serde_json::{Value, json};
use star_attention::cpu::flash::Plan;
use star_attention::{AttentionConfig, AttentionShape, Element, Inputs, Mask};
use star_attention::{TensorView, TensorViewMut, bf16, f16};
use std::error::Error;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A case, with its element type erased.
trait Case {
    fn flops(&self) -> u64;
    fn run(&mut self) -> Result<f64, Box<dyn Error>>;
    fn save(&self) -> Result<(), Box<dyn Error>>;
}

struct Tensors<T> {
    folder: PathBuf,
    config: AttentionConfig,
    shape: AttentionShape,
    query: Vec<T>,
    key: Vec<T>,
    value: Vec<T>,
    out: Vec<T>,
    workspace: Vec<u8>,
}

/// `[batch, heads, seq, dim]` for `[batch, seq, heads, dim]`.
fn heads_first([batch, seq, heads, dim]: [usize; 4]) -> [usize; 4] {
    [batch, heads, seq, dim]
}

impl<T: Element> Tensors<T> {
    fn read(
        folder: &Path,
        config: AttentionConfig,
        shape: AttentionShape,
        from_le_bytes: fn(&[u8]) -> T,
    ) -> Result<Self, Box<dyn Error>> {
        let tensor = |name: &str| -> Result<Vec<T>, Box<dyn Error>> {
            Ok(std::fs::read(folder.join(name))?.chunks_exact(T::DTYPE.size()).map(from_le_bytes).collect())
        };
        let (query, key, value) = (tensor("query")?, tensor("key")?, tensor("value")?);
        let out = vec![T::default(); query.len()];
        let workspace = Vec::with_capacity(Plan::new(&config, &shape)?.workspace_bytes());
        Ok(Self { folder: folder.into(), config, shape, query, key, value, out, workspace })
    }
}

impl<T: Element> Case for Tensors<T> {
    fn flops(&self) -> u64 {
        Plan::new(&self.config, &self.shape).map_or(0, |plan| plan.flops())
    }

    fn run(&mut self) -> Result<f64, Box<dyn Error>> {
        let (query, key) = (heads_first(self.shape.query_shape()), heads_first(self.shape.key_shape()));
        let start = Instant::now();
        Plan::new(&self.config, &self.shape)?.run(
            Inputs::new(
                TensorView::contiguous("query", &self.query, query)?.swap_seq_heads(),
                TensorView::contiguous("key", &self.key, key)?.swap_seq_heads(),
                TensorView::contiguous("value", &self.value, key)?.swap_seq_heads(),
            ),
            TensorViewMut::contiguous("out", &mut self.out, query)?.swap_seq_heads(),
            None,
            &mut self.workspace,
        )?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn save(&self) -> Result<(), Box<dyn Error>> {
        let bytes: Vec<u8> = self.out.iter().flat_map(|x| x.to_f32().to_le_bytes()).collect();
        Ok(std::fs::write(self.folder.join("out"), bytes)?)
    }
}

fn read_case(line: &str) -> Result<Box<dyn Case>, Box<dyn Error>> {
    let case: Value = serde_json::from_str(line)?;
    let text = |name: &str| case[name].as_str().ok_or_else(|| format!("{name}: expected a string"));
    let number = |name: &str| {
        let number = case[name].as_u64().and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| format!("{name}: expected a number"))
    };
    let shape = AttentionShape {
        batch: 1,
        query_len: number("query_len")?,
        key_len: number("key_len")?,
        query_heads: number("query_heads")?,
        kv_heads: number("kv_heads")?,
        head_dim: number("head_dim")?,
        value_dim: number("head_dim")?,
    };
    let config = AttentionConfig::new(match text("mask")? {
        "full" => Mask::Full,
        "causal" => Mask::Causal,
        other => return Err(format!("mask: expected full or causal, got {other}").into()),
    });
    let folder = PathBuf::from(text("folder")?);
    Ok(match text("dtype")? {
        "f32" => {
            Box::new(Tensors::read(&folder, config, shape, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))?)
        }
        "f16" => Box::new(Tensors::read(&folder, config, shape, |b| f16::from_le_bytes([b[0], b[1]]))?),
        "bf16" => Box::new(Tensors::read(&folder, config, shape, |b| bf16::from_le_bytes([b[0], b[1]]))?),
        other => return Err(format!("dtype: expected f32, f16 or bf16, got {other}").into()),
    })
}

fn answer(line: &str, case: &mut Option<Box<dyn Case>>) -> Result<String, Box<dyn Error>> {
    match line.trim() {
        "run" => Ok(case.as_mut().ok_or("run: no case was given")?.run()?.to_string()),
        "save" => case.as_ref().ok_or("save: no case was given")?.save().map(|()| "saved".into()),
        "peaks" => {
            let peaks = Peaks::measure();
            let answer = json!({
                "f32": peaks.f32_flops,
                "bf16": peaks.bf16_flops,
                "amx": peaks.amx_flops,
                "read": peaks.read_bytes,
                "copy": peaks.copy_bytes,
            });
            Ok(answer.to_string())
        }
        line => {
            let read = case.insert(read_case(line)?);
            Ok(format!("ready {}", read.flops()))
        }
    }
}

fn main() {
    let mut case = None;
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        match answer(&line, &mut case) {
            Ok(answer) => println!("{answer}"),
            Err(error) => {
                eprintln!("timed_attention: {error}");
                std::process::exit(2);
            }
        }
        if std::io::stdout().flush().is_err() {
            return;
        }
    }
}
