//! The merge of every rank's partial, on every rank.
//!
//! ```text
//! all-gather   every partial to every rank ─▶ merge of all rows
//! by rows      a share of every partial's rows to each rank ─▶ merge of the share ─▶ the merged share to every rank
//! ```
//!
//! With `R = batch · seq · heads` rows of `dim` elements, `e` bytes each, in partials and `o` in
//! the output, a rank sends to each of `H - 1` others
//!
//! ```text
//! all-gather   R (dim e + 4) bytes in one message
//! by rows      ⌈R/H⌉ (dim e + 4) and then ⌈R/H⌉ (dim o + 4) bytes in two
//! ```
//!
//! A message has two regions: log-sum-exps, and outputs. Rows are summed in the order of ranks by
//! either way, so the results have the same bits on every rank, in every run, and by both.
//!
//! A row with a log-sum-exp of `-inf` on a rank counts for nothing there; one of `+inf` or NaN
//! makes the merged row NaN, as [`crate::merge`] says.

mod cpu;
#[cfg(any(feature = "cuda", feature = "simt"))]
mod device;
mod plan;

pub use cpu::{CpuMerge, PendingMerge};
#[cfg(any(feature = "cuda", feature = "simt"))]
pub use device::DeviceMerge;
pub use plan::MergePlan;

use super::Collective;
use crate::merge::Partial;
use crate::{Element, Result, TensorViewMut};

/// Merges every rank's `partial` into `out` `[batch, seq, heads, dim]` and `lse` `[batch, heads,
/// seq]`, on every rank and with the same bits.
///
/// The way is the cheapest on the group's link. Where calls repeat, make a [`MergePlan`] once and
/// keep what is made of it. With attention sinks, see [`CpuMerge::with_sinks`].
///
/// # Errors
/// As [`MergePlan::new`] and [`CpuMerge::merge`].
pub fn merge<T: Element, O: Element>(
    group: &(impl Collective + ?Sized),
    partial: &Partial<'_, T>,
    out: TensorViewMut<'_, O>,
    lse: &mut [f32],
) -> Result<()> {
    let plan = MergePlan::new(partial.out.shape(), group.size(), &group.link())?;
    plan.on_cpu().merge(group, partial, out, Some(lse))
}

/// Regions of a message.
const LSE: usize = 0;
const OUT: usize = 1;
