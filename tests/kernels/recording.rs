//! Backends whose calls can be captured in a graph and replayed: the emulator, and GPUs.

use star_attention::cuda::simt::{Buffer, Simt};
use star_attention::cuda::{Cuda, Device, Launch, Properties};
use star_attention::{Backend, Error, Result};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The emulator with a stream whose launches can be recorded and replayed, as a graph's are.
#[derive(Debug, Default)]
pub struct Recording {
    emulator: Simt,
    graph: Mutex<Vec<Recorded>>,
    /// The copy from pinned memory that fails, counted down; none at 0.
    failing: AtomicUsize,
}

impl Recording {
    /// Lets the `nth` copy from pinned memory from here on fail; 1 is the next.
    pub fn fail_copy(&self, nth: usize) {
        self.failing.store(nth, Ordering::Relaxed);
    }
}

/// A launch of a graph.
#[derive(Clone, Debug)]
pub struct Recorded {
    kernel: String,
    blocks: u32,
    threads: u32,
    shared_bytes: u32,
    params: Vec<u8>,
}

impl Device for Recording {
    /// Whether it is being captured.
    type Stream = AtomicBool;
    type Guard<'a> = ();
    type Memory = Buffer<u8>;
    type Pinned = Vec<u8>;
    type Event = ();

    fn properties(&self) -> Properties {
        self.emulator.properties()
    }

    fn stream_id(_: &AtomicBool) -> [u64; 2] {
        [0; 2]
    }

    fn is_capturing(stream: &AtomicBool) -> Result<bool> {
        Ok(stream.load(Ordering::Relaxed))
    }

    unsafe fn launch(&self, stream: &AtomicBool, launch: &Launch<'_>) -> Result<()> {
        if !stream.load(Ordering::Relaxed) {
            // SAFETY: the caller's promise.
            return unsafe { self.emulator.launch(&(), launch) };
        }
        let Launch { kernel, blocks, threads, shared_bytes, params } = *launch;
        let (kernel, params) = (kernel.to_string(), params.to_vec());
        self.graph.lock().unwrap().push(Recorded { kernel, blocks, threads, shared_bytes, params });
        Ok(())
    }

    unsafe fn upload(&self, stream: &AtomicBool, to: u64, bytes: &[u8]) -> Result<()> {
        assert!(!stream.load(Ordering::Relaxed), "a copy was recorded");
        // SAFETY: the caller's promise.
        unsafe { self.emulator.upload(&(), to, bytes) }
    }

    unsafe fn download(&self, _: &AtomicBool, from: u64, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.emulator.download(&(), from, bytes) }
    }

    fn allocate(&self, _: &AtomicBool, bytes: usize) -> Result<Buffer<u8>> {
        self.emulator.allocate(&(), bytes)
    }

    fn address(memory: &Buffer<u8>) -> u64 {
        Simt::address(memory)
    }

    fn pinned(&self, bytes: usize) -> Result<Vec<u8>> {
        self.emulator.pinned(bytes)
    }

    fn event(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn upload_pinned(&self, stream: &AtomicBool, to: u64, bytes: &[u8]) -> Result<()> {
        if self.failing.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) == Ok(1) {
            return Err(Error::Unavailable { what: "the device", reason: "a copy fails".into() });
        }
        // SAFETY: the caller's promise.
        unsafe { self.upload(stream, to, bytes) }
    }

    fn record(_: &AtomicBool, (): &()) -> Result<()> {
        Ok(())
    }

    fn has_passed((): &()) -> Result<bool> {
        Ok(true)
    }

    fn wait((): &()) -> Result<()> {
        Ok(())
    }
}

/// A backend whose calls can be captured and replayed.
pub trait Captures: Backend {
    type Graph;
    /// Records what `calls` asks for.
    fn capture(&self, calls: impl FnOnce()) -> Self::Graph;
    fn replay(&self, graph: &Self::Graph);
}

impl Captures for Cuda<Recording> {
    type Graph = Vec<Recorded>;

    fn capture(&self, calls: impl FnOnce()) -> Vec<Recorded> {
        self.stream().store(true, Ordering::Relaxed);
        calls();
        self.stream().store(false, Ordering::Relaxed);
        std::mem::take(&mut self.device().graph.lock().unwrap())
    }

    fn replay(&self, graph: &Vec<Recorded>) {
        for Recorded { kernel, blocks, threads, shared_bytes, params } in graph {
            let launch =
                Launch { kernel, blocks: *blocks, threads: *threads, shared_bytes: *shared_bytes, params };
            // SAFETY: the memory that was captured lives as long as the test.
            unsafe { self.device().launch(self.stream(), &launch) }.unwrap();
        }
    }
}

#[cfg(feature = "cuda")]
impl Captures for Cuda<star_attention::cuda::driver::Driver> {
    type Graph = cudarc::driver::CudaGraph;

    fn capture(&self, calls: impl FnOnce()) -> Self::Graph {
        use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
        self.stream().synchronize().unwrap();
        self.stream().begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        calls();
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        self.stream().end_capture(flags).unwrap().expect("a graph")
    }

    fn replay(&self, graph: &Self::Graph) {
        graph.launch().unwrap();
    }
}
