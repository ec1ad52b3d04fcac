//! Tensors of an NVIDIA GPU.

use super::memory::{Home, Number, StorageMut, check_dtype};
use crate::cuda::driver::{Driver, driver as driver_error};
use crate::cuda::{Cuda, Span, SpanMut};
use crate::{Error, Result};
use candle_core::cuda_backend::CudaDType;
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Device, DeviceLocation, Shape, Storage, Tensor};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtrMut, DeviceRepr, result, sys};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, LazyLock, Mutex};

/// What candle and cudarc ask of the elements of a GPU's memory.
pub trait CudaNumber: CudaDType + DeviceRepr {}
impl<T: CudaDType + DeviceRepr> CudaNumber for T {}

/// A GPU of candle's, and the backend on its stream.
#[derive(Debug)]
pub struct Gpu {
    backend: Cuda<Driver>,
    device: CudaDevice,
}

impl Gpu {
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        Ok(Self { backend: Cuda::new(driver(&stream)?, stream), device: device.clone() })
    }

    fn location(&self) -> DeviceLocation {
        Device::Cuda(self.device.clone()).location()
    }
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

impl Home for Gpu {
    type Backend = Cuda<Driver>;
    type Owned<T: Number> = CudaSlice<T>;

    fn backend(&self) -> &Cuda<Driver> {
        &self.backend
    }

    fn check(&self, argument: &'static str, tensor: &Tensor) -> Result<()> {
        let (expected, got) = (self.location(), tensor.device().location());
        if expected == got {
            return Ok(());
        }
        Err(Error::value(argument, format!("a tensor on {expected:?}"), format!("{got:?}")))
    }

    /// Kernels move 16 bytes at a time.
    fn readable(&self, tensor: &Tensor) -> Result<Tensor> {
        let (bytes, layout) = (tensor.dtype().size_in_bytes(), tensor.layout());
        let axes = layout.stride().len().saturating_sub(1);
        let steps = layout.dims().iter().zip(layout.stride()).take(axes);
        let steps = steps.filter(|(extent, _)| **extent > 1).map(|(_, stride)| stride);
        let aligned = steps.chain([&layout.start_offset()]).all(|&at| (at * bytes).is_multiple_of(16));
        if aligned { Ok(tensor.clone()) } else { Ok(tensor.force_contiguous()?) }
    }

    fn slice<'a, T: Number>(
        &'a self,
        argument: &'static str,
        storage: &'a Storage,
        range: Range<usize>,
    ) -> Result<Span<'a, Driver, T>> {
        check_dtype::<T>(argument, storage.dtype())?;
        let Storage::Cuda(storage) = storage else {
            return Err(Error::value(argument, "a tensor on a GPU", "one on another device"));
        };
        Ok(Span::of(storage.as_cuda_slice::<T>()?, self.backend.stream()).range(range))
    }

    fn slice_mut<'a, T: Number>(
        &'a self,
        argument: &'static str,
        storage: StorageMut<'a>,
        range: Range<usize>,
    ) -> Result<SpanMut<'a, Driver, T>> {
        let StorageMut::Cuda(storage) = storage else {
            return Err(Error::value(argument, "a tensor on a GPU", "one on another device"));
        };
        check_dtype::<T>(argument, candle_core::backend::BackendStorage::dtype(storage))?;
        Ok(SpanMut::of(storage.as_cuda_slice_mut::<T>()?, self.backend.stream()).range(range))
    }

    fn allocate<T: Number>(&self, len: usize, written: bool) -> Result<CudaSlice<T>> {
        // A GPU gives no memory of no size.
        // SAFETY: zeroed below, or written whole before anything reads it, as the caller says.
        let mut memory = unsafe { self.device.alloc::<T>(len.max(1)) }?;
        if !written {
            let stream = self.backend.stream();
            let bytes = memory.num_bytes();
            let (address, _guard) = memory.device_ptr_mut(stream);
            // SAFETY: all of the memory, which no one else has.
            unsafe { result::memset_d8_async(address, 0, bytes, stream.cu_stream()) }
                .map_err(driver_error("fill memory"))?;
        }
        Ok(memory)
    }

    fn minus_infinity(&self, len: usize) -> Result<CudaSlice<f32>> {
        // SAFETY: filled next.
        let mut memory = unsafe { self.device.alloc::<f32>(len.max(1)) }?;
        {
            let stream = self.backend.stream();
            let (bits, count) = (f32::NEG_INFINITY.to_bits(), memory.len());
            let (address, _guard) = memory.device_ptr_mut(stream);
            // SAFETY: all of the memory, which no one else has.
            unsafe { sys::cuMemsetD32Async(address, bits, count, stream.cu_stream()) }
                .result()
                .map_err(driver_error("fill memory"))?;
        }
        Ok(memory)
    }

    fn owned_mut<'a, T: Number>(&'a self, owned: &'a mut CudaSlice<T>, len: usize) -> SpanMut<'a, Driver, T> {
        SpanMut::of(owned, self.backend.stream()).range(0..len)
    }

    fn tensor<T: Number>(&self, owned: CudaSlice<T>, shape: Shape) -> Result<Tensor> {
        let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(owned, self.device.clone()));
        Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
    }
}
