//! The merge over ranks in device memory, without a copy to CPU memory where the engine needs none.

use super::MergePlan;
use crate::comm::device::Region;
use crate::comm::{DeviceCollective, Exchange, MergeWay};
use crate::cuda::{
    ALIGNMENT, Device, DevicePartial, DeviceTensor, DeviceTensorMut, Partials, RowSinks, Span, SpanMut,
    check_len, check_merged_types, merge, merge_separate, merge_stacked,
};
use crate::{Element, Error, Result};

/// A [`MergePlan`] on a device, with a scratch for its messages.
///
/// Its calls are ordered by its stream: they return before they are done, and wait only where the
/// collective does. So there is nothing to start and to wait for: work that an engine asks for on
/// other streams, or on the CPU, goes on meanwhile. With NCCL they can be captured in a graph.
#[derive(Debug)]
pub struct DeviceMerge<'a, D: Device, T, O> {
    plan: MergePlan<T, O>,
    device: &'a D,
    stream: &'a D::Stream,
    scratch: SpanMut<'a, D, u8>,
    sinks: RowSinks,
}

impl<T: Element, O: Element> MergePlan<T, O> {
    /// Bytes of the scratch that [`on_device`](Self::on_device) needs.
    pub fn device_scratch_bytes(&self) -> usize {
        self.regions().iter().flatten().sum()
    }

    /// The merge in device memory: f32 partials into any type, others into their own or f32.
    ///
    /// # Errors
    /// [`Error::DType`] for types that are not merged, [`Error::Workspace`] for a scratch shorter
    /// than [`device_scratch_bytes`](Self::device_scratch_bytes), [`Error::Value`] for one that is
    /// not aligned to 16 bytes or was borrowed for another stream.
    pub fn on_device<'a, D: Device>(
        &self,
        device: &'a D,
        stream: &'a D::Stream,
        scratch: SpanMut<'a, D, u8>,
    ) -> Result<DeviceMerge<'a, D, T, O>> {
        check_merged_types("out", T::DTYPE, O::DTYPE)?;
        let needed = self.device_scratch_bytes();
        if scratch.len() < needed {
            return Err(Error::Workspace { expected: needed, got: scratch.len() });
        }
        scratch.check("scratch", needed)?;
        scratch.check_stream("scratch", stream)?;
        Ok(DeviceMerge { plan: *self, device, stream, scratch, sinks: RowSinks::default() })
    }

    /// Bytes of what is sent, what is received, what is merged, and what is received of that:
    /// outputs and log-sum-exps of each.
    fn regions(&self) -> [[usize; 2]; 4] {
        let of = |rows: usize, size: usize| {
            [rows * self.shape[3] * size, rows * size_of::<f32>()]
                .map(|bytes| bytes.next_multiple_of(ALIGNMENT))
        };
        let (from, to) = (size_of::<T>(), size_of::<O>());
        let rows = self.message_rows();
        match self.way() {
            MergeWay::AllGather => [of(rows, from), of(self.ranks * rows, from), [0; 2], [0; 2]],
            MergeWay::ByRows => [of(rows, from), of(rows, from), of(self.share(), to), of(rows, to)],
        }
    }
}

impl<'a, D: Device, T: Element, O: Element> DeviceMerge<'a, D, T, O> {
    /// The same with attention sinks f32 `[heads]`, if given: each merge finishes its rows, as
    /// [`merge_with_sinks`](crate::merge::merge_with_sinks) says. They are the same on every rank,
    /// and each counts once. That none is NaN or `+inf` is the caller's promise.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of them, [`Error::Value`] for memory that was borrowed
    /// for another stream.
    pub fn with_sinks(self, sinks: Option<&'a Span<'_, D, f32>>) -> Result<Self> {
        let sinks = RowSinks::new(self.stream, self.plan.shape, sinks)?;
        Ok(Self { sinks, ..self })
    }

    /// [`partial`](Self::partial), for as long as the scratch was borrowed.
    pub(crate) fn into_partial(self) -> Result<(DeviceTensorMut<'a, D, T>, SpanMut<'a, D, f32>)> {
        self.message()
    }

    /// The message's memory, which the scratch's borrow covers for `'b`.
    fn message<'b>(&self) -> Result<(DeviceTensorMut<'b, D, T>, SpanMut<'b, D, f32>)> {
        let [[out, lse], ..] = self.places();
        let (plan, stream) = (self.plan, D::stream_id(self.stream));
        let out = DeviceTensorMut::new("partial", out.write_on(stream), plan.shape, plan.strides())?;
        Ok((out, lse.first(plan.rows() * size_of::<f32>()).write_on(stream)))
    }

    /// The place of this rank's partial in the message: an output `[batch, seq, heads, dim]` with
    /// the message's strides, and a log-sum-exp `[batch, heads, seq]`. Attention writes both, or a
    /// merge of several partials does, and [`run`](Self::run) sends them.
    ///
    /// # Errors
    /// None: the plan has made room for it.
    pub fn partial(&mut self) -> Result<(DeviceTensorMut<'_, D, T>, SpanMut<'_, D, f32>)> {
        self.message()
    }

    /// Merges every rank's written partial into `out` `[batch, seq, heads, dim]` and, if given,
    /// `lse` `[batch, heads, seq]`, on every rank and with the same bits.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Stride`] or [`Error::Value`] for memory that does not fit the
    /// plan (nothing was sent then); errors of the collective and of the driver.
    pub fn run(
        &mut self,
        group: &impl DeviceCollective<D>,
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        self.check(group, out, lse.as_deref())?;
        let [sent, ..] = self.places();
        self.exchange(group, sent, out, lse)
    }

    /// As [`run`](Self::run), of a partial that lies anywhere, at any strides. One that lies as a
    /// message does is sent from there, another is copied into the message.
    ///
    /// # Errors
    /// As [`run`](Self::run), for the partial too.
    pub fn merge(
        &mut self,
        group: &impl DeviceCollective<D>,
        partial: &DevicePartial<'_, '_, D, T>,
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        self.check(group, out, lse.as_deref())?;
        let (plan, device, stream) = (self.plan, self.device, self.stream);
        partial.check(stream, plan.shape)?;
        if plan.message_rows() == plan.rows() && lies_at(&partial.out, plan.strides()) {
            let bytes = plan.rows() * plan.shape[3] * size_of::<T>();
            let sent = [
                Region::new(partial.out.params().data, bytes),
                Region::new(partial.lse.address(), plan.rows() * size_of::<f32>()),
            ];
            return self.exchange(group, sent, out, lse);
        }
        // A merge of one partial puts its rows anywhere.
        {
            let (mut to, mut to_lse) = self.partial()?;
            let one = std::slice::from_ref(partial);
            merge_separate(device, stream, one, None, &mut to, Some(&mut to_lse))?;
        }
        let [sent, ..] = self.places();
        self.exchange(group, sent, out, lse)
    }

    fn check(
        &self,
        group: &impl DeviceCollective<D>,
        out: &DeviceTensorMut<'_, D, O>,
        lse: Option<&SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        let plan = &self.plan;
        crate::config::check_rows("out", plan.shape, out.shape(), out.strides())?;
        out.check_stream("out", self.stream)?;
        if let Some(lse) = lse {
            check_len("lse", plan.rows(), lse.len())?;
            lse.check_stream("lse", self.stream)?;
        }
        plan.check_group(group.size())
    }

    /// Where outputs and log-sum-exps lie in the scratch: sent, received, merged, and received of
    /// that.
    fn places(&self) -> [[Region; 2]; 4] {
        let mut at = self.scratch.address();
        self.plan.regions().map(|regions| {
            regions.map(|bytes| {
                at += bytes as u64;
                Region::new(at - bytes as u64, bytes)
            })
        })
    }

    fn exchange(
        &self,
        group: &impl DeviceCollective<D>,
        sent: [Region; 2],
        out: &mut DeviceTensorMut<'_, D, O>,
        lse: Option<&mut SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        let (plan, device, stream) = (&self.plan, self.device, self.stream);
        let [batch, seq, heads, dim] = plan.shape;
        let (ranks, rows, share) = (plan.ranks, plan.rows(), plan.share());
        let [_, received, own, all] = self.places();
        let of = |[out, lse]: [Region; 2], rows: usize, size: usize| {
            [out.first(rows * dim * size), lse.first(rows * size_of::<f32>())]
        };
        match plan.way() {
            MergeWay::AllGather => {
                let received = of(received, ranks * rows, size_of::<T>());
                group.all_gather(stream, &exchanges(of(sent, rows, size_of::<T>()), received))?;
                let shape = [ranks * batch, seq, heads, dim];
                let partials = stacked::<D, T>(received, shape, plan.strides(), rows)?;
                merge_stacked(device, stream, &partials, self.sinks, out, lse)
            }
            MergeWay::ByRows => {
                let message = plan.message_rows();
                let received = of(received, message, size_of::<T>());
                group.all_to_all(stream, &exchanges(of(sent, message, size_of::<T>()), received))?;
                // To a share it is the same which token and head a row is of, but for its sink.
                let mine = plan.own_rows(group.rank());
                let sinks = self.sinks.starting_at(plan.rows().min(group.rank() * share));
                let strides = [share * dim, dim, dim, 1];
                let partials = stacked::<D, T>(received, [ranks, mine, 1, dim], strides, share)?;
                let own = of(own, share, size_of::<O>());
                let [merged, merged_lse] = of(own, mine, size_of::<O>());
                let mut merged =
                    DeviceTensorMut::contiguous("out", merged.write::<D, O>(), [1, mine, 1, dim])?;
                merge_stacked(device, stream, &partials, sinks, &mut merged, Some(&mut merged_lse.write()))?;
                let all = of(all, message, size_of::<O>());
                group.all_gather(stream, &exchanges(own, all))?;
                // A merge of one partial puts it where it belongs.
                let merged =
                    stacked::<D, O>(of(all, rows, size_of::<O>()), plan.shape, plan.strides(), rows)?;
                merge(device, stream, &merged, None, out, lse)
            }
        }
    }
}

/// Whether a tensor has these strides, but for steps that are never taken.
fn lies_at<D: Device, T: Element>(tensor: &DeviceTensor<'_, D, T>, strides: [usize; 4]) -> bool {
    (0..4).all(|axis| tensor.shape()[axis] <= 1 || tensor.strides()[axis] == strides[axis])
}

fn exchanges<'a, D: Device>(send: [Region; 2], receive: [Region; 2]) -> [Exchange<'a, D>; 2] {
    [(send[0].read(), receive[0].write()), (send[1].read(), receive[1].write())]
}

/// Partials one after another, `shape` and `strides` of them together.
fn stacked<'a, D: Device, E: Element>(
    [out, lse]: [Region; 2],
    shape: [usize; 4],
    strides: [usize; 4],
    lse_stride: usize,
) -> Result<Partials<'a, D, E>> {
    let out: Span<'a, D, E> = out.read();
    Ok(Partials { out: DeviceTensor::new("partials", out, shape, strides)?, lse: lse.read(), lse_stride })
}
