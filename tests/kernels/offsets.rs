//! Tensors that reach 2³² elements and further: no offset may be cut to 32 bits, with or without a
//! sign.
//!
//! Each is a few rows in memory that is not touched elsewhere, and on the emulator not even taken
//! from the system.

use crate::backend::Backend;
use crate::call::{Memory, on_each_device};
use crate::common::{Rng, Tensor, extents, indices};
use crate::properties::cases::Inputs;
use crate::properties::expected::Expected;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::{Device, Partials, append, merge};
use star_attention::{Append, AttentionConfig, f16};
use std::sync::{Mutex, PoisonError};

/// A tensor's memory.
type Far<B> = Memory<B, f16>;

/// Tests take turns, so that their tensors fit a GPU together.
static TURN: Mutex<()> = Mutex::new(());

/// A call on tensors that are far along the axis batch, seq or heads; none if there is no memory
/// for them.
fn along_each_axis(mut call: impl FnMut(usize) -> Option<()>) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for axis in 0..3 {
        if call(axis).is_none() {
            println!("skipped: no memory for tensors of 2³² elements");
        }
    }
}

/// Row-major but for one axis, whose last index is 2³² elements behind its first, or a few more.
fn room<B: Backend>(backend: &B, shape: [usize; 4], axis: usize) -> Option<Far<B>> {
    let [_, seq, heads, dim] = shape;
    let mut strides = [seq * heads * dim, heads * dim, dim, 1];
    strides[axis] = ((1usize << 32).div_ceil(shape[axis].max(2) - 1)).next_multiple_of(8);
    let last: usize = shape.iter().zip(strides).map(|(extent, stride)| (extent - 1) * stride).sum();
    Some(Memory { memory: backend.room(last + 1)?, shape, strides, offset: 0 })
}

/// The first element of each row, and where it lies.
fn rows<B: Backend>(memory: &Far<B>) -> impl Iterator<Item = ([usize; 4], usize)> + use<B> {
    let ([batch, seq, heads, _], strides) = (memory.shape, memory.strides);
    indices([batch, seq, heads, 1])
        .map(move |index| (index, index.iter().zip(strides).map(|(i, stride)| i * stride).sum()))
}

fn far<B: Backend>(backend: &B, tensor: &Tensor<f16>, axis: usize) -> Option<Far<B>> {
    let mut memory = room(backend, tensor.shape(), axis)?;
    for ([b, s, h, _], at) in rows(&memory) {
        let row: Vec<f16> = (0..memory.shape[3]).map(|d| tensor.get([b, s, h, d])).collect();
        backend.write(&mut memory.memory, at, &row);
    }
    Some(memory)
}

fn near<B: Backend>(backend: &B, memory: &Far<B>) -> Tensor<f16> {
    let mut tensor = Tensor::contiguous("near", memory.shape, |_| f32::NAN);
    for ([b, s, h, _], at) in rows(memory) {
        let row = backend.read_range(&memory.memory, at..at + memory.shape[3]);
        row.into_iter().enumerate().for_each(|(d, x)| tensor.set([b, s, h, d], x));
    }
    tensor
}

/// With whole tiles of keys, also beyond 2³² bytes, and a rest.
fn attention<B: Backend>(query_len: usize, axis: usize) -> Option<()> {
    let shape = extents([3, query_len, 400], [6, 3], [64, 64]);
    let mut rng = Rng::new(1);
    let inputs = Inputs::<f16> {
        query: Tensor::normal("query", shape.query_shape(), &mut rng),
        key: Tensor::normal("key", shape.key_shape(), &mut rng),
        value: Tensor::normal("value", shape.key_shape(), &mut rng),
    };
    let backend = B::open(1);
    let query = far(&backend, &inputs.query, axis)?;
    let key = far(&backend, &inputs.key, axis)?;
    let value = far(&backend, &inputs.value, axis)?;
    let mut out = room(&backend, shape.query_shape(), axis)?;
    let config = AttentionConfig::default();
    let plan = Plan::new(&backend.device().properties(), &config, &shape).unwrap();
    let mut workspace = backend.memory(&vec![0u8; plan.workspace_bytes()]);
    plan.prepare(backend.device(), backend.stream(), backend.span_mut(&mut workspace))
        .unwrap()
        .run(
            star_attention::Inputs::new(
                &query.view(&backend, "query"),
                &key.view(&backend, "key"),
                &value.view(&backend, "value"),
            ),
            &mut out.view_mut(&backend, "out"),
            None,
        )
        .unwrap();
    let expected = Expected::of(&config, &inputs.query, &inputs.key, &inputs.value, false);
    expected.check_out(near(&backend, &out).values()).unwrap();
    Some(())
}

/// Of `n` partials, of which only the last one counts: its rows.
fn merge_of<B: Backend>(n: usize, batch: usize, axis: usize) -> Option<()> {
    let shape @ [_, seq, heads, dim] = [batch, 4, 5, 64];
    let rows = batch * seq * heads;
    let tensor = Tensor::normal("partials", [n * batch, seq, heads, dim], &mut Rng::new(2));
    let backend = B::open(2);
    let partials = far(&backend, &tensor, axis)?;
    let mut out = room(&backend, shape, axis)?;
    let lse = [vec![f32::NEG_INFINITY; (n - 1) * rows], vec![0.5; rows]].concat();
    let lse = backend.memory(&lse);
    let from =
        Partials { out: partials.view(&backend, "partials"), lse: backend.span(&lse), lse_stride: rows };
    merge(backend.device(), backend.stream(), &from, None, &mut out.view_mut(&backend, "out"), None).unwrap();
    let out = near(&backend, &out);
    for [b, s, h, d] in indices(shape) {
        assert_eq!(out.get([b, s, h, d]), tensor.get([(n - 1) * batch + b, s, h, d]));
    }
    Some(())
}

/// Each sequence to the page after its own, to every second row.
fn append_to_pages<B: Backend>(axis: usize) -> Option<()> {
    let shape @ [batch, seq, heads, dim] = [3, 4, 5, 64];
    let mut rng = Rng::new(3);
    let tensors = [(); 2].map(|()| Tensor::normal("rows", shape, &mut rng));
    let backend = B::open(3);
    let [key, value] = tensors.each_ref().map(|rows| far(&backend, rows, axis));
    let [stored_key, stored_value] = [(); 2].map(|()| room(&backend, [batch, 2 * seq, heads, dim], axis));
    let (mut stored_key, mut stored_value) = (stored_key?, stored_value?);
    let place = |b: usize, s: usize| [(b + 1) % batch, 2 * s];
    let places: Vec<u32> = (0..batch)
        .flat_map(|b| (0..seq).map(move |s| place(b, s)))
        .map(|[page, row]| (page * 2 * seq + row) as u32)
        .collect();
    let (key, value, places) = (key?, value?, backend.memory(&places));
    append(
        backend.device(),
        backend.stream(),
        &Append::new(key.view(&backend, "key"), value.view(&backend, "value"), backend.span(&places)),
        &mut stored_key.view_mut(&backend, "cache_key"),
        &mut stored_value.view_mut(&backend, "cache_value"),
    )
    .unwrap();
    for (rows, stored) in tensors.iter().zip([&stored_key, &stored_value]) {
        let stored = near(&backend, stored);
        for [b, s, h, d] in indices(shape) {
            let [page, row] = place(b, s);
            assert_eq!(stored.get([page, row, h, d]), rows.get([b, s, h, d]));
        }
    }
    Some(())
}

on_each_device! {
    fn attention_of_few_rows() {
        along_each_axis(|axis| attention::<B>(3, axis));
    }

    fn attention_of_many_rows() {
        along_each_axis(|axis| attention::<B>(40, axis));
    }

    fn merges() {
        along_each_axis(|axis| merge_of::<B>(2, 3, axis));
        // The last partial as a whole is 2³² elements behind the first.
        along_each_axis(|axis| merge_of::<B>(3, 1, axis));
    }

    fn appends() {
        along_each_axis(append_to_pages::<B>);
    }
}
