//! Collectives between hosts, and the merge over them.
//!
//! The library opens no connections of its own: an engine brings the transport behind [`Collective`].

mod threads;

pub use threads::ThreadGroup;

use crate::Result;

/// What a group of hosts can do together. Every rank makes the same calls in the same order with the same lengths.
pub trait Collective: Send {
    /// This host's number, below [`size`](Self::size).
    fn rank(&self) -> usize;

    /// Hosts of the group.
    fn size(&self) -> usize;

    /// Sends `send` to every rank; `receive` gets each rank's bytes, in rank order: `size * send.len()` bytes.
    ///
    /// # Errors
    /// Lengths that do not fit, or a peer that left, differs, or is late.
    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()>;

    /// Sends the `r`-th of `size` equal parts of `send` to rank `r`; `receive` gets the parts meant for this rank, in rank order.
    ///
    /// # Errors
    /// Lengths that do not fit, or a peer that left, differs, or is late.
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()>;

    /// Copies `buffer` of rank `root` over every other rank's.
    ///
    /// # Errors
    /// A root out of range, or a peer that left, differs, or is late.
    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()>;
}
