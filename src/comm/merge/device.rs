//! The merge over ranks of partials in device memory: [`crate::comm`]'s two ways, without a copy to CPU memory where the engine needs none.
//!
//! ```text
//! all-gather   out, lse of every rank ─▶ merge of all rows
//! by rows      a share of every rank's rows ─▶ merge ─▶ the merged share to every rank ─▶ to its place
//! ```
//!
//! Outputs and log-sum-exps travel side by side in one collective, from where attention left them and to where the merge kernel reads them.

use super::check_extents;
use crate::comm::{DeviceCollective, Exchange, Link, MergeWay, Traffic};
use crate::cuda::{ALIGNMENT, Device, DeviceTensor, DeviceTensorMut, Partials, Span, SpanMut, merge};
use crate::{Element, Error, Result};
use std::marker::PhantomData;

/// A merge over ranks of partials of given extents: made once, it serves every layer.
#[derive(Clone, Copy, Debug)]
pub struct RanksMerge<T, O> {
    /// `[batch, seq, heads, dim]`.
    shape: [usize; 4],
    ranks: usize,
    way: MergeWay,
    types: PhantomData<(T, O)>,
}

impl<T: Element, O: Element> RanksMerge<T, O> {
    /// Partials with outputs `[batch, seq, heads, dim]` of `T` over `ranks`, merged into outputs of `O`: f32 partials into any type, others into their own or
    /// f32. By rows where that is cheaper on `link`, and the ranks divide `batch · seq · heads`.
    ///
    /// # Errors
    /// [`Error::Value`] for no rank, [`Error::Shape`] if dim is 0 or the messages could not be addressed.
    pub fn new(shape: [usize; 4], ranks: usize, link: &Link) -> Result<Self> {
        check_extents(shape, ranks)?;
        let plan = Self { shape, ranks, way: MergeWay::AllGather, types: PhantomData };
        let way = MergeWay::cheapest(link, ranks, plan.rows() * (shape[3] * size_of::<T>() + 4));
        Ok(if plan.divides() { Self { way, ..plan } } else { plan })
    }

    /// The same merge, by another way.
    ///
    /// # Errors
    /// [`Error::Value`] for rows that the ranks do not divide.
    pub fn with_way(self, way: MergeWay) -> Result<Self> {
        if way == MergeWay::ByRows && !self.divides() {
            let expected = format!("rows (batch, tokens, heads) a multiple of {} ranks", self.ranks);
            return Err(Error::value("way", expected, format!("{:?}", self.shape)));
        }
        Ok(Self { way, ..self })
    }

    /// How it merges.
    pub fn way(&self) -> MergeWay {
        self.way
    }

    /// What a rank sends in one merge.
    pub fn traffic(&self) -> Traffic {
        let row = |size: usize| self.shape[3] * size + 4;
        let step = |bytes| Traffic::of(self.ranks - 1, bytes);
        match self.way {
            MergeWay::AllGather => step(self.rows() * row(size_of::<T>())),
            MergeWay::ByRows => {
                let share = self.rows() / self.ranks;
                step(share * row(size_of::<T>())) + step(share * row(size_of::<O>()))
            }
        }
    }

    /// Bytes of the scratch that [`prepare`](Self::prepare) needs.
    pub fn scratch_len(&self) -> usize {
        self.regions().iter().sum()
    }

    /// The merge on a device, with a scratch for its messages.
    ///
    /// # Errors
    /// [`Error::Workspace`] for a scratch shorter than [`scratch_len`](Self::scratch_len), [`Error::Value`] for one that is not aligned to 16 bytes or was borrowed
    /// for another stream.
    pub fn prepare<'a, D: Device>(
        &self,
        device: &'a D,
        stream: &'a D::Stream,
        scratch: SpanMut<'a, D, u8>,
    ) -> Result<PreparedMerge<'a, D, T, O>> {
        if scratch.len() < self.scratch_len() {
            return Err(Error::Workspace { expected: self.scratch_len(), got: scratch.len() });
        }
        scratch.check("scratch", self.scratch_len())?;
        scratch.check_stream("scratch", stream)?;
        Ok(PreparedMerge { plan: *self, device, stream, scratch })
    }

    fn rows(&self) -> usize {
        self.shape[..3].iter().product()
    }

    fn divides(&self) -> bool {
        self.rows().is_multiple_of(self.ranks)
    }

    /// Bytes of what is received, what is merged, and what is received of that: outputs and log-sum-exps of each.
    fn regions(&self) -> [usize; 6] {
        let (rows, dim) = (self.rows(), self.shape[3]);
        let of = |rows: usize, size: usize| (rows * size).next_multiple_of(ALIGNMENT);
        match self.way {
            MergeWay::AllGather => {
                [of(self.ranks * rows, dim * size_of::<T>()), of(self.ranks * rows, 4), 0, 0, 0, 0]
            }
            MergeWay::ByRows => {
                let (share, merged) = (rows / self.ranks, dim * size_of::<O>());
                [
                    of(rows, dim * size_of::<T>()),
                    of(rows, 4),
                    of(share, merged),
                    of(share, 4),
                    of(rows, merged),
                    of(rows, 4),
                ]
            }
        }
    }
}

/// A [`RanksMerge`] on a device. Calls are ordered by its stream, and wait only where the collective does.
#[derive(Debug)]
pub struct PreparedMerge<'a, D: Device, T, O> {
    plan: RanksMerge<T, O>,
    device: &'a D,
    stream: &'a D::Stream,
    scratch: SpanMut<'a, D, u8>,
}

impl<D: Device, T: Element, O: Element> PreparedMerge<'_, D, T, O> {
    /// Merges every rank's partial into `out` `[batch, seq, heads, dim]` and, if given, `lse` `[batch, heads, seq]`, on every rank and with the same bits.
    ///
    /// The partial's output is `[batch, heads, seq, dim]` without gaps: what attention writes into
    /// `DeviceTensorMut::contiguous(..)` of that shape with [`swap_seq_heads`](DeviceTensorMut::swap_seq_heads). Its log-sum-exp is `[batch, heads, seq]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] for memory that does not fit the plan, [`Error::DType`] for types that are not merged; errors of
    /// the collective and of the driver.
    pub fn run(
        &mut self,
        group: &impl DeviceCollective<D>,
        partial: (&Span<'_, D, T>, &Span<'_, D, f32>),
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        let (plan, device, stream) = (&self.plan, self.device, self.stream);
        let RanksMerge { shape: [batch, seq, heads, dim], ranks, .. } = *plan;
        let (rows, elements) = (plan.rows(), plan.rows() * dim);
        check_len("partial", elements, partial.0.len())?;
        check_len("partial", rows, partial.1.len())?;
        if out.shape() != plan.shape {
            return Err(Error::shape("out", format!("{:?}", plan.shape), format!("{:?}", out.shape())));
        }
        if let Some(lse) = &lse {
            check_len("lse", rows, lse.len())?;
        }
        if group.size() != ranks {
            return Err(Error::value("group", format!("of {ranks} ranks"), group.size()));
        }
        partial.0.check_stream("partial", stream)?;
        partial.1.check_stream("partial", stream)?;
        let mut at = self.scratch.address();
        let regions = plan.regions().map(|bytes| {
            at += bytes as u64;
            Region { address: at - bytes as u64, bytes }
        });
        let [outs, lses, own, own_lse, all, all_lse] = regions;
        let sent = |address, bytes| Region { address, bytes };
        let sent = [
            sent(partial.0.address(), elements * size_of::<T>()),
            sent(partial.1.address(), rows * size_of::<f32>()),
        ];
        let received = match plan.way {
            MergeWay::AllGather => ranks,
            MergeWay::ByRows => 1,
        };
        let received = [outs.first(received * sent[0].bytes), lses.first(received * sent[1].bytes)];
        match plan.way {
            MergeWay::AllGather => {
                group.all_gather(stream, &exchanges(sent, received))?;
                merge(
                    device,
                    stream,
                    &partials::<D, T>(outs, lses, [ranks * batch, seq, heads, dim], rows)?,
                    out,
                    lse,
                )
            }
            MergeWay::ByRows => {
                // To a share it is the same which token and head a row is of.
                let share = rows / ranks;
                group.all_to_all(stream, &exchanges(sent, received))?;
                let of_share = partials::<D, T>(outs, lses, [ranks, 1, share, dim], share)?;
                let own = own.first(share * dim * size_of::<O>());
                let own_lse = own_lse.first(share * size_of::<f32>());
                let mut merged = DeviceTensorMut::contiguous("out", own.write::<D, O>(), [1, 1, share, dim])?;
                merge(device, stream, &of_share, &mut merged, Some(&mut own_lse.write()))?;
                let all = [all.first(elements * size_of::<O>()), all_lse.first(rows * size_of::<f32>())];
                group.all_gather(stream, &exchanges([own, own_lse], all))?;
                // A merge of one partial puts it where it belongs.
                merge(device, stream, &partials::<D, O>(all[0], all[1], plan.shape, rows)?, out, lse)
            }
        }
    }
}

fn check_len(argument: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected != got {
        return Err(Error::shape(argument, format!("{expected} elements"), got.to_string()));
    }
    Ok(())
}

/// Device memory that a merge in progress reads and writes: a part of its scratch, or the caller's partial.
///
/// Both are borrowed, and all work on them is in the order of one stream; each step reads what steps before it wrote, and writes another region.
#[derive(Clone, Copy)]
struct Region {
    address: u64,
    bytes: usize,
}

impl Region {
    fn first(self, bytes: usize) -> Self {
        debug_assert!(bytes <= self.bytes);
        Self { bytes, ..self }
    }

    fn read<'a, D: Device, E>(self) -> Span<'a, D, E> {
        // SAFETY: as the type says.
        unsafe { Span::from_raw(self.address, self.bytes / size_of::<E>()) }
    }

    fn write<'a, D: Device, E>(self) -> SpanMut<'a, D, E> {
        // SAFETY: as the type says.
        unsafe { SpanMut::from_raw(self.address, self.bytes / size_of::<E>()) }
    }
}

fn exchanges<'a, D: Device>(send: [Region; 2], receive: [Region; 2]) -> [Exchange<'a, D>; 2] {
    [(send[0].read(), receive[0].write()), (send[1].read(), receive[1].write())]
}

/// Partials `[n, seq, heads, dim]` that lie one after another as `[heads, seq, dim]`.
fn partials<'a, D: Device, E: Element>(
    out: Region,
    lse: Region,
    [n, seq, heads, dim]: [usize; 4],
    lse_stride: usize,
) -> Result<Partials<'a, D, E>> {
    let out = out.first(n * seq * heads * dim * size_of::<E>());
    let out = DeviceTensor::contiguous("partials", out.read(), [n, heads, seq, dim])?.swap_seq_heads();
    Ok(Partials { out, lse: lse.read(), lse_stride })
}
