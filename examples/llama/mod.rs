//! A Llama on Star Attention, for the examples: a checkpoint is loaded, and a group of ranks answers
//! queries about a context.
//!
//! [`Llama`](model::Llama) leaves its attention to the caller; [`Rank`](rank::Rank) is the caller,
//! and does what the crate is for; [`run`](run::run) starts the ranks and asks. Text goes through a
//! [`Tokenizer`](tokenizer::Tokenizer). An example includes the directory as a module: `#[path =
//! "../llama/mod.rs"] mod llama;`.

// No example uses all of it.
#![allow(dead_code)]

pub mod anchor;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod error;
pub mod fail;
pub mod family;
pub mod fields;
pub mod gguf;
pub mod layer;
pub mod model;
pub mod random;
pub mod rank;
pub mod rope;
pub mod run;
pub mod table;
pub mod threads;
pub mod tokenizer;
pub mod weights;
pub mod windowed;
