//! The default backend: tiled attention with an online softmax, over rayon's threads.
//!
//! ```text
//! batch → segments of rows that share their keys (schedule) → tiles of rows, longest first, their keys perhaps split (work)
//!       → tile: many rows, or few: bound by reading KV → out and lse, or partials over splits of the keys, merged
//! ```
//!
//! The kernels are written once against vectors of f32 and compiled for each [`InstructionSet`]. f32 and f16 inputs are
//! multiplied in f32; bf16 inputs as pairs with f32 sums where the CPU can (probabilities are then rounded to
//! bf16, as on a GPU), and in f32 elsewhere. Results depend on the batch, the config and the instruction set, not on the
//! number of threads; with [`Plan::with_split_keys`] a row's results depend on its own sequence alone.

mod few;
mod piece;
mod rows;
mod tile;
mod work;

use super::simd::{InstructionSet, Product, Simd, Task, dispatch};
use crate::config::{check_lse, check_rows};
use crate::merge::merge_row;
use crate::tensor::SharedRows;
use crate::{
    AttentionConfig, AttentionShape, Batch, DType, Element, Error, Result, ScoreConfig, TensorView,
    TensorViewMut,
};
use piece::{Inputs, Piece};
use rayon::prelude::*;
use rows::Rows;
use std::sync::atomic::{AtomicUsize, Ordering};
use work::{Place, Work};

/// Multiply-adds below which a second thread costs more than it saves (some ten microseconds).
const THREAD_WORK: u64 = 1 << 18;

/// Each thread's part of the workspace starts at a cache line: that many f32.
const ALIGNMENT: usize = 16;

/// The schedule of calls on one batch. Made once, it serves every layer of a model.
#[derive(Clone, Debug)]
pub struct Plan {
    score: ScoreConfig,
    batch: Batch,
    instructions: InstructionSet,
    work: Work,
    threads: usize,
}

impl Plan {
    /// A plan for sequences of one length.
    ///
    /// # Errors
    /// [`Error::Value`] for a config, [`Error::Shape`] for extents out of range.
    pub fn new(config: &AttentionConfig, shape: &AttentionShape) -> Result<Self> {
        Self::for_batch(&config.score(), Batch::uniform(shape, config.mask)?)
    }

    /// A plan for sequences of different lengths, packed one after the other on the seq axes of a batch of 1: those of
    /// [`Batch::packed`], under the mask of `config`. `shape.query_len` and `shape.key_len` are the totals, and the log-sum-exp is
    /// `[1, heads, query_len]`.
    ///
    /// # Errors
    /// [`Error::Value`] for a config out of range or offsets that do not ascend from 0 to the total; [`Error::Shape`] for
    /// extents out of range, a batch other than 1, or offsets of different counts.
    pub fn packed(
        config: &AttentionConfig,
        shape: &AttentionShape,
        query_offsets: &[usize],
        key_offsets: &[usize],
    ) -> Result<Self> {
        Self::for_batch(&config.score(), Batch::packed(shape, query_offsets, key_offsets, config.mask)?)
    }

    /// A plan for any batch: each sequence with its own length, its own mask, and keys in rows or pages.
    ///
    /// ```
    /// use star_attention::cpu::flash::Plan;
    /// use star_attention::{Batch, Keys, Mask, ScoreConfig, Sequence, TensorView, TensorViewMut};
    ///
    /// # fn main() -> star_attention::Result<()> {
    /// // Two requests with 5 and 3 keys, in a cache of 8 tokens each, decode one token.
    /// let mut batch = Batch::new([2, 1, 4, 64], [2, 8, 2, 64])?;
    /// batch.push(Sequence::new(0, 0..1, Keys::rows(0, 0..5), Mask::Causal))?;
    /// batch.push(Sequence::new(1, 0..1, Keys::rows(1, 0..3), Mask::Causal))?;
    /// let plan = Plan::for_batch(&ScoreConfig::new(), batch)?;
    ///
    /// let (query, cache) = (vec![0.5f32; 2 * 4 * 64], vec![0.25f32; 2 * 8 * 2 * 64]);
    /// let (mut out, mut lse) = (vec![0f32; query.len()], vec![0f32; 2 * 4]);
    /// let keys = TensorView::contiguous("key", &cache, plan.batch().key_shape())?;
    /// plan.run(
    ///     TensorView::contiguous("query", &query, plan.batch().query_shape())?,
    ///     keys,
    ///     keys,
    ///     TensorViewMut::contiguous("out", &mut out, plan.batch().query_shape())?,
    ///     Some(&mut lse),
    ///     &mut vec![0.0; plan.workspace_len()],
    /// )?;
    /// assert!(out.iter().all(|&x| (x - 0.25).abs() < 1e-6));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Value`] for a scale or softcap out of range.
    pub fn for_batch(score: &ScoreConfig, batch: Batch) -> Result<Self> {
        score.validate()?;
        let work = Work::new(&batch, None);
        Ok(Self { score: *score, batch, instructions: InstructionSet::best(), threads: 1, work }
            .with_threads())
    }

    /// As many threads as rayon has, if the work is worth them.
    fn with_threads(self) -> Self {
        let threads = rayon::current_num_threads().min(self.work.pieces());
        let worth = 1 + self.flops() / 4 / THREAD_WORK;
        Self { threads: threads.min(usize::try_from(worth).unwrap_or(usize::MAX)).max(1), ..self }
    }

    /// The same plan for other instructions than the best of this CPU.
    ///
    /// # Errors
    /// [`Error::Value`] if the CPU has not got them.
    pub fn with_instructions(self, instructions: InstructionSet) -> Result<Self> {
        instructions.check()?;
        Ok(Self { instructions, ..self })
    }

    /// The same plan, with the keys of each row split at multiples of `split_keys` (rounded up to whole tiles of keys). The bits
    /// of a row's results then do not depend on what else is in the batch, on the number of threads, or on where the keys
    /// lie. Without it, splits follow from the whole batch.
    ///
    /// # Errors
    /// [`Error::Value`] for 0.
    pub fn with_split_keys(self, split_keys: usize) -> Result<Self> {
        if split_keys == 0 {
            return Err(Error::value("split_keys", "at least 1", split_keys));
        }
        let work = Work::new(&self.batch, Some(split_keys));
        Ok(Self { work, ..self }.with_threads())
    }

    /// The batch that this plan is for.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Elements of the workspace that [`run`](Self::run) needs: some buffers for each of the threads that rayon had when the plan was
    /// made, and partials where keys are split.
    pub fn workspace_len(&self) -> usize {
        self.threads * self.scratch_len() + self.partials_len() + ALIGNMENT
    }

    /// Multiply-adds that the masks leave, each counted as two: `4 · head_dim` per query head for every key a row sees.
    pub fn flops(&self) -> u64 {
        let [_, _, heads, head_dim] = self.batch.query_shape();
        self.work.pairs().saturating_mul(4 * (heads * head_dim) as u64)
    }

    fn scratch_len(&self) -> usize {
        let head_dim = self.batch.query_shape()[3];
        tile::scratch_len(head_dim).max(few::scratch_len(head_dim)).next_multiple_of(ALIGNMENT)
    }

    /// A partial's row is its output and then its log-sum-exp.
    fn partials_shape(&self) -> [usize; 4] {
        [1, 1, self.work.partial_rows(), self.batch.query_shape()[3] + 1]
    }

    fn partials_len(&self) -> usize {
        self.partials_shape().iter().product()
    }

    /// Attention of `query` over `key` and `value`, of the shapes of the plan's [`batch`](Self::batch), into `out`, which has the
    /// query's shape, and the natural log-sum-exp `[batch, query_heads, seq]` of the queries into `lse`.
    ///
    /// Any strides will do whose last axis is contiguous. `out` may be of another type than the inputs: f32 for partials that are
    /// to be merged. A row that sees no key gets 0 and `-inf`; one that belongs to no sequence is left alone. What the workspace
    /// holds does not matter.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Stride`] for tensors that are not the plan's, [`Error::Workspace`] for one shorter than
    /// [`workspace_len`](Self::workspace_len). Nothing was written then.
    pub fn run<T: Element, O: Element>(
        &self,
        query: TensorView<'_, T>,
        key: TensorView<'_, T>,
        value: TensorView<'_, T>,
        out: TensorViewMut<'_, O>,
        lse: Option<&mut [f32]>,
        workspace: &mut [f32],
    ) -> Result<()> {
        let (queries, keys) = (self.batch.query_shape(), self.batch.key_shape());
        check_rows("query", queries, query.shape(), query.strides())?;
        check_rows("key", keys, key.shape(), key.strides())?;
        check_rows("value", keys, value.shape(), value.strides())?;
        check_rows("out", queries, out.shape(), out.strides())?;
        check_lse(queries, lse.as_deref())?;
        if workspace.len() < self.workspace_len() {
            return Err(Error::Workspace { expected: self.workspace_len(), got: workspace.len() });
        }
        if self.work.pieces() == 0 {
            return Ok(());
        }
        let [batch, query_len, query_heads, head_dim] = queries;
        let out = SharedRows::new(out);
        let lse = match lse {
            Some(lse) => Some(SharedRows::new(TensorViewMut::contiguous(
                "lse",
                lse,
                [batch, query_heads, query_len, 1],
            )?)),
            None => None,
        };
        // SAFETY (of both rows): each row belongs to one piece, which is worked on once, or merged once: no two sequences of a
        // batch share rows.
        let write_lse = |[batch, token, head]: [usize; 3], x: f32| {
            if let Some(lse) = &lse {
                // SAFETY: see above.
                unsafe { lse.row(batch, head, token)[0] = x };
            }
        };
        let write = |place @ [batch, token, head]: [usize; 3], row: &[f32], x: f32| {
            // SAFETY: see above.
            let to = unsafe { out.row(batch, token, head) };
            to.iter_mut().zip(row).for_each(|(to, &x)| *to = O::from_f32(x));
            write_lse(place, x);
        };
        let inputs = Inputs {
            query: Rows::new(query),
            key: Rows::new(key),
            value: Rows::new(value),
            head_dim,
            factors: self.score.factors_for(head_dim),
        };

        let aligned = workspace.as_ptr().align_offset(ALIGNMENT * size_of::<f32>()).min(ALIGNMENT);
        let (scratch, partials) = workspace[aligned..].split_at_mut(self.threads * self.scratch_len());
        let partials = &mut partials[..self.partials_len()];
        let shared = TensorViewMut::contiguous("workspace", &mut *partials, self.partials_shape())?;
        let shared = SharedRows::new(shared);
        self.run_pieces(&inputs, T::DTYPE, scratch, |piece, place, row, x, lse| {
            if place.whole {
                return write(piece.place(row), x, lse);
            }
            // SAFETY: each row of each split of a piece is worked on once.
            let to = unsafe { shared.row(0, 0, place.partials + row) };
            to[..head_dim].copy_from_slice(x);
            to[head_dim] = lse;
        });
        let width = head_dim + 1;
        let partials = &*partials;
        (0..self.work.merges()).into_par_iter().for_each(|merge| {
            let (piece, rows, step) = self.work.merge(&self.batch, merge);
            for row in 0..piece.rows() {
                let parts = (rows.start + row..rows.end).step_by(step);
                let parts = parts.map(|part| &partials[part * width..][..width]);
                let place @ [batch, token, head] = piece.place(row);
                // SAFETY: each row belongs to one piece, which is merged once.
                let to = unsafe { out.row(batch, token, head) };
                let lse = merge_row(parts.map(|part| (&part[..head_dim], part[head_dim])), to);
                write_lse(place, lse);
            }
        });
        Ok(())
    }

    /// Works off all pieces; `write(piece, place, row, out, lse)` gets each row's result.
    fn run_pieces(
        &self,
        inputs: &Inputs<'_>,
        dtype: DType,
        scratch: &mut [f32],
        write: impl Fn(&Piece<'_>, Place, usize, &[f32], f32) + Sync,
    ) {
        let next = AtomicUsize::new(0);
        let worker = |scratch: &mut [f32]| {
            let worker = Worker { plan: self, inputs, next: &next, scratch, write: &write };
            dispatch(self.instructions, dtype == DType::BF16, worker);
        };
        let (own, others) = scratch.split_at_mut(self.scratch_len());
        rayon::scope(|scope| {
            for scratch in others.chunks_exact_mut(self.scratch_len()) {
                scope.spawn(|_| worker(scratch));
            }
            worker(own);
        });
    }
}

/// Gets a row's result: the piece and where its result goes, the row, out and lse.
type Write<'a> = &'a (dyn Fn(&Piece<'_>, Place, usize, &[f32], f32) + Sync);

/// A thread that takes pieces until none is left.
struct Worker<'a> {
    plan: &'a Plan,
    inputs: &'a Inputs<'a>,
    next: &'a AtomicUsize,
    scratch: &'a mut [f32],
    write: Write<'a>,
}

impl Task for Worker<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd, P: Product<S>>(self, simd: S, product: P) {
        let total = self.plan.work.pieces();
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= total {
                return;
            }
            let (piece, place) = self.plan.work.piece(&self.plan.batch, index);
            let write = |row: usize, out: &[f32], lse: f32| {
                (self.write)(&piece, place, row, out, lse);
            };
            let one_length = !piece.segment.causal || piece.segment.rows.len() == 1;
            if one_length && piece.rows() <= few::ROWS {
                few::attend(simd, product, self.inputs, &piece, self.scratch, write);
            } else {
                tile::attend(simd, product, self.inputs, &piece, self.scratch, write);
            }
        }
    }
}

/// One call by a plan made for it, with a workspace allocated for it. Where calls repeat, keep both.
///
/// # Errors
/// As [`Plan::new`] and [`Plan::run`].
pub fn attention<T: Element, O: Element>(
    config: &AttentionConfig,
    query: TensorView<'_, T>,
    key: TensorView<'_, T>,
    value: TensorView<'_, T>,
    out: TensorViewMut<'_, O>,
    lse: Option<&mut [f32]>,
) -> Result<()> {
    let plan = Plan::new(config, &AttentionShape::of(&query, &key, &value)?)?;
    let mut workspace = vec![0.0; plan.workspace_len()];
    plan.run(query, key, value, out, lse, &mut workspace)
}
