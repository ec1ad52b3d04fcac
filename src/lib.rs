//! Attention over long contexts for inference engines, after *Star Attention: Efficient LLM
//! Inference over Long Sequences* ([arXiv 2411.17116](https://arxiv.org/abs/2411.17116)).
//!
//! The crate computes attention, keeps keys and values, and merges partial results. It has no model
//! code and opens no connections: an engine calls it on its own buffers.
//!
//! # Ten lines
//!
//! Causal attention on the CPU. Tensors are `[batch, seq, heads, dim]`, here contiguous; eight query
//! heads share two KV heads.
//!
//! ```
//! use star_attention::{AttentionConfig, Mask, TensorView, TensorViewMut, cpu::flash};
//!
//! let (query, key, value) = (vec![0.1f32; 100 * 8 * 64], vec![0.2; 100 * 2 * 64], vec![0.3; 100 * 2 * 64]);
//! let mut out = vec![0.0; query.len()];
//! flash::attention(
//!     &AttentionConfig::new(Mask::Causal),
//!     TensorView::contiguous("query", &query, [1, 100, 8, 64])?,
//!     TensorView::contiguous("key", &key, [1, 100, 2, 64])?,
//!     TensorView::contiguous("value", &value, [1, 100, 2, 64])?,
//!     TensorViewMut::contiguous("out", &mut out, [1, 100, 8, 64])?,
//!     None, // or memory for the log-sum-exp of each row
//! )?;
//! assert!(out.iter().all(|x| (x - 0.3).abs() < 1e-6));
//! # Ok::<(), star_attention::Error>(())
//! ```
//!
//! # Which call
//!
//! | task | call |
//! |---|---|
//! | attention of one shape, once | [`cpu::flash::attention`] |
//! | the same again and again, with memory and threads of the caller | [`cpu::flash::Plan`] |
//! | a step of an engine: sequences of any lengths and masks, keys in rows or pages | [`Batch`] with [`Backend::plan`], [`update`](Backend::update) and [`attend`](Backend::attend) |
//! | the cache of keys and values of all layers | [`KvStore`], or [`Backend::append`] on memory of one's own |
//! | which tokens a rank encodes, keeps and attends to | [`StarLayout`] and its [`RankLayout`]s |
//! | partial results over disjoint keys to one | [`merge`](mod@merge) for what is at hand, [`comm::merge`] or [`comm::MergePlan`] over ranks |
//! | tensors of candle | the module [`candle`] |
//! | an NVIDIA GPU | [`cuda::Cuda`] behind [`Backend`], or the calls of the module [`cuda`] |
//! | an oracle to test against, in f64 | [`cpu::reference`](mod@cpu::reference) |
//!
//! Masks are values of [`Mask`]: full, causal, windows, star, and lists of blocks. [`ScoreConfig`] has
//! scale and softcap, [`Inputs`] attention sinks and the scales of fp8 keys and values.
//!
//! # The two phases
//!
//! 1. **Context encoding** (section 2.1 of the paper). The context is cut into blocks. Each block,
//!    prefixed with an anchor (the first tokens of the context), attends within anchor and itself, on
//!    its own rank, and keeps the keys and values of its own tokens. [`RankLayout::tokens`] are the
//!    tokens to encode, [`RankLayout::mask`] is what they see, and [`RankLayout::kept`] which rows
//!    stay.
//! 2. **Query encoding and generation** (section 2.2). Every rank attends from the query to the keys
//!    that it holds, and gives a partial output with its log-sum-exp. One merge makes the softmax over
//!    all keys, with the same bits on every rank. [`RankLayout::step`] says who appends and who sees
//!    what.
//!
//! All of it in one layer over three ranks, which are threads here:
//!
//! ```
#![doc = include_str!("../examples/two_phases.rs")]
//! ```
//!
//! # Memory and threads
//!
//! The caller owns inputs, outputs and workspaces. On the CPU outputs and workspaces may be
//! uninitialised: a plan says how many bytes it needs
//! ([`workspace_bytes`](cpu::flash::Plan::workspace_bytes)), and any memory of that size will do
//! ([`Workspace`](cpu::flash::Workspace)). One plan serves every layer of the same batch.
//!
//! A call on the CPU returns when it is done. It runs in the rayon pool in which it is called
//! (`pool.install(|| plan.run(..))`), on as many threads as the plan was made for;
//! [`Cpu::with_threads`](cpu::Cpu::with_threads)`(1)` needs no pool. In async code it belongs on a
//! thread that may block.
//!
//! # GPUs
//!
//! Calls of the module [`cuda`] are ordered by the stream that they are given. They never
//! synchronise and allocate nothing, so that `append`, `attend` and `merge` can be captured in a
//! graph; a plan is prepared before. The graph stays valid while sequences grow, join and leave
//! within the plan's [`Capacity`]: what it attends to is the batch of the last
//! [`update`](Backend::update).
//!
//! # Errors
//!
//! Bad input returns an [`Error`] that names the argument, what was expected and what came; nothing
//! was written then. Without a driver or a GPU calls return [`Error::Unavailable`]. A rank that fails
//! makes the others' calls return an error that names it.
//!
//! # Features
//!
//! Features add to each other. The default build has none, and needs Rust 1.89 and nothing else.
//!
//! | feature | what it adds | needs |
//! |---|---|---|
//! | `candle` | the module [`candle`] on tensors of the CPU | |
//! | `cuda` | the module [`cuda`] on NVIDIA GPUs of compute capability 8.0 and up | nvcc 12.8 to build, the driver to run |
//! | `candle-cuda` | the module [`candle`] on CUDA tensors | what candle's CUDA needs |
//! | `nccl` | [`comm`] between GPUs, by NCCL | `cuda`; NCCL at run time |
//! | `mpi` | [`comm`] between processes, by MPI | an MPI and libclang |
//! | `simt` | the kernels of [`cuda`] on an emulator that checks each access, for tests | a C++ compiler |
//! | `variants` | other divisions of the kernels, for benches | |
//!
#![cfg_attr(feature = "candle", doc = "[`candle`]: crate::candle")]
#![cfg_attr(not(feature = "candle"), doc = "[`candle`]: #features")]
#![cfg_attr(any(feature = "cuda", feature = "simt"), doc = "[`cuda`]: crate::cuda")]
#![cfg_attr(any(feature = "cuda", feature = "simt"), doc = "[`cuda::Cuda`]: crate::cuda::Cuda")]
#![cfg_attr(not(any(feature = "cuda", feature = "simt")), doc = "[`cuda`]: #features")]
#![cfg_attr(not(any(feature = "cuda", feature = "simt")), doc = "[`cuda::Cuda`]: #features")]
#![cfg_attr(docsrs, feature(doc_cfg))]
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
