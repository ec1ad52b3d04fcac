//! A stream of a device as a [`Backend`].

use super::append::append;
use super::device::{Device, DeviceTensor, DeviceTensorMut, Span, SpanMut, bytes_of};
use super::flash::DevicePlan;
use super::merge::merge_separate;
use crate::backend::{Backend, Capacity, Plain, clamp};
use crate::merge::PartialOf;
use crate::{Append, Batch, Element, Error, Inputs, PlanConfig, Result, Scales};
use std::marker::PhantomData;
use std::ops::RangeBounds;
use std::sync::Arc;

/// A device and one of its streams, on which all calls are made.
///
/// Memory of other owners takes part as well: [`Span`]s and [`DeviceTensor`]s of any origin are the
/// backend's slices and views.
#[derive(Debug)]
pub struct Cuda<D: Device> {
    device: Arc<D>,
    stream: D::Stream,
}

impl<D: Device> Cuda<D> {
    /// A device, and a stream of it.
    pub fn new(device: impl Into<Arc<D>>, stream: D::Stream) -> Self {
        Self { device: device.into(), stream }
    }

    /// The device.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// The stream.
    pub fn stream(&self) -> &D::Stream {
        &self.stream
    }
}

/// Owned memory of a device, for work on the stream of the backend that made it.
#[derive(Debug)]
pub struct Buffer<M, T> {
    _memory: M,
    address: u64,
    stream: [u64; 2],
    len: usize,
    elements: PhantomData<T>,
}

impl<M, T: Plain> Buffer<M, T> {
    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The address and the count of the elements in a range.
    fn part(&self, range: impl RangeBounds<usize>) -> (u64, usize) {
        let range = clamp(range, self.len);
        (self.address + (range.start * size_of::<T>()) as u64, range.len())
    }

    fn check_stream<D: Device>(&self, stream: &D::Stream) -> Result<()> {
        if self.stream == D::stream_id(stream) {
            return Ok(());
        }
        Err(Error::value("buffer", "memory of the backend's stream", "of another"))
    }
}

impl<D: Device> Backend for Cuda<D> {
    type Buffer<T: Plain> = Buffer<D::Memory, T>;
    type Slice<'a, T: Plain>
        = Span<'a, D, T>
    where
        Self: 'a;
    type SliceMut<'a, T: Plain>
        = SpanMut<'a, D, T>
    where
        Self: 'a;
    type View<'a, T: Element>
        = DeviceTensor<'a, D, T>
    where
        Self: 'a;
    type ViewMut<'a, T: Element>
        = DeviceTensorMut<'a, D, T>
    where
        Self: 'a;
    type Plan = DevicePlan<D>;

    fn buffer<T: Plain>(&self, len: usize) -> Result<Buffer<D::Memory, T>> {
        let Some(bytes) = len.checked_mul(size_of::<T>()) else {
            return Err(Error::value("len", "a size that memory has room for", len));
        };
        let memory = self.device.allocate(&self.stream, bytes)?;
        let address = D::address(&memory);
        let stream = D::stream_id(&self.stream);
        Ok(Buffer { _memory: memory, address, stream, len, elements: PhantomData })
    }

    fn write<T: Plain>(&self, buffer: &mut Buffer<D::Memory, T>, at: usize, data: &[T]) -> Result<()> {
        buffer.check_stream::<D>(&self.stream)?;
        if at.checked_add(data.len()).is_none_or(|end| end > buffer.len) {
            let got = format!("{} from {at} on", data.len());
            return Err(Error::value("data", format!("elements within 0..{}", buffer.len), got));
        }
        if data.is_empty() {
            return Ok(());
        }
        // SAFETY: inside the buffer, which is borrowed to be written.
        unsafe { self.device.upload(&self.stream, buffer.part(at..).0, bytes_of(data)) }
    }

    fn read<T: Plain>(&self, buffer: &Buffer<D::Memory, T>) -> Result<Vec<T>> {
        buffer.check_stream::<D>(&self.stream)?;
        let mut data = vec![T::default(); buffer.len];
        if !data.is_empty() {
            let bytes = bytemuck::cast_slice_mut(&mut data);
            // SAFETY: all of the buffer, which is borrowed.
            unsafe { self.device.download(&self.stream, buffer.part(..).0, bytes)? };
        }
        Ok(data)
    }

    fn slice<'a, T: Plain>(
        &'a self,
        buffer: &'a Buffer<D::Memory, T>,
        range: impl RangeBounds<usize>,
    ) -> Span<'a, D, T> {
        let (address, len) = buffer.part(range);
        Span::on(address, len, buffer.stream)
    }

    fn slice_mut<'a, T: Plain>(
        &'a self,
        buffer: &'a mut Buffer<D::Memory, T>,
        range: impl RangeBounds<usize>,
    ) -> SpanMut<'a, D, T> {
        let (address, len) = buffer.part(range);
        SpanMut::on(address, len, buffer.stream)
    }

    fn view<'a, T: Element>(
        argument: &'static str,
        slice: Span<'a, D, T>,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<DeviceTensor<'a, D, T>>
    where
        Self: 'a,
    {
        DeviceTensor::new(argument, slice, shape, strides)
    }

    fn view_mut<'a, T: Element>(
        argument: &'static str,
        slice: SpanMut<'a, D, T>,
        shape: [usize; 4],
        strides: [usize; 4],
    ) -> Result<DeviceTensorMut<'a, D, T>>
    where
        Self: 'a,
    {
        DeviceTensorMut::new(argument, slice, shape, strides)
    }

    fn plan(&self, config: &PlanConfig, capacity: &Capacity) -> Result<DevicePlan<D>> {
        DevicePlan::with_capacity(&self.device, &self.stream, config, capacity)
    }

    fn plan_for(&self, config: &PlanConfig, batch: &Batch) -> Result<DevicePlan<D>> {
        DevicePlan::for_batch(&self.device, &self.stream, config, batch)
    }

    fn update(&self, plan: &mut DevicePlan<D>, batch: &Batch) -> Result<()> {
        plan.update(&self.device, &self.stream, batch)
    }

    fn workspace_bytes(&self, plan: &DevicePlan<D>) -> usize {
        plan.workspace_bytes()
    }

    fn attend<Q: Element, T: Element, O: Element>(
        &self,
        plan: &mut DevicePlan<D>,
        inputs: Inputs<DeviceTensor<'_, D, Q>, DeviceTensor<'_, D, T>, Span<'_, D, f32>>,
        mut out: DeviceTensorMut<'_, D, O>,
        mut lse: Option<SpanMut<'_, D, f32>>,
        mut workspace: SpanMut<'_, D, u8>,
    ) -> Result<()> {
        let Inputs { query, key, value, prefix, sinks, scales } = &inputs;
        let prefix = prefix.as_ref().map(|[key, value]| [key, value]);
        let scales = scales.as_ref().map(|scales| Scales::new(&scales.key, &scales.value));
        let inputs = Inputs { query, key, value, prefix, sinks: sinks.as_ref(), scales };
        plan.run(&self.device, &self.stream, inputs, &mut out, lse.as_mut(), &mut workspace)
    }

    fn append<T: Element, C: Element>(
        &self,
        new: Append<DeviceTensor<'_, D, T>, Span<'_, D, f32>, Span<'_, D, u32>>,
        mut cache_key: DeviceTensorMut<'_, D, C>,
        mut cache_value: DeviceTensorMut<'_, D, C>,
    ) -> Result<()> {
        append(&*self.device, &self.stream, &new, &mut cache_key, &mut cache_value)
    }

    fn merge<T: Element, O: Element>(
        &self,
        partials: Vec<PartialOf<DeviceTensor<'_, D, T>, Span<'_, D, f32>>>,
        sinks: Option<Span<'_, D, f32>>,
        mut out: DeviceTensorMut<'_, D, O>,
        mut lse: Option<SpanMut<'_, D, f32>>,
    ) -> Result<()> {
        merge_separate(&*self.device, &self.stream, &partials, sinks.as_ref(), &mut out, lse.as_mut())
    }
}
