//! What is refused before anything is asked of a device: copies while a stream is captured, memory
//! of another stream, and extents that kernels cannot count.

use crate::common::{extents, named};
use star_attention::comm::{DeviceCollective, Staged, ThreadGroup};
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{
    Cuda, Device, DeviceTensor, DeviceTensorMut, Launch, Partials, Properties, Span, SpanMut, append, merge,
    merge_separate,
};
use star_attention::merge::PartialOf;
use star_attention::{
    Append, AttentionConfig, AttentionShape, Backend, Batch, Capacity, Element, Inputs, Keys, Mask,
    PlanConfig, Result, Sequence, f16,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A device without memory that counts what it is asked for.
#[derive(Debug, Default)]
struct Recorder {
    copies: AtomicUsize,
    launches: AtomicUsize,
}

impl Recorder {
    /// Copies and launches so far.
    fn asked_for(&self) -> [usize; 2] {
        [&self.copies, &self.launches].map(|count| count.load(Ordering::Relaxed))
    }
}

/// A stream of a [`Recorder`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stream {
    Plain,
    Captured,
    Other,
}

impl Device for Recorder {
    type Stream = Stream;
    type Guard<'a> = ();
    type Memory = Vec<u8>;
    type Pinned = Vec<u8>;
    type Event = ();

    fn properties(&self) -> Properties {
        Properties::new(8, 100 * 1024, 1024 * 1024)
    }

    fn stream_id(stream: &Stream) -> [u64; 2] {
        [0, u64::from(*stream == Stream::Other)]
    }

    fn is_capturing(stream: &Stream) -> Result<bool> {
        Ok(*stream == Stream::Captured)
    }

    unsafe fn launch(&self, _: &Stream, _: &Launch<'_>) -> Result<()> {
        self.launches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    unsafe fn upload(&self, _: &Stream, _: u64, _: &[u8]) -> Result<()> {
        self.copies.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    unsafe fn download(&self, _: &Stream, _: u64, _: &mut [u8]) -> Result<()> {
        self.copies.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn allocate(&self, _: &Stream, bytes: usize) -> Result<Vec<u8>> {
        Ok(vec![0; bytes])
    }

    fn address(memory: &Vec<u8>) -> u64 {
        memory.as_ptr().expose_provenance() as u64
    }

    fn pinned(&self, bytes: usize) -> Result<Vec<u8>> {
        Ok(vec![0; bytes])
    }

    fn event(&self) -> Result<()> {
        Ok(())
    }

    unsafe fn upload_pinned(&self, _: &Stream, _: u64, _: &[u8]) -> Result<()> {
        self.copies.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn record(_: &Stream, (): &()) -> Result<()> {
        Ok(())
    }

    fn has_passed((): &()) -> Result<bool> {
        Ok(true)
    }

    fn wait((): &()) -> Result<()> {
        Ok(())
    }
}

fn span<'a, T>(len: usize) -> Span<'a, Recorder, T> {
    // SAFETY: a recorder touches no memory.
    unsafe { Span::from_raw(256, len) }
}

fn span_mut<'a, T>(len: usize) -> SpanMut<'a, Recorder, T> {
    // SAFETY: a recorder touches no memory.
    unsafe { SpanMut::from_raw(256, len) }
}

/// Row-major, for extents of any size.
fn strides([_, seq, heads, dim]: [usize; 4]) -> [usize; 4] {
    let token = heads.wrapping_mul(dim);
    [seq.wrapping_mul(token), token, dim, 1]
}

fn tensor<'a, T: Element>(shape: [usize; 4]) -> DeviceTensor<'a, Recorder, T> {
    DeviceTensor::new("tensor", span(1 << 60), shape, strides(shape)).unwrap()
}

fn tensor_mut<'a, T: Element>(shape: [usize; 4]) -> DeviceTensorMut<'a, Recorder, T> {
    DeviceTensorMut::new("tensor", span_mut(1 << 60), shape, strides(shape)).unwrap()
}

#[test]
fn a_plan_is_not_prepared_on_a_captured_stream() {
    let recorder = Recorder::default();
    let shape = extents([1, 2, 3], [2, 1], [64, 64]);
    for (query_len, copies) in [(2, 1), (0, 0)] {
        let shape = AttentionShape { query_len, ..shape };
        let plan = Plan::new(&recorder.properties(), &AttentionConfig::default(), &shape).unwrap();
        let prepare = |stream| plan.prepare(&recorder, stream, span_mut(4096)).map(|_| ());
        let before = recorder.asked_for();
        assert_eq!(named(prepare(&Stream::Captured).unwrap_err()), ("value", "stream"));
        assert_eq!(recorder.asked_for(), before);
        prepare(&Stream::Plain).unwrap();
        assert_eq!(recorder.asked_for(), [before[0] + copies, 0]);
    }
}

#[test]
fn calls_through_cpu_memory_are_not_captured() {
    let recorder = Recorder::default();
    let group = ThreadGroup::ranks(1).unwrap().remove(0);
    let staged = Staged { device: &recorder, group: &group };
    let calls = |stream| {
        let parts = || [(span(16), span_mut(16))];
        [
            staged.all_gather(stream, &parts()),
            staged.all_to_all(stream, &parts()),
            staged.broadcast(stream, 0, &mut [span_mut(16)]),
        ]
    };
    for refused in calls(&Stream::Captured) {
        assert_eq!(named(refused.unwrap_err()), ("value", "stream"));
    }
    assert_eq!(recorder.asked_for(), [0, 0]);
    for done in calls(&Stream::Plain) {
        done.unwrap();
    }
    // Two for each, but that the root of a broadcast is not written.
    assert_eq!(recorder.asked_for(), [5, 0]);
}

/// Of new rows and of a cache.
fn append_rows(recorder: &Recorder, rows: [usize; 4], stored: [usize; 4]) -> Result<()> {
    let places = span(rows[0].wrapping_mul(rows[1]));
    let new = Append::new(tensor::<f16>(rows), tensor(rows), places);
    append(recorder, &Stream::Plain, &new, &mut tensor_mut::<f16>(stored), &mut tensor_mut::<f16>(stored))
}

/// Cut to 32 bits, most of them would be no work at all.
#[test]
fn appends_of_extents_that_kernels_cannot_count() {
    let recorder = Recorder::default();
    let stored = [4, 16, 1, 8];
    let big = 1 << 33;
    let rows = [
        [big, 1, 1, 8],
        [1, big, 1, 8],
        [1, 1, big, 8],
        [1, 1, 1, big],
        [big, big, 0, 8],
        [0, 1, big, big],
        // One block too many.
        [1, (1 << 31) - 1, 256, 16],
    ];
    for rows in rows {
        let stored = [4, 16, rows[2].min(256), rows[3].min(16)];
        let error = append_rows(&recorder, rows, stored).unwrap_err();
        assert_eq!(named(error), ("shape", "key"), "{rows:?}");
    }
    for stored in [[big, 1, 1, 8], [1, big, 1, 8], [1 << 16, 1 << 16, 1, 8]] {
        let error = append_rows(&recorder, [1, 2, 1, 8], stored).unwrap_err();
        assert_eq!(named(error), ("shape", "cache_key"), "{stored:?}");
    }
    assert_eq!(recorder.asked_for(), [0, 0]);
    append_rows(&recorder, [1, (1 << 31) - 1, 1, 8], stored).unwrap();
    assert_eq!(recorder.asked_for(), [0, 1]);
}

/// Memory and plans serve the stream that they were made on. With others nothing is asked of the
/// device.
#[test]
fn a_backend_takes_what_was_made_on_its_stream_alone() {
    const SHAPE: [usize; 4] = [1, 2, 2, 64];
    let recorder = Arc::new(Recorder::default());
    let [own, other] =
        [Stream::Plain, Stream::Other].map(|stream| Cuda::<Recorder>::new(recorder.clone(), stream));
    let merge = |wrong: usize| {
        let of = |i: usize| if i == wrong { &other } else { &own };
        let rows = own.buffer::<f32>(256).unwrap();
        let strange = (of(0).buffer::<f32>(256).unwrap(), of(1).buffer::<f32>(4).unwrap());
        let lse = own.buffer::<f32>(4).unwrap();
        let (mut out, mut to_lse) = (of(2).buffer::<f32>(256).unwrap(), of(3).buffer::<f32>(4).unwrap());
        let all = [(&rows, &lse), (&strange.0, &strange.1)].map(|(rows, lse)| PartialOf {
            out: own.whole("partial", rows, SHAPE).unwrap(),
            lse: own.slice(lse, ..),
        });
        let to_lse = own.slice_mut(&mut to_lse, ..);
        own.merge(all.into(), None, own.whole_mut::<f32>("out", &mut out, SHAPE).unwrap(), Some(to_lse))
    };
    for (wrong, argument) in [(0, "partial"), (1, "partial"), (2, "out"), (3, "lse")] {
        assert_eq!(named(merge(wrong).unwrap_err()), ("value", argument));
    }
    let mut buffer = other.buffer::<u32>(4).unwrap();
    assert_eq!(named(own.write(&mut buffer, 0, &[1]).unwrap_err()), ("value", "buffer"));
    assert_eq!(named(own.read(&buffer).unwrap_err()), ("value", "buffer"));
    let capacity = Capacity::new(SHAPE, SHAPE, 1, 1);
    let mut plan = other.plan(&PlanConfig::new(), &capacity).unwrap();
    let batch = Batch::new(SHAPE, SHAPE).unwrap();
    assert_eq!(named(own.update(&mut plan, &batch).unwrap_err()), ("value", "stream"));
    assert_eq!(recorder.asked_for(), [0, 0]);

    merge(4).unwrap();
    other.write(&mut buffer, 0, &[1]).unwrap();
    assert_eq!(recorder.asked_for(), [1, 1]);
}

#[test]
fn merges_of_extents_that_kernels_cannot_count() {
    let recorder = Recorder::default();
    let merge_of = |shape: [usize; 4]| {
        let rows = shape[..3].iter().fold(1usize, |rows, &extent| rows.wrapping_mul(extent));
        let from = Partials { out: tensor::<f16>(shape), lse: span(rows), lse_stride: rows };
        let stacked = merge(&recorder, &Stream::Plain, &from, None, &mut tensor_mut::<f16>(shape), None);
        let from = [PartialOf { out: tensor::<f16>(shape), lse: span(rows) }];
        let out = &mut tensor_mut::<f16>(shape);
        let separate = merge_separate(&recorder, &Stream::Plain, &from, None, out, None);
        assert_eq!(format!("{stacked:?}"), format!("{separate:?}"));
        separate
    };
    let big = 1 << 33;
    for shape in [[big, 1, 1, 1], [1, big, 1, 1], [1, 1, big, 1], [1, 1, 1, big], [1, 1, 1, (1 << 32) - 1]] {
        assert_eq!(named(merge_of(shape).unwrap_err()), ("shape", "out"), "{shape:?}");
    }
    assert_eq!(recorder.asked_for(), [0, 0]);
    // No rows, be the product of the other extents in range or not.
    merge_of([big, big, 0, 8]).unwrap();
    assert_eq!(recorder.asked_for(), [0, 0]);
    merge_of([1, 1, 1, (1 << 31) - 1]).unwrap();
    assert_eq!(recorder.asked_for(), [0, 2]);
}

/// A call that is refused asks for no launch: memory of another stream, a workspace that is too
/// small, and a prefix that is missing where a graph might need it.
#[test]
fn calls_that_do_not_fit_are_not_launched() {
    const SHAPE: [usize; 4] = [1, 2, 2, 64];
    let recorder = Arc::new(Recorder::default());
    let [own, other, captured] = [Stream::Plain, Stream::Other, Stream::Captured]
        .map(|stream| Cuda::<Recorder>::new(recorder.clone(), stream));
    let capacity = Capacity::new(SHAPE, SHAPE, 1, 1).with_prefix(1, 3);
    let mut plan = own.plan(&PlanConfig::new(), &capacity).unwrap();
    let mut batch = Batch::new(SHAPE, SHAPE).unwrap().with_prefix(1, 3).unwrap();
    batch.push(Sequence::new(0, 0..1, Keys::rows(0, 0..2), Mask::Full)).unwrap();
    own.update(&mut plan, &batch).unwrap();
    let copies = recorder.asked_for()[0];
    let bytes = own.workspace_bytes(&plan);
    assert!(bytes > 0);
    let mut attend = |on: &Cuda<Recorder>, out_of: &Cuda<Recorder>, bytes: usize, prefix: bool| {
        let rows = own.buffer::<f16>(256).unwrap();
        let rows_of_prefix = own.buffer::<f16>(3 * 128).unwrap();
        let view = |name| own.whole(name, &rows, SHAPE).unwrap();
        let mut inputs = Inputs::new(view("query"), view("key"), view("value"));
        if prefix {
            let view = || own.whole("prefix", &rows_of_prefix, [1, 3, 2, 64]).unwrap();
            inputs = inputs.with_prefix(view(), view());
        }
        let (mut out, mut workspace) = (out_of.buffer::<f16>(256).unwrap(), own.buffer::<u8>(bytes).unwrap());
        let out = out_of.whole_mut("out", &mut out, SHAPE).unwrap();
        on.attend(&mut plan, inputs, out, None, own.slice_mut(&mut workspace, ..))
    };
    assert_eq!(named(attend(&other, &own, bytes, true).unwrap_err()), ("value", "stream"));
    assert_eq!(named(attend(&own, &other, bytes, true).unwrap_err()), ("value", "out"));
    assert_eq!(named(attend(&own, &own, bytes - 1, true).unwrap_err()), ("workspace", "workspace"));
    assert_eq!(named(attend(&captured, &own, bytes, false).unwrap_err()), ("value", "prefix"));
    assert_eq!(recorder.asked_for(), [copies, 0]);
    attend(&own, &own, bytes, false).unwrap();
    attend(&captured, &own, bytes, true).unwrap();
    assert!(recorder.asked_for()[1] > 1);
}
