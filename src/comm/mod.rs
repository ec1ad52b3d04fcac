//! Collectives between hosts, and the merge over them.
//!
//! The library opens no connections of its own: an engine brings the transport behind [`Collective`].
//!
//! ```text
//! partial (out, lse) on each host ─ one packed all-gather ─▶ every partial on every host ─ merge in rank order ─▶ out, lse
//! ```

mod threads;

pub use threads::ThreadGroup;

use crate::config::check_rows;
use crate::merge::{self, Partial, check_lse};
use crate::{Element, Error, Result, TensorView, TensorViewMut};

/// What a group of hosts can do together. Every rank makes the same calls in the same order with the same lengths.
///
/// After an error a rank has left the group: its later calls fail, and so do its peers'.
pub trait Collective: Send {
    /// This host's number, below [`size`](Self::size).
    fn rank(&self) -> usize;

    /// Hosts of the group.
    fn size(&self) -> usize;

    /// Sends `send` to every rank; `receive`, of `size * send.len()` bytes, gets each rank's bytes in rank order.
    ///
    /// # Errors
    /// [`Error::Shape`] for a `receive` of another length (the group is as it was), or a peer that left, differs, or is late.
    fn all_gather(&self, send: &[u8], receive: &mut [u8]) -> Result<()>;

    /// Sends the `r`-th of `size` equal parts of `send` to rank `r`; `receive`, as long as `send`, gets the parts meant for this
    /// rank, in rank order.
    ///
    /// # Errors
    /// [`Error::Shape`] for lengths that do not fit (the group is as it was), or a peer that left, differs, or is late.
    fn all_to_all(&self, send: &[u8], receive: &mut [u8]) -> Result<()>;

    /// Copies `buffer` of rank `root` over every other rank's.
    ///
    /// # Errors
    /// [`Error::Value`] for a root out of range (the group is as it was), or a peer that left, differs, or is late.
    fn broadcast(&self, root: usize, buffer: &mut [u8]) -> Result<()>;

    /// What this rank has sent so far.
    fn traffic(&self) -> Traffic;
}

/// What a rank has sent to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Collectives taken part in.
    pub collectives: u64,
    /// Bytes sent to other ranks, counted once for each of them: `size - 1` times the message for an all-gather.
    pub bytes: u64,
}

impl std::ops::Sub for Traffic {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self { collectives: self.collectives - earlier.collectives, bytes: self.bytes - earlier.bytes }
    }
}

/// f32 of the scratch that [`merge`](merge()) needs for outputs of `shape` `[batch, seq, heads, dim]` over `hosts`.
pub fn merge_scratch_len([batch, seq, heads, dim]: [usize; 4], hosts: usize) -> usize {
    (hosts + 1) * batch * seq * heads * (dim + 1)
}

/// Merges every host's partial into `out` and `lse`, on every host, with the same bits.
///
/// One all-gather of the packed `(out, lse)`, `batch · seq · heads · (4 dim + 4)` bytes a host, and an n-way [`merge`](mod@crate::merge) in rank
/// order. `out` has the partial's shape `[batch, seq, heads, dim]`, any element type and any strides with a contiguous last axis; `lse`
/// is `[batch, heads, seq]`. What the scratch holds does not matter.
///
/// # Errors
/// [`Error::Shape`] or [`Error::Stride`] for tensors that do not fit together, [`Error::Workspace`] for a scratch shorter than
/// [`merge_scratch_len`] (nothing was sent then); and the collective's errors. Nothing was written to `out` and `lse`.
pub fn merge<O: Element>(
    group: &(impl Collective + ?Sized),
    partial: &Partial<'_, f32>,
    out: TensorViewMut<'_, O>,
    lse: &mut [f32],
    scratch: &mut [f32],
) -> Result<()> {
    let shape = partial.out.shape();
    partial.check(shape)?;
    check_rows("out", shape, out.shape(), out.strides())?;
    check_lse("lse", shape, lse)?;
    let needed = merge_scratch_len(shape, group.size());
    if scratch.len() < needed {
        return Err(Error::Workspace { expected: needed, got: scratch.len() });
    }
    let [batch, seq, heads, dim] = shape;
    let (elements, rows) = (batch * seq * heads * dim, batch * seq * heads);
    let (send, receive) = scratch[..needed].split_at_mut(elements + rows);
    let (send_out, send_lse) = send.split_at_mut(elements);
    for (row, to) in send_out.chunks_exact_mut(dim.max(1)).enumerate() {
        to.copy_from_slice(partial.row(row / heads / seq, row / heads % seq, row % heads));
    }
    send_lse.copy_from_slice(partial.lse);
    group.all_gather(bytemuck::cast_slice(send), bytemuck::cast_slice_mut(receive))?;
    let partials = (0..group.size()).map(|rank| {
        let (out, lse) = receive[rank * send.len()..][..send.len()].split_at(elements);
        Ok(Partial { out: TensorView::contiguous("partial", out, shape)?, lse })
    });
    merge::merge(&partials.collect::<Result<Vec<_>>>()?, out, lse)
}
