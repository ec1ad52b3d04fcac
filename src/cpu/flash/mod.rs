//! The default backend: tiled attention with an online softmax, over rayon's threads.
//!
//! ```text
//! mask → segments of rows that share their keys (walk) → tiles of rows, longest first (Plan)
//!      → tile: many rows, or few: bound by reading KV → out and lse, or partials over splits of the keys, merged
//! ```
//!
//! The kernels are written once against vectors of f32 and compiled for each [`InstructionSet`]. f32 and f16 inputs are
//! multiplied in f32; bf16 inputs as pairs with f32 sums where the CPU can (probabilities are then rounded to
//! bf16, as on a GPU), and in f32 elsewhere. Results depend on the extents, the config and the instruction set, not on the
//! number of threads.

mod few;
mod piece;
mod rows;
mod tile;

use super::simd::{InstructionSet, Product, Simd, Task, dispatch};
use crate::merge::merge_row;
use crate::tensor::SharedRows;
use crate::walk::{self, Segment};
use crate::{AttentionConfig, AttentionShape, DType, Element, Error, Result, TensorView, TensorViewMut};
use piece::{Inputs, Piece};
use rayon::prelude::*;
use rows::Rows;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Keys are split until there are this many pieces of work, enough for the threads of a large machine...
const PIECES: usize = 128;
/// ...but not below this many keys, where the merge would begin to count.
const SPLIT_KEYS: usize = 512;
/// Multiply-adds below which a second thread costs more than it saves (some ten microseconds).
const THREAD_WORK: usize = 1 << 18;

/// Each thread's part of the workspace starts at a cache line: that many f32.
const ALIGNMENT: usize = 16;

/// How a call of known config and extents is worked off. Made once, it serves every layer of a model.
#[derive(Clone, Debug)]
pub struct Plan {
    config: AttentionConfig,
    shape: AttentionShape,
    instructions: InstructionSet,
    /// The place of each sequence on the seq axes of queries and keys.
    sequences: Vec<[Range<usize>; 2]>,
    /// Rows of a sequence that are worked on together, longest walk first.
    tasks: Vec<(usize, Segment)>,
    /// Query heads that are worked on together: all of a KV head's, or as many as fill a tile.
    heads: usize,
    splits: usize,
    threads: usize,
}

impl Plan {
    /// A plan for sequences of one length.
    ///
    /// # Errors
    /// [`Error::Value`] for a config, [`Error::Shape`] for extents out of range.
    pub fn new(config: &AttentionConfig, shape: &AttentionShape) -> Result<Self> {
        Self::with_sequences(config, shape, vec![[0..shape.query_len, 0..shape.key_len]])
    }

    /// A plan for sequences of different lengths, packed one after the other on the seq axes of a batch of 1.
    ///
    /// Sequence `i` has the query rows `query_offsets[i]..query_offsets[i + 1]` and the keys
    /// `key_offsets[i]..key_offsets[i + 1]`; the mask holds for each sequence by itself. `shape.query_len` and
    /// `shape.key_len` are the totals, and the log-sum-exp is `[1, heads, query_len]`.
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
        Self::with_sequences(config, shape, walk::packed_sequences(shape, query_offsets, key_offsets)?)
    }

    fn with_sequences(
        config: &AttentionConfig,
        shape: &AttentionShape,
        sequences: Vec<[Range<usize>; 2]>,
    ) -> Result<Self> {
        config.validate()?;
        shape.validate()?;
        let heads = shape.group().min(tile::ROWS);
        let tokens = tile::ROWS / heads;
        let mut tasks = Vec::new();
        for (index, [query, key]) in sequences.iter().enumerate() {
            walk::segments(config.mask, query.len(), key.len(), |segment| {
                for start in segment.rows.clone().step_by(tokens) {
                    let end = segment.rows.end.min(start + tokens);
                    tasks.push((index, segment.part(start..end)));
                }
            });
        }
        // The sort is stable: among equals, neighbours stay together.
        tasks.sort_by_key(|(_, segment)| std::cmp::Reverse(segment.pairs()));
        let copies = shape.batch * shape.kv_heads * shape.group().div_ceil(heads);
        let longest = tasks.iter().map(|(_, segment)| segment.len()).max().unwrap_or(0);
        let pieces = tasks.len() * copies;
        let splits = PIECES.div_ceil(pieces.max(1)).min(longest / SPLIT_KEYS).max(1);
        let work = tasks.iter().map(|(_, segment)| segment.pairs()).sum::<usize>();
        let work = work.saturating_mul(shape.batch * shape.query_heads * shape.head_dim);
        let threads = rayon::current_num_threads().min(pieces * splits).min(1 + work / THREAD_WORK).max(1);
        let instructions = InstructionSet::best();
        Ok(Self { config: *config, shape: *shape, instructions, sequences, tasks, heads, splits, threads })
    }

    /// The same plan for other instructions than the best of this CPU.
    ///
    /// # Errors
    /// [`Error::Value`] if the CPU has not got them.
    pub fn with_instructions(self, instructions: InstructionSet) -> Result<Self> {
        instructions.check()?;
        Ok(Self { instructions, ..self })
    }

    /// Elements of the workspace that [`run`](Self::run) needs: some buffers for each of the threads that rayon had when the plan was
    /// made, and partials where keys are split.
    pub fn workspace_len(&self) -> usize {
        self.threads * self.scratch_len() + self.partials_len() + ALIGNMENT
    }

    /// Multiply-adds that the mask leaves, each counted as two: `4 · head_dim` per query head for every key a row sees.
    pub fn flops(&self) -> u64 {
        let pairs: u64 = self.tasks.iter().map(|(_, segment)| segment.pairs() as u64).sum();
        4 * pairs * (self.shape.batch * self.shape.query_heads * self.shape.head_dim) as u64
    }

    fn scratch_len(&self) -> usize {
        let head_dim = self.shape.head_dim;
        tile::scratch_len(head_dim).max(few::scratch_len(head_dim)).next_multiple_of(ALIGNMENT)
    }

    /// A partial's row is its output and then its log-sum-exp.
    fn partials_shape(&self) -> [usize; 4] {
        if self.splits == 1 {
            return [0; 4];
        }
        let rows = self.tasks.iter().map(|(_, segment)| segment.rows.len()).max().unwrap_or(0) * self.heads;
        [self.pieces(), self.splits, rows, self.shape.head_dim + 1]
    }

    fn partials_len(&self) -> usize {
        self.partials_shape().iter().product()
    }

    /// Pieces of work before the keys are split.
    fn pieces(&self) -> usize {
        self.tasks.len() * self.shape.batch * self.shape.kv_heads * self.head_parts()
    }

    fn head_parts(&self) -> usize {
        self.shape.group().div_ceil(self.heads)
    }

    /// A piece: all tasks of one KV head before the next, so that its keys stay in the cache.
    fn piece(&self, index: usize, split: usize) -> Piece {
        let (plane, task) = (index / self.tasks.len(), index % self.tasks.len());
        let (plane, part) = (plane / self.head_parts(), plane % self.head_parts());
        let (batch, kv_head) = (plane / self.shape.kv_heads, plane % self.shape.kv_heads);
        let (sequence, segment) = &self.tasks[task];
        let [query, key] = &self.sequences[*sequence];
        let group = self.shape.group();
        let first = part * self.heads;
        let heads = kv_head * group + first..kv_head * group + group.min(first + self.heads);
        let each = segment.len().div_ceil(self.splits).next_multiple_of(tile::KEYS);
        let entry = |split: usize| (each * split).min(segment.len());
        Piece {
            batch,
            kv_head,
            heads,
            query_start: query.start,
            key_start: key.start,
            segment: segment.clone(),
            entries: entry(split)..entry(split + 1),
        }
    }

    /// Attention of `query` `[batch, query_len, query_heads, head_dim]` over `key` and `value` `[batch, key_len, kv_heads, head_dim]`
    /// into `out`, which has the query's shape, and the natural log-sum-exp `[batch, query_heads, query_len]` into `lse`.
    ///
    /// Any strides will do whose last axis is contiguous. `out` may be of another type than the inputs: f32 for partials that are
    /// to be merged. A row that sees no key gets 0 and `-inf`. What the workspace holds does not matter.
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
        self.shape.check(&query, &key, &value)?;
        self.shape.check_output(out.shape(), out.strides(), lse.as_deref())?;
        if workspace.len() < self.workspace_len() {
            return Err(Error::Workspace { expected: self.workspace_len(), got: workspace.len() });
        }
        if self.tasks.is_empty() || self.shape.batch == 0 {
            return Ok(());
        }
        let [batch, query_len, query_heads, head_dim] = self.shape.query_shape();
        let out = SharedRows::new(out);
        let lse = match lse {
            Some(lse) => Some(SharedRows::new(TensorViewMut::contiguous(
                "lse",
                lse,
                [batch, query_heads, query_len, 1],
            )?)),
            None => None,
        };
        // SAFETY (of both rows): each row belongs to one piece, which is worked on once, or merged once.
        let write_lse = |batch: usize, (token, head): (usize, usize), x: f32| {
            if let Some(lse) = &lse {
                // SAFETY: see above.
                unsafe { lse.row(batch, head, token)[0] = x };
            }
        };
        let write = |batch: usize, place: (usize, usize), row: &[f32], x: f32| {
            // SAFETY: see above.
            let to = unsafe { out.row(batch, place.0, place.1) };
            to.iter_mut().zip(row).for_each(|(to, &x)| *to = O::from_f32(x));
            write_lse(batch, place, x);
        };
        let inputs = Inputs {
            query: Rows::new(query),
            key: Rows::new(key),
            value: Rows::new(value),
            head_dim,
            factors: self.config.factors_for(head_dim),
        };

        let aligned = workspace.as_ptr().align_offset(ALIGNMENT * size_of::<f32>()).min(ALIGNMENT);
        let (scratch, partials) = workspace[aligned..].split_at_mut(self.threads * self.scratch_len());
        let partials = &mut partials[..self.partials_len()];
        if self.splits == 1 {
            self.work(&inputs, T::DTYPE, scratch, |piece, _, row, x, lse| {
                write(piece.batch, piece.place(row), x, lse);
            });
            return Ok(());
        }
        let shared = TensorViewMut::contiguous("workspace", &mut *partials, self.partials_shape())?;
        let shared = SharedRows::new(shared);
        self.work(&inputs, T::DTYPE, scratch, |_, [index, split], row, x, lse| {
            // SAFETY: each row of each split of a piece is worked on once.
            let to = unsafe { shared.row(index, split, row) };
            to[..head_dim].copy_from_slice(x);
            to[head_dim] = lse;
        });
        let [_, splits, rows, width] = self.partials_shape();
        partials.par_chunks_exact(splits * rows * width).enumerate().for_each(|(index, partials)| {
            let piece = self.piece(index, 0);
            for row in 0..piece.rows() {
                let parts = partials.chunks_exact(rows * width).map(|part| &part[row * width..][..width]);
                let place = piece.place(row);
                // SAFETY: each row belongs to one piece, which is merged once.
                let to = unsafe { out.row(piece.batch, place.0, place.1) };
                let lse = merge_row(parts.map(|part| (&part[..head_dim], part[head_dim])), to);
                write_lse(piece.batch, place, lse);
            }
        });
        Ok(())
    }

    /// Works off all pieces; `write(piece, [index, split], row, out, lse)` gets each row's result.
    fn work(
        &self,
        inputs: &Inputs<'_>,
        dtype: DType,
        scratch: &mut [f32],
        write: impl Fn(&Piece, [usize; 2], usize, &[f32], f32) + Sync,
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

/// Gets a row's result: the piece, its index and split, the row, out and lse.
type Write<'a> = &'a (dyn Fn(&Piece, [usize; 2], usize, &[f32], f32) + Sync);

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
        let pieces = self.plan.pieces();
        let total = pieces * self.plan.splits;
        loop {
            let taken = self.next.fetch_add(1, Ordering::Relaxed);
            if taken >= total {
                return;
            }
            // All heads of a split before the next: in [seq, heads] layouts they share their pages.
            let (split, index) = (taken / pieces, taken % pieces);
            let piece = self.plan.piece(index, split);
            let write = |row: usize, out: &[f32], lse: f32| {
                (self.write)(&piece, [index, split], row, out, lse);
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
