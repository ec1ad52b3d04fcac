//! Tensors of an NVIDIA GPU.

use super::own_rows;
use crate::cuda::driver::Driver;
use crate::cuda::flash::Plan;
use crate::cuda::{self, Device as _, DeviceTensor, DeviceTensorMut, HalfElement, Partials, Span, SpanMut};
use crate::{AttentionConfig, AttentionShape, DType, Element, Error, Inputs, Result};
use candle_core::cuda_backend::CudaDType;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, DeviceLocation, Layout, Storage, StorageRef, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, CudaView, DeviceRepr};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

/// The error for a dtype that only the CPU takes.
pub fn unsupported(argument: &'static str, got: DType) -> Error {
    Error::value(argument, "a tensor of f16 or bf16 on a GPU", got)
}

/// Kernels are loaded once for each GPU: its number, and where they are.
fn driver(stream: &CudaStream) -> Result<Arc<Driver>> {
    static DRIVERS: LazyLock<Mutex<HashMap<usize, Arc<Driver>>>> = LazyLock::new(Mutex::default);
    let mut drivers = DRIVERS.lock().unwrap_or_else(|e| e.into_inner());
    let context = stream.context();
    if let Some(driver) = drivers.get(&context.ordinal()) {
        return Ok(driver.clone());
    }
    let driver = Arc::new(Driver::new(context.clone())?);
    drivers.insert(context.ordinal(), driver.clone());
    Ok(driver)
}

/// A tensor, locked against candle's in-place writes.
struct Borrowed<'a> {
    argument: &'static str,
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Borrowed<'a> {
    fn new(argument: &'static str, tensor: &'a Tensor, location: &DeviceLocation) -> Result<Self> {
        if tensor.device().location() != *location {
            let got = format!("{:?}", tensor.device().location());
            return Err(Error::value(argument, format!("a tensor on {location:?}"), got));
        }
        let (storage, layout) = tensor.storage_and_layout();
        Ok(Self { argument, storage, layout })
    }

    /// The elements from the tensor's first one on.
    fn elements<T: Element + CudaDType>(&self) -> Result<CudaView<'_, T>> {
        super::check_dtype(self.argument, T::DTYPE, self.storage.dtype())?;
        let Storage::Cuda(storage) = &*self.storage else {
            return Err(Error::value(self.argument, "a tensor on a GPU", "one on another device"));
        };
        let slice = storage.as_cuda_slice::<T>()?;
        Ok(slice.slice(self.layout.start_offset().min(slice.len())..))
    }

    fn axes<const N: usize>(&self, of: &[usize]) -> Result<[usize; N]> {
        let expected = format!("of {N} axes");
        of.try_into().map_err(|_| Error::shape(self.argument, expected, format!("{:?}", self.layout.dims())))
    }

    fn view<'b, T: Element>(
        &self,
        elements: &'b CudaView<'b, T>,
        stream: &'b Arc<CudaStream>,
    ) -> Result<DeviceTensor<'b, Driver, T>> {
        let (shape, strides) = (self.axes(self.layout.dims())?, self.axes(self.layout.stride())?);
        DeviceTensor::new(self.argument, Span::of(elements, stream), shape, strides)
    }
}

/// The tensor itself, or a copy of it if rows share memory or do not start at multiples of 16 bytes.
fn aligned_rows(tensor: &Tensor) -> Result<Tensor> {
    let tensor = own_rows(tensor)?;
    let bytes = tensor.dtype().size_in_bytes();
    let (_, layout) = tensor.storage_and_layout();
    let outer = &layout.stride()[..layout.stride().len().saturating_sub(1)];
    let aligned = outer.iter().chain([&layout.start_offset()]).all(|&at| (at * bytes).is_multiple_of(16));
    if aligned { Ok(tensor.clone()) } else { Ok(tensor.force_contiguous()?) }
}

/// Attention of query, key and value `[batch, seq, heads, dim]`.
pub fn run<T: HalfElement + CudaDType, O: Element + CudaDType + DeviceRepr>(
    device: &CudaDevice,
    config: &AttentionConfig,
    inputs: [&Tensor; 3],
) -> Result<(Tensor, Tensor)> {
    let stream = device.cuda_stream();
    let driver = driver(&stream)?;
    let location = inputs[0].device().location();
    let [query, key, value] = inputs.map(aligned_rows);
    let (query, key, value) = (query?, key?, value?);
    let query = Borrowed::new("query", &query, &location)?;
    let key = Borrowed::new("key", &key, &location)?;
    let value = Borrowed::new("value", &value, &location)?;
    let [batch, query_len, query_heads, head_dim] = query.axes(query.layout.dims())?;
    let [_, key_len, kv_heads, _] = key.axes(key.layout.dims())?;
    let shape = AttentionShape { batch, query_len, key_len, query_heads, kv_heads, head_dim };
    let plan = Plan::new(&driver.properties(), config, &shape)?;
    let (q, k, v) = (query.elements::<T>()?, key.elements::<T>()?, value.elements::<T>()?);
    let mut out = uninitialised::<O>(device, shape.query_shape().iter().product())?;
    let mut lse = uninitialised::<f32>(device, shape.lse_len())?;
    let mut workspace = uninitialised::<u8>(device, plan.workspace_bytes())?;
    {
        let to = SpanMut::of(&mut out, &stream).range(0..shape.query_shape().iter().product());
        plan.prepare(&*driver, &stream, SpanMut::of(&mut workspace, &stream))?.run(
            Inputs::new(&query.view(&q, &stream)?, &key.view(&k, &stream)?, &value.view(&v, &stream)?),
            &mut DeviceTensorMut::contiguous("out", to, shape.query_shape())?,
            Some(&mut SpanMut::of(&mut lse, &stream).range(0..shape.lse_len())),
        )?;
    }
    Ok(tensors(device, shape.query_shape(), out, lse))
}

/// Partials of one dtype `(out [batch, seq, heads, dim], lse [batch, heads, seq])`, at least one, to one such pair.
pub fn merge<T: Element + CudaDType + DeviceRepr>(
    device: &CudaDevice,
    partials: &[(Tensor, Tensor)],
) -> Result<(Tensor, Tensor)> {
    let stream = device.cuda_stream();
    let driver = driver(&stream)?;
    let location = partials[0].0.device().location();
    let shape = <[usize; 4]>::try_from(partials[0].0.dims())
        .map_err(|_| Error::shape("partial", "of 4 axes", format!("{:?}", partials[0].0.dims())))?;
    let [batch, seq, heads, dim] = shape;
    for (out, lse) in partials {
        let fits = |argument, tensor: &Tensor, expected: &[usize]| {
            if tensor.dims() == expected {
                return Ok(());
            }
            Err(Error::shape(argument, format!("{expected:?}"), format!("{:?}", tensor.dims())))
        };
        fits("partial", out, &shape)?;
        fits("lse", lse, &[batch, heads, seq])?;
        super::check_dtype("partial", T::DTYPE, out.dtype())?;
        super::check_dtype("lse", DType::F32, lse.dtype())?;
        drop((Borrowed::new("partial", out, &location)?, Borrowed::new("lse", lse, &location)?));
    }
    let stacked = |of: fn(&(Tensor, Tensor)) -> &Tensor| {
        Tensor::cat(&partials.iter().map(of).collect::<Vec<_>>(), 0).and_then(|all| all.contiguous())
    };
    let (all, all_lse) = (stacked(|partial| &partial.0)?, stacked(|partial| &partial.1)?);
    let all = Borrowed::new("partial", &all, &location)?;
    let all_lse = Borrowed::new("lse", &all_lse, &location)?;
    let (elements, lse_elements) = (all.elements::<T>()?, all_lse.elements::<f32>()?);
    let rows = batch * seq * heads;
    let mut out = uninitialised::<T>(device, rows * dim)?;
    let mut lse = uninitialised::<f32>(device, rows)?;
    {
        let to = SpanMut::of(&mut out, &stream).range(0..rows * dim);
        let from = Partials {
            out: all.view(&elements, &stream)?,
            lse: Span::of(&lse_elements, &stream),
            lse_stride: rows,
        };
        let mut to = DeviceTensorMut::contiguous("out", to, shape)?;
        let mut lse = SpanMut::of(&mut lse, &stream).range(0..rows);
        cuda::merge(&*driver, &stream, &from, &mut to, Some(&mut lse))?;
    }
    Ok(tensors(device, shape, out, lse))
}

/// Memory for the kernels to fill; at least one element, since a GPU gives no memory of no size.
fn uninitialised<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: outputs are written whole before anything reads them, and so is what is read of a workspace.
    Ok(unsafe { device.alloc::<T>(len.max(1)) }?)
}

fn tensors<O: CudaDType>(
    device: &CudaDevice,
    [batch, seq, heads, dim]: [usize; 4],
    out: CudaSlice<O>,
    lse: CudaSlice<f32>,
) -> (Tensor, Tensor) {
    let out = Storage::Cuda(CudaStorage::wrap_cuda_slice(out, device.clone()));
    let lse = Storage::Cuda(CudaStorage::wrap_cuda_slice(lse, device.clone()));
    (
        Tensor::from_storage(out, (batch, seq, heads, dim), BackpropOp::none(), false),
        Tensor::from_storage(lse, (batch, heads, seq), BackpropOp::none(), false),
    )
}
