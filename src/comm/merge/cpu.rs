//! The merge of every rank's partial, on every rank.
//!
//! ```text
//! all-gather   every partial to every rank ─▶ merge of all rows
//! by rows      a share of every partial's rows to each rank ─▶ merge of the share ─▶ the merged share to every rank
//! ```
//!
//! With `R = batch · seq · heads` rows of `dim` elements, `e` bytes each, in partials and `o` in the output, a rank sends to each of `H - 1` others
//!
//! ```text
//! all-gather   R (dim e + 4) bytes in one message
//! by rows      ⌈R/H⌉ (dim e + 4) and then ⌈R/H⌉ (dim o + 4) bytes in two
//! ```
//!
//! (rows of 16 bits and an odd number of elements are filled up to 4 bytes). Rows are summed in the order of ranks by either way, so the results have the same
//! bits on every rank, in every run, and by both.

use super::super::{Collective, Link, MergeWay, Traffic};
use crate::config::check_rows;
use crate::merge::{self, Partial, ROWS_PER_TASK, check_lse, for_each_row, merge_row};
use crate::{Element, Error, Result, TensorView, TensorViewMut};
use rayon::prelude::*;
use std::marker::PhantomData;

/// A merge over ranks of partials of given extents: made once, it serves every layer.
#[derive(Clone, Copy, Debug)]
pub struct MergePlan<T, O> {
    /// `[batch, seq, heads, dim]`.
    shape: [usize; 4],
    ranks: usize,
    way: MergeWay,
    types: PhantomData<(T, O)>,
}

impl<T: Element, O: Element> MergePlan<T, O> {
    /// Partials with outputs `[batch, seq, heads, dim]` of `T` over `ranks`, merged into outputs of `O`, by the way that is cheapest on `link`.
    ///
    /// f32 partials round once, 16-bit ones are half the bytes. Every rank must make the plan with the same arguments.
    ///
    /// # Errors
    /// [`Error::Value`] for no rank, [`Error::Shape`] if dim is 0 or the messages could not be addressed.
    pub fn new(shape: [usize; 4], ranks: usize, link: &Link) -> Result<Self> {
        check_extents(shape, ranks)?;
        let mut plan = Self { shape, ranks, way: MergeWay::AllGather, types: PhantomData };
        plan.way = MergeWay::cheapest(link, ranks, plan.part::<T>(plan.rows()).bytes());
        Ok(plan)
    }

    /// The same merge, by another way.
    #[must_use]
    pub fn with_way(self, way: MergeWay) -> Self {
        Self { way, ..self }
    }

    /// How it merges.
    pub fn way(&self) -> MergeWay {
        self.way
    }

    /// Elements of the scratch that [`run`](Self::run) needs.
    pub fn scratch_len(&self) -> usize {
        let share = self.share();
        match self.way {
            MergeWay::AllGather => (self.ranks + 1) * self.part::<T>(self.rows()).words(),
            MergeWay::ByRows => {
                2 * self.ranks * self.part::<T>(share).words()
                    + (self.ranks + 1) * self.part::<O>(share).words()
            }
        }
    }

    /// What a rank sends in one merge.
    pub fn traffic(&self) -> Traffic {
        let step = |bytes: usize| Traffic::of(self.ranks - 1, bytes);
        match self.way {
            MergeWay::AllGather => step(self.part::<T>(self.rows()).bytes()),
            MergeWay::ByRows => {
                step(self.part::<T>(self.share()).bytes()) + step(self.part::<O>(self.share()).bytes())
            }
        }
    }

    /// Merges every rank's `partial` into `out` and `lse`, on every rank.
    ///
    /// `out` is `[batch, seq, heads, dim]` with any strides but a contiguous last axis, `lse` `[batch, heads, seq]`. What the scratch
    /// holds does not matter.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Stride`] for tensors that do not have the plan's extents, [`Error::Value`] for a group of another size,
    /// [`Error::Workspace`] for a scratch shorter than [`scratch_len`](Self::scratch_len) (nothing was sent then); and the collective's
    /// errors. Nothing was written to `out` and `lse`.
    pub fn run(
        &self,
        group: &(impl Collective + ?Sized),
        partial: &Partial<'_, T>,
        out: TensorViewMut<'_, O>,
        lse: &mut [f32],
        scratch: &mut [f32],
    ) -> Result<()> {
        partial.check(self.shape)?;
        check_rows("out", self.shape, out.shape(), out.strides())?;
        check_lse("lse", self.shape, lse)?;
        if group.size() != self.ranks {
            return Err(Error::value("group", format!("of {} ranks", self.ranks), group.size()));
        }
        let needed = self.scratch_len();
        if scratch.len() < needed {
            return Err(Error::scratch::<f32>(needed, scratch.len()));
        }
        match self.way {
            MergeWay::AllGather => self.all_gather(group, partial, out, lse, &mut scratch[..needed]),
            MergeWay::ByRows => self.by_rows(group, partial, out, lse, &mut scratch[..needed]),
        }
    }

    fn all_gather(
        &self,
        group: &(impl Collective + ?Sized),
        partial: &Partial<'_, T>,
        out: TensorViewMut<'_, O>,
        lse: &mut [f32],
        scratch: &mut [f32],
    ) -> Result<()> {
        let [_, seq, heads, dim] = self.shape;
        let part = self.part::<T>(self.rows());
        let (send, receive) = scratch.split_at_mut(part.words());
        let (send_out, send_lse) = part.split_mut::<T>(send);
        // As the tensor is laid out: tokens before heads.
        for (row, to) in send_out.chunks_exact_mut(dim).enumerate() {
            to.copy_from_slice(partial.row(row / heads / seq, row / heads % seq, row % heads));
        }
        send_lse.copy_from_slice(partial.lse);
        group.all_gather(bytemuck::cast_slice(send), bytemuck::cast_slice_mut(receive))?;
        let partials = receive.chunks_exact(part.words().max(1)).map(|words| {
            let (out, lse) = part.split::<T>(words);
            Ok(Partial { out: TensorView::contiguous("partial", out, self.shape)?, lse })
        });
        merge::merge(&partials.collect::<Result<Vec<_>>>()?, out, lse)
    }

    fn by_rows(
        &self,
        group: &(impl Collective + ?Sized),
        partial: &Partial<'_, T>,
        out: TensorViewMut<'_, O>,
        lse: &mut [f32],
        scratch: &mut [f32],
    ) -> Result<()> {
        let [_, seq, heads, dim] = self.shape;
        let (rows, share) = (self.rows(), self.share());
        let (part, merged_part) = (self.part::<T>(share), self.part::<O>(share));
        let (send, scratch) = scratch.split_at_mut(self.ranks * part.words());
        let (receive, scratch) = scratch.split_at_mut(self.ranks * part.words());
        let (merged, all) = scratch.split_at_mut(merged_part.words());

        // Rows are numbered as outputs lie in memory: tokens before heads. The last shares may have fewer, or none.
        for (rank, words) in send.chunks_exact_mut(part.words().max(1)).enumerate() {
            let (outs, lses) = part.split_mut::<T>(words);
            for (i, (to, to_lse)) in outs.chunks_exact_mut(dim).zip(lses).enumerate() {
                let row = rank * share + i;
                if row < rows {
                    let (batch, token, head) = (row / heads / seq, row / heads % seq, row % heads);
                    to.copy_from_slice(partial.row(batch, token, head));
                    *to_lse = partial.lse[(batch * heads + head) * seq + token];
                } else {
                    to.fill(T::default());
                    *to_lse = f32::NEG_INFINITY;
                }
            }
        }
        group.all_to_all(bytemuck::cast_slice(send), bytemuck::cast_slice_mut(receive))?;

        let parts: Vec<_> =
            receive.chunks_exact(part.words().max(1)).map(|words| part.split::<T>(words)).collect();
        let (outs, lses) = merged_part.split_mut::<O>(merged);
        outs.par_chunks_exact_mut(dim).zip(lses).with_min_len(ROWS_PER_TASK).enumerate().for_each(
            |(row, (out, lse))| {
                let partials = parts.iter().map(|(outs, lses)| (&outs[row * dim..][..dim], lses[row]));
                *lse = merge_row(partials, out);
            },
        );
        group.all_gather(bytemuck::cast_slice(merged), bytemuck::cast_slice_mut(all))?;

        let parts: Vec<_> =
            all.chunks_exact(merged_part.words().max(1)).map(|words| merged_part.split::<O>(words)).collect();
        for_each_row(out, Some(lse), |_, [batch, token, head], out, lse| {
            let row = (batch * seq + token) * heads + head;
            let (outs, lses) = parts[row / share];
            out.copy_from_slice(&outs[row % share * dim..][..dim]);
            *lse = lses[row % share];
        })
    }

    fn rows(&self) -> usize {
        self.shape[..3].iter().product()
    }

    /// Rows that a rank merges by rows.
    fn share(&self) -> usize {
        self.rows().div_ceil(self.ranks)
    }

    fn part<E: Element>(&self, rows: usize) -> Part {
        Part {
            rows,
            elements: rows * self.shape[3],
            out_words: (rows * self.shape[3] * size_of::<E>()).div_ceil(4),
        }
    }
}

/// Refuses merges over no rank, of no elements, or whose scratch could not be addressed.
pub(crate) fn check_extents(shape: [usize; 4], ranks: usize) -> Result<()> {
    if ranks == 0 {
        return Err(Error::value("ranks", "at least 1", ranks));
    }
    // A row is at most dim + 1 words of 4 bytes; a scratch has less than 3 ranks + 3 times all rows, each share rounded up.
    let extents = [shape[0], shape[1], shape[2], shape[3].saturating_add(1), ranks, 16];
    let words = extents.iter().try_fold(4usize, |n, &extent| n.checked_mul(extent.max(1)));
    if shape[3] == 0 || words.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
        let expected = "dim of at least 1, and extents that can be addressed";
        return Err(Error::shape("partial", expected, format!("{shape:?}")));
    }
    Ok(())
}

/// Some rows of a partial in a message: outputs, and then log-sum-exps.
#[derive(Clone, Copy)]
struct Part {
    rows: usize,
    elements: usize,
    out_words: usize,
}

impl Part {
    fn words(&self) -> usize {
        self.out_words + self.rows
    }

    fn bytes(&self) -> usize {
        4 * self.words()
    }

    fn split<'a, E: Element>(&self, words: &'a [f32]) -> (&'a [E], &'a [f32]) {
        let (out, lse) = words.split_at(self.out_words);
        (&bytemuck::cast_slice(out)[..self.elements], lse)
    }

    fn split_mut<'a, E: Element>(&self, words: &'a mut [f32]) -> (&'a mut [E], &'a mut [f32]) {
        let (out, lse) = words.split_at_mut(self.out_words);
        (&mut bytemuck::cast_slice_mut(out)[..self.elements], lse)
    }
}

/// Merges every rank's `partial` into `out` `[batch, seq, heads, dim]` and `lse` `[batch, heads, seq]`, on every rank and with the same bits.
///
/// The way is the cheapest on the group's link. Where calls repeat, make a [`MergePlan`] once and keep its scratch.
///
/// # Errors
/// As [`MergePlan::run`].
pub fn merge<T: Element, O: Element>(
    group: &(impl Collective + ?Sized),
    partial: &Partial<'_, T>,
    out: TensorViewMut<'_, O>,
    lse: &mut [f32],
) -> Result<()> {
    let plan = MergePlan::new(partial.out.shape(), group.size(), &group.link())?;
    plan.run(group, partial, out, lse, &mut vec![0.0; plan.scratch_len()])
}
