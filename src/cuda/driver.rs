//! NVIDIA GPUs, through cudarc and the CUDA driver. Neither a toolkit nor a CUDA library is needed
//! to run.
//!
//! ```no_run
//! use star_attention::cuda::driver::Driver;
//! use star_attention::cuda::flash::Plan;
//! use star_attention::cuda::{Device, DeviceTensor, DeviceTensorMut, Span, SpanMut};
//! use star_attention::{AttentionConfig, AttentionShape, Inputs, Mask, bf16};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let device = Driver::open(0)?;
//! let stream = device.context().default_stream();
//! let shape = AttentionShape { batch: 1, query_len: 4096, key_len: 4096, query_heads: 32, kv_heads: 8, head_dim: 128, value_dim: 128 };
//! let plan = Plan::new(&device.properties(), &AttentionConfig::new(Mask::Causal), &shape)?;
//!
//! let query = stream.alloc_zeros::<bf16>(4096 * 32 * 128)?;
//! let key = stream.alloc_zeros::<bf16>(4096 * 8 * 128)?;
//! let mut out = stream.alloc_zeros::<bf16>(4096 * 32 * 128)?;
//! let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes())?;
//!
//! let mut prepared = plan.prepare(&device, &stream, SpanMut::of(&mut workspace, &stream))?;
//! let query = DeviceTensor::contiguous("query", Span::of(&query, &stream), shape.query_shape())?;
//! let key = DeviceTensor::contiguous("key", Span::of(&key, &stream), shape.key_shape())?;
//! prepared.run(
//!     Inputs::new(&query, &key, &key),
//!     &mut DeviceTensorMut::contiguous("out", SpanMut::of(&mut out, &stream), shape.query_shape())?,
//!     None,
//! )?;
//! # Ok(())
//! # }
//! ```

use super::device::{Device, Launch, Properties, Span, SpanMut, check_not_capturing};
use super::functions::Functions;
use crate::{Error, Result};
use cudarc::driver::sys::{
    self, CUdevice_attribute, CUfunction_attribute_enum, CUstreamCaptureMode, CUstreamCaptureStatus,
};
use cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError,
    SyncOnDrop, result,
};
use cudarc::nvrtc::Ptx;
use std::sync::{Arc, LazyLock};

include!(concat!(env!("OUT_DIR"), "/cuda_modules.rs"));

/// The lowest compute capability that the kernels' instructions have.
const CAPABILITY: (i32, i32) = (8, 0);

/// The kernels of this process. Handles keep their contexts alive, so that no other context takes
/// the address of one.
static FUNCTIONS: LazyLock<Functions<CudaFunction>> = LazyLock::new(Functions::default);

/// A GPU.
///
/// Kernels are loaded when they are first launched in a context, once for all threads and all
/// `Driver`s of that context. They and the context then stay until the process ends: a graph that
/// captured a launch may be replayed after its `Driver` was dropped.
#[derive(Debug)]
pub struct Driver {
    context: Arc<CudaContext>,
    properties: Properties,
    /// Of one block.
    most_shared_bytes: i32,
}

pub(crate) fn driver(operation: &'static str) -> impl Fn(DriverError) -> Error {
    move |source| Error::Driver { operation, source }
}

/// Refuses a library that cannot be loaded: where one is missing, cudarc panics.
pub(crate) fn check_library(what: &'static str, name: &str) -> Result<()> {
    // SAFETY: the driver's and NVIDIA's libraries may be loaded at any time; cudarc does so next.
    match unsafe { libloading::Library::new(name) } {
        Ok(_) => Ok(()),
        Err(error) => {
            // What the loader says is the cause, the error itself only that it failed.
            let cause =
                std::error::Error::source(&error).map_or(error.to_string(), |cause| cause.to_string());
            Err(Error::Unavailable { what, reason: cause })
        }
    }
}

/// Refuses a stream of another context.
pub(crate) fn check_stream(context: &CudaContext, stream: &CudaStream) -> Result<()> {
    if stream.context().cu_ctx() == context.cu_ctx() {
        return Ok(());
    }
    let name = |context: &CudaContext| format!("a stream of device {}", context.ordinal());
    Err(Error::value("stream", name(context), name(stream.context())))
}

fn check_driver() -> Result<()> {
    check_library("the CUDA driver", if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" })
}

/// Sets which calls of this thread the driver refuses while any stream is being captured, and
/// returns what was set before.
fn exchange_capture_mode(mut mode: CUstreamCaptureMode) -> Result<CUstreamCaptureMode> {
    // SAFETY: the driver writes a mode to the place of this one.
    let exchanged = unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) };
    exchanged.result().map_err(driver("exchange the capture mode"))?;
    Ok(mode)
}

impl Driver {
    /// The GPUs of this machine.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver, [`Error::Driver`] for what it answers.
    pub fn count() -> Result<usize> {
        check_driver()?;
        let count = CudaContext::device_count().map_err(driver("count devices"))?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The GPU of this number.
    ///
    /// # Errors
    /// [`Error::Unavailable`] without a driver or such a GPU, [`Error::Value`] if it is too old,
    /// [`Error::Driver`] for what the driver answers.
    pub fn open(ordinal: usize) -> Result<Self> {
        let count = Self::count()?;
        if ordinal >= count {
            let reason = format!("there are {count}, asked for number {ordinal}");
            return Err(Error::Unavailable { what: "the GPU", reason });
        }
        Self::new(CudaContext::new(ordinal).map_err(driver("open the device"))?)
    }

    /// The GPU of a context that is there already.
    ///
    /// # Errors
    /// [`Error::Value`] if it is too old, [`Error::Driver`] for what the driver answers.
    pub fn new(context: Arc<CudaContext>) -> Result<Self> {
        let capability = context.compute_capability().map_err(driver("ask for the compute capability"))?;
        if capability < CAPABILITY {
            let got = format!("{}.{}", capability.0, capability.1);
            return Err(Error::value("device", "compute capability 8.0 or later", got));
        }
        let attribute = |attribute| -> Result<usize> {
            let value = context.attribute(attribute).map_err(driver("ask for an attribute"))?;
            Ok(usize::try_from(value).unwrap_or(0))
        };
        let mut properties = Properties::new(
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?,
        );
        // Machine code for 9.0 alone; newer GPUs do not run it.
        properties.hopper = capability == (9, 0) && HAS_HOPPER;
        let most_shared_bytes =
            attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        Ok(Self {
            context,
            properties,
            most_shared_bytes: i32::try_from(most_shared_bytes).unwrap_or(i32::MAX),
        })
    }

    /// As `NVIDIA H200`.
    ///
    /// # Errors
    /// [`Error::Driver`] for what the driver answers.
    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(driver("ask for the name"))
    }

    /// Names of all kernels that were built and that this GPU runs.
    pub fn kernels(&self) -> impl Iterator<Item = &'static str> + use<> {
        let hopper = self.properties.hopper;
        let names = MODULES.iter().flat_map(|(names, _)| names.iter().copied());
        names.filter(move |name| hopper || !name.contains("_hopper_"))
    }

    /// For streams and memory. Streams of other frameworks come in by
    /// [`CudaContext::wrap_borrowed_stream`].
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// Loads kernels before their first launch, which may otherwise not be captured in a graph.
    ///
    /// # Errors
    /// [`Error::Value`] for a name that was not built, [`Error::Driver`] for what the driver
    /// answers.
    pub fn load<'a>(&self, kernels: impl IntoIterator<Item = &'a str>) -> Result<()> {
        kernels.into_iter().try_for_each(|kernel| self.function(kernel).map(|_| ()))
    }

    fn function(&self, kernel: &str) -> Result<CudaFunction> {
        FUNCTIONS.get(self.context.cu_ctx().addr(), kernel, || self.load_module_of(kernel))
    }

    /// All kernels of the module that has `kernel`, or none if no module has it.
    fn load_module_of(&self, kernel: &str) -> Result<Vec<(&'static str, CudaFunction)>> {
        let Some((names, image)) = MODULES.iter().find(|(names, _)| names.contains(&kernel)) else {
            return Ok(Vec::new());
        };
        let image = Ptx::from_binary(image.to_vec());
        let module = self.context.load_module(image).map_err(driver("load kernels"))?;
        let function = |&name: &&'static str| {
            let function = module.load_function(name).map_err(driver("find a kernel"))?;
            // Launches of more than 48 KB must be allowed beforehand.
            function
                .set_attribute(
                    CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    self.most_shared_bytes,
                )
                .map_err(driver("allow shared memory"))?;
            Ok((name, function))
        };
        names.iter().map(function).collect()
    }
}

/// Owned memory of a GPU.
#[derive(Debug)]
pub struct Memory {
    bytes: CudaSlice<u8>,
    address: u64,
}

impl Memory {
    /// The bytes, for work on any stream.
    pub fn bytes(&self) -> &CudaSlice<u8> {
        &self.bytes
    }
}

/// CPU memory whose pages stay where they are, so that a GPU copies from it by itself.
#[derive(Debug)]
pub struct Pinned {
    start: *mut u8,
    bytes: usize,
    /// Lives until the memory is freed.
    context: Arc<CudaContext>,
}

// SAFETY: the memory is owned, and any thread may use and free it.
unsafe impl Send for Pinned {}

impl AsMut<[u8]> for Pinned {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: memory of so many initialised bytes, which `self` owns.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // An error is returned by a later call on the context.
        self.context.record_err(self.context.bind_to_thread());
        // SAFETY: from `malloc_host`, and freed nowhere else. No copy reads it, as those who asked
        // for copies have promised.
        self.context.record_err(unsafe { result::free_host(self.start.cast()) });
    }
}

impl Device for Driver {
    type Stream = Arc<CudaStream>;
    type Guard<'a> = SyncOnDrop<'a>;
    type Memory = Memory;
    type Pinned = Pinned;
    type Event = CudaEvent;

    fn properties(&self) -> Properties {
        self.properties
    }

    fn stream_id(stream: &Self::Stream) -> [u64; 2] {
        [stream.context().cu_ctx().addr() as u64, stream.cu_stream().addr() as u64]
    }

    fn is_capturing(stream: &Self::Stream) -> Result<bool> {
        let status = stream.capture_status().map_err(driver("ask whether the stream is captured"))?;
        Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    fn load(&self, kernel: &str) -> Result<()> {
        self.function(kernel).map(|_| ())
    }

    unsafe fn launch(&self, stream: &Self::Stream, launch: &Launch<'_>) -> Result<()> {
        check_stream(&self.context, stream)?;
        let function = self.function(launch.kernel)?;
        self.context.bind_to_thread().map_err(driver("bind the context"))?;
        let mut params = [launch.params.as_ptr().cast_mut().cast()];
        // SAFETY: the kernel takes one struct, whose bytes these are; the rest is the caller's
        // promise.
        let launched = unsafe {
            result::launch_kernel(
                function.cu_function(),
                (launch.blocks, 1, 1),
                (launch.threads, 1, 1),
                launch.shared_bytes,
                stream.cu_stream(),
                &mut params,
            )
        };
        launched.map_err(driver("launch a kernel"))
    }

    unsafe fn upload(&self, stream: &Self::Stream, to: u64, bytes: &[u8]) -> Result<()> {
        check_stream(&self.context, stream)?;
        check_not_capturing::<Self>(stream)?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.bind_to_thread().map_err(driver("bind the context"))?;
        // SAFETY: the caller's promise. The driver has read pageable memory when this returns.
        unsafe { result::memcpy_htod_async(to, bytes, stream.cu_stream()) }
            .map_err(driver("copy to the device"))
    }

    unsafe fn download(&self, stream: &Self::Stream, from: u64, bytes: &mut [u8]) -> Result<()> {
        check_stream(&self.context, stream)?;
        check_not_capturing::<Self>(stream)?;
        if !bytes.is_empty() {
            self.context.bind_to_thread().map_err(driver("bind the context"))?;
            // SAFETY: the caller's promise; the copy has ended before this returns.
            unsafe { result::memcpy_dtoh_async(bytes, from, stream.cu_stream()) }
                .map_err(driver("copy from the device"))?;
        }
        stream.synchronize().map_err(driver("wait for the stream"))
    }

    fn allocate(&self, stream: &Self::Stream, bytes: usize) -> Result<Memory> {
        check_stream(&self.context, stream)?;
        // The driver gives no memory of no size.
        let bytes = stream.alloc_zeros::<u8>(bytes.max(1)).map_err(driver("allocate memory"))?;
        let address = bytes.device_ptr(stream).0;
        Ok(Memory { bytes, address })
    }

    fn address(memory: &Memory) -> u64 {
        memory.address
    }

    fn pinned(&self, bytes: usize) -> Result<Pinned> {
        self.context.bind_to_thread().map_err(driver("bind the context"))?;
        // The driver gives no memory of no size.
        // SAFETY: initialised below, before anything reads it.
        let start = unsafe { result::malloc_host(bytes.max(1), 0) };
        let start = start.map_err(driver("allocate pinned memory"))?.cast::<u8>();
        // SAFETY: new memory of at least so many bytes.
        unsafe { start.write_bytes(0, bytes) };
        Ok(Pinned { start, bytes, context: self.context.clone() })
    }

    fn event(&self) -> Result<CudaEvent> {
        self.context.new_event(None).map_err(driver("make an event"))
    }

    unsafe fn upload_pinned(&self, stream: &Self::Stream, to: u64, bytes: &[u8]) -> Result<()> {
        // The same call of the driver: it returns before pinned memory is read.
        // SAFETY: the caller's promise.
        unsafe { self.upload(stream, to, bytes) }
    }

    fn record(stream: &Self::Stream, event: &CudaEvent) -> Result<()> {
        event.record(stream).map_err(driver("record an event"))
    }

    fn has_passed(event: &CudaEvent) -> Result<bool> {
        event.context().bind_to_thread().map_err(driver("bind the context"))?;
        // In other modes the query would end captures of other streams with an error.
        let mode = exchange_capture_mode(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)?;
        let passed = event.try_is_complete().map_err(driver("ask whether an event has passed"));
        exchange_capture_mode(mode)?;
        passed
    }

    fn wait(event: &CudaEvent) -> Result<()> {
        event.synchronize().map_err(driver("wait for an event"))
    }
}

impl<'a, T> Span<'a, Driver, T> {
    /// The elements of a slice or view, after all earlier writes to them.
    pub fn of<S: DevicePtr<T>>(slice: &'a S, stream: &'a Arc<CudaStream>) -> Self {
        let (address, guard) = slice.device_ptr(stream);
        Self::guarded(address, slice.len(), stream, guard)
    }
}

impl<'a, T> SpanMut<'a, Driver, T> {
    /// The elements of a slice or view, after all earlier reads and writes of them.
    pub fn of<S: DevicePtrMut<T>>(slice: &'a mut S, stream: &'a Arc<CudaStream>) -> Self {
        let len = slice.len();
        let (address, guard) = slice.device_ptr_mut(stream);
        Self::guarded(address, len, stream, guard)
    }
}
