//! Devices that kernels are tested on: the emulator, and a GPU where there is one.

use half::vec::HalfBitsVecExt;
use star_attention::cuda::simt::{self, Simt};
use star_attention::cuda::{Cuda, Device, Span, SpanMut};
use star_attention::f16;
use std::fmt::Debug;
use std::ops::Range;

/// What goes to a device's memory: numbers, of which any bits are one.
pub trait Plain: Copy + Default + Send + Sync + Debug + 'static {}
impl<T: Copy + Default + Send + Sync + Debug + 'static> Plain for T {}

/// A device with a stream, and its memory.
pub trait Backend {
    type Device: Device;
    type Memory<T: Plain>: Debug;

    /// `seed` draws the order of work, where it is drawn.
    fn open(seed: u64) -> Self;
    fn device(&self) -> &Self::Device;
    fn stream(&self) -> &<Self::Device as Device>::Stream;
    /// The device and its stream as the crate's backend, with the same memory.
    fn as_cuda(&self) -> Cuda<Self::Device>;
    fn memory<T: Plain>(&self, data: &[T]) -> Self::Memory<T>;
    /// Memory for so many numbers, which nothing is written to; none if there is not so much.
    fn room(&self, len: usize) -> Option<Self::Memory<f16>>;
    fn span<'a, T: Plain>(&'a self, memory: &'a Self::Memory<T>) -> Span<'a, Self::Device, T>;
    fn span_mut<'a, T: Plain>(&'a self, memory: &'a mut Self::Memory<T>) -> SpanMut<'a, Self::Device, T>;
    /// Writes `data` to the memory from element `at` on.
    fn write<T: Plain>(&self, memory: &mut Self::Memory<T>, at: usize, data: &[T]);
    /// What a part of the memory holds after all work of the stream.
    fn read_range<T: Plain>(&self, memory: &Self::Memory<T>, range: Range<usize>) -> Vec<T>;
    /// What the memory holds after all work of the stream.
    fn read<T: Plain>(&self, memory: &Self::Memory<T>) -> Vec<T> {
        self.read_range(memory, 0..self.span(memory).len())
    }
}

impl Backend for Simt {
    type Device = Self;
    type Memory<T: Plain> = simt::Buffer<T>;

    fn open(seed: u64) -> Self {
        Self::new(seed)
    }
    fn device(&self) -> &Self {
        self
    }
    fn stream(&self) -> &() {
        &()
    }
    fn as_cuda(&self) -> Cuda<Self> {
        Cuda::new(self.clone(), ())
    }
    fn memory<T: Plain>(&self, data: &[T]) -> Self::Memory<T> {
        self.buffer(data)
    }
    fn span<'a, T: Plain>(&'a self, memory: &'a Self::Memory<T>) -> Span<'a, Self, T> {
        memory.span()
    }
    fn span_mut<'a, T: Plain>(&'a self, memory: &'a mut Self::Memory<T>) -> SpanMut<'a, Self, T> {
        memory.span_mut()
    }
    fn room(&self, len: usize) -> Option<Self::Memory<f16>> {
        // The device may leave some out, for the alignment of the first.
        let len = len + 128;
        // A vector of zeros takes pages from the system when they are touched, but ends the process
        // where there are none.
        Vec::<u16>::new().try_reserve_exact(len).ok()?;
        Some(self.adopt(vec![0u16; len].reinterpret_into()))
    }
    fn write<T: Plain>(&self, memory: &mut Self::Memory<T>, at: usize, data: &[T]) {
        memory.as_mut_slice()[at..][..data.len()].copy_from_slice(data);
    }
    fn read_range<T: Plain>(&self, memory: &Self::Memory<T>, range: Range<usize>) -> Vec<T> {
        memory.as_slice()[range].to_vec()
    }
}

/// The emulator as a device on which plans take the kernels for Hopper GPUs.
pub struct Hopper(Simt);

impl Backend for Hopper {
    type Device = Simt;
    type Memory<T: Plain> = simt::Buffer<T>;

    fn open(seed: u64) -> Self {
        Self(Simt::new(seed).with_hopper())
    }
    fn device(&self) -> &Simt {
        &self.0
    }
    fn stream(&self) -> &() {
        &()
    }
    fn as_cuda(&self) -> Cuda<Simt> {
        self.0.as_cuda()
    }
    fn memory<T: Plain>(&self, data: &[T]) -> Self::Memory<T> {
        self.0.memory(data)
    }
    fn span<'a, T: Plain>(&'a self, memory: &'a Self::Memory<T>) -> Span<'a, Simt, T> {
        self.0.span(memory)
    }
    fn span_mut<'a, T: Plain>(&'a self, memory: &'a mut Self::Memory<T>) -> SpanMut<'a, Simt, T> {
        self.0.span_mut(memory)
    }
    fn room(&self, len: usize) -> Option<Self::Memory<f16>> {
        self.0.room(len)
    }
    fn write<T: Plain>(&self, memory: &mut Self::Memory<T>, at: usize, data: &[T]) {
        self.0.write(memory, at, data);
    }
    fn read_range<T: Plain>(&self, memory: &Self::Memory<T>, range: Range<usize>) -> Vec<T> {
        self.0.read_range(memory, range)
    }
}

#[cfg(feature = "cuda")]
pub use gpu::Gpu;

#[cfg(feature = "cuda")]
mod gpu {
    use super::*;
    use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError};
    use star_attention::cuda::driver::Driver;
    use std::marker::PhantomData;
    use std::sync::{Arc, OnceLock};

    /// The first GPU, with a stream of its own.
    pub struct Gpu {
        driver: Arc<Driver>,
        stream: Arc<CudaStream>,
    }

    /// Memory of a GPU. As bytes: cudarc does not know all types that are plain here.
    #[derive(Debug)]
    pub struct Memory<T> {
        bytes: CudaSlice<u8>,
        len: usize,
        _elements: PhantomData<T>,
    }

    impl Gpu {
        pub fn new(driver: Arc<Driver>) -> star_attention::Result<Self> {
            let stream = driver.context().new_stream();
            let stream = stream
                .map_err(|source| star_attention::Error::Driver { operation: "make a stream", source })?;
            Ok(Self { driver, stream })
        }

        /// Memory of which a sanitizer knows that nothing was written to it.
        pub fn uninitialised<T: Plain>(&self, len: usize) -> Result<Memory<T>, DriverError> {
            // No GPU gives memory of no size.
            let bytes = (len * size_of::<T>()).max(1);
            // SAFETY: only read where something was written before.
            let bytes = unsafe { self.stream.alloc(bytes) }?;
            Ok(Memory { bytes, len, _elements: PhantomData })
        }
    }

    impl Backend for Gpu {
        type Device = Driver;
        type Memory<T: Plain> = Memory<T>;

        /// Kernels are loaded once for all.
        fn open(_: u64) -> Self {
            static DRIVER: OnceLock<Arc<Driver>> = OnceLock::new();
            let driver = DRIVER.get_or_init(|| Arc::new(Driver::open(0).expect("a GPU")));
            Self::new(driver.clone()).expect("a stream")
        }
        fn device(&self) -> &Driver {
            &self.driver
        }
        fn stream(&self) -> &Arc<CudaStream> {
            &self.stream
        }
        fn as_cuda(&self) -> Cuda<Driver> {
            Cuda::new(self.driver.clone(), self.stream.clone())
        }
        fn memory<T: Plain>(&self, data: &[T]) -> Memory<T> {
            let mut memory = self.uninitialised(data.len()).expect("memory of the GPU");
            self.write(&mut memory, 0, data);
            memory
        }
        fn room(&self, len: usize) -> Option<Memory<f16>> {
            self.uninitialised(len).ok()
        }
        fn span<'a, T: Plain>(&'a self, memory: &'a Memory<T>) -> Span<'a, Driver, T> {
            let (address, _guard) = memory.bytes.device_ptr(&self.stream);
            // SAFETY: borrowed, and used on this stream only.
            unsafe { Span::from_raw(address, memory.len) }
        }
        fn span_mut<'a, T: Plain>(&'a self, memory: &'a mut Memory<T>) -> SpanMut<'a, Driver, T> {
            let (address, _guard) = memory.bytes.device_ptr_mut(&self.stream);
            // SAFETY: borrowed to be written, and used on this stream only.
            unsafe { SpanMut::from_raw(address, memory.len) }
        }
        fn write<T: Plain>(&self, memory: &mut Memory<T>, at: usize, data: &[T]) {
            // SAFETY: plain numbers are their bytes.
            let plain = unsafe { std::slice::from_raw_parts(data.as_ptr().cast::<u8>(), size_of_val(data)) };
            let mut to = memory.bytes.slice_mut(at * size_of::<T>()..);
            self.stream.memcpy_htod(plain, &mut to).expect("a copy to the GPU");
        }
        fn read_range<T: Plain>(&self, memory: &Memory<T>, range: Range<usize>) -> Vec<T> {
            let mut data = vec![T::default(); range.len()];
            if data.is_empty() {
                return data;
            }
            let bytes = range.start * size_of::<T>()..range.end * size_of::<T>();
            let bytes = self.stream.clone_dtoh(&memory.bytes.slice(bytes)).expect("a copy from the GPU");
            self.stream.synchronize().expect("the GPU's work");
            // SAFETY: plain numbers are their bytes, and there are as many.
            unsafe {
                bytes.as_ptr().copy_to_nonoverlapping(data.as_mut_ptr().cast(), size_of_val(&data[..]))
            };
            data
        }
    }
}
