//! The merge over ranks in CPU memory.

use super::{LSE, MergePlan, OUT};
use crate::comm::message::{Message, Pattern, Pool, Received, Started};
use crate::comm::{Collective, MergeWay};
use crate::config::{check_rows, check_sinks};
use crate::cpu::InstructionSet;
use crate::merge::{
    Block, Partial, ROWS_PER_TASK, block_rows, check_lse, for_each_row, merge_row, merge_rows, one_by_one,
    sink_of, totals,
};
use crate::{Element, Error, Result, TensorView, TensorViewMut};
use rayon::prelude::*;

/// A [`MergePlan`] in CPU memory, with the memory of its messages.
///
/// Attention writes into the message ([`partial`](Self::partial)), and ranks merge from the others'
/// messages where they lie, if the engine has them in memory. Messages are made when they are first
/// needed, and used again: a rank writes one while others still read the one before.
#[derive(Debug)]
pub struct CpuMerge<T, O> {
    plan: MergePlan<T, O>,
    partials: Pool,
    /// Of the shares that this rank has merged.
    shares: Pool,
    written: Option<Message>,
    /// Of the next merge.
    sinks: Option<Vec<f32>>,
}

impl<T: Element, O: Element> MergePlan<T, O> {
    /// The merge in CPU memory.
    pub fn on_cpu(&self) -> CpuMerge<T, O> {
        let regions = |rows: usize, size: usize| {
            let mut regions = vec![0; 2];
            (regions[LSE], regions[OUT]) = (rows * size_of::<f32>(), rows * self.shape[3] * size);
            regions
        };
        CpuMerge {
            plan: *self,
            partials: Pool::new(regions(self.message_rows(), size_of::<T>())),
            shares: Pool::new(regions(self.share(), size_of::<O>())),
            written: None,
            sinks: None,
        }
    }
}

impl<T: Element, O: Element> CpuMerge<T, O> {
    /// The place of this rank's next partial in the message: an output `[batch, seq, heads, dim]`
    /// with the message's strides, and a log-sum-exp `[batch, heads, seq]`. Attention writes both,
    /// all of them, or a merge of several partials does; [`run`](Self::run) and
    /// [`start`](Self::start) send them.
    ///
    /// # Errors
    /// [`Error::Value`] if memory has no room for the message.
    pub fn partial(&mut self) -> Result<(TensorViewMut<'_, T>, &mut [f32])> {
        let plan = self.plan;
        let message = match self.written.take() {
            Some(message) => message,
            None => self.partials.take()?,
        };
        let (lse, out) = two_regions(self.written.insert(message));
        Ok((TensorViewMut::new("partial", out, plan.shape, plan.strides())?, &mut lse[..plan.rows()]))
    }

    /// The same with attention sinks `[heads]`, if given, in the next merge and no other: it
    /// finishes the rows, as [`merge_with_sinks`](crate::merge::merge_with_sinks) says. They are
    /// the same on every rank, and each counts once.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of them, [`Error::Value`] for one that is NaN or `+inf`.
    pub fn with_sinks(&mut self, sinks: Option<&[f32]>) -> Result<&mut Self> {
        check_sinks(self.plan.shape[2], sinks)?;
        self.sinks = sinks.map(<[f32]>::to_vec);
        Ok(self)
    }

    /// Merges every rank's written partial into `out` and, if given, `lse`, on every rank.
    ///
    /// `out` is `[batch, seq, heads, dim]` with any strides but a contiguous last axis, `lse`
    /// `[batch, heads, seq]`.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Stride`] for tensors that do not have the plan's extents,
    /// [`Error::Value`] for a group of another size or if no partial was written since the last
    /// merge (nothing was sent then); and the collective's errors. Nothing was written to `out` and
    /// `lse`.
    pub fn run(
        &mut self,
        group: &(impl Collective + ?Sized),
        out: TensorViewMut<'_, O>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        self.check_output(&out, lse.as_deref())?;
        self.start(group)?.wait(out, lse)
    }

    /// As [`run`](Self::run), of a partial that lies anywhere, at any strides: it is copied into
    /// the message.
    ///
    /// # Errors
    /// As [`run`](Self::run), for the partial too.
    pub fn merge(
        &mut self,
        group: &(impl Collective + ?Sized),
        partial: &Partial<'_, T>,
        out: TensorViewMut<'_, O>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        partial.check(self.plan.shape)?;
        self.check_output(&out, lse.as_deref())?;
        self.plan.check_group(group.size())?;
        let (to, to_lse) = self.partial()?;
        for_each_row(to, Some(to_lse), |index, [batch, seq, head], out, lse| {
            out.copy_from_slice(partial.row(batch, seq, head));
            *lse = partial.lse[index];
        })?;
        self.run(group, out, lse)
    }

    /// Sends the written partial, and returns at once: the merge is under way until
    /// [`PendingMerge::wait`].
    ///
    /// By rows, the second of the two messages goes in the wait.
    ///
    /// # Errors
    /// [`Error::Value`] for a group of another size, or if no partial was written since the last
    /// merge (nothing was sent then); and the collective's errors.
    pub fn start<'a, C: Collective + ?Sized>(
        &'a mut self,
        group: &'a C,
    ) -> Result<PendingMerge<'a, C, T, O>> {
        self.plan.check_group(group.size())?;
        let nothing = || Error::value("partial", "one that was written since the last merge", "none");
        // All memory first: what was sent must be finished.
        let (pattern, share) = match self.plan.way() {
            MergeWay::AllGather => (Pattern::AllGather, None),
            MergeWay::ByRows => (Pattern::AllToAll, Some(self.shares.take()?)),
        };
        let mut message = self.written.take().ok_or_else(nothing)?;
        match group.start(pattern, message.clone()) {
            Ok(started) => {
                self.partials.put(message);
                let sinks = self.sinks.take();
                Ok(PendingMerge { merge: self, group, started: Some(UnderWay { started, share, sinks }) })
            }
            Err(error) => {
                // Still there, if the group has not kept it.
                self.written = message.get_mut().is_some().then_some(message);
                Err(error)
            }
        }
    }

    fn check_output(&self, out: &TensorViewMut<'_, O>, lse: Option<&[f32]>) -> Result<()> {
        check_rows("out", self.plan.shape, out.shape(), out.strides())?;
        lse.map_or(Ok(()), |lse| check_lse("lse", self.plan.shape, lse))
    }

    /// Finishes what was started. Without an output the result is lost.
    fn finish(
        &mut self,
        group: &(impl Collective + ?Sized),
        UnderWay { started, share, sinks }: UnderWay,
        mut to: Option<(TensorViewMut<'_, O>, Option<&mut [f32]>)>,
    ) -> Result<()> {
        let (plan, sinks) = (self.plan, sinks.as_deref());
        let mut merged = Ok(());
        let Some(mut share) = share else {
            group.finish(started, &mut |received| {
                merged = to
                    .take()
                    .map_or(Ok(()), |(out, lse)| merge_rows(&plan.partials(received)?, sinks, out, lse));
            })?;
            return merged;
        };
        group.finish(started, &mut |received| {
            merged = plan.merge_share(group.rank(), received, sinks, &mut share);
        })?;
        // The others wait for this rank's share: what it cannot merge, it does not send.
        merged?;
        self.shares.put(share.clone());
        let started = group.start(Pattern::AllGather, share)?;
        let mut placed = Ok(());
        group.finish(started, &mut |received| {
            placed = to.take().map_or(Ok(()), |(out, lse)| plan.place_shares(received, out, lse));
        })?;
        placed
    }
}

/// A merge whose messages are under way, while its rank does other work.
///
/// Until it is waited for, the group takes part in nothing else. Dropping it waits as well, as long
/// as the group's timeout says (by rows for each of two exchanges), so that the others get their results; this rank's is lost. (A
/// thread that panics does not wait: it leaves the group as it drops it.) One that is forgotten
/// leaves the group with the exchange under way: the group's other calls are refused, and to the
/// others this rank has left once the group is dropped. The memory of messages is shared with the
/// group, so none of this leaves it without an owner.
#[derive(Debug)]
#[must_use = "dropping it waits for the others"]
pub struct PendingMerge<'a, C: Collective + ?Sized, T: Element, O: Element> {
    merge: &'a mut CpuMerge<T, O>,
    group: &'a C,
    started: Option<UnderWay>,
}

/// What was started.
#[derive(Debug)]
struct UnderWay {
    started: Started,
    /// By rows, the memory of this rank's share.
    share: Option<Message>,
    /// By rows the others get this rank's share with them, even if this rank gives up its result.
    sinks: Option<Vec<f32>>,
}

impl<C: Collective + ?Sized, T: Element, O: Element> PendingMerge<'_, C, T, O> {
    /// Waits for the others, and merges into `out` and, if given, `lse`, as [`CpuMerge::run`].
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Stride`] for tensors that do not have the plan's extents, after
    /// the merge was completed without them; and the collective's errors. Nothing was written.
    pub fn wait(mut self, out: TensorViewMut<'_, O>, lse: Option<&mut [f32]>) -> Result<()> {
        self.merge.check_output(&out, lse.as_deref())?;
        match self.started.take() {
            Some(started) => self.merge.finish(self.group, started, Some((out, lse))),
            None => Ok(()),
        }
    }
}

impl<C: Collective + ?Sized, T: Element, O: Element> Drop for PendingMerge<'_, C, T, O> {
    fn drop(&mut self) {
        if let Some(started) = self.started.take()
            && !std::thread::panicking()
        {
            // After an error the rank has left the group: its next call says so.
            let _ = self.merge.finish(self.group, started, None);
        }
    }
}

impl<T: Element, O: Element> MergePlan<T, O> {
    /// Every rank's partial, where it lies.
    fn partials<'a>(&self, received: &Received<'a>) -> Result<Vec<Partial<'a, T>>> {
        let partial = |rank| {
            let out = received.elements(rank, OUT, self.rows() * self.shape[3])?;
            let out = TensorView::new("received", out, self.shape, self.strides())?;
            Ok(Partial { out, lse: received.elements(rank, LSE, self.rows())? })
        };
        (0..self.ranks).map(partial).collect()
    }

    /// Merges this rank's rows of every partial into a message.
    fn merge_share(
        &self,
        rank: usize,
        received: &Received<'_>,
        sinks: Option<&[f32]>,
        share: &mut Message,
    ) -> Result<()> {
        let ([_, seq, heads, dim], first) = (self.shape, rank * self.share());
        let rows = self.own_rows(rank);
        let part = |rank| {
            let out: &[T] = received.elements(rank, OUT, rows * dim)?;
            let lse: &[f32] = received.elements(rank, LSE, rows)?;
            Ok((out, lse))
        };
        let parts = (0..self.ranks).map(part).collect::<Result<Vec<_>>>()?;
        let (lses, outs) = two_regions::<O>(share);
        let (lses, outs) = (&mut lses[..rows], &mut outs[..rows * dim]);
        let instructions = InstructionSet::best();
        let row = |rank: usize, row: usize| &parts[rank].0[row * dim..][..dim];
        let sink = |row: usize| sink_of(sinks, (first + row) / seq % heads);
        if one_by_one(self.ranks, dim) {
            let rows = outs.par_chunks_exact_mut(dim).zip(lses).enumerate();
            rows.with_min_len(ROWS_PER_TASK).for_each(|(index, (out, lse))| {
                let parts = (0..self.ranks).map(|rank| (row(rank, index), parts[rank].1[index]));
                *lse = merge_row(parts, sink(index), out);
            });
            return Ok(());
        }
        let block = block_rows(dim);
        let blocks = outs.par_chunks_mut(block * dim).zip(lses.par_chunks_mut(block)).enumerate();
        let blocks = blocks.with_min_len(ROWS_PER_TASK.div_ceil(block));
        blocks.for_each_init(totals, |totals, (index, (outs, lses))| {
            let start = index * block;
            let block = Block {
                partials: self.ranks,
                rows: lses.len(),
                dim,
                row: |rank, index| row(rank, start + index),
                lse: |rank: usize, index: usize| parts[rank].1[start + index],
                sink: |index| sink(start + index),
            };
            block.merge(instructions, totals, |index, total, scale, lse| {
                let out = &mut outs[index * dim..][..dim];
                out.iter_mut().zip(total).for_each(|(out, total)| *out = O::from_f32(scale * total));
                lses[index] = lse;
            });
        });
        Ok(())
    }

    /// Puts every rank's merged rows where they belong.
    fn place_shares(
        &self,
        received: &Received<'_>,
        out: TensorViewMut<'_, O>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        let (share, dim) = (self.share(), self.shape[3]);
        let part = |rank| {
            let out: &[O] = received.elements(rank, OUT, self.own_rows(rank) * dim)?;
            let lse: &[f32] = received.elements(rank, LSE, self.own_rows(rank))?;
            Ok((out, lse))
        };
        let parts = (0..self.ranks).map(part).collect::<Result<Vec<_>>>()?;
        // Rows are numbered as log-sum-exps lie: heads before tokens.
        for_each_row(out, lse, |row, _, out, lse| {
            let (outs, lses) = parts[row / share];
            out.copy_from_slice(&outs[row % share * dim..][..dim]);
            *lse = lses[row % share];
        })
    }
}

/// Log-sum-exps and outputs of a message that nobody else has.
fn two_regions<E: Element>(message: &mut Message) -> (&mut [f32], &mut [E]) {
    let mut regions = message.get_mut().expect("nobody else has it").into_iter();
    let [lse, out] = [(); 2].map(|()| regions.next().unwrap_or_default());
    (bytemuck::cast_slice_mut(lse), bytemuck::cast_slice_mut(out))
}
