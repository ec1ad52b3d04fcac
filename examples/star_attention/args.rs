//! The command line.

use super::engine::Engine;
use super::haystack::ANSWER_LEN;
use clap::{Parser, ValueEnum};
use std::path::PathBuf;

/// Answers from a long context with Star Attention, and with dense attention beside it.
#[derive(Parser)]
pub struct Args {
    /// Hugging Face directory or GGUF file of a Llama, or of a model of its shape [default: the
    /// retrieval Llama of this repository]
    #[arg(long, value_name = "PATH")]
    pub model: Option<PathBuf>,
    /// Tokens of the haystack
    #[arg(long, default_value_t = 8192, value_name = "L", conflicts_with = "prompt")]
    pub context_len: usize,
    /// Tokens of a block [default: context / ranks]
    #[arg(long, value_name = "B")]
    pub block_len: Option<usize>,
    /// Tokens of the anchor, at most a block [default: a block]
    #[arg(long, value_name = "A")]
    pub anchor_len: Option<usize>,
    /// Ranks over which the context is spread [default: 4 threads, or all processes]
    #[arg(long, alias = "hosts", value_name = "N")]
    pub ranks: Option<usize>,
    /// What carries messages between ranks
    #[arg(long, value_enum, default_value_t = Engine::Threads)]
    pub engine: Engine,
    /// Seconds that a process waits for another: longer than dense attention takes, if that is run
    /// as well
    #[arg(long, default_value_t = 600.0, value_name = "S")]
    pub timeout: f64,
    /// How ranks come by the anchor's keys and values
    #[arg(long, value_enum, default_value_t = Anchor::Encoded)]
    pub anchor: Anchor,
    /// Where keys and values of query and generated tokens are kept
    #[arg(long, value_enum, default_value_t = Generated::QueryRank)]
    pub generated: Generated,
    /// Facts in the haystack
    #[arg(long, default_value_t = 8, value_name = "N", conflicts_with = "prompt")]
    pub needles: usize,
    /// Questions, over as many haystacks as it takes [default: one for each needle]
    #[arg(long, value_name = "N", conflicts_with = "prompt")]
    pub queries: Option<usize>,
    /// Seed of the haystack
    #[arg(long, default_value_t = 0, value_name = "S", conflicts_with = "prompt")]
    pub seed: u64,
    /// Attention over the context
    #[arg(long, value_enum, default_value_t = Modes::Both)]
    pub mode: Modes,
    /// Type of weights, queries, keys and values [default: the checkpoint's]
    #[arg(long, value_enum)]
    pub dtype: Option<Precision>,
    /// Tokens to generate for each query, at most [default: 128 for text, else 2]
    #[arg(long, value_name = "N")]
    pub generate: Option<usize>,
    /// Context as text, instead of a haystack; `-` is standard input
    #[arg(long, visible_alias = "text", value_name = "FILE", requires = "query", group = "prompt")]
    pub context: Option<PathBuf>,
    /// Query as text; the answer ends where the model ends it
    #[arg(long, visible_alias = "question", value_name = "TEXT", requires = "context")]
    pub query: Option<String>,
    /// Puts context and query into the model's chat template, as one turn of the user
    #[arg(long, requires = "query")]
    pub chat: bool,
    /// Context as a JSON array of token ids, instead of a haystack
    #[arg(long, value_name = "FILE", requires = "query_ids", group = "prompt")]
    pub context_ids: Option<PathBuf>,
    /// Query as a JSON array of token ids
    #[arg(long, value_name = "FILE", requires = "context_ids")]
    pub query_ids: Option<PathBuf>,
    /// Writes the logits of all query and generated tokens, f32 [tokens, vocab], as tensors `star`
    /// and `dense`
    #[arg(long, value_name = "FILE", requires = "prompt")]
    pub save_logits: Option<PathBuf>,
}

impl Args {
    /// Tokens to generate for each query, at most.
    pub fn generate(&self) -> usize {
        self.generate.unwrap_or(if self.context.is_some() { 128 } else { ANSWER_LEN })
    }
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Modes {
    Star,
    Dense,
    Both,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Anchor {
    /// Every rank encodes the anchor's tokens
    Encoded,
    /// Rank 0 sends them, layer by layer
    Received,
    /// What is faster by the cost model
    Cheapest,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Generated {
    /// All on the last rank
    #[value(alias = "query-host")]
    QueryRank,
    /// Dealt to the ranks in turn
    RoundRobin,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Precision {
    F32,
    F16,
    Bf16,
}
