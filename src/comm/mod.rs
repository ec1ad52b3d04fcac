//! Many ranks: collectives between them, and what Star Attention does with these.
//!
//! The library opens no connections of its own. An engine brings the transport behind
//! [`Collective`]: [`ThreadGroup`] for threads of one process, `Mpi` (feature `mpi`) for processes
//! and machines, `Nccl` (feature `nccl`) for GPUs.
//!
//! ```text
//! at the start   agree          all ranks have the same layout, extents, types and version
//! phase 1        share_anchor   the anchor's keys and values from rank 0 to all, a layer at a time; or no message at all
//! phase 2        MergePlan      partial (out, lse) on each rank ─▶ out, lse on every rank, with the same bits
//! ```
//!
//! Which way a merge goes, and whether the anchor is sent, follows from the costs of a [`Link`].

mod agree;
mod anchor;
mod call;
mod cost;
#[cfg(any(feature = "cuda", feature = "simt"))]
mod device;
mod merge;
mod message;
#[cfg(feature = "mpi")]
mod mpi;
#[cfg(feature = "nccl")]
mod nccl;
mod ranks;
#[cfg(any(test, feature = "nccl"))]
mod teardown;
mod threads;

pub use agree::{Agreement, agree};
#[cfg(any(feature = "cuda", feature = "simt"))]
pub use anchor::share_anchor_on_device;
pub use anchor::{anchor_scratch_len, share_anchor};
pub use cost::{AnchorKv, Link, MergeWay};
#[cfg(any(feature = "cuda", feature = "simt"))]
pub use device::{DeviceCollective, Exchange, Staged};
#[cfg(any(feature = "cuda", feature = "simt"))]
pub use merge::DeviceMerge;
pub use merge::{CpuMerge, MergePlan, PendingMerge, merge};
pub use message::{Message, Pattern, Received, Started};
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
#[cfg(feature = "nccl")]
pub use nccl::Nccl;
pub use ranks::Ranks;
#[cfg(any(feature = "cuda", feature = "simt"))]
pub use ranks::StreamMerge;
pub use threads::ThreadGroup;

use crate::{Error, Result};
use std::ops::{Add, Sub};
use std::time::Duration;

/// What a group of ranks can do together. Every rank makes the same calls in the same order with
/// the same lengths.
///
/// After an error a rank has left the group: its later calls fail, and so do its peers'.
pub trait Collective: Send {
    /// This rank's number, below [`size`](Self::size).
    fn rank(&self) -> usize;

    /// Ranks of the group.
    fn size(&self) -> usize;

    /// What sending takes. The same on every rank.
    fn link(&self) -> Link;

    /// Sends `send` to every rank; `receive`, of `size * send.len()` bytes, gets each rank's bytes
    /// in rank order.
    ///
    /// # Errors
    /// [`Error::Shape`] for a `receive` of another length (the group is as it was), or a peer that
    /// left, differs, or is late.
    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()>;

    /// Sends the `r`-th of `size` equal parts of `send` to rank `r`; `receive`, as long as `send`,
    /// gets the parts meant for this rank, in rank order.
    ///
    /// # Errors
    /// [`Error::Shape`] for lengths that do not fit (the group is as it was), or a peer that left,
    /// differs, or is late.
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()>;

    /// Copies `buffer` of rank `root` over every other rank's. The root may return before the
    /// others have it.
    ///
    /// # Errors
    /// [`Error::Value`] for a root out of range (the group is as it was), or a peer that left,
    /// differs, or is late.
    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()>;

    /// Sends a message that the group shares until all have read it, and returns at once. Until
    /// [`finish`](Self::finish) the group refuses other calls. The others are waited for from there
    /// on.
    ///
    /// An engine that implements the calls on borrowed memory alone has this as well: it then sends
    /// in [`finish`](Self::finish), and does not refuse other calls before that.
    ///
    /// # Errors
    /// [`Error::Shape`] for regions that do not fit, [`Error::Value`] while another exchange is
    /// under way (the group is as it was); and the engine's errors.
    fn start(&self, pattern: Pattern, message: Message) -> Result<Started> {
        message.check(pattern, self.size())?;
        Ok(Started { pattern, message })
    }

    /// Waits for what was started, and shows `read` every rank's bytes where they lie. After an
    /// error it has shown nothing.
    ///
    /// `read` may not call the group.
    ///
    /// # Errors
    /// [`Error::Value`] if no exchange is under way (the group is as it was); a peer that left,
    /// differs, or is late.
    fn finish(&self, started: Started, read: &mut dyn FnMut(&Received<'_>)) -> Result<()> {
        let collective = |send: &[u8], receive: &mut [u8]| match started.pattern {
            Pattern::AllGather => self.all_gather(send, receive),
            Pattern::AllToAll => self.all_to_all(send, receive),
        };
        started.blocking(self.size(), collective, read)
    }

    /// What this rank has sent so far.
    fn traffic(&self) -> Traffic;
}

impl<C: Collective + ?Sized> Collective for Box<C> {
    fn rank(&self) -> usize {
        (**self).rank()
    }
    fn size(&self) -> usize {
        (**self).size()
    }
    fn link(&self) -> Link {
        (**self).link()
    }
    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        (**self).all_gather(send, receive)
    }
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()> {
        (**self).all_to_all(send, receive)
    }
    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()> {
        (**self).broadcast(root, buffer)
    }
    fn start(&self, pattern: Pattern, message: Message) -> Result<Started> {
        (**self).start(pattern, message)
    }
    fn finish(&self, started: Started, read: &mut dyn FnMut(&Received<'_>)) -> Result<()> {
        (**self).finish(started, read)
    }
    fn traffic(&self) -> Traffic {
        (**self).traffic()
    }
}

/// What an engine is told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupConfig {
    /// How long a rank waits for the others in a collective: 30 s, unless said otherwise.
    pub timeout: Duration,
    /// What sending takes, the same on every rank; the engine's own estimate if `None`.
    pub link: Option<Link>,
}

impl Default for GroupConfig {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(30), link: None }
    }
}

/// What a rank has sent to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Collectives taken part in.
    pub collectives: u64,
    /// Messages to other ranks.
    pub messages: u64,
    /// Bytes of the callers in these messages, without what an engine adds.
    pub bytes: u64,
}

impl Traffic {
    /// One collective, with so many messages of so many bytes each.
    pub(crate) fn of(messages: usize, bytes: usize) -> Self {
        Self { collectives: 1, messages: messages as u64, bytes: messages as u64 * bytes as u64 }
    }
}

impl Add for Traffic {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            collectives: self.collectives + other.collectives,
            messages: self.messages + other.messages,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Sub for Traffic {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            collectives: self.collectives - earlier.collectives,
            messages: self.messages - earlier.messages,
            bytes: self.bytes - earlier.bytes,
        }
    }
}

/// Refuses buffers that do not fit an all-gather over `size`.
fn check_all_gather(size: usize, send: &[u8], receive: &[u8]) -> Result<()> {
    check_len("receive", size.saturating_mul(send.len()), receive.len())
}

/// Refuses buffers that do not fit an all-to-all over `size`.
fn check_all_to_all(size: usize, send: &[u8], receive: &[u8]) -> Result<()> {
    check_len("send", send.len().next_multiple_of(size), send.len())?;
    check_len("receive", send.len(), receive.len())
}

/// Refuses a call of a group that has an exchange under way, or to finish one where there is none.
fn check_under_way(expected: bool, got: bool) -> Result<()> {
    let what = |under_way| if under_way { "an exchange under way" } else { "no exchange under way" };
    if expected != got { Err(Error::value("group", what(expected), what(got))) } else { Ok(()) }
}

/// Refuses a root that is no rank.
fn check_root(size: usize, root: usize) -> Result<()> {
    if root >= size {
        return Err(Error::value("root", format!("below {size}"), root));
    }
    Ok(())
}

fn check_len(argument: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected != got {
        return Err(Error::shape(argument, format!("{expected} bytes"), format!("{got} bytes")));
    }
    Ok(())
}
