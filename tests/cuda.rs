//! What only a GPU has: slices and streams of cudarc and of others, graphs, threads. Needs one, and
//! `--ignored`.

#![cfg(feature = "cuda")]

use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaSlice, CudaStream, result};
use star_attention::cpu::reference;
use star_attention::cuda::driver::Driver;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Device, DeviceTensor, DeviceTensorMut, Launch, Span, SpanMut, Staging};
use star_attention::{AttentionConfig, AttentionShape, Error, Inputs, Mask, TensorView, bf16};
use std::ffi::c_void;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const SHAPE: AttentionShape = AttentionShape {
    batch: 1,
    query_len: 4,
    key_len: 3000,
    query_heads: 8,
    kv_heads: 2,
    head_dim: 128,
    value_dim: 128,
};

/// A merge, launched by name.
const KERNEL: &str = "merge_f32_f32";
/// Parameters of a merge of no rows: a batch of 0, with one token, one head and one lane, as the
/// kernel divides by these.
const NO_ROWS: [u8; 112] = {
    let mut params = [0; 112];
    (params[96], params[100], params[108]) = (1, 1, 1);
    params
};
/// Of a block, on every GPU.
const MOST_THREADS: u32 = 1024;

fn values(count: usize, seed: u64) -> Vec<bf16> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bf16::from_f32((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
        })
        .collect()
}

/// Inputs in CPU memory and what the definition gives for them.
struct Case {
    query: Vec<bf16>,
    key: Vec<bf16>,
    value: Vec<bf16>,
    expected: Vec<f64>,
}

impl Case {
    fn new(seed: u64) -> Self {
        let count = |shape: [usize; 4]| shape.iter().product();
        let query = values(count(SHAPE.query_shape()), seed);
        let key = values(count(SHAPE.key_shape()), seed + 1);
        let value = values(count(SHAPE.key_shape()), seed + 2);
        let view = |data, shape| TensorView::contiguous("tensor", data, shape).unwrap();
        let expected = reference::attention(
            &AttentionConfig::new(Mask::Causal),
            view(&query, SHAPE.query_shape()),
            view(&key, SHAPE.key_shape()),
            view(&value, SHAPE.key_shape()),
        );
        Self { query, key, value, expected: expected.unwrap().out }
    }

    fn check(&self, out: &[f32]) {
        assert_eq!(out.len(), self.expected.len());
        for (got, expected) in out.iter().zip(&self.expected) {
            assert!((f64::from(*got) - expected).abs() < 2e-3, "{got} for {expected}");
        }
    }
}

fn plan(driver: &Driver) -> Plan {
    let plan = Plan::new(&driver.properties(), &AttentionConfig::new(Mask::Causal), &SHAPE).unwrap();
    assert!(plan.splits() > 1, "so that the merge runs too");
    plan
}

/// One call on slices and views of cudarc.
fn run(
    driver: &Driver,
    stream: &Arc<CudaStream>,
    inputs: [&CudaSlice<bf16>; 3],
    out: &mut CudaSlice<f32>,
    workspace: &mut CudaSlice<u8>,
) -> star_attention::Result<()> {
    let plan = plan(driver);
    let [query, key, value] = inputs;
    let key = key.slice(..);
    plan.prepare(driver, stream, SpanMut::of(workspace, stream))?.run(
        Inputs::new(
            &DeviceTensor::contiguous("query", Span::of(query, stream), SHAPE.query_shape())?,
            &DeviceTensor::contiguous("key", Span::of(&key, stream), SHAPE.key_shape())?,
            &DeviceTensor::contiguous("value", Span::of(value, stream), SHAPE.key_shape())?,
        ),
        &mut DeviceTensorMut::contiguous("out", SpanMut::of(out, stream), SHAPE.query_shape())?,
        None,
    )
}

fn on_stream(driver: &Driver, stream: &Arc<CudaStream>, case: &Case) -> Vec<f32> {
    let [query, key, value] =
        [&case.query, &case.key, &case.value].map(|data| stream.clone_htod(data).unwrap());
    let mut out = stream.alloc_zeros::<f32>(case.query.len()).unwrap();
    let mut workspace = stream.alloc_zeros::<u8>(plan(driver).workspace_bytes()).unwrap();
    run(driver, stream, [&query, &key, &value], &mut out, &mut workspace).unwrap();
    let out = stream.clone_dtoh(&out).unwrap();
    stream.synchronize().unwrap();
    out
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn every_kernel_loads() {
    let driver = Driver::open(0).unwrap();
    driver.load(driver.kernels()).unwrap();
}

/// The default stream, one of its own, and one that another library owns.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn any_stream_of_the_device_serves() {
    let driver = Driver::open(0).unwrap();
    let case = Case::new(1);
    let own = driver.context().new_stream().unwrap();
    // SAFETY: a stream of this context that outlives the wrapper.
    let borrowed = unsafe { driver.context().wrap_borrowed_stream(own.cu_stream()) };
    for stream in [driver.context().default_stream(), own, borrowed] {
        case.check(&on_stream(&driver, &stream, &case));
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn handles_serve_many_threads() {
    let driver = Driver::open(0).unwrap();
    let case = Case::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let stream = driver.context().new_stream().unwrap();
                case.check(&on_stream(&driver, &stream, &case));
            });
        }
    });
}

/// A captured call runs again on what its buffers then hold, also after the `Driver` that loaded
/// its kernels was dropped.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn calls_can_be_captured_in_a_graph() {
    let driver = Driver::open(0).unwrap();
    // SAFETY: all work below is on one stream; events cannot be waited for in a capture.
    unsafe { driver.context().disable_event_tracking() };
    driver.load(driver.kernels()).unwrap();
    let stream = driver.context().new_stream().unwrap();
    let first = Case::new(7);
    let [mut query, mut key, mut value] =
        [&first.query, &first.key, &first.value].map(|data| stream.clone_htod(data).unwrap());
    let mut out = stream.alloc_zeros::<f32>(first.query.len()).unwrap();
    let plan = plan(&driver);
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).unwrap();
    let graph = {
        let mut prepared = plan.prepare(&driver, &stream, SpanMut::of(&mut workspace, &stream)).unwrap();
        let tensor =
            |name, data, shape| DeviceTensor::contiguous(name, Span::of(data, &stream), shape).unwrap();
        let (q, k, v) = (
            tensor("query", &query, SHAPE.query_shape()),
            tensor("key", &key, SHAPE.key_shape()),
            tensor("value", &value, SHAPE.key_shape()),
        );
        let to = SpanMut::of(&mut out, &stream);
        let mut to = DeviceTensorMut::contiguous("out", to, SHAPE.query_shape()).unwrap();
        stream.synchronize().unwrap();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        prepared.run(Inputs::new(&q, &k, &v), &mut to, None).unwrap();
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        stream.end_capture(flags).unwrap().expect("a graph")
    };
    drop(driver);
    let zeros = stream.clone_dtoh(&out).unwrap();
    stream.synchronize().unwrap();
    assert!(zeros.iter().all(|&x| x == 0.0), "captured, not run");
    for case in [first, Case::new(10)] {
        stream.memcpy_htod(&case.query, &mut query).unwrap();
        stream.memcpy_htod(&case.key, &mut key).unwrap();
        stream.memcpy_htod(&case.value, &mut value).unwrap();
        graph.launch().unwrap();
        let out = stream.clone_dtoh(&out).unwrap();
        stream.synchronize().unwrap();
        case.check(&out);
    }
}

/// The driver's own answer is kept.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn errors_of_the_driver_are_named() {
    let driver = Driver::open(0).unwrap();
    let stream = driver.context().new_stream().unwrap();
    let launch =
        Launch { kernel: KERNEL, blocks: 1, threads: MOST_THREADS + 1, shared_bytes: 0, params: &NO_ROWS };
    // SAFETY: the driver refuses such blocks.
    let error = unsafe { driver.launch(&stream, &launch) }.unwrap_err();
    assert!(matches!(error, Error::Driver { operation: "launch a kernel", .. }), "{error}");
}

/// Whether this process runs one test only. If not, the test of this name has passed in one that
/// does.
fn is_alone(test: &str) -> bool {
    const ALONE: &str = "STAR_ATTENTION_TEST_ALONE";
    let alone = std::env::var_os(ALONE).is_some();
    if !alone {
        let mut process = Command::new(std::env::current_exe().unwrap());
        let output = process.args(["--ignored", "--exact", test]).env(ALONE, "1").output().unwrap();
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && stdout.contains("1 passed"), "{stdout}");
    }
    alone
}

/// In a process of its own, where no other test has loaded the kernel.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn many_threads_launch_a_kernel_that_is_not_loaded_yet() {
    if !is_alone("many_threads_launch_a_kernel_that_is_not_loaded_yet") {
        return;
    }
    let driver = Driver::open(0).unwrap();
    let start = Barrier::new(16);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let stream = driver.context().new_stream().unwrap();
                let launch =
                    Launch { kernel: KERNEL, blocks: 1, threads: 256, shared_bytes: 0, params: &NO_ROWS };
                start.wait();
                // SAFETY: a merge of no rows reads and writes no memory.
                unsafe { driver.launch(&stream, &launch) }.unwrap();
                stream.synchronize().unwrap();
            });
        }
    });
}

/// Its copy would read the plan's memory whenever the graph is replayed.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_plan_is_not_prepared_on_a_captured_stream() {
    let driver = Driver::open(0).unwrap();
    // SAFETY: all work below is on one stream; events cannot be waited for in a capture.
    unsafe { driver.context().disable_event_tracking() };
    let stream = driver.context().new_stream().unwrap();
    let plan = plan(&driver);
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).unwrap();
    stream.synchronize().unwrap();
    let workspace = SpanMut::of(&mut workspace, &stream);
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let prepared = plan.prepare(&driver, &stream, workspace).map(|_| ());
    // SAFETY: refused before anything is copied.
    let uploaded = unsafe { driver.upload(&stream, 256, &[0; 16]) };
    // SAFETY: as above.
    let downloaded = unsafe { driver.download(&stream, 256, &mut [0; 16]) };
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    stream.end_capture(flags).unwrap();
    for refused in [prepared, uploaded, downloaded] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::Value { argument: "stream", .. }), "{error}");
    }
}

/// What memory holds after all work of the stream.
fn read(stream: &Arc<CudaStream>, memory: &CudaSlice<u8>) -> Vec<u8> {
    let bytes = stream.clone_dtoh(memory).unwrap();
    stream.synchronize().unwrap();
    bytes
}

/// While a stream is captured its ring is left alone; afterwards it serves as before.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn staged_copies_are_not_captured() {
    let driver = Driver::open(0).unwrap();
    // SAFETY: all work below is on one stream; events cannot be waited for in a capture.
    unsafe { driver.context().disable_event_tracking() };
    let stream = driver.context().new_stream().unwrap();
    let mut staging = Staging::new(&driver, 1, 16).unwrap();
    let mut memory = stream.alloc_zeros::<u8>(16).unwrap();
    stream.synchronize().unwrap();
    let mut to = SpanMut::of(&mut memory, &stream);
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let refused = staging.copy(&driver, &stream, &mut to, &[(0, &[1; 16])]);
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    stream.end_capture(flags).unwrap();
    let error = refused.unwrap_err();
    assert!(matches!(error, Error::Value { argument: "stream", .. }), "{error}");
    staging.copy(&driver, &stream, &mut to, &[(3, &[2; 5])]).unwrap();
    drop(to);
    let mut expected = [0; 16];
    expected[3..8].fill(2);
    assert_eq!(read(&stream, &memory), expected);
}

/// A capture in the strictest mode goes on while a ring copies on another stream. In a process of
/// its own: calls of other tests would end the capture.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn staged_copies_leave_captures_of_other_streams_alone() {
    if !is_alone("staged_copies_leave_captures_of_other_streams_alone") {
        return;
    }
    let driver = Driver::open(0).unwrap();
    // SAFETY: each stream has memory of its own; events cannot be waited for in a capture.
    unsafe { driver.context().disable_event_tracking() };
    let [stream, captured] = [(); 2].map(|()| driver.context().new_stream().unwrap());
    let mut staging = Staging::new(&driver, 1, 4).unwrap();
    let mut memory = stream.alloc_zeros::<u8>(4).unwrap();
    let mut captured_memory = captured.alloc_zeros::<u8>(4).unwrap();
    let mut to = SpanMut::of(&mut memory, &stream);
    // So that the next copy asks for an event.
    staging.copy(&driver, &stream, &mut to, &[(0, &[1; 4])]).unwrap();
    stream.synchronize().unwrap();
    captured.synchronize().unwrap();
    captured.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL).unwrap();
    captured.memset_zeros(&mut captured_memory).unwrap();
    let copied = staging.copy(&driver, &stream, &mut to, &[(0, &[2; 4])]);
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    captured.end_capture(flags).unwrap().expect("a graph");
    copied.unwrap();
    drop(to);
    assert_eq!(read(&stream, &memory), [2; 4]);
}

/// Opened by the test, or after a time that only a call that waits for the stream takes.
static GATE: AtomicBool = AtomicBool::new(false);

unsafe extern "C" fn wait_for_gate(_: *mut c_void) {
    let start = Instant::now();
    while !GATE.load(Ordering::Acquire) && start.elapsed() < Duration::from_secs(20) {
        std::thread::yield_now();
    }
}

/// The ring is full while the stream stands still, and has free slots when its work is done.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn staged_copies_do_not_wait_for_the_stream() {
    let driver = Driver::open(0).unwrap();
    let stream = driver.context().new_stream().unwrap();
    let mut staging = Staging::new(&driver, 2, 4).unwrap();
    let mut memory = stream.alloc_zeros::<u8>(4).unwrap();
    let mut copy = |byte| {
        let to = &mut SpanMut::of(&mut memory, &stream);
        staging.copy(&driver, &stream, to, &[(0, &[byte; 4])])
    };
    driver.context().bind_to_thread().unwrap();
    // SAFETY: a function that may be called at any time, with any argument.
    let launched = unsafe {
        result::stream::launch_host_function(stream.cu_stream(), wait_for_gate, std::ptr::null_mut())
    };
    launched.unwrap();
    let [first, second, third] = [1, 2, 3].map(&mut copy);
    GATE.store(true, Ordering::Release);
    stream.synchronize().unwrap();
    first.unwrap();
    second.unwrap();
    assert!(matches!(third, Err(Error::Busy { slots: 2 })), "{third:?}");
    copy(4).unwrap();
    assert_eq!(read(&stream, &memory), [4; 4]);
}

/// Memory borrowed for one stream does not go to another: nothing would order the two.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn memory_for_another_stream_is_refused() {
    let driver = Driver::open(0).unwrap();
    let [stream, other] = [(); 2].map(|()| driver.context().new_stream().unwrap());
    let (plan, elements) = (plan(&driver), SHAPE.key_shape().iter().product::<usize>());
    let data = stream.alloc_zeros::<bf16>(elements).unwrap();
    let mut out = stream.alloc_zeros::<f32>(elements).unwrap();
    let mut workspace = stream.alloc_zeros::<u8>(plan.workspace_bytes()).unwrap();
    let mut prepared = plan.prepare(&driver, &stream, SpanMut::of(&mut workspace, &stream)).unwrap();
    let rows = SHAPE.query_shape().iter().product();
    let query = Span::of(&data, &stream).range(0..rows);
    let query = DeviceTensor::contiguous("query", query, SHAPE.query_shape()).unwrap();
    let key = DeviceTensor::contiguous("key", Span::of(&data, &other), SHAPE.key_shape()).unwrap();
    let to = SpanMut::of(&mut out, &stream).range(0..rows);
    let mut to = DeviceTensorMut::contiguous("out", to, SHAPE.query_shape()).unwrap();
    let error = prepared.run(Inputs::new(&query, &key, &key), &mut to, None).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "key", .. }), "{error}");
    let mut staging = Staging::new(&driver, 1, 4).unwrap();
    let mut bytes = stream.alloc_zeros::<u8>(4).unwrap();
    let to = &mut SpanMut::of(&mut bytes, &stream);
    let error = staging.copy(&driver, &other, to, &[(0, &[1; 4])]).unwrap_err();
    assert!(matches!(error, Error::Value { argument: "to", .. }), "{error}");
}

/// Of another device, where there is one.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn streams_of_other_devices_are_refused() {
    if Driver::count().unwrap() < 2 {
        println!("skipped: there is one GPU");
        return;
    }
    let (driver, other) = (Driver::open(0).unwrap(), Driver::open(1).unwrap());
    let stream = other.context().new_stream().unwrap();
    // SAFETY: refused before anything is copied.
    let error = unsafe { driver.upload(&stream, 256, &[0; 16]) }.unwrap_err();
    assert!(matches!(error, Error::Value { argument: "stream", .. }), "{error}");
}

#[test]
fn handles_are_send_and_sync() {
    fn check<T: Send + Sync>() {}
    fn check_send<T: Send>() {}
    check::<Driver>();
    check::<Plan>();
    check_send::<Staging<Driver>>();
}
