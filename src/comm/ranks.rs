//! The merge over ranks in the memory of any backend, so that an engine writes its loop once.

#[cfg(any(feature = "cuda", feature = "simt"))]
use super::DeviceCollective;
use super::{Collective, CpuMerge, MergePlan};
use crate::cpu::Cpu;
#[cfg(any(feature = "cuda", feature = "simt"))]
use crate::cuda::{Buffer, Cuda, Device, DeviceTensorMut, Span, SpanMut};
use crate::{Backend, Element, Result, TensorViewMut};

/// A group of ranks, as the partials of one backend go between them.
///
/// Every [`Collective`] is one for the CPU, and every `DeviceCollective` one for the streams of its
/// device. A layer of phase 2 is the same on both:
///
/// ```
/// use star_attention::comm::Ranks;
/// use star_attention::{Backend, Element, Inputs, Result};
///
/// /// Attends to what this rank holds, into the message, and merges over all ranks.
/// fn layer<B: Backend, R: Ranks<B>, T: Element>(
///     backend: &B,
///     ranks: &R,
///     plan: &mut B::Plan,
///     merge: &mut R::Merge<f32, T>,
///     inputs: Inputs<B::View<'_, T>, B::View<'_, T>, B::Slice<'_, f32>>,
///     out: B::ViewMut<'_, T>,
///     workspace: B::SliceMut<'_, u8>,
/// ) -> Result<()> {
///     let (partial, lse) = ranks.partial(backend, merge)?;
///     backend.attend(plan, inputs, partial, Some(lse), workspace)?;
///     ranks.run(backend, merge, out, None)
/// }
/// ```
pub trait Ranks<B: Backend> {
    /// A plan's merge with the memory of its messages: made once, it serves every layer.
    type Merge<T: Element, O: Element>;

    /// This rank, and how many there are.
    fn rank_and_size(&self) -> (usize, usize);

    /// Partials with outputs `[batch, seq, heads, dim]` of `T`, merged into outputs of `O` by the
    /// way that is cheapest on the group's link.
    ///
    /// # Errors
    /// As [`MergePlan::new`].
    fn plan<T: Element, O: Element>(&self, shape: [usize; 4]) -> Result<MergePlan<T, O>>;

    /// The merge of a plan.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) if there is not so much memory; errors of the driver.
    fn prepare<T: Element, O: Element>(
        &self,
        backend: &B,
        plan: &MergePlan<T, O>,
    ) -> Result<Self::Merge<T, O>>;

    /// The place of this rank's next partial in the message: an output `[batch, seq, heads, dim]`,
    /// and a log-sum-exp `[batch, heads, seq]`. Attention writes both, and [`run`](Self::run) sends
    /// them.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) if memory has no room for the message;
    /// [`Error::DType`](crate::Error::DType) for types that the backend does not merge.
    fn partial<'a, T: Element, O: Element>(
        &self,
        backend: &'a B,
        merge: &'a mut Self::Merge<T, O>,
    ) -> Result<(B::ViewMut<'a, T>, B::SliceMut<'a, f32>)>;

    /// Merges every rank's partial, which must have been written, into `out` `[batch, seq, heads, dim]` and, if given,
    /// `lse` `[batch, heads, seq]`, on every rank and with the same bits.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Stride`](crate::Error::Stride) or
    /// [`Error::Value`](crate::Error::Value) for what does not fit the plan; errors of the
    /// collective and of the driver.
    fn run<T: Element, O: Element>(
        &self,
        backend: &B,
        merge: &mut Self::Merge<T, O>,
        out: B::ViewMut<'_, O>,
        lse: Option<B::SliceMut<'_, f32>>,
    ) -> Result<()> {
        self.run_with_sinks(backend, merge, None, out, lse)
    }

    /// As [`run`](Self::run), with the attention sinks f32 `[heads]`, if given: the same on every
    /// rank, each counts once ([`Inputs::with_sinks`](crate::Inputs::with_sinks)). The attention
    /// that wrote the partials has none.
    ///
    /// # Errors
    /// As [`run`](Self::run), [`Error::Shape`](crate::Error::Shape) for another number of sinks,
    /// and in CPU memory [`Error::Value`](crate::Error::Value) for one that is NaN or `+inf`.
    fn run_with_sinks<T: Element, O: Element>(
        &self,
        backend: &B,
        merge: &mut Self::Merge<T, O>,
        sinks: Option<B::Slice<'_, f32>>,
        out: B::ViewMut<'_, O>,
        lse: Option<B::SliceMut<'_, f32>>,
    ) -> Result<()>;
}

impl<C: Collective + ?Sized> Ranks<Cpu> for C {
    type Merge<T: Element, O: Element> = CpuMerge<T, O>;

    fn rank_and_size(&self) -> (usize, usize) {
        (self.rank(), self.size())
    }

    fn plan<T: Element, O: Element>(&self, shape: [usize; 4]) -> Result<MergePlan<T, O>> {
        MergePlan::new(shape, self.size(), &self.link())
    }

    fn prepare<T: Element, O: Element>(&self, _: &Cpu, plan: &MergePlan<T, O>) -> Result<CpuMerge<T, O>> {
        Ok(plan.on_cpu())
    }

    fn partial<'a, T: Element, O: Element>(
        &self,
        _: &'a Cpu,
        merge: &'a mut CpuMerge<T, O>,
    ) -> Result<(TensorViewMut<'a, T>, &'a mut [f32])> {
        merge.partial()
    }

    fn run_with_sinks<T: Element, O: Element>(
        &self,
        _: &Cpu,
        merge: &mut CpuMerge<T, O>,
        sinks: Option<&[f32]>,
        out: TensorViewMut<'_, O>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        merge.with_sinks(sinks)?.run(self, out, lse)
    }
}

/// A [`MergePlan`] with device memory for its messages.
#[cfg(any(feature = "cuda", feature = "simt"))]
#[derive(Debug)]
pub struct StreamMerge<D: Device, T, O> {
    plan: MergePlan<T, O>,
    scratch: Buffer<D::Memory, u8>,
}

#[cfg(any(feature = "cuda", feature = "simt"))]
impl<D: Device, G: DeviceCollective<D>> Ranks<Cuda<D>> for G {
    type Merge<T: Element, O: Element> = StreamMerge<D, T, O>;

    fn rank_and_size(&self) -> (usize, usize) {
        (self.rank(), self.size())
    }

    fn plan<T: Element, O: Element>(&self, shape: [usize; 4]) -> Result<MergePlan<T, O>> {
        MergePlan::new(shape, self.size(), &self.link())
    }

    fn prepare<T: Element, O: Element>(
        &self,
        backend: &Cuda<D>,
        plan: &MergePlan<T, O>,
    ) -> Result<StreamMerge<D, T, O>> {
        Ok(StreamMerge { plan: *plan, scratch: backend.buffer(plan.device_scratch_bytes())? })
    }

    fn partial<'a, T: Element, O: Element>(
        &self,
        backend: &'a Cuda<D>,
        merge: &'a mut StreamMerge<D, T, O>,
    ) -> Result<(DeviceTensorMut<'a, D, T>, SpanMut<'a, D, f32>)> {
        let scratch = backend.slice_mut(&mut merge.scratch, ..);
        merge.plan.on_device(&**backend.device(), backend.stream(), scratch)?.into_partial()
    }

    fn run_with_sinks<T: Element, O: Element>(
        &self,
        backend: &Cuda<D>,
        merge: &mut StreamMerge<D, T, O>,
        sinks: Option<Span<'_, D, f32>>,
        mut out: DeviceTensorMut<'_, D, O>,
        mut lse: Option<SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        let scratch = backend.slice_mut(&mut merge.scratch, ..);
        let merge = merge.plan.on_device(&**backend.device(), backend.stream(), scratch)?;
        merge.with_sinks(sinks.as_ref())?.run(self, &mut out, lse.as_mut())
    }
}
