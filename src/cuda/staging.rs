//! Copies from CPU memory that the CPU does not wait for.

use super::device::{Device, SpanMut, check_not_capturing};
use crate::{Error, Result};

/// A ring of slots of pinned memory, for tables that change while a stream works.
///
/// A copy from pageable memory may keep the CPU until the stream comes to it. Here the bytes are
/// written to a slot of pinned memory, the device copies them from there in the order of the
/// stream, and an event behind the copies tells when the slot is free again. So a call neither
/// waits nor allocates. As many slots are enough as updates may be under way at a time.
///
/// Dropping the ring waits for its copies. Memory whose copies cannot be waited for is leaked. On a
/// GPU, rings are made and dropped while no stream is being captured, as the driver asks for; they
/// may be used then, on other streams.
#[derive(Debug)]
pub struct Staging<D: Device> {
    slots: Vec<Slot<D>>,
    /// Bytes of a slot.
    bytes: usize,
    /// The slot that was taken longest ago.
    next: usize,
}

#[derive(Debug)]
struct Slot<D: Device> {
    memory: D::Pinned,
    /// Recorded behind the last copies from the memory.
    event: D::Event,
    /// The event may not be behind the last copies: nothing tells when they end.
    lost: bool,
}

impl<D: Device> Staging<D> {
    /// A ring of `slots` slots of `bytes` bytes each.
    ///
    /// # Errors
    /// [`Error::Value`] for no slots, or for more bytes than memory has room for; errors of the
    /// driver.
    pub fn new(device: &D, slots: usize, bytes: usize) -> Result<Self> {
        if slots == 0 {
            return Err(Error::value("slots", "at least 1", slots));
        }
        let slot = |_| Ok(Slot { memory: device.pinned(bytes)?, event: device.event()?, lost: false });
        Ok(Self { slots: (0..slots).map(slot).collect::<Result<_>>()?, bytes, next: 0 })
    }

    /// Copies each of `parts`, an offset in bytes and the bytes, to that offset of `to`, one after
    /// the other, after all earlier work of the stream. What lies between the parts is left as it
    /// is. All parts are read before this returns, and share one slot; without any bytes no slot is
    /// taken. `device` is the one that the ring was made for.
    ///
    /// # Errors
    /// - [`Error::Busy`] while all slots are in flight: try again after the stream has moved on.
    /// - [`Error::Value`], naming `stream`, if it is being captured in a graph, which would copy
    ///   what the slot holds whenever it is replayed.
    /// - [`Error::Value`], naming `to`, for memory that was borrowed for another stream.
    /// - [`Error::Shape`], naming `parts`, for a part that leaves `to`, or for more bytes than a
    ///   slot has.
    /// - [`Error::Unavailable`] after errors of the driver have cost the ring all of its slots.
    ///
    /// Nothing was copied then, and no slot was taken.
    ///
    /// After an error of the driver the parts may or may not have been copied. If the event could
    /// not be recorded, the slot is not used again.
    pub fn copy(
        &mut self,
        device: &D,
        stream: &D::Stream,
        to: &mut SpanMut<'_, D, u8>,
        parts: &[(usize, &[u8])],
    ) -> Result<()> {
        check_not_capturing::<D>(stream)?;
        to.check_stream("to", stream)?;
        if self.check_parts(to.len, parts)? == 0 {
            return Ok(());
        }
        let at = self.free_slot()?;
        let slot = &mut self.slots[at];
        slot.lost = true;
        let copied = slot.copy(device, stream, to, parts);
        // Also behind copies of which one has failed: earlier ones may be in flight.
        let recorded = D::record(stream, &slot.event);
        slot.lost = recorded.is_err();
        self.next = (at + 1) % self.slots.len();
        copied.and(recorded)
    }

    /// The bytes of all parts, if they fit a slot and each lies inside of `len` bytes.
    fn check_parts(&self, len: usize, parts: &[(usize, &[u8])]) -> Result<usize> {
        let mut total = 0usize;
        for &(offset, bytes) in parts {
            if offset.checked_add(bytes.len()).is_none_or(|end| end > len) {
                let got = format!("{} bytes at offset {offset}", bytes.len());
                return Err(Error::shape("parts", format!("parts inside of {len} bytes"), got));
            }
            total = total.saturating_add(bytes.len());
        }
        if total > self.bytes {
            let expected = format!("at most {} bytes in all", self.bytes);
            return Err(Error::shape("parts", expected, total.to_string()));
        }
        Ok(total)
    }

    /// The free slot that was taken longest ago.
    fn free_slot(&self) -> Result<usize> {
        for at in (self.next..self.slots.len()).chain(0..self.next) {
            let slot = &self.slots[at];
            if !slot.lost && D::has_passed(&slot.event)? {
                return Ok(at);
            }
        }
        if self.slots.iter().all(|slot| slot.lost) {
            let reason = "the driver failed to record an event for each slot".into();
            return Err(Error::Unavailable { what: "staging memory", reason });
        }
        Err(Error::Busy { slots: self.slots.len() })
    }
}

impl<D: Device> Slot<D> {
    /// Copies parts that were checked, through memory that no copy reads.
    fn copy(
        &mut self,
        device: &D,
        stream: &D::Stream,
        to: &SpanMut<'_, D, u8>,
        parts: &[(usize, &[u8])],
    ) -> Result<()> {
        let mut free = self.memory.as_mut();
        for &(offset, bytes) in parts.iter().filter(|(_, bytes)| !bytes.is_empty()) {
            let (staged, rest) = free.split_at_mut(bytes.len());
            staged.copy_from_slice(bytes);
            // SAFETY: inside of a span that is borrowed to be written. The slot is not written
            // again, nor its memory freed, before the event behind this copy has passed.
            unsafe { device.upload_pinned(stream, to.address + offset as u64, staged)? };
            free = rest;
        }
        Ok(())
    }
}

impl<D: Device> Drop for Staging<D> {
    fn drop(&mut self) {
        for Slot { memory, event, lost } in self.slots.drain(..) {
            if lost || D::wait(&event).is_err() {
                // A copy may still read it.
                std::mem::forget(memory);
            }
        }
    }
}
