//! Rates of one rank: of the crate's CPU kernels, measured, or given.

use super::model::KV_HEADS;
use super::run::{Run, Work};
use super::tokens;
use indicatif::ProgressBar;
use star_attention::Mask;
use std::fmt;

/// Rates that are not to be measured.
pub struct Given {
    /// FLOP/s of attention, under every mask.
    pub attention: Option<f64>,
    /// FLOP/s of linear layers.
    pub linear: Option<f64>,
    /// Bytes per second of keys and values.
    pub bandwidth: Option<f64>,
}

/// What one rank does in a second.
pub struct Rates {
    /// Context encoding, by tokens of a block, ascending.
    star: [(usize, Run); 3],
    /// Causal attention, by tokens, ascending.
    causal: [(usize, Run); 3],
    /// The query's tokens over a shard.
    query: Run,
    /// One token over a shard.
    token: Run,
    /// FLOP/s of linear layers, if given.
    linear: Option<f64>,
}

impl Rates {
    /// Measures what is not given; tiny extents if it is a `test`.
    pub fn new(given: &Given, query_len: usize, test: bool) -> Self {
        let (blocks, shard, rounds) =
            if test { ([16, 32, 64], 256, 1) } else { ([1024, 4096, 8192], 32 * 1024, 8) };
        let star = blocks.map(|block| {
            let mask = Mask::Star { anchor_len: block, block_len: block, first_block_len: block, left: None };
            let what = format!("context encoding, anchor and block of {}", tokens(block));
            (block, Run::new(what, mask, [2 * block, 2 * block, 1], Work::Flops, given.attention))
        });
        let causal = blocks.map(|block| {
            let what = format!("causal attention of {} tokens", tokens(block));
            (block, Run::new(what, Mask::Causal, [block, block, 1], Work::Flops, given.attention))
        });
        // All heads of a layer, so that keys and values lie in memory and not in a cache.
        let over_shard = |query_len, work, given| {
            let what = format!("queries of {query_len} over {} keys", tokens(shard));
            Run::new(what, Mask::Full, [query_len, shard, KV_HEADS], work, given)
        };
        let query = over_shard(query_len, Work::Flops, given.attention);
        let token = over_shard(1, Work::KeyBytes, given.bandwidth);
        let mut rates = Self { star, causal, query, token, linear: given.linear };
        rates.measure(rounds);
        rates
    }

    /// In turns, so that what disturbs the machine for a while disturbs all of them.
    fn measure(&mut self, rounds: usize) {
        let blocks = self.star.iter_mut().chain(&mut self.causal).map(|(_, run)| run);
        let mut runs: Vec<&mut Run> = blocks.chain([&mut self.query, &mut self.token]).collect();
        let bar = ProgressBar::new((rounds * runs.len()) as u64);
        for _ in 0..rounds {
            for run in &mut runs {
                run.run();
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
    }

    /// FLOP/s of context encoding at blocks of so many tokens.
    pub fn star(&self, block: usize) -> f64 {
        at(&self.star, block)
    }

    /// FLOP/s of causal attention at so many tokens.
    pub fn causal(&self, tokens: usize) -> f64 {
        at(&self.causal, tokens)
    }

    /// FLOP/s of the query's tokens over a shard.
    pub fn query(&self) -> f64 {
        self.query.rate()
    }

    /// FLOP/s of linear layers.
    pub fn linear(&self) -> f64 {
        self.linear.unwrap_or_else(|| at(&self.causal, usize::MAX))
    }

    /// Bytes per second of keys and values read for one token.
    pub fn bandwidth(&self) -> f64 {
        self.token.rate()
    }
}

impl fmt::Display for Rates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = rayon::current_num_threads();
        writeln!(f, "Rates of one rank; measured on {threads} threads in bf16, unless given:\n")?;
        writeln!(f, "| what | rate |\n|---|---:|")?;
        let blocks = self.star.iter().chain(&self.causal).map(|(_, run)| run);
        blocks.chain([&self.query, &self.token]).try_for_each(|run| writeln!(f, "{run}"))?;
        let how = if self.linear.is_some() { "given" } else { "the longest causal attention's" };
        writeln!(f, "| linear layers | {:.1} GFLOP/s ({how}) |", self.linear() / 1e9)
    }
}

/// The rate of the longest run of at most so many tokens, or of the shortest.
fn at(runs: &[(usize, Run)], tokens: usize) -> f64 {
    runs.iter().rfind(|(len, _)| *len <= tokens).unwrap_or(&runs[0]).1.rate()
}
