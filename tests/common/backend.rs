//! Devices that kernels are tested on: the host, and a GPU where there is one.

use star_attention::cuda::simt::{self, Simt};
use star_attention::cuda::{Device, Span, SpanMut};

/// What goes to a device's memory.
pub trait Plain: Copy + Default + Send + Sync + std::fmt::Debug + 'static {}
impl<T: Copy + Default + Send + Sync + std::fmt::Debug + 'static> Plain for T {}

/// A device with a stream, and its memory.
pub trait Backend {
    type Device: Device;
    type Memory<T: Plain>;

    fn open() -> Self;
    fn device(&self) -> &Self::Device;
    fn stream(&self) -> &<Self::Device as Device>::Stream;
    fn memory<T: Plain>(&self, data: &[T]) -> Self::Memory<T>;
    fn span<'a, T: Plain>(&'a self, memory: &'a Self::Memory<T>) -> Span<'a, Self::Device, T>;
    fn span_mut<'a, T: Plain>(&'a self, memory: &'a mut Self::Memory<T>) -> SpanMut<'a, Self::Device, T>;
    /// What the memory holds after all work of the stream.
    fn read<T: Plain>(&self, memory: &Self::Memory<T>) -> Vec<T>;
}

impl Backend for Simt {
    type Device = Self;
    type Memory<T: Plain> = simt::Buffer<T>;

    fn open() -> Self {
        Self::new(0)
    }
    fn device(&self) -> &Self {
        self
    }
    fn stream(&self) -> &() {
        &()
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
    fn read<T: Plain>(&self, memory: &Self::Memory<T>) -> Vec<T> {
        memory.as_slice().to_vec()
    }
}
