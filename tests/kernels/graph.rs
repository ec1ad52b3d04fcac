//! One captured graph decodes for a batch that grows, joins and leaves: what it attends to is the
//! batch of the plan's last update.

use crate::common::Rng;
use star_attention::cuda::simt::{Buffer, Simt};
use star_attention::cuda::{Cuda, Device, Launch, Properties};
use star_attention::{
    Append, Backend, Batch, Capacity, Error, Inputs, Keys, LEFT_OUT, Mask, PlanConfig, Result, Sequence, bf16,
};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The emulator with a stream whose launches can be recorded and replayed, as a graph's are.
#[derive(Debug, Default)]
struct Recording {
    emulator: Simt,
    graph: Mutex<Vec<Recorded>>,
}

#[derive(Clone, Debug)]
struct Recorded {
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
trait Captures: Backend {
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

const SEQUENCES: usize = 4;
const PAGE_LEN: usize = 16;
/// Of a sequence.
const PAGES: usize = 24;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const QUERY: [usize; 4] = [SEQUENCES, 1, HEADS, DIM];
const NEW: [usize; 4] = [SEQUENCES, 1, KV_HEADS, DIM];
const CACHE: [usize; 4] = [SEQUENCES * PAGES, PAGE_LEN, KV_HEADS, DIM];

fn len(shape: [usize; 4]) -> usize {
    shape.iter().product()
}

/// The memory of an engine.
struct Memory<B: Backend> {
    query: B::Buffer<bf16>,
    new: B::Buffer<bf16>,
    places: B::Buffer<u32>,
    cache: [B::Buffer<bf16>; 2],
    out: B::Buffer<f32>,
    lse: B::Buffer<f32>,
    workspace: B::Buffer<u8>,
}

/// One step: the new keys to the cache, and attention.
fn step<B: Backend>(backend: &B, plan: &mut B::Plan, memory: &mut Memory<B>) -> Result<()> {
    let Memory { query, new, places, cache: [key, value], out, lse, workspace } = memory;
    let rows = Append::new(
        backend.whole("key", new, NEW)?,
        backend.whole("value", new, NEW)?,
        backend.slice(places, ..),
    );
    let to_key = backend.whole_mut("cache_key", key, CACHE)?;
    backend.append(rows, to_key, backend.whole_mut("cache_value", value, CACHE)?)?;
    let inputs = Inputs::new(
        backend.whole("query", query, QUERY)?,
        backend.whole("key", key, CACHE)?,
        backend.whole("value", value, CACHE)?,
    );
    let out = backend.whole_mut("out", out, QUERY)?;
    let (lse, workspace) = (backend.slice_mut(lse, ..), backend.slice_mut(workspace, ..));
    backend.attend(plan, inputs, out, Some(lse), workspace)
}

/// Decodes `tokens` tokens by one captured graph, each compared bit for bit with plain calls.
fn decodes_for_a_growing_batch<B: Captures>(backend: &B, config: &PlanConfig, tokens: usize) {
    let capacity = Capacity::new(QUERY, CACHE, SEQUENCES, 1).with_pages(SEQUENCES * PAGES);
    let mut rng = Rng::new(9);
    let mut plan = backend.plan(config, &capacity).unwrap();
    let mut memory = Memory {
        query: backend.buffer(len(QUERY)).unwrap(),
        new: backend.buffer(len(NEW)).unwrap(),
        places: backend.buffer(SEQUENCES).unwrap(),
        cache: [(); 2].map(|()| backend.buffer(len(CACHE)).unwrap()),
        out: backend.buffer(len(QUERY)).unwrap(),
        lse: backend.buffer(SEQUENCES * HEADS).unwrap(),
        workspace: backend.buffer(backend.workspace_bytes(&plan)).unwrap(),
    };
    // Kernels are loaded by a first call; all rows are left out of it.
    backend.write(&mut memory.places, 0, &[LEFT_OUT; SEQUENCES]).unwrap();
    step(backend, &mut plan, &mut memory).unwrap();
    let graph = backend.capture(|| step(backend, &mut plan, &mut memory).unwrap());

    let mut lens = [0usize; SEQUENCES];
    for token in 0..tokens {
        // A sequence starts, with some keys at once, or ends, now and then.
        let at = rng.below(SEQUENCES);
        match rng.below(8) {
            0 => lens[at] = 0,
            1 | 2 if lens[at] == 0 => lens[at] = 1 + rng.below(PAGES * PAGE_LEN - tokens),
            _ => {}
        }
        lens.iter_mut().filter(|len| **len > 0 || token == 0).for_each(|len| *len += 1);
        let mut batch = Batch::new(QUERY, CACHE).unwrap();
        let mut places = [LEFT_OUT; SEQUENCES];
        for (index, &len) in lens.iter().enumerate().filter(|(_, len)| **len > 0) {
            // From the last page to the first.
            let pages: Vec<u32> = (0..PAGES).rev().map(|page| (index * PAGES + page) as u32).collect();
            places[index] = pages[(len - 1) / PAGE_LEN] * PAGE_LEN as u32 + ((len - 1) % PAGE_LEN) as u32;
            batch.push(Sequence::new(index, 0..1, Keys::pages(len, pages), Mask::Causal)).unwrap();
        }
        let mut normal = |len| (0..len).map(|_| bf16::from_f32(rng.normal())).collect::<Vec<bf16>>();
        backend.write(&mut memory.query, 0, &normal(len(QUERY))).unwrap();
        backend.write(&mut memory.new, 0, &normal(len(NEW))).unwrap();
        backend.write(&mut memory.places, 0, &places).unwrap();
        backend.write(&mut memory.out, 0, &[7.0; len_of_query()]).unwrap();
        loop {
            match backend.update(&mut plan, &batch) {
                // The device has not yet come to earlier updates.
                Err(Error::Busy { .. }) => drop(backend.read(&memory.lse).unwrap()),
                updated => break updated.unwrap(),
            }
        }
        backend.replay(&graph);
        let replayed = [backend.read(&memory.out).unwrap(), backend.read(&memory.lse).unwrap()];

        // The same keys are stored again.
        backend.write(&mut memory.out, 0, &[7.0; len_of_query()]).unwrap();
        step(backend, &mut plan, &mut memory).unwrap();
        let plain = [backend.read(&memory.out).unwrap(), backend.read(&memory.lse).unwrap()];
        let mut alone = backend.plan_for(config, &batch).unwrap();
        let mut workspace = backend.buffer(backend.workspace_bytes(&alone)).unwrap();
        std::mem::swap(&mut workspace, &mut memory.workspace);
        step(backend, &mut alone, &mut memory).unwrap();
        std::mem::swap(&mut workspace, &mut memory.workspace);
        let of_one_batch = [backend.read(&memory.out).unwrap(), backend.read(&memory.lse).unwrap()];
        let bits = |results: &[Vec<f32>; 2]| results.concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&replayed), bits(&plain), "token {token}, keys {lens:?}");
        assert_eq!(bits(&replayed), bits(&of_one_batch), "token {token}, keys {lens:?}");
    }
}

const fn len_of_query() -> usize {
    SEQUENCES * HEADS * DIM
}

#[test]
fn a_graph_on_the_emulator() {
    let backend = Cuda::new(Recording::default(), AtomicBool::new(false));
    decodes_for_a_growing_batch(&backend, &PlanConfig::new(), 100);
    decodes_for_a_growing_batch(&backend, &PlanConfig::new().with_split_keys(64), 100);
    decodes_for_a_growing_batch(&backend, &PlanConfig::new().with_row_invariant(), 20);
}

#[test]
#[cfg(feature = "cuda")]
#[ignore = "needs an NVIDIA GPU"]
fn a_graph_on_a_gpu() {
    let backend = crate::engine::gpu();
    decodes_for_a_growing_batch(&backend, &PlanConfig::new(), 100);
    decodes_for_a_growing_batch(&backend, &PlanConfig::new().with_split_keys(64), 100);
    decodes_for_a_growing_batch(&backend, &PlanConfig::new().with_row_invariant(), 100);
}

/// What a graph would copy again and again is an error, and the plan stays as it was.
#[test]
fn no_update_is_captured() {
    let backend = Cuda::new(Recording::default(), AtomicBool::new(false));
    let capacity = Capacity::new(QUERY, CACHE, SEQUENCES, 1).with_pages(SEQUENCES * PAGES);
    let mut plan = backend.plan(&PlanConfig::new(), &capacity).unwrap();
    let mut batch = Batch::new(QUERY, CACHE).unwrap();
    batch.push(Sequence::new(0, 0..1, Keys::pages(1, [0]), Mask::Causal)).unwrap();
    let refused = |result: Result<()>| {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Value { argument: "stream", .. }), "{error}");
    };
    let graph = backend.capture(|| {
        refused(backend.update(&mut plan, &batch));
        refused(backend.plan_for(&PlanConfig::new(), &batch).map(drop));
        refused(backend.plan(&PlanConfig::new(), &capacity).map(drop));
    });
    assert!(graph.is_empty());
    backend.update(&mut plan, &batch).unwrap();
}
