//! How a row is measured, and what is made of its times.

use crate::device::Bench;
use serde_json::{Value, json};
use star_attention::Result;

/// Why a row has no figures.
pub type Failure = Box<dyn std::error::Error>;

/// How thoroughly a row is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Milliseconds of launches beforehand, which let the clocks rise.
    pub warm_ms: f64,
    /// Milliseconds of a round: enough launches that events resolve them.
    pub round_ms: f64,
    /// Rounds, of which the median counts...
    pub rounds: usize,
    /// ...or three, if all of them took longer than this.
    pub most_ms: f64,
    /// Inputs rotate over so many bytes, so that none is found in the L2 cache.
    pub rotated_bytes: usize,
}

impl Effort {
    /// For a GPU. The rotated bytes are twice the largest L2 cache (126 MB on Blackwell).
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub const GPU: Self =
        Self { warm_ms: 200.0, round_ms: 40.0, rounds: 9, most_ms: 4000.0, rotated_bytes: 256 << 20 };
    /// A single launch.
    pub const ONCE: Self = Self { warm_ms: 0.0, round_ms: 0.0, rounds: 1, most_ms: 0.0, rotated_bytes: 0 };
}

/// To six digits: so many survive being read and written again in any program.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// Milliseconds of one launch in each round.
#[derive(Clone, Debug)]
pub struct Times(Vec<f64>);

impl Times {
    /// Of at least one round.
    pub fn new(mut rounds: Vec<f64>) -> Self {
        rounds.sort_by(f64::total_cmp);
        Self(rounds)
    }

    pub fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    pub fn least(&self) -> f64 {
        self.0[0]
    }

    pub fn most(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    pub fn describe(&self) -> Value {
        let [median, least, most] = [self.median(), self.least(), self.most()].map(rounded);
        json!({ "median": median, "least": least, "most": most })
    }
}

/// Times several launches in turn: round by round, each of `ways` once. `launch(way, n)` is the
/// n-th launch of that way.
pub fn alternate<B: Bench>(
    backend: &B,
    effort: &Effort,
    ways: usize,
    launch: &mut dyn FnMut(usize, usize) -> Result<()>,
) -> Result<Vec<Vec<f64>>> {
    let mut next = vec![0; ways];
    let mut round = |way: usize, launches: usize| {
        let ms = backend.ms(&mut || {
            for _ in 0..launches {
                launch(way, next[way])?;
                next[way] += 1;
            }
            Ok(())
        })?;
        Ok::<f64, star_attention::Error>(ms / launches as f64)
    };
    let mut launches = vec![1; ways];
    let mut rounds = effort.rounds;
    if effort.warm_ms > 0.0 {
        let mut all_ms = 0.0;
        for (way, launches) in launches.iter_mut().enumerate() {
            // The first launch loads the kernel.
            round(way, 1)?;
            let (mut warm, mut one) = (0.0, 0.0);
            for _ in 0..50 {
                one = round(way, 1)?;
                warm += one;
                if warm > effort.warm_ms {
                    break;
                }
            }
            *launches = ((effort.round_ms / one) as usize).clamp(1, 2000);
            all_ms += one * *launches as f64;
        }
        if all_ms * rounds as f64 > effort.most_ms {
            rounds = rounds.min(3);
        }
    }
    let mut times = vec![Vec::with_capacity(rounds); ways];
    for _ in 0..rounds {
        for (way, times) in times.iter_mut().enumerate() {
            times.push(round(way, launches[way])?);
        }
    }
    Ok(times)
}

/// Times one launch.
pub fn measure<B: Bench>(
    backend: &B,
    effort: &Effort,
    mut launch: impl FnMut(usize) -> Result<()>,
) -> Result<Times> {
    let mut times = alternate(backend, effort, 1, &mut |_, n| launch(n))?;
    Ok(Times::new(times.swap_remove(0)))
}

/// What this device did best in this run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// Of a bf16 matrix product by PyTorch.
    pub matmul_tflops: Option<f64>,
    /// Of a copy, bytes read and bytes written.
    pub copy_gb_per_s: Option<f64>,
}

/// A row's figures.
#[derive(Clone, Debug)]
pub struct Figures {
    pub times: Times,
    /// Of one launch; 0 where none count.
    pub flops: u64,
    /// Read and written by one launch, each once.
    pub bytes: usize,
}

impl Figures {
    pub fn tflops(&self) -> Option<f64> {
        (self.flops > 0).then(|| self.flops as f64 / self.times.median() / 1e9)
    }

    pub fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / self.times.median() / 1e6
    }

    /// Adds the figures to a row, with their shares of the device's rates.
    pub fn describe(&self, rates: &Rates, row: &mut Value) {
        let share = |rate: Option<f64>, best: Option<f64>| Some(rounded(rate? / best?));
        row["ms"] = self.times.describe();
        row["flops"] = json!(self.flops);
        row["tflops"] = json!(self.tflops().map(rounded));
        row["gb_per_s"] = json!(rounded(self.gb_per_s()));
        row["of_matmul"] = json!(share(self.tflops(), rates.matmul_tflops));
        row["of_copy"] = json!(share(Some(self.gb_per_s()), rates.copy_gb_per_s));
    }
}
