//! Bad input: a typed error that names the argument, and nothing written.

use crate::backend::Backend;
use crate::call::on_each_device;
use crate::common::{extents, named, of_sequence};
use crate::properties::cases::RUBBISH;
use half::{bf16, f16};
use star_attention::cuda::flash::{PageTable, Plan};
use star_attention::cuda::{
    Device, DeviceTensor, DeviceTensorMut, Partials, Properties, Span, SpanMut, append, merge,
};
use star_attention::{
    AttentionConfig, AttentionShape, Batch, Element, Error, Inputs, Keys, Mask, PlanConfig, Result, Rotation,
    ScoreConfig, Sequence,
};

const PROPERTIES: Properties = Properties::new(132, 228 * 1024, 50 << 20);
const SHAPE: AttentionShape = extents([2, 3, 5], [4, 2], [64, 64]);
const QUERY: [usize; 4] = [2, 3, 4, 64];
const KEY: [usize; 4] = [2, 5, 2, 64];
const LSE: usize = 24;
/// Enough for every tensor of the calls below.
const ELEMENTS: usize = 8192;

/// A call of which one thing is wrong.
#[derive(Clone, Copy)]
struct Call {
    shapes: [[usize; 4]; 4],
    /// Elements between the rows of the tensors q, k, v and out, beyond a row.
    gaps: [usize; 4],
    /// The stride of their last axis.
    steps: [usize; 4],
    /// Elements before their first.
    offsets: [usize; 4],
    lse: usize,
    workspace: [usize; 2],
}

const GOOD: Call = Call {
    shapes: [QUERY, KEY, KEY, QUERY],
    gaps: [0; 4],
    steps: [1; 4],
    offsets: [0; 4],
    lse: LSE,
    workspace: [0, 4096],
};

impl Call {
    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn strides(&self, tensor: usize) -> [usize; 4] {
        let [_, seq, heads, dim] = self.shapes[tensor];
        let row = dim * self.steps[tensor] + self.gaps[tensor];
        [seq * heads * row, heads * row, row, self.steps[tensor]]
    }

    /// Makes the call with an output of type `O`; asserts that nothing was written if it is
    /// refused.
    fn run<B: Backend, O: Element>(&self) -> Result<()> {
        let backend = B::open(0);
        let plan = Plan::new(&backend.device().properties(), &AttentionConfig::default(), &SHAPE).unwrap();
        let input = backend.memory(&vec![f16::from_f32(0.5); ELEMENTS]);
        let rubbish = O::from_f32(RUBBISH);
        let mut rows = backend.memory(&[rubbish; ELEMENTS]);
        let mut lse = backend.memory(&vec![RUBBISH; self.lse]);
        let mut workspace = backend.memory(&[0u8; ELEMENTS]);
        let view = |i: usize, name| {
            let span = backend.span(&input).range(self.offsets[i]..usize::MAX);
            DeviceTensor::new(name, span, self.shapes[i], self.strides(i)).unwrap()
        };
        let result = {
            let span = backend.span_mut(&mut rows).range(self.offsets[3]..usize::MAX);
            let mut out = DeviceTensorMut::new("o", span, self.shapes[3], self.strides(3)).unwrap();
            let [start, end] = self.workspace;
            let workspace = backend.span_mut(&mut workspace).range(start..end);
            plan.prepare(backend.device(), backend.stream(), workspace).and_then(|mut prepared| {
                let lse = &mut backend.span_mut(&mut lse);
                let (query, key, value) = (view(0, "q"), view(1, "k"), view(2, "v"));
                prepared.run(Inputs::new(&query, &key, &value), &mut out, Some(lse))
            })
        };
        if result.is_err() {
            let written = backend.read(&rows).iter().any(|x| x.to_f32() != rubbish.to_f32());
            assert!(!written && backend.read(&lse).iter().all(|&x| x == RUBBISH), "{result:?}");
        }
        result
    }

    fn fails_with<B: Backend>(&self, kind: &str, argument: &str) {
        assert_eq!(named(self.run::<B, f16>().unwrap_err()), (kind, argument));
    }
}

const NAMES: [&str; 4] = ["query", "key", "value", "out"];

on_each_device! {
    fn the_good_call_is_good() {
        GOOD.run::<B, f16>().unwrap();
        GOOD.run::<B, f32>().unwrap();
    }

    fn shapes_that_are_not_the_plans() {
        for (tensor, name) in NAMES.into_iter().enumerate() {
            for axis in 0..4 {
                GOOD.with(|call| call.shapes[tensor][axis] += 1).fails_with::<B>("shape", name);
                GOOD.with(|call| call.shapes[tensor][axis] -= 1).fails_with::<B>("shape", name);
            }
        }
        for lse in [0, LSE - 1, LSE + 1] {
            GOOD.with(|call| call.lse = lse).fails_with::<B>("shape", "lse");
        }
    }

    fn rows_that_cannot_be_copied_16_bytes_at_a_time() {
        for (tensor, name) in NAMES.into_iter().enumerate() {
            GOOD.with(|call| call.gaps[tensor] = 8).run::<B, f16>().unwrap();
            GOOD.with(|call| call.offsets[tensor] = 8).run::<B, f16>().unwrap();
            GOOD.with(|call| call.gaps[tensor] = 4).fails_with::<B>("stride", name);
            GOOD.with(|call| call.steps[tensor] = 2).fails_with::<B>("stride", name);
            GOOD.with(|call| call.offsets[tensor] = 1).fails_with::<B>("value", name);
        }
    }

    fn outputs_of_other_types() {
        assert_eq!(named(GOOD.run::<B, bf16>().unwrap_err()), ("dtype", "out"));
    }

    fn workspaces_too_small_or_not_aligned() {
        let plan = Plan::new(&B::open(0).device().properties(), &AttentionConfig::default(), &SHAPE).unwrap();
        let needed = plan.workspace_bytes();
        GOOD.with(|call| call.workspace = [0, needed]).run::<B, f16>().unwrap();
        match GOOD.with(|call| call.workspace = [0, needed - 1]).run::<B, f16>() {
            Err(Error::Workspace { expected, got }) => assert_eq!((expected, got), (needed, needed - 1)),
            other => panic!("{other:?}"),
        }
        GOOD.with(|call| call.workspace = [8, 4096]).fails_with::<B>("value", "workspace");
    }

    fn merges_that_do_not_fit() {
        merges::<B>();
    }

    fn appends_that_do_not_fit() {
        appends::<B>();
    }
}

#[test]
fn configs_and_extents_out_of_range() {
    let plan = |config: AttentionConfig, shape| named(Plan::new(&PROPERTIES, &config, &shape).unwrap_err());
    for head_dim in [0, 1, 63, 65, 100, 255, 584] {
        let got = plan(AttentionConfig::default(), AttentionShape { head_dim, ..SHAPE });
        assert_eq!(got, if head_dim == 0 { ("shape", "query") } else { ("value", "head_dim") });
    }
    for value_dim in [0, 1, 63, 100, 516] {
        let got = plan(AttentionConfig::default(), AttentionShape { value_dim, ..SHAPE });
        assert_eq!(got, if value_dim == 0 { ("shape", "value") } else { ("value", "value_dim") });
    }
    let config = AttentionConfig { scale: Some(-1.0), ..Default::default() };
    assert_eq!(plan(config, SHAPE), ("value", "scale"));
    let config = AttentionConfig { softcap: Some(0.0), ..Default::default() };
    assert_eq!(plan(config, SHAPE), ("value", "softcap"));
    let config =
        AttentionConfig::new(Mask::Star { anchor_len: 9, block_len: 8, first_block_len: 9, left: None });
    assert_eq!(plan(config, SHAPE), ("value", "anchor_len"));
    // The last one has 2³³ heads in few enough blocks.
    let heads = [(4, 3, "query"), (0, 2, "query"), (4, 0, "key"), (1 << 33, 1 << 28, "query")];
    for (query_heads, kv_heads, argument) in heads {
        let shape = extents([1, 1, 1], [query_heads, kv_heads], [64, 64]);
        let got = plan(AttentionConfig::default(), shape);
        assert_eq!(got, ("shape", argument));
    }
    const MAX: usize = usize::MAX;
    for [batch, query_len, key_len] in [[MAX, 1, 1], [1, MAX, 1], [1, 1, MAX], [0, MAX, MAX], [1, 1 << 33, 1]]
    {
        for mask in [
            Mask::Full,
            Mask::Causal,
            Mask::Star { anchor_len: 1, block_len: 4, first_block_len: 1, left: None },
        ] {
            let shape = AttentionShape { batch, query_len, key_len, ..SHAPE };
            assert_eq!(plan(AttentionConfig::new(mask), shape).0, "shape");
        }
    }
}

#[test]
fn packed_offsets_and_page_tables_that_do_not_fit() {
    let config = AttentionConfig::default();
    let shape = AttentionShape { batch: 1, ..SHAPE };
    let packed = |query: &[usize], key: &[usize]| {
        named(Plan::packed(&PROPERTIES, &config, &shape, query, key).unwrap_err())
    };
    assert_eq!(packed(&[0, 2], &[0, 5]), ("value", "query_offsets"));
    assert_eq!(packed(&[0, 3], &[0, 6]), ("value", "key_offsets"));
    assert_eq!(packed(&[0, 3], &[0, 2, 5]), ("shape", "key_offsets"));
    let two = Plan::packed(&PROPERTIES, &config, &SHAPE, &[0, 3], &[0, 5]);
    assert_eq!(named(two.unwrap_err()), ("shape", "query"));

    let table = PageTable { pages: 3, page_len: 2, sequences: vec![(3, vec![2, 0]), (2, vec![1])] };
    let paged =
        |table: &PageTable, offsets: &[usize]| Plan::paged(&PROPERTIES, &config, &shape, offsets, table);
    paged(&table, &[0, 1, 3]).unwrap();
    let with = |change: fn(&mut PageTable)| {
        let mut table = table.clone();
        change(&mut table);
        paged(&table, &[0, 1, 3]).unwrap_err()
    };
    assert_eq!(of_sequence(with(|t| t.page_len = 0)), (0, "value", "pages"));
    assert_eq!(of_sequence(with(|t| t.pages = 2)), (0, "value", "pages"));
    assert_eq!(of_sequence(with(|t| t.sequences[1].1 = vec![])), (1, "value", "pages"));
    assert_eq!(named(with(|t| t.page_len = 1 << 32)), ("shape", "key"));
    assert_eq!(named(with(|t| t.sequences[0].0 = 4)), ("value", "key_offsets"));
    assert_eq!(named(with(|t| t.sequences[0].0 = usize::MAX)), ("value", "key_offsets"));
    assert_eq!(named(paged(&table, &[0, 3]).unwrap_err()), ("shape", "key_offsets"));
}

#[test]
fn batches_that_kernels_do_not_take() {
    let plan =
        |score: ScoreConfig, batch: &Batch| Plan::for_batch(&PROPERTIES, &score.into(), batch).unwrap_err();
    let batch = Batch::new(QUERY, KEY).unwrap();
    assert_eq!(named(plan(ScoreConfig::new().with_scale(f32::NAN), &batch)), ("value", "scale"));
    assert_eq!(named(plan(ScoreConfig::new().with_softcap(-1.0), &batch)), ("value", "softcap"));
    let batch = |query, key| Batch::new(query, key).unwrap();
    let score = ScoreConfig::new();
    assert_eq!(named(plan(score, &batch([2, 3, 4, 84], [2, 5, 2, 84]))), ("value", "head_dim"));
    // An axis too long for 32 bits, or too many rows of a KV head.
    const END: usize = 1 << 31;
    for query in [[END, 1, 1, 64], [1, END, 1, 64], [1, 1, END, 64], [1, END / 2, 2, 64]] {
        assert_eq!(named(plan(score, &batch(query, [1, 1, 1, 64]))), ("shape", "query"), "{query:?}");
    }
    for key in [[END, 1, 1, 64], [1, END, 1, 64]] {
        assert_eq!(named(plan(score, &batch([1, 1, 1, 64], key))), ("shape", "key"), "{key:?}");
    }
    // One head's keys may be as many, whatever the group.
    let mut long = batch([1, 1, 128, 64], [1, END - 1, 1, 64]);
    long.push(Sequence::new(0, 0..1, Keys::rows(0, 0..END - 1), Mask::Full)).unwrap();
    Plan::for_batch(&PROPERTIES, &score.into(), &long).unwrap();
    // But not their partial rows, and no split is empty.
    let fixed =
        |split_keys| Plan::for_batch(&PROPERTIES, &PlanConfig::new().with_split_keys(split_keys), &long);
    assert_eq!(named(fixed(1).unwrap_err()), ("value", "split_keys"));
    assert_eq!(named(fixed(0).unwrap_err()), ("value", "split_keys"));
    fixed(1 << 20).unwrap();
    fixed(usize::MAX).unwrap();

    // One key for each, in order of the sequences.
    let of = |all: [Keys; 2]| {
        let mut batch = batch([1, 2, 1, 64], [2, END / 2, 1, 64]);
        for (row, keys) in all.into_iter().enumerate() {
            batch.push(Sequence::new(0, row..row + 1, keys, Mask::Full)).unwrap();
        }
        of_sequence(plan(score, &batch))
    };
    assert_eq!(of([Keys::rows(0, 0..1), Keys::pages(1, [0])]), (1, "value", "keys"));
    assert_eq!(of([Keys::pages(1, [0]), Keys::rows(0, 0..1)]), (1, "value", "keys"));
    assert_eq!(of([Keys::pages(1, [0]), Keys::pages(END, [0, 1])]), (1, "value", "keys"));
}

fn merges<B: Backend>() {
    let backend = B::open(0);
    let shape = [1, 3, 2, 8];
    let partials = backend.memory(&[0.5f32; 192]);
    let lse = backend.memory(&[0.0f32; 12]);
    /// Which of these the merge gets.
    struct Merge {
        stacked: [usize; 4],
        step: usize,
        lse: usize,
        lse_stride: usize,
        out: [usize; 4],
        lse_out: usize,
    }
    let good = || Merge { stacked: [2, 3, 2, 8], step: 1, lse: 12, lse_stride: 6, out: shape, lse_out: 6 };
    let run = |m: Merge| {
        let mut out = backend.memory(&[RUBBISH; 48]);
        let mut lse_out = backend.memory(&[RUBBISH; 6]);
        let result = {
            let [_, seq, heads, dim] = m.stacked;
            let strides = [seq * heads * dim, heads * dim, dim, 1].map(|stride| stride * m.step);
            let from = Partials {
                out: DeviceTensor::new("p", backend.span(&partials), m.stacked, strides).unwrap(),
                lse: backend.span(&lse).range(0..m.lse),
                lse_stride: m.lse_stride,
            };
            let span = backend.span_mut(&mut out).range(0..m.out.iter().product());
            let mut out = DeviceTensorMut::contiguous("o", span, m.out).unwrap();
            let mut lse_out = backend.span_mut(&mut lse_out).range(0..m.lse_out);
            merge(backend.device(), backend.stream(), &from, None, &mut out, Some(&mut lse_out))
        };
        if result.is_err() {
            assert!(backend.read(&out).iter().chain(&backend.read(&lse_out)).all(|&x| x == RUBBISH));
        }
        result
    };
    run(good()).unwrap();
    let refused = |m: Merge| named(run(m).unwrap_err());
    assert_eq!(refused(Merge { stacked: [2, 3, 1, 8], ..good() }), ("shape", "partials"));
    assert_eq!(refused(Merge { lse: 11, ..good() }), ("shape", "partials"));
    assert_eq!(refused(Merge { lse_stride: 5, ..good() }), ("shape", "partials"));
    assert_eq!(refused(Merge { lse_stride: usize::MAX, ..good() }), ("shape", "partials"));
    assert_eq!(refused(Merge { lse_out: 5, ..good() }), ("shape", "lse"));
    assert_eq!(refused(Merge { out: [1, 3, 2, 0], ..good() }), ("shape", "out"));
    assert_eq!(refused(Merge { out: [2, 3, 1, 8], ..good() }), ("shape", "partials"));
    assert_eq!(refused(Merge { step: 2, ..good() }), ("stride", "partials"));

    // Types that are not merged.
    let halves = backend.memory(&[f16::ONE; 96]);
    let mut brain = backend.memory(&[bf16::ONE; 48]);
    let from = Partials {
        out: DeviceTensor::contiguous("p", backend.span(&halves), [2, 3, 2, 8]).unwrap(),
        lse: backend.span(&lse),
        lse_stride: 6,
    };
    let mut out = DeviceTensorMut::contiguous("o", backend.span_mut(&mut brain), shape).unwrap();
    let result = merge(backend.device(), backend.stream(), &from, None, &mut out, None);
    assert_eq!(named(result.unwrap_err()), ("dtype", "out"));
}

fn appends<B: Backend>() {
    let backend = B::open(0);
    struct Append {
        key: [usize; 4],
        value: [usize; 4],
        shard: [[usize; 4]; 2],
        offset: usize,
        places: usize,
        rotated: usize,
        /// Of the tables of cosines and sines, and the positions.
        lens: [usize; 3],
    }
    const ROWS: [usize; 4] = [1, 3, 2, 32];
    const SHARD: [usize; 4] = [2, 4, 2, 32];
    let good = || Append {
        key: ROWS,
        value: ROWS,
        shard: [SHARD; 2],
        offset: 0,
        places: 3,
        rotated: 16,
        lens: [80, 80, 3],
    };
    let rows = backend.memory(&[bf16::ONE; 1024]);
    let numbers = backend.memory(&[1u32; 128]);
    let table = backend.memory(&[0.5f32; 128]);
    let run = |a: Append| {
        let mut stored = [backend.memory(&[bf16::ZERO; 1024]), backend.memory(&[bf16::ZERO; 1024])];
        let result = {
            let view = |shape: [usize; 4]| {
                let span = backend.span(&rows).range(a.offset..a.offset + shape.iter().product::<usize>());
                DeviceTensor::contiguous("r", span, shape).unwrap()
            };
            let [key, value] = &mut stored;
            let mut spans = [backend.span_mut(key), backend.span_mut(value)].into_iter().zip(a.shard).map(
                |(span, shape)| {
                    DeviceTensorMut::contiguous("s", span.range(0..shape.iter().product()), shape).unwrap()
                },
            );
            let (mut cache_key, mut cache_value) = (spans.next().unwrap(), spans.next().unwrap());
            let rotation = Rotation {
                cos: backend.span(&table).range(0..a.lens[0]),
                sin: backend.span(&table).range(0..a.lens[1]),
                positions: backend.span(&numbers).range(0..a.lens[2]),
                rotated: a.rotated,
                interleaved: false,
            };
            let places = backend.span(&numbers).range(0..a.places);
            let new = star_attention::Append::new(view(a.key), view(a.value), places);
            append(
                backend.device(),
                backend.stream(),
                &new.with_rotation(rotation),
                &mut cache_key,
                &mut cache_value,
            )
        };
        if result.is_err() {
            assert!(stored.iter().all(|rows| backend.read(rows).iter().all(|&x| x == bf16::ZERO)));
        }
        result
    };
    // One place, so that the three rows do not meet.
    run(Append { key: [1, 1, 2, 32], value: [1, 1, 2, 32], places: 1, lens: [80, 80, 1], ..good() }).unwrap();
    let refused = |a: Append| named(run(a).unwrap_err());
    assert_eq!(refused(Append { value: [1, 2, 2, 32], ..good() }), ("shape", "value"));
    assert_eq!(refused(Append { key: [1, 3, 2, 12], ..good() }), ("shape", "key"));
    assert_eq!(refused(Append { shard: [[2, 4, 1, 32], SHARD], ..good() }), ("shape", "cache_key"));
    assert_eq!(refused(Append { shard: [SHARD, [2, 3, 2, 32]], ..good() }), ("shape", "cache_value"));
    assert_eq!(refused(Append { offset: 4, ..good() }), ("value", "key"));
    assert_eq!(refused(Append { places: 4, ..good() }), ("shape", "places"));
    for rotated in [0, 8, 24, 48] {
        assert_eq!(refused(Append { rotated, ..good() }), ("value", "rotated"));
    }
    assert_eq!(refused(Append { lens: [81, 80, 3], ..good() }), ("shape", "cos"));
    assert_eq!(refused(Append { lens: [80, 72, 3], ..good() }), ("shape", "sin"));
    assert_eq!(refused(Append { lens: [80, 80, 2], ..good() }), ("shape", "positions"));
}

/// A kernel that was not built, and spans of nothing.
#[test]
fn kernels_that_were_not_built() {
    use star_attention::cuda::Launch;
    use star_attention::cuda::simt::Simt;
    let simt = Simt::new(0);
    let launch = Launch { kernel: "encode_f16_d80", blocks: 1, threads: 32, shared_bytes: 0, params: &[] };
    // SAFETY: there is no such kernel.
    let result = unsafe { simt.launch(&(), &launch) };
    assert_eq!(named(result.unwrap_err()), ("value", "kernel"));
    // SAFETY: no elements.
    let (nothing, none) =
        unsafe { (Span::<Simt, f32>::from_raw(0, 0), SpanMut::<Simt, f32>::from_raw(0, 0)) };
    assert!(nothing.is_empty() && none.is_empty());
    assert!(nothing.range(2..5).is_empty() && none.range(usize::MAX..usize::MAX).is_empty());
}

/// Without a driver: an error that says so, in one line, and no panic.
#[cfg(feature = "cuda")]
#[test]
fn no_driver_is_an_error() {
    use star_attention::cuda::driver::Driver;
    match Driver::count() {
        Ok(count) => {
            let error = Driver::open(count).unwrap_err();
            assert!(matches!(error, Error::Unavailable { what: "the GPU", .. }), "{error}");
        }
        Err(error) => {
            assert!(matches!(error, Error::Unavailable { what: "the CUDA driver", .. }), "{error}");
            assert!(!error.to_string().contains('\n'));
            assert_eq!(Driver::open(0).unwrap_err().to_string(), error.to_string());
        }
    }
}
