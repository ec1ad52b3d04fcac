//! The merge over hosts of partials in device memory: [`crate::comm`]'s two ways, without a copy to the host where the engine needs none.
//!
//! ```text
//! all-gather   out, lse of every host ─▶ merge of all rows
//! by rows      a share of every host's rows ─▶ merge ─▶ the merged share to every host ─▶ to its place
//! ```
//!
//! Outputs and log-sum-exps travel side by side in one collective, from where attention left them and to where the merge kernel reads them.

use super::device::{ALIGNMENT, Device, DeviceTensor, DeviceTensorMut, Span, SpanMut};
use super::merge::{Partials, merge};
use crate::comm::{Collective, Link, MergeWay, Traffic};
use crate::{Element, Error, Result};
use std::marker::PhantomData;

/// Bytes in device memory that are sent, and those that are received in return.
pub type Exchange<'a, D> = (Span<'a, D, u8>, SpanMut<'a, D, u8>);

/// What a group of hosts can do together with device memory, in the order of a stream. As [`Collective`], but for that.
pub trait DeviceCollective<D: Device> {
    /// This host's number, below [`size`](Self::size).
    fn rank(&self) -> usize;

    /// Hosts of the group.
    fn size(&self) -> usize;

    /// What sending takes. The same on every rank.
    fn link(&self) -> Link;

    /// As [`Collective::all_gather`], of several pieces of memory at once.
    ///
    /// # Errors
    /// [`Error::Shape`] for lengths that do not fit; and the engine's errors.
    fn all_gather(&self, stream: &D::Stream, parts: &[Exchange<'_, D>]) -> Result<()>;

    /// As [`Collective::all_to_all`], of several pieces of memory at once.
    ///
    /// # Errors
    /// [`Error::Shape`] for lengths that do not fit; and the engine's errors.
    fn all_to_all(&self, stream: &D::Stream, parts: &[Exchange<'_, D>]) -> Result<()>;

    /// As [`Collective::broadcast`].
    ///
    /// # Errors
    /// [`Error::Value`] for a root out of range; and the engine's errors.
    fn broadcast(&self, stream: &D::Stream, root: usize, buffer: &mut SpanMut<'_, D, u8>) -> Result<()>;

    /// What this rank has sent so far.
    fn traffic(&self) -> Traffic;
}

/// Any collective, through the host's memory: for GPUs on machines without NCCL, and for tests. Every call waits for the stream.
#[derive(Clone, Copy, Debug)]
pub struct Staged<'a, D, C: ?Sized> {
    /// The device whose memory is sent.
    pub device: &'a D,
    /// What carries it.
    pub group: &'a C,
}

impl<D: Device, C: Collective + ?Sized> Staged<'_, D, C> {
    fn download(&self, stream: &D::Stream, argument: &'static str, span: (u64, usize)) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes
            .try_reserve_exact(span.1)
            .map_err(|_| Error::value(argument, "a size that memory has room for", span.1))?;
        bytes.resize(span.1, 0);
        // SAFETY: a span of this device, which is borrowed until this returns.
        unsafe { self.device.download(stream, span.0, &mut bytes)? };
        Ok(bytes)
    }

    /// All pieces as one message: for each of `pieces` ranks its part of each.
    fn exchange(
        &self,
        stream: &D::Stream,
        parts: &[Exchange<'_, D>],
        pieces: usize,
        collective: impl Fn(&[u8], &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let mut sends = Vec::new();
        let mut each = 0;
        for part in parts {
            check_exchange(part, pieces, self.group.size(), stream)?;
        }
        for (send, _) in parts {
            sends.push(self.download(stream, "send", (send.address(), send.len()))?);
            each += send.len() / pieces;
        }
        let mut message = Vec::with_capacity(pieces * each);
        for piece in 0..pieces {
            for send in &sends {
                let len = send.len() / pieces;
                message.extend_from_slice(&send[piece * len..][..len]);
            }
        }
        let mut received = vec![0; self.group.size() * each];
        collective(&message, &mut received)?;
        for from in 0..self.group.size() {
            let mut rest = &received[from * each..][..each];
            for (send, receive) in parts {
                let len = send.len() / pieces;
                let (bytes, after) = rest.split_at(len);
                // SAFETY: inside a span of this device that is borrowed to be written.
                unsafe { self.device.upload(stream, receive.address() + (from * len) as u64, bytes)? };
                rest = after;
            }
        }
        Ok(())
    }
}

/// Refuses memory of another stream, or lengths that do not fit a message that is cut into `pieces`, over `size` hosts.
pub(crate) fn check_exchange<D: Device>(
    (send, receive): &Exchange<'_, D>,
    pieces: usize,
    size: usize,
    stream: &D::Stream,
) -> Result<()> {
    let expected = send.len().checked_mul(size).map(|bytes| bytes / pieces);
    if !send.len().is_multiple_of(pieces) || expected != Some(receive.len()) {
        let expected = format!("a part of each of {size} ranks, for {} bytes", send.len());
        return Err(Error::shape("receive", expected, receive.len().to_string()));
    }
    send.check_stream("send", stream)?;
    receive.check_stream("receive", stream)
}

impl<D: Device, C: Collective + ?Sized> DeviceCollective<D> for Staged<'_, D, C> {
    fn rank(&self) -> usize {
        self.group.rank()
    }

    fn size(&self) -> usize {
        self.group.size()
    }

    fn link(&self) -> Link {
        self.group.link()
    }

    fn all_gather(&self, stream: &D::Stream, parts: &[Exchange<'_, D>]) -> Result<()> {
        self.exchange(stream, parts, 1, |send, receive| self.group.all_gather(send, receive))
    }

    fn all_to_all(&self, stream: &D::Stream, parts: &[Exchange<'_, D>]) -> Result<()> {
        self.exchange(stream, parts, self.group.size(), |send, receive| self.group.all_to_all(send, receive))
    }

    fn broadcast(&self, stream: &D::Stream, root: usize, buffer: &mut SpanMut<'_, D, u8>) -> Result<()> {
        buffer.check_stream("buffer", stream)?;
        let mut bytes = self.download(stream, "buffer", (buffer.address(), buffer.len()))?;
        self.group.broadcast(root, &mut bytes)?;
        // SAFETY: a span of this device that is borrowed to be written.
        unsafe { self.device.upload(stream, buffer.address(), &bytes) }
    }

    fn traffic(&self) -> Traffic {
        self.group.traffic()
    }
}

/// A merge over hosts of partials of given extents: made once, it serves every layer.
#[derive(Clone, Copy, Debug)]
pub struct HostsMerge<T, O> {
    /// `[batch, seq, heads, dim]`.
    shape: [usize; 4],
    hosts: usize,
    way: MergeWay,
    types: PhantomData<(T, O)>,
}

impl<T: Element, O: Element> HostsMerge<T, O> {
    /// Partials with outputs `[batch, seq, heads, dim]` of `T` over `hosts`, merged into outputs of `O`: f32 partials into any type, others into their own or
    /// f32. By rows where that is cheaper on `link`, and the hosts divide `batch · seq · heads`.
    ///
    /// # Errors
    /// [`Error::Value`] for no host, [`Error::Shape`] if dim is 0 or the messages could not be addressed.
    pub fn new(shape: [usize; 4], hosts: usize, link: &Link) -> Result<Self> {
        if hosts == 0 {
            return Err(Error::value("hosts", "at least 1", hosts));
        }
        let extents = [shape[0], shape[1], shape[2], shape[3].saturating_add(1), hosts, 16];
        let bytes = extents.iter().try_fold(4usize, |n, &extent| n.checked_mul(extent.max(1)));
        if shape[3] == 0 || bytes.is_none_or(|bytes| isize::try_from(bytes).is_err()) {
            let expected = "dim of at least 1, and extents that can be addressed";
            return Err(Error::shape("partial", expected, format!("{shape:?}")));
        }
        let plan = Self { shape, hosts, way: MergeWay::AllGather, types: PhantomData };
        let way = MergeWay::cheapest(link, hosts, plan.rows() * (shape[3] * size_of::<T>() + 4));
        Ok(if plan.divides() { Self { way, ..plan } } else { plan })
    }

    /// The same merge, by another way.
    ///
    /// # Errors
    /// [`Error::Value`] for rows that the hosts do not divide.
    pub fn with_way(self, way: MergeWay) -> Result<Self> {
        if way == MergeWay::ByRows && !self.divides() {
            let expected = format!("rows (batch, tokens, heads) a multiple of {} hosts", self.hosts);
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
        let step = |bytes| Traffic::of(self.hosts - 1, bytes);
        match self.way {
            MergeWay::AllGather => step(self.rows() * row(size_of::<T>())),
            MergeWay::ByRows => {
                let share = self.rows() / self.hosts;
                step(share * row(size_of::<T>())) + step(share * row(size_of::<O>()))
            }
        }
    }

    /// Bytes of the scratch that [`run`](Self::run) needs.
    pub fn scratch_len(&self) -> usize {
        self.regions().iter().sum()
    }

    /// Merges every host's partial into `out` `[batch, seq, heads, dim]` and, if given, `lse` `[batch, heads, seq]`, on every host and with the same bits.
    ///
    /// The partial's output is `[batch, heads, seq, dim]` without gaps: what attention writes into
    /// `DeviceTensorMut::contiguous(..)` of that shape with [`swap_seq_heads`](DeviceTensorMut::swap_seq_heads). Its log-sum-exp is `[batch, heads, seq]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] for memory that does not fit the plan, [`Error::Workspace`] for a scratch shorter than
    /// [`scratch_len`](Self::scratch_len), [`Error::DType`] for types that are not merged; errors of the collective and of the driver.
    pub fn run<D: Device>(
        &self,
        group: &impl DeviceCollective<D>,
        device: &D,
        stream: &D::Stream,
        partial: (&Span<'_, D, T>, &Span<'_, D, f32>),
        scratch: &mut SpanMut<'_, D, u8>,
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        let [batch, seq, heads, dim] = self.shape;
        let (rows, elements) = (self.rows(), self.rows() * dim);
        check_len("partial", elements, partial.0.len())?;
        check_len("partial", rows, partial.1.len())?;
        if out.shape() != self.shape {
            return Err(Error::shape("out", format!("{:?}", self.shape), format!("{:?}", out.shape())));
        }
        if let Some(lse) = &lse {
            check_len("lse", rows, lse.len())?;
        }
        if group.size() != self.hosts {
            return Err(Error::value("group", format!("of {} hosts", self.hosts), group.size()));
        }
        if scratch.len() < self.scratch_len() {
            return Err(Error::Workspace { expected: self.scratch_len(), got: scratch.len() });
        }
        scratch.check("scratch", self.scratch_len())?;
        scratch.check_stream("scratch", stream)?;
        partial.0.check_stream("partial", stream)?;
        partial.1.check_stream("partial", stream)?;
        let mut at = scratch.address();
        let regions = self.regions().map(|bytes| {
            at += bytes as u64;
            Region { address: at - bytes as u64, bytes }
        });
        let [outs, lses, own, own_lse, all, all_lse] = regions;
        let sent = |address, bytes| Region { address, bytes };
        let sent = [
            sent(partial.0.address(), elements * size_of::<T>()),
            sent(partial.1.address(), rows * size_of::<f32>()),
        ];
        let received = match self.way {
            MergeWay::AllGather => self.hosts,
            MergeWay::ByRows => 1,
        };
        let received = [outs.first(received * sent[0].bytes), lses.first(received * sent[1].bytes)];
        match self.way {
            MergeWay::AllGather => {
                group.all_gather(stream, &exchanges(sent, received))?;
                merge(
                    device,
                    stream,
                    &partials::<D, T>(outs, lses, [self.hosts * batch, seq, heads, dim], rows)?,
                    out,
                    lse,
                )
            }
            MergeWay::ByRows => {
                // To a share it is the same which token and head a row is of.
                let share = rows / self.hosts;
                group.all_to_all(stream, &exchanges(sent, received))?;
                let of_share = partials::<D, T>(outs, lses, [self.hosts, 1, share, dim], share)?;
                let own = own.first(share * dim * size_of::<O>());
                let own_lse = own_lse.first(share * size_of::<f32>());
                let mut merged = DeviceTensorMut::contiguous("out", own.write::<D, O>(), [1, 1, share, dim])?;
                merge(device, stream, &of_share, &mut merged, Some(&mut own_lse.write()))?;
                let all = [all.first(elements * size_of::<O>()), all_lse.first(rows * size_of::<f32>())];
                group.all_gather(stream, &exchanges([own, own_lse], all))?;
                // A merge of one partial puts it where it belongs.
                merge(device, stream, &partials::<D, O>(all[0], all[1], self.shape, rows)?, out, lse)
            }
        }
    }

    fn rows(&self) -> usize {
        self.shape[..3].iter().product()
    }

    fn divides(&self) -> bool {
        self.rows().is_multiple_of(self.hosts)
    }

    /// Bytes of what is received, what is merged, and what is received of that: outputs and log-sum-exps of each.
    fn regions(&self) -> [usize; 6] {
        let (rows, dim) = (self.rows(), self.shape[3]);
        let of = |rows: usize, size: usize| (rows * size).next_multiple_of(ALIGNMENT);
        match self.way {
            MergeWay::AllGather => {
                [of(self.hosts * rows, dim * size_of::<T>()), of(self.hosts * rows, 4), 0, 0, 0, 0]
            }
            MergeWay::ByRows => {
                let (share, merged) = (rows / self.hosts, dim * size_of::<O>());
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
