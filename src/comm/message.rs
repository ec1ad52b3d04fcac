//! Messages that a group holds while they are under way.

use crate::{Element, Error, Result};
#[cfg(feature = "mpi")]
use std::ops::Range;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// All of it to every rank.
    AllGather,
    /// The `r`-th of `size` equal parts of each of its regions to rank `r`.
    AllToAll,
}

/// Bytes on the heap, at a multiple of 16.
#[derive(Debug, Default)]
pub(super) struct Bytes {
    words: Vec<u128>,
    len: usize,
}

impl Bytes {
    pub fn zeroed(len: usize) -> Result<Self> {
        let mut bytes = Self::default();
        bytes.resize(len)?;
        Ok(bytes)
    }

    /// What is new is 0, what was there stays.
    pub fn resize(&mut self, len: usize) -> Result<()> {
        let words = len.div_ceil(size_of::<u128>());
        self.words
            .try_reserve(words.saturating_sub(self.words.len()))
            .map_err(|_| Error::value("message", "a size that memory has room for", len))?;
        self.words.resize(words, 0);
        self.len = len;
        Ok(())
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

impl DerefMut for Bytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}

/// A message of a rank: regions of bytes, one after another without gaps, in memory of its own at a
/// multiple of 16.
///
/// A clone is the same memory. It can be written while nobody else has a clone.
#[derive(Clone, Debug)]
pub struct Message(Arc<Content>);

#[derive(Debug)]
struct Content {
    bytes: Bytes,
    /// Bytes of each region.
    regions: Vec<usize>,
    /// Of an engine that only knows calls on borrowed memory.
    scratch: Mutex<Bytes>,
}

impl Message {
    /// Zeros, in regions of so many bytes.
    ///
    /// # Errors
    /// [`Error::Value`] for more than memory has room for.
    pub fn new(regions: &[usize]) -> Result<Self> {
        let len = regions.iter().fold(0usize, |sum, &bytes| sum.saturating_add(bytes));
        let content =
            Content { bytes: Bytes::zeroed(len)?, regions: regions.to_vec(), scratch: Mutex::default() };
        Ok(Self(Arc::new(content)))
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0.bytes
    }

    /// Bytes of each region.
    pub fn regions(&self) -> &[usize] {
        &self.0.regions
    }

    /// The regions, to be written; `None` while somebody else has a clone.
    pub fn get_mut(&mut self) -> Option<Vec<&mut [u8]>> {
        let content = Arc::get_mut(&mut self.0)?;
        let mut rest = &mut content.bytes[..];
        let regions = content.regions.iter().map(|&len| {
            let (region, after) = std::mem::take(&mut rest).split_at_mut(len);
            rest = after;
            region
        });
        Some(regions.collect())
    }

    /// What goes to `rank` of `size`: its part of each region.
    pub fn part(&self, pattern: Pattern, size: usize, rank: usize) -> Vec<&[u8]> {
        let mut rest = self.bytes();
        let regions = self.regions().iter().map(|&len| {
            let (region, after) = rest.split_at(len);
            rest = after;
            match pattern {
                Pattern::AllGather => region,
                Pattern::AllToAll => &region[len / size * rank..][..len / size],
            }
        });
        regions.collect()
    }

    /// Bytes that go to each rank.
    pub fn part_len(&self, pattern: Pattern, size: usize) -> usize {
        match pattern {
            Pattern::AllGather => self.bytes().len(),
            Pattern::AllToAll => self.bytes().len() / size,
        }
    }

    /// Refuses regions that cannot be cut for `size` ranks.
    pub(super) fn check(&self, pattern: Pattern, size: usize) -> Result<()> {
        let cut = |len: &usize| pattern == Pattern::AllGather || len.is_multiple_of(size);
        if !self.regions().iter().all(cut) {
            let expected = format!("regions of multiples of {size} bytes");
            return Err(Error::shape("message", expected, format!("{:?}", self.regions())));
        }
        Ok(())
    }

    /// Makes it one region with these bytes; `false` while somebody else has a clone.
    pub(super) fn refill(&mut self, bytes: &[u8]) -> Result<bool> {
        let Some(content) = Arc::get_mut(&mut self.0) else { return Ok(false) };
        content.bytes.resize(bytes.len())?;
        content.bytes.copy_from_slice(bytes);
        content.regions = vec![bytes.len()];
        Ok(true)
    }
}

/// An exchange that was started. It has no borrowed memory: one that is forgotten does no harm but
/// that its group takes part in nothing else.
#[derive(Debug)]
#[must_use = "a group does nothing else until what was started is finished"]
pub struct Started {
    /// Where the message goes.
    pub pattern: Pattern,
    /// The message of this rank.
    pub message: Message,
}

impl Started {
    /// The exchange by a blocking collective of `size` ranks from borrowed memory to borrowed
    /// memory.
    pub(super) fn blocking(
        &self,
        size: usize,
        collective: impl FnOnce(&[u8], &mut [u8]) -> Result<()>,
        read: &mut dyn FnMut(&Received<'_>),
    ) -> Result<()> {
        let Self { pattern, message } = self;
        let each = message.part_len(*pattern, size);
        let packs = *pattern == Pattern::AllToAll && message.regions().len() > 1;
        let (packed, stride) = (if packs { size * each } else { 0 }, each.next_multiple_of(16));
        let mut scratch = message.0.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        scratch.resize(size.saturating_mul(stride).saturating_add(packed))?;
        let (received, send) = scratch.split_at_mut(size * stride);
        if packs {
            let mut rest = &mut send[..];
            for slice in (0..size).flat_map(|rank| message.part(*pattern, size, rank)) {
                let (to, after) = rest.split_at_mut(slice.len());
                to.copy_from_slice(slice);
                rest = after;
            }
        }
        collective(if packs { send } else { message.bytes() }, &mut received[..size * each])?;
        // Each rank's bytes to a multiple of 16, from the last on.
        for rank in (1..size).rev().filter(|_| stride != each) {
            received.copy_within(rank * each..(rank + 1) * each, rank * stride);
        }
        let regions: Vec<usize> = message.part(*pattern, size, 0).iter().map(|part| part.len()).collect();
        let slices = (0..size).flat_map(|rank| cut(&received[rank * stride..][..each], &regions));
        read(&Received::new(regions.len(), slices.collect()));
        Ok(())
    }
}

/// Bytes as regions of these lengths.
pub(super) fn cut<'a>(mut bytes: &'a [u8], regions: &[usize]) -> Vec<&'a [u8]> {
    let region = |&len: &usize| {
        let (region, after) = bytes.split_at(len);
        bytes = after;
        region
    };
    regions.iter().map(region).collect()
}

/// The bytes `range` of slices one after another.
#[cfg(feature = "mpi")]
pub(super) fn range_of<'a>(slices: &[&'a [u8]], range: &Range<usize>) -> Vec<&'a [u8]> {
    let mut at = 0;
    let part = |slice: &&'a [u8]| {
        let within = |place: usize| place.saturating_sub(at).min(slice.len());
        let part = &slice[within(range.start)..within(range.end)];
        at += slice.len();
        part
    };
    slices.iter().map(part).collect()
}

/// What an exchange has brought: the regions of every rank's message, or this rank's parts of them,
/// where they lie.
#[derive(Debug)]
pub struct Received<'a> {
    regions: usize,
    /// Of each rank in turn.
    slices: Vec<&'a [u8]>,
}

impl<'a> Received<'a> {
    /// The `regions` of each rank in turn.
    pub fn new(regions: usize, slices: Vec<&'a [u8]>) -> Self {
        Self { regions, slices }
    }

    /// A region of a rank's message, or this rank's part of it; `None` if there is no such.
    pub fn get(&self, rank: usize, region: usize) -> Option<&'a [u8]> {
        if region >= self.regions {
            return None;
        }
        self.slices.get(rank.checked_mul(self.regions)?.checked_add(region)?).copied()
    }

    /// A region as so many elements.
    pub(super) fn elements<E: Element>(&self, rank: usize, region: usize, len: usize) -> Result<&'a [E]> {
        let bytes = self.get(rank, region).unwrap_or_default();
        let elements = bytemuck::try_cast_slice(bytes).ok().filter(|elements: &&[E]| elements.len() >= len);
        elements.map(|elements| &elements[..len]).ok_or_else(|| {
            let expected = format!("{len} elements of {} from rank {rank}", E::DTYPE);
            Error::shape("received", expected, format!("{} bytes", bytes.len()))
        })
    }
}

/// Messages of one form, used in turn: one is written while peers still read another.
#[derive(Debug)]
pub(super) struct Pool {
    regions: Vec<usize>,
    messages: Vec<Message>,
}

impl Pool {
    pub fn new(regions: Vec<usize>) -> Self {
        Self { regions, messages: Vec::new() }
    }

    /// A message that nobody else has.
    pub fn take(&mut self) -> Result<Message> {
        match self.messages.iter_mut().position(|message| message.get_mut().is_some()) {
            Some(at) => Ok(self.messages.swap_remove(at)),
            None => Message::new(&self.regions),
        }
    }

    /// Keeps a message for later.
    pub fn put(&mut self, message: Message) {
        self.messages.push(message);
    }
}
