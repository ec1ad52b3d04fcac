//! The default backend: tiled attention with an online softmax, over rayon's threads.
//!
//! ```text
//! batch → segments of rows that share their keys (schedule)
//!       → tiles of rows, longest first, their keys perhaps split (work)
//!       → tile: many rows, or few: bound by reading KV
//!       → out and lse, or partials over splits of the keys, merged
//! ```
//!
//! The kernels are written once against vectors of f32 and compiled for each [`InstructionSet`].
//! Products are of f32, to which f16 and bf16 are converted exactly, whatever the types of queries
//! and keys. Only where all inputs are bf16 and the CPU has fast products of them are they of bf16
//! pairs with f32 sums (probabilities are then rounded to bf16, as on a GPU). A matrix unit
//! multiplies f32 as sums of bf16 terms, as exactly; where all inputs are f16, probabilities have
//! 16 bits there.
//!
//! **Threads.** A call runs in the rayon pool in which it is made: the global one, or that of
//! `pool.install(|| plan.run(..))`. [`Plan::with_threads`] limits it to some threads of the pool,
//! or to the caller's thread alone, which no pool is needed for.
//!
//! **Bits.** They depend on the batch, the config and the instruction set, not on the number of
//! threads. [`PlanConfig`] promises more: under a fixed split length a row's bits depend on its own
//! sequence alone, and those of row-invariant plans not even on the other rows of the sequence.
//! This is of numbers; which NaN a NaN is may differ.

mod few;
mod piece;
mod rows;
mod splits;
mod tile;
mod work;
mod worker;
mod workspace;

pub use workspace::Workspace;

use crate::config::{check_lse, check_rows, check_sinks};
use crate::merge::{merge_row, sink_of};
use crate::simd::{InstructionSet, dispatch};
use crate::tensor::SharedRows;
use crate::{
    AttentionConfig, AttentionShape, Batch, Capacity, DType, Element, Error, Inputs, Output, PlanConfig,
    Result, TensorView, TensorViewMut,
};
use piece::{Operands, Source};
use rayon::prelude::*;
use rows::Rows;
use splits::RowLimits;
use std::iter;
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::AtomicUsize;
use work::Work;
use worker::{Worker, Write};
use workspace::{ALIGNMENT, Scratch, bytes_for};

/// No model comes near it, and the sizes of buffers stay far inside a `usize`.
const MOST_HEAD_DIM: usize = 1 << 20;

/// Elements of keys that, with as many of values, may be in the caches of a few cores.
const CACHED: usize = 1 << 22;

/// Multiply-adds below which a second thread costs more than it saves (some ten microseconds).
const THREAD_WORK: u64 = 1 << 18;

/// The schedule of calls on one batch. Made once, it serves every layer of a model.
#[derive(Clone, Debug)]
pub struct Plan {
    config: PlanConfig,
    batch: Batch,
    instructions: InstructionSet,
    work: Work,
    /// Threads at most.
    limit: usize,
    /// Threads, once they were asked for: only then is a pool of rayon looked at.
    threads: OnceLock<usize>,
}

impl Plan {
    /// A plan for sequences of one length.
    ///
    /// # Errors
    /// [`Error::Value`] for a config, [`Error::Shape`] for extents out of range.
    pub fn new(config: &AttentionConfig, shape: &AttentionShape) -> Result<Self> {
        Self::for_batch(&config.score().into(), Batch::uniform(shape, &config.mask)?)
    }

    /// A plan for sequences of different lengths, packed one after the other on the seq axes of a
    /// batch of 1: those of [`Batch::packed`], under the mask of `config`. `shape.query_len` and
    /// `shape.key_len` are the totals, and the log-sum-exp is `[1, heads, query_len]`.
    ///
    /// # Errors
    /// [`Error::Value`] for a config out of range or offsets that do not ascend from 0 to the
    /// total; [`Error::Shape`] for extents out of range, a batch other than 1, or offsets of
    /// different counts.
    pub fn packed(
        config: &AttentionConfig,
        shape: &AttentionShape,
        query_offsets: &[usize],
        key_offsets: &[usize],
    ) -> Result<Self> {
        let batch = Batch::packed(shape, query_offsets, key_offsets, &config.mask)?;
        Self::for_batch(&config.score().into(), batch)
    }

    /// A plan for any batch: each sequence with its own length, its own mask, and keys in rows or
    /// pages, perhaps with a prefix in tensors of its own.
    ///
    /// ```
    /// use star_attention::cpu::flash::Plan;
    /// use star_attention::{Batch, Inputs, Keys, Mask, PlanConfig, Sequence};
    /// use star_attention::{TensorView, TensorViewMut};
    ///
    /// # fn main() -> star_attention::Result<()> {
    /// // Two requests with 5 and 3 keys, in a cache of 8 tokens each, decode one token.
    /// let mut batch = Batch::new([2, 1, 4, 64], [2, 8, 2, 64])?;
    /// batch.push(Sequence::new(0, 0..1, Keys::rows(0, 0..5), Mask::Causal))?;
    /// batch.push(Sequence::new(1, 0..1, Keys::rows(1, 0..3), Mask::Causal))?;
    /// let plan = Plan::for_batch(&PlanConfig::new(), batch)?;
    ///
    /// let (query, cache) = (vec![0.5f32; 2 * 4 * 64], vec![0.25f32; 2 * 8 * 2 * 64]);
    /// let (mut out, mut lse) = (vec![0f32; query.len()], vec![0f32; 2 * 4]);
    /// let queries = TensorView::contiguous("query", &query, plan.batch().query_shape())?;
    /// let keys = TensorView::contiguous("key", &cache, plan.batch().key_shape())?;
    /// plan.run(
    ///     Inputs::new(queries, keys, keys),
    ///     TensorViewMut::contiguous("out", &mut out, plan.batch().query_shape())?,
    ///     Some(&mut lse),
    ///     &mut Vec::with_capacity(plan.workspace_bytes()),
    /// )?;
    /// assert!(out.iter().all(|&x| (x - 0.25).abs() < 1e-6));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Value`] for a scale, softcap or split length out of range, a split length that
    /// leaves 2³¹ partial rows or more, or a head dim or value dim above 2²⁰.
    pub fn for_batch(config: &PlanConfig, batch: Batch) -> Result<Self> {
        config.validate()?;
        for (argument, dim) in [("head_dim", batch.query_shape()[3]), ("value_dim", batch.value_dim())] {
            if dim > MOST_HEAD_DIM {
                return Err(Error::value(argument, format!("at most {MOST_HEAD_DIM}"), dim));
            }
        }
        let (instructions, threads) = (InstructionSet::best(), OnceLock::new());
        let work = Work::new(&batch, config, RowLimits::new(instructions, config))?;
        Ok(Self { config: *config, batch, instructions, work, limit: usize::MAX, threads })
    }

    /// The same plan on at most `threads` threads of the rayon pool in which it runs. On one thread
    /// it is the caller's, and rayon is not called.
    ///
    /// # Errors
    /// [`Error::Value`] for 0.
    pub fn with_threads(self, threads: usize) -> Result<Self> {
        if threads == 0 {
            return Err(Error::value("threads", "at least 1", threads));
        }
        Ok(Self { limit: threads, threads: OnceLock::new(), ..self })
    }

    /// The same plan for other instructions than the best of this CPU.
    ///
    /// # Errors
    /// [`Error::Value`] if the CPU has not got them.
    pub fn with_instructions(self, instructions: InstructionSet) -> Result<Self> {
        instructions.check()?;
        let work = match RowLimits::new(instructions, &self.config) {
            limits if limits == self.work.limits() => self.work,
            limits => Work::new(&self.batch, &self.config, limits)?,
        };
        Ok(Self { instructions, work, threads: OnceLock::new(), ..self })
    }

    /// The batch that this plan is for.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Bytes of the workspace that [`run`](Self::run) needs, of any alignment: buffers for each
    /// thread, and partials where keys are split. The threads are counted when this (or `run`) is
    /// first called: those of the current rayon pool, as far as the work is worth them. In another
    /// pool the plan runs on so many of its threads.
    pub fn workspace_bytes(&self) -> usize {
        bytes_for(self.workspace_len())
    }

    /// [`workspace_bytes`](Self::workspace_bytes) of plans for any batch within a capacity, on at
    /// most `threads` threads.
    pub(in crate::cpu) fn most_workspace_bytes(&self, capacity: &Capacity, threads: usize) -> usize {
        let rows = work::most_partial_rows(capacity, self.config.fixed_split_keys(), self.work.limits());
        let partials = rows.saturating_mul(capacity.value_dim + 1);
        bytes_for(threads.saturating_mul(self.scratch_len()).saturating_add(partials))
    }

    fn workspace_len(&self) -> usize {
        self.threads() * self.scratch_len() + self.partials_len()
    }

    fn threads(&self) -> usize {
        *self.threads.get_or_init(|| {
            let worth = usize::try_from(1 + self.flops() / 4 / THREAD_WORK).unwrap_or(usize::MAX);
            let most = self.limit.min(self.work.pieces()).min(worth);
            if most <= 1 { 1 } else { most.min(rayon::current_num_threads()) }
        })
    }

    /// Multiply-adds that the masks leave, each counted as two: `2 · (head_dim + value_dim)` per
    /// query head for every key a row sees.
    pub fn flops(&self) -> u64 {
        let [_, _, heads, head_dim] = self.batch.query_shape();
        self.work.pairs().saturating_mul(2 * (heads * (head_dim + self.batch.value_dim())) as u64)
    }

    fn scratch_len(&self) -> usize {
        let dims = [self.batch.query_shape()[3], self.batch.value_dim()];
        tile::scratch_len(dims)
            .max(few::scratch_len(dims))
            .max(if self.instructions.has_matrix_unit() { tile::matrix::scratch_len(dims) } else { 0 })
            .next_multiple_of(ALIGNMENT / size_of::<f32>())
    }

    /// A partial's row is its output and then its log-sum-exp.
    fn partials_shape(&self) -> [usize; 4] {
        [1, 1, self.work.partial_rows(), self.batch.value_dim() + 1]
    }

    fn partials_len(&self) -> usize {
        self.partials_shape().iter().product()
    }

    /// Attention of the queries over keys and values, of the shapes of the plan's
    /// [`batch`](Self::batch), into `out`, of its [`out_shape`](Batch::out_shape), and the natural
    /// log-sum-exp `[batch, query_heads, seq]` of the queries into `lse`.
    ///
    /// Any strides will do whose last axis is contiguous. Queries, keys and `out` may each be of
    /// another type; `out` may be uninitialised memory. A row that sees no key gets 0 and `-inf`;
    /// one that belongs to no sequence is left alone. Sinks count in every row
    /// ([`Inputs::with_sinks`]).
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Stride`] for tensors that are not the plan's, [`Error::Value`]
    /// if a sequence has a prefix and the inputs have none, for a sink that is NaN or `+inf`, or
    /// for a scale that is not finite or not above 0, [`Error::DType`] for scales of keys that are
    /// not [`F8E4M3`](crate::F8E4M3), [`Error::Workspace`] for one smaller than
    /// [`workspace_bytes`](Self::workspace_bytes). Nothing was written then.
    pub fn run<'w, Q: Element, T: Element, O: Output>(
        &self,
        inputs: Inputs<TensorView<'_, Q>, TensorView<'_, T>, &[f32]>,
        out: TensorViewMut<'_, O>,
        lse: Option<&mut [f32]>,
        workspace: impl Into<Workspace<'w>>,
    ) -> Result<()> {
        let queries @ [batch, query_len, query_heads, _] = self.batch.query_shape();
        let value_dim = self.batch.value_dim();
        let operands = self.operands(&inputs)?;
        let sinks = inputs.sinks;
        check_sinks(query_heads, sinks)?;
        check_rows("out", self.batch.out_shape(), out.shape(), out.strides())?;
        check_lse(queries, lse.as_deref())?;
        let (scratch, partials) =
            workspace.into().take(self.workspace_len())?.split_at_mut(self.threads() * self.scratch_len());
        if self.work.pieces() == 0 {
            return Ok(());
        }
        let out = SharedRows::new(out);
        let lse = match lse {
            Some(lse) => Some(SharedRows::new(TensorViewMut::contiguous(
                "lse",
                lse,
                [batch, query_heads, query_len, 1],
            )?)),
            None => None,
        };
        let write_lse = |[batch, token, head]: [usize; 3], x: f32| {
            if let Some(lse) = &lse {
                // SAFETY: each row belongs to one piece, which is worked on once, or merged once:
                // no two sequences of a batch share rows.
                unsafe { lse.row(batch, head, token)[0] = x };
            }
        };
        let write = |place @ [batch, token, head]: [usize; 3], row: &[f32], x: f32| {
            // SAFETY: as of the log-sum-exp.
            let to = unsafe { out.row(batch, token, head) };
            let lse = match sink_of(sinks, head) {
                f32::NEG_INFINITY => {
                    to.iter_mut().zip(row).for_each(|(to, &x)| *to = O::from_f32(x));
                    x
                }
                sink => merge_row(iter::once((row, x)), sink, to),
            };
            write_lse(place, lse);
        };

        let shared = TensorViewMut::contiguous("workspace", &mut *partials, self.partials_shape())?;
        let shared = SharedRows::new(shared);
        let pairs = (Q::DTYPE, T::DTYPE) == (DType::BF16, DType::BF16);
        self.run_pieces(&operands, pairs, scratch, &|piece, place, row, x, lse| {
            if place.whole {
                return write(piece.place(row), x, lse);
            }
            // SAFETY: each row of each split of a piece is worked on once.
            let to = unsafe { shared.row(0, 0, place.partials + row) };
            to[..value_dim].iter_mut().zip(x).for_each(|(to, &x)| *to = MaybeUninit::new(x));
            to[value_dim] = MaybeUninit::new(lse);
        });
        let width = value_dim + 1;
        let partials = &*partials;
        let merge = |merge: usize| {
            let (piece, rows, step) = self.work.merge(&self.batch, merge);
            for row in 0..piece.rows() {
                let parts = (rows.start + row..rows.end).step_by(step);
                let parts = parts.map(|part| {
                    let part = &partials[part * width..][..width];
                    // SAFETY: all pieces are done, and each wrote all of its rows.
                    unsafe { std::slice::from_raw_parts(part.as_ptr().cast::<f32>(), width) }
                });
                let place @ [batch, token, head] = piece.place(row);
                // SAFETY: each row belongs to one piece, which is merged once.
                let to = unsafe { out.row(batch, token, head) };
                let lse = merge_row(
                    parts.map(|part| (&part[..value_dim], part[value_dim])),
                    sink_of(sinks, head),
                    to,
                );
                write_lse(place, lse);
            }
        };
        let merges = self.work.merges();
        match self.threads() {
            1 => (0..merges).for_each(merge),
            // At least so many for each, so that no more threads take part.
            n => (0..merges).into_par_iter().with_min_len(merges.div_ceil(n)).for_each(merge),
        }
        Ok(())
    }

    /// The inputs with their types erased, if they fit the batch.
    fn operands<'a, Q: Element, T: Element>(
        &self,
        inputs: &Inputs<TensorView<'a, Q>, TensorView<'a, T>, &'a [f32]>,
    ) -> Result<Operands<'a>> {
        let queries @ [.., head_dim] = self.batch.query_shape();
        let Inputs { query, key, value, prefix, scales, .. } = inputs;
        check_rows("query", queries, query.shape(), query.strides())?;
        check_rows("key", self.batch.key_shape(), key.shape(), key.strides())?;
        check_rows("value", self.batch.value_shape(), value.shape(), value.strides())?;
        if let Some([key, value]) = prefix {
            check_rows("prefix", self.batch.prefix_shape(), key.shape(), key.strides())?;
            check_rows("prefix", self.batch.prefix_value_shape(), value.shape(), value.strides())?;
        }
        if prefix.is_none()
            && let Some(index) = self.batch.sequences().iter().position(|s| s.prefix_len() > 0)
        {
            let expected = format!("its keys and values, which sequence {index} has rows of");
            return Err(Error::value("prefix", expected, "none"));
        }
        if let Some(scales) = scales {
            scales.check(T::DTYPE, self.batch.key_shape()[2])?;
        }
        let [prefix_key, prefix_value] = prefix.unwrap_or([*key, *value]);
        let value_dim = self.batch.value_dim();
        Ok(Operands {
            query: Rows::new(*query),
            key: Source { prefix: Rows::new(prefix_key), others: Rows::new(*key) },
            value: Source { prefix: Rows::new(prefix_value), others: Rows::new(*value) },
            head_dim,
            value_dim,
            cold: self.work.key_rows().saturating_mul(head_dim.midpoint(value_dim)) > CACHED,
            score: self.config.score,
            scales: *scales,
        })
    }

    /// Works off all pieces. `pairs` asks for products of bf16 pairs. Not generic, so that the
    /// kernels are compiled with this crate and not with each one that calls them.
    fn run_pieces(
        &self,
        inputs: &Operands<'_>,
        pairs: bool,
        scratch: &mut [MaybeUninit<f32>],
        write: Write<'_>,
    ) {
        let next = AtomicUsize::new(0);
        let worker = |scratch: &mut [MaybeUninit<f32>]| {
            let scratch = Scratch::new(scratch);
            let worker = Worker { plan: self, inputs, next: &next, scratch, write };
            dispatch(self.instructions, pairs, worker);
        };
        let (own, others) = scratch.split_at_mut(self.scratch_len());
        if others.is_empty() {
            return worker(own);
        }
        rayon::scope(|scope| {
            for scratch in others.chunks_exact_mut(self.scratch_len()) {
                scope.spawn(|_| worker(scratch));
            }
            worker(own);
        });
    }
}

/// One call by a plan made for it, with a workspace allocated for it. Where calls repeat, keep
/// both.
///
/// # Errors
/// As [`Plan::new`] and [`Plan::run`].
pub fn attention<Q: Element, T: Element, O: Output>(
    config: &AttentionConfig,
    query: TensorView<'_, Q>,
    key: TensorView<'_, T>,
    value: TensorView<'_, T>,
    out: TensorViewMut<'_, O>,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    let plan = Plan::new(config, &AttentionShape::of(&query, &key, &value)?)?;
    let mut workspace = Vec::with_capacity(plan.workspace_bytes());
    plan.run(Inputs::new(query, key, value), out, lse, &mut workspace)
}
