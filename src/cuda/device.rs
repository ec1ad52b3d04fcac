//! Where kernels run, and the memory they run on.
//!
//! A [`Device`] is what plans need of a GPU: its extents, copies to and from its memory, events,
//! launches by name, and whether a stream is being captured. It is a GPU through its driver, or the
//! SIMT emulator.

use crate::tensor::Strided;
use crate::{Element, Error, Result, bf16, f16};
use std::marker::PhantomData;

/// What a plan must know of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Properties {
    /// Blocks of threads that run at the same time, if each fills one.
    pub multiprocessors: usize,
    /// Shared memory of a multiprocessor, in bytes.
    pub shared_bytes: usize,
    /// The L2 cache, which all multiprocessors share, in bytes.
    pub l2_bytes: usize,
    /// Whether it runs the kernels for Hopper GPUs: its compute capability is 9.0, and they were
    /// built.
    pub hopper: bool,
}

impl Properties {
    /// Properties of a device, be it one of this machine or another, that runs the kernels for any
    /// GPU.
    pub const fn new(multiprocessors: usize, shared_bytes: usize, l2_bytes: usize) -> Self {
        Self { multiprocessors, shared_bytes, l2_bytes, hopper: false }
    }

    /// The same of a device that runs the kernels for Hopper GPUs as well.
    #[must_use]
    pub const fn with_hopper(self) -> Self {
        Self { hopper: true, ..self }
    }
}

/// A kernel, and all that it is told.
#[derive(Clone, Debug)]
pub struct Launch<'a> {
    /// Name of the entry point, as `encode_bf16_d128`.
    pub kernel: &'a str,
    /// Blocks of threads.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The parameter struct of `cuda/params.h`.
    pub params: &'a [u8],
}

/// Where kernels run.
pub trait Device: Send + Sync {
    /// An order of work: what is asked for on a stream happens in that order.
    type Stream;
    /// Kept as long as work may be asked for on a piece of memory.
    type Guard<'a>: std::fmt::Debug;
    /// Owned memory of the device. It is freed when dropped, after all work of its stream.
    type Memory: Send + std::fmt::Debug;
    /// CPU memory that the device copies from while the CPU goes on. Freed when dropped.
    type Pinned: AsMut<[u8]> + Send + std::fmt::Debug;
    /// A point in the order of a stream. One that was never recorded has passed.
    type Event: Send + std::fmt::Debug;

    /// What plans must know.
    fn properties(&self) -> Properties;

    /// What tells a stream from all others of the process.
    fn stream_id(stream: &Self::Stream) -> [u64; 2];

    /// Whether work that is asked for on a stream is recorded in a graph instead of being done.
    ///
    /// # Errors
    /// Errors of the driver.
    fn is_capturing(stream: &Self::Stream) -> Result<bool>;

    /// Makes a kernel ready to be launched, where its first launch would have to load it: that may
    /// not be captured in a graph.
    ///
    /// # Errors
    /// As [`launch`](Self::launch).
    fn load(&self, _kernel: &str) -> Result<()> {
        Ok(())
    }

    /// Starts a kernel after all earlier work of the stream.
    ///
    /// # Errors
    /// [`Error::Value`] if the kernel was not built; errors of the driver.
    ///
    /// # Safety
    /// The parameters are those of the kernel, and all memory that they name lives, and is left
    /// alone by others, until the kernel has ended.
    unsafe fn launch(&self, stream: &Self::Stream, launch: &Launch<'_>) -> Result<()>;

    /// Copies `bytes` to device memory after all earlier work of the stream. They are read before
    /// this returns.
    ///
    /// # Errors
    /// [`Error::Value`] if the stream is being captured: a graph would read `bytes` whenever it is
    /// replayed. Errors of the driver.
    ///
    /// # Safety
    /// `to..to + bytes.len()` is memory of this device, left alone by others until the copy has
    /// ended. `bytes` are not [`Pinned`](Self::Pinned).
    unsafe fn upload(&self, stream: &Self::Stream, to: u64, bytes: &[u8]) -> Result<()>;

    /// Copies device memory to `bytes` after all earlier work of the stream, and waits until that
    /// is done.
    ///
    /// # Errors
    /// [`Error::Value`] if the stream is being captured: nothing would be done to wait for. Errors
    /// of the driver.
    ///
    /// # Safety
    /// `from..from + bytes.len()` is memory of this device, written by nobody until this returns.
    unsafe fn download(&self, stream: &Self::Stream, from: u64, bytes: &mut [u8]) -> Result<()>;

    /// Memory of `bytes` zeros for work on one stream, at a multiple of 256.
    ///
    /// # Errors
    /// [`Error::Value`], naming `bytes`, for more than memory has room for; errors of the driver.
    fn allocate(&self, stream: &Self::Stream, bytes: usize) -> Result<Self::Memory>;

    /// The device address of a memory's first byte.
    fn address(memory: &Self::Memory) -> u64;

    /// Pinned memory of exactly `bytes` zeros. This may take long, and may wait for the device.
    ///
    /// # Errors
    /// [`Error::Value`], naming `bytes`, for more than memory has room for; errors of the driver.
    fn pinned(&self, bytes: usize) -> Result<Self::Pinned>;

    /// An event that was never recorded.
    ///
    /// # Errors
    /// Errors of the driver.
    fn event(&self) -> Result<Self::Event>;

    /// Copies `bytes` of pinned memory to device memory after all earlier work of the stream. They
    /// are read at any time until the copy has ended.
    ///
    /// # Errors
    /// [`Error::Value`] if the stream is being captured: a graph would read `bytes` whenever it is
    /// replayed. Errors of the driver.
    ///
    /// # Safety
    /// `bytes` lies in a [`Pinned`](Self::Pinned) of this device, which is neither written nor
    /// dropped until the copy has ended. `to..to + bytes.len()` is memory of this device, left
    /// alone by others until then.
    unsafe fn upload_pinned(&self, stream: &Self::Stream, to: u64, bytes: &[u8]) -> Result<()>;

    /// Puts an event behind all earlier work of the stream. It passes when that is done, and stands
    /// for nothing that it was recorded behind before.
    ///
    /// # Errors
    /// Errors of the driver. The event may then stand where it stood.
    fn record(stream: &Self::Stream, event: &Self::Event) -> Result<()>;

    /// Whether all work before an event is done. This does not wait.
    ///
    /// # Errors
    /// Errors of the driver, those of the work before included.
    fn has_passed(event: &Self::Event) -> Result<bool>;

    /// Waits until all work before an event is done.
    ///
    /// # Errors
    /// Errors of the driver. The work may then still go on.
    fn wait(event: &Self::Event) -> Result<()>;
}

/// Refuses a stream that is being captured in a graph, for copies from or to CPU memory.
pub(crate) fn check_not_capturing<D: Device>(stream: &D::Stream) -> Result<()> {
    if D::is_capturing(stream)? {
        return Err(Error::value("stream", "one that is not being captured in a graph", "one that is"));
    }
    Ok(())
}

/// The element types that GPU kernels multiply: [`struct@f16`] and [`bf16`].
pub trait HalfElement: Element {}
impl HalfElement for f16 {}
impl HalfElement for bf16 {}

/// A borrowed piece of device memory for work on one stream.
#[derive(Debug)]
pub struct Span<'a, D: Device, T> {
    pub(crate) address: u64,
    pub(crate) len: usize,
    /// What it was borrowed for; any if `None`.
    stream: Option<[u64; 2]>,
    _guard: Option<D::Guard<'a>>,
    _borrow: PhantomData<&'a T>,
}

/// A piece of device memory for work on one stream, borrowed to be written.
#[derive(Debug)]
pub struct SpanMut<'a, D: Device, T> {
    pub(crate) address: u64,
    pub(crate) len: usize,
    /// What it was borrowed for; any if `None`.
    stream: Option<[u64; 2]>,
    _guard: Option<D::Guard<'a>>,
    _borrow: PhantomData<&'a mut T>,
}

impl<'a, D: Device, T> Span<'a, D, T> {
    /// `len` elements at a device address: the way in for memory of other frameworks.
    ///
    /// # Safety
    /// For `'a`, and until all work asked for with it has ended, they are initialised elements in
    /// memory of the device `D` stands for, and nothing writes them.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self { address, len, stream: None, _guard: None, _borrow: PhantomData }
    }
}

impl<'a, D: Device, T> SpanMut<'a, D, T> {
    /// `len` elements at a device address: the way in for memory of other frameworks.
    ///
    /// # Safety
    /// For `'a`, and until all work asked for with it has ended, they are memory of the device `D`
    /// stands for, and nothing else reads or writes them.
    pub unsafe fn from_raw(address: u64, len: usize) -> Self {
        Self { address, len, stream: None, _guard: None, _borrow: PhantomData }
    }

    /// Refuses fewer than `len` elements, or an address not aligned for 16-byte accesses.
    pub(crate) fn check(&self, argument: &'static str, len: usize) -> Result<()> {
        if self.len < len {
            return Err(Error::shape(argument, format!("at least {len} elements"), self.len.to_string()));
        }
        if self.len == 0 { Ok(()) } else { check_aligned(argument, self.address) }
    }
}

macro_rules! span {
    ($Span:ident) => {
        impl<'a, D: Device, T> $Span<'a, D, T> {
            pub(crate) fn guarded(address: u64, len: usize, stream: &D::Stream, guard: D::Guard<'a>) -> Self {
                let stream = Some(D::stream_id(stream));
                Self { address, len, stream, _guard: Some(guard), _borrow: PhantomData }
            }

            /// Elements that are borrowed for `'a`, for work on one stream.
            pub(crate) fn on(address: u64, len: usize, stream_id: [u64; 2]) -> Self {
                Self { address, len, stream: Some(stream_id), _guard: None, _borrow: PhantomData }
            }

            /// Refuses memory that was borrowed for work on another stream.
            pub(crate) fn check_stream(&self, argument: &'static str, stream: &D::Stream) -> Result<()> {
                check_stream::<D>(argument, self.stream, stream)
            }

            /// The elements of a range, as far as there are any.
            #[must_use]
            pub fn range(self, range: std::ops::Range<usize>) -> Self {
                let end = range.end.min(self.len);
                let start = range.start.min(end);
                Self { address: self.address + (start * size_of::<T>()) as u64, len: end - start, ..self }
            }

            /// The device address of the first element.
            pub fn address(&self) -> u64 {
                self.address
            }

            /// Elements.
            pub fn len(&self) -> usize {
                self.len
            }

            /// Whether there are none.
            pub fn is_empty(&self) -> bool {
                self.len == 0
            }
        }
    };
}

span!(Span);
span!(SpanMut);

fn check_stream<D: Device>(argument: &'static str, of: Option<[u64; 2]>, stream: &D::Stream) -> Result<()> {
    if of.is_some_and(|id| id != D::stream_id(stream)) {
        return Err(Error::value(argument, "memory borrowed for the stream of the call", "for another"));
    }
    Ok(())
}

/// Kernels move 16 bytes at a time.
pub(crate) const ALIGNMENT: usize = 16;

pub(crate) fn check_aligned(argument: &'static str, address: u64) -> Result<()> {
    if !address.is_multiple_of(ALIGNMENT as u64) {
        return Err(Error::value(argument, "an address that is a multiple of 16", format!("{address:#x}")));
    }
    Ok(())
}

/// A borrowed tensor `[batch, seq, heads, dim]` in device memory, read only.
#[derive(Debug)]
pub struct DeviceTensor<'a, D: Device, T> {
    span: Span<'a, D, T>,
    layout: Strided,
}

/// A borrowed tensor `[batch, seq, heads, dim]` in device memory, to be written.
#[derive(Debug)]
pub struct DeviceTensorMut<'a, D: Device, T> {
    span: SpanMut<'a, D, T>,
    layout: Strided,
}

macro_rules! tensor {
    ($Tensor:ident, $Span:ident, $check:ident, $like:literal) => {
        impl<'a, D: Device, T: Element> $Tensor<'a, D, T> {
            #[doc = concat!("A view of `span` with explicit strides, in elements, as ", $like, ".")]
            ///
            /// # Errors
            /// [`Error::Stride`], naming `argument`, if an index leaves `span` or two indices meet.
            pub fn new(
                argument: &'static str,
                span: $Span<'a, D, T>,
                shape: [usize; 4],
                strides: [usize; 4],
            ) -> Result<Self> {
                let layout = Strided::$check(argument, span.len, shape, strides)?;
                Ok(Self { span, layout })
            }

            /// A row-major view of the whole of `span`.
            ///
            /// # Errors
            /// [`Error::Shape`], naming `argument`, if `shape` has not exactly its elements.
            pub fn contiguous(
                argument: &'static str,
                span: $Span<'a, D, T>,
                shape: [usize; 4],
            ) -> Result<Self> {
                let layout = Strided::contiguous(argument, span.len, shape)?;
                Ok(Self { span, layout })
            }

            /// The same elements with the axes seq and heads exchanged.
            #[must_use]
            pub fn swap_seq_heads(self) -> Self {
                Self { layout: self.layout.swap_seq_heads(), ..self }
            }

            /// The elements `start..start + len` of one axis.
            ///
            /// # Errors
            /// [`Error::Value`] if there is no such axis or the range leaves it.
            pub fn narrow(mut self, axis: usize, start: usize, len: usize) -> Result<Self> {
                let (layout, offset) = self.layout.narrow(axis, start, len)?;
                self.span.address += (offset * T::DTYPE.size()) as u64;
                self.span.len -= offset;
                Ok(Self { layout, ..self })
            }

            /// The elements `first`, `first + step`, `first + 2 step` and so on of one axis; none
            /// if there is no `first`.
            ///
            /// # Errors
            /// [`Error::Value`] if there is no such axis, or for a step of 0.
            pub fn every(mut self, axis: usize, first: usize, step: usize) -> Result<Self> {
                let (layout, offset) = self.layout.every(axis, first, step)?;
                self.span.address += (offset * T::DTYPE.size()) as u64;
                self.span.len -= offset;
                Ok(Self { layout, ..self })
            }

            /// The extents `[batch, seq, heads, dim]`.
            pub fn shape(&self) -> [usize; 4] {
                self.layout.shape
            }

            /// The strides of `[batch, seq, heads, dim]`, in elements.
            pub fn strides(&self) -> [usize; 4] {
                self.layout.strides
            }

            /// Refuses memory that was borrowed for work on another stream.
            pub(crate) fn check_stream(&self, argument: &'static str, stream: &D::Stream) -> Result<()> {
                self.span.check_stream(argument, stream)
            }

            /// Refuses rows that the kernels could not move 16 bytes at a time.
            pub(crate) fn check_rows(&self, argument: &'static str, expected: [usize; 4]) -> Result<()> {
                crate::config::check_rows(argument, expected, self.shape(), self.strides())?;
                if !expected.contains(&0) {
                    check_aligned(argument, self.span.address)?;
                }
                let elements = ALIGNMENT / T::DTYPE.size();
                if self.strides()[..3].iter().any(|stride| !stride.is_multiple_of(elements)) {
                    let expected = format!("multiples of {elements}: rows start at multiples of 16 bytes");
                    return Err(Error::stride(argument, expected, format!("{:?}", self.strides())));
                }
                Ok(())
            }

            pub(crate) fn params(&self) -> super::params::StarTensor {
                let [batch, seq, head, _] = self.strides().map(|stride| stride as u64);
                super::params::StarTensor { data: self.span.address, batch, seq, head }
            }
        }
    };
}

tensor!(
    DeviceTensor,
    Span,
    read_only,
    "[`TensorView::new`](crate::TensorView::new): an axis of stride 0 repeats its elements"
);
tensor!(DeviceTensorMut, SpanMut, new, "[`TensorViewMut::new`](crate::TensorViewMut::new)");

/// The bytes of a parameter struct.
pub(crate) fn bytes_of<P: Copy>(params: &[P]) -> &[u8] {
    // SAFETY: the structs of params.rs are of integers and floats, without padding (params.rs
    // asserts their sizes).
    unsafe { std::slice::from_raw_parts(params.as_ptr().cast(), size_of_val(params)) }
}
