//! A plan whose tables and partial results share one workspace of the caller's.

use super::call::{Call, Tables};
use super::room::Room;
use super::{DeviceInputs, Plan};
use crate::cuda::device::{Device, DeviceTensorMut, HalfElement, SpanMut};
use crate::{Element, Result};

/// A [`Plan`] in a device's memory. Calls are ordered by its stream, wait for nothing and allocate
/// no memory of the device; on a GPU they can be captured in a graph.
#[derive(Debug)]
pub struct Prepared<'a, D: Device> {
    pub(super) plan: &'a Plan,
    pub(super) device: &'a D,
    pub(super) stream: &'a D::Stream,
    pub(super) room: Room,
    pub(super) workspace: SpanMut<'a, D, u8>,
}

impl<D: Device> Prepared<'_, D> {
    /// Attention of the inputs, of the batch's shapes, into `out` as the query, of its type or f32,
    /// and, if given, `lse` `[batch, query_heads, seq]`: natural logarithm, -inf where a row sees
    /// no key. Rows of no sequence are neither read nor written. A prefix may be left out where no
    /// sequence has one. Sinks count in every row
    /// ([`Inputs::with_sinks`](crate::Inputs::with_sinks)); that none is NaN or `+inf` is the
    /// caller's promise.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) or [`Error::Stride`](crate::Error::Stride) for tensors
    /// that are not the plan's (last axes contiguous, the others at multiples of 16 bytes),
    /// [`Error::Value`](crate::Error::Value) for a prefix that is missing, addresses that are no
    /// multiples of 16 bytes or memory borrowed for another stream,
    /// [`Error::DType`](crate::Error::DType) for an output of another type; errors of the driver.
    /// Nothing was written then.
    pub fn run<T: HalfElement, O: Element>(
        &mut self,
        inputs: DeviceInputs<'_, '_, '_, '_, D, T, T>,
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        let tables = self.workspace.address;
        let partials = tables + self.room.places().end as u64;
        let call = Call {
            plan: self.plan,
            device: self.device,
            stream: self.stream,
            launches: &self.plan.launches,
            merged: self.plan.merged.len(),
            needs_prefix: self.plan.has_prefix,
            tables: Tables::new(&self.room, tables, partials, !self.plan.pages.is_empty()),
        };
        call.run(inputs, out, lse)
    }
}
