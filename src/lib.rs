#![doc = include_str!("../README.md")]
#![deny(unsafe_op_in_unsafe_fn, missing_docs, clippy::undocumented_unsafe_blocks)]

mod append;
mod backend;
mod batch;
#[cfg(feature = "candle")]
pub mod candle;
pub mod comm;
mod config;
pub mod cpu;
#[cfg(any(feature = "cuda", feature = "simt"))]
pub mod cuda;
mod element;
mod error;
mod inputs;
mod kv;
mod layout;
mod mask;
pub mod merge;
mod scales;
mod schedule;
mod simd;
mod tensor;

pub use append::{Append, LEFT_OUT, Rotation};
pub use backend::{Backend, Capacity, Plain};
pub use batch::{Batch, Keys, Prefix, Sequence};
/// The types of streams and device memory that [`cuda::driver`] takes, of the version that it was
/// built with.
#[cfg(feature = "cuda")]
pub use cudarc;

pub use config::{AttentionConfig, AttentionShape, PlanConfig, ROW_INVARIANT_SPLIT_KEYS, ScoreConfig};
pub use element::{DType, Element, F8E4M3, Output};
pub use error::{Error, Result};
pub use half::{bf16, f16};
pub use inputs::Inputs;
pub use kv::{KvConfig, KvRoom, KvStore, SequenceId, StepRows};
pub use layout::{GeneratedKv, RankLayout, StarLayout, StarLayoutBuilder, StepLayout};
pub use mask::{BlockList, Mask};
pub use scales::Scales;
pub use tensor::{TensorView, TensorViewMut};
