//! Collectives between ranks whose messages lie in device memory.

use super::{Collective, Link, Traffic, check_root};
use crate::cuda::{Device, Span, SpanMut, check_not_capturing};
use crate::{Error, Result};

/// Bytes in device memory that are sent, and those that are received in return.
pub type Exchange<'a, D> = (Span<'a, D, u8>, SpanMut<'a, D, u8>);

/// What a group of ranks can do together with device memory, in the order of a stream. As
/// [`Collective`], but for that.
pub trait DeviceCollective<D: Device> {
    /// This rank's number, below [`size`](Self::size).
    fn rank(&self) -> usize;

    /// Ranks of the group.
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

    /// As [`Collective::broadcast`], of several pieces of memory at once.
    ///
    /// # Errors
    /// [`Error::Value`] for a root out of range; and the engine's errors.
    fn broadcast(&self, stream: &D::Stream, root: usize, parts: &mut [SpanMut<'_, D, u8>]) -> Result<()>;

    /// What this rank has sent so far.
    fn traffic(&self) -> Traffic;
}

/// Any collective, through CPU memory: for GPUs on machines without NCCL, and for tests. Every call
/// waits for the stream, so none can be captured in a graph.
#[derive(Clone, Copy, Debug)]
pub struct Staged<'a, D, C: ?Sized> {
    /// The device whose memory is sent.
    pub device: &'a D,
    /// What carries it.
    pub group: &'a C,
}

impl<D: Device, C: Collective + ?Sized> Staged<'_, D, C> {
    fn download(&self, stream: &D::Stream, argument: &'static str, span: (u64, usize)) -> Result<Vec<u8>> {
        check_not_capturing::<D>(stream)?;
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

/// Refuses memory of another stream, or lengths that do not fit a message that is cut into
/// `pieces`, over `size` ranks.
pub(super) fn check_exchange<D: Device>(
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

    fn broadcast(&self, stream: &D::Stream, root: usize, parts: &mut [SpanMut<'_, D, u8>]) -> Result<()> {
        check_root(self.size(), root)?;
        check_not_capturing::<D>(stream)?;
        parts.iter().try_for_each(|part| part.check_stream("parts", stream))?;
        let mut message = vec![0; parts.iter().map(SpanMut::len).sum()];
        if self.rank() == root {
            let mut rest = &mut message[..];
            for part in parts.iter() {
                let (bytes, after) = rest.split_at_mut(part.len());
                bytes.copy_from_slice(&self.download(stream, "parts", (part.address(), part.len()))?);
                rest = after;
            }
        }
        self.group.broadcast(root, &mut message)?;
        if self.rank() != root {
            let mut rest = &message[..];
            for part in parts.iter() {
                let (bytes, after) = rest.split_at(part.len());
                // SAFETY: a span of this device that is borrowed to be written.
                unsafe { self.device.upload(stream, part.address(), bytes)? };
                rest = after;
            }
        }
        Ok(())
    }

    fn traffic(&self) -> Traffic {
        self.group.traffic()
    }
}

/// Device memory that a call in progress reads and writes: a part of its scratch, or memory of the
/// caller.
///
/// Both are borrowed, and all work on them is in the order of one stream; each step reads what
/// steps before it wrote, and writes another region.
#[derive(Clone, Copy)]
pub(super) struct Region {
    address: u64,
    bytes: usize,
}

impl Region {
    pub fn new(address: u64, bytes: usize) -> Self {
        Self { address, bytes }
    }

    pub fn first(self, bytes: usize) -> Self {
        debug_assert!(bytes <= self.bytes);
        Self { bytes, ..self }
    }

    pub fn read<'a, D: Device, E>(self) -> Span<'a, D, E> {
        // SAFETY: as the type says.
        unsafe { Span::from_raw(self.address, self.bytes / size_of::<E>()) }
    }

    pub fn write<'a, D: Device, E>(self) -> SpanMut<'a, D, E> {
        // SAFETY: as the type says.
        unsafe { SpanMut::from_raw(self.address, self.bytes / size_of::<E>()) }
    }

    /// For work on one stream alone.
    pub fn write_on<'a, D: Device, E>(self, stream_id: [u64; 2]) -> SpanMut<'a, D, E> {
        SpanMut::on(self.address, self.bytes / size_of::<E>(), stream_id)
    }
}
