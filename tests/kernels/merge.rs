//! The laws of merging by the kernel, in every type, at any strides, and in place.

use crate::backend::Backend;
use crate::call::{merge_on, on_each_device};
use crate::common::{Layout, Tensor, aligned, layouts};
use crate::properties::cases::RUBBISH;
use crate::properties::merge::{self as laws, Data, assert_rounded, parts};
use proptest::prelude::*;
use star_attention::cuda::{DeviceTensor, DeviceTensorMut, Partials, SpanMut, merge};
use star_attention::{Element, bf16, f16};

/// The merge as the laws know it.
fn merged<B: Backend>(parts: &[&Data], shape: [usize; 4]) -> Data {
    merged_with::<B>(parts, shape, None)
}

/// The same with a sink for each head.
fn with_sinks<B: Backend>(parts: &[&Data], shape: [usize; 4], sinks: &[f32]) -> Data {
    merged_with::<B>(parts, shape, Some(sinks))
}

fn merged_with<B: Backend>(parts: &[&Data], shape: [usize; 4], sinks: Option<&[f32]>) -> Data {
    let tensor = |part: &Data| {
        let mut rows = part.out.iter();
        Tensor::<f32>::contiguous("partial", shape, |_| *rows.next().unwrap())
    };
    let partials: Vec<_> = parts.iter().map(|part| (tensor(part), part.lse.clone())).collect();
    let mut out = Tensor::<f32>::contiguous("out", shape, |_| f32::NAN);
    let mut lse = Data::identity(shape).lse;
    lse.fill(f32::NAN);
    merge_on(&B::open(0), &partials, sinks, &mut out, &mut lse).unwrap();
    Data { shape, out: out.values().collect(), lse }
}

/// What a merge in a type of `T` into one of `O` may be off by: its own rounding, and that of f32.
fn is_exact<B: Backend, T: Element, O: Element>(
    parts: &[Data],
    layout: &Layout,
) -> Result<(), TestCaseError> {
    let shape = parts[0].shape;
    let round = |x: f32| T::from_f32(x).to_f32();
    let rounded: Vec<Data> =
        parts.iter().map(|p| Data { out: p.out.iter().copied().map(round).collect(), ..p.clone() }).collect();
    let partials: Vec<_> = rounded
        .iter()
        .map(|part| {
            let mut rows = part.out.iter();
            (Tensor::<T>::contiguous("partial", shape, |_| *rows.next().unwrap()), part.lse.clone())
        })
        .collect();
    let mut out = Tensor::<O>::new("out", shape, layout, RUBBISH, |_| f32::NAN);
    let mut lse = vec![f32::NAN; parts[0].lse.len()];
    merge_on(&B::open(1), &partials, None, &mut out, &mut lse).unwrap();
    prop_assert!(out.padding_is(RUBBISH), "wrote between the rows of out");
    let got = Data { shape, out: out.values().collect(), lse };
    assert_rounded(&got, &rounded.iter().collect::<Vec<_>>(), O::DTYPE);
    Ok(())
}

/// The output takes the place of the first partial, and its log-sum-exp too.
fn in_place<B: Backend>(parts: &[Data]) {
    let shape = parts[0].shape;
    let [batch, seq, heads, dim] = shape;
    let rows = parts[0].lse.len();
    let backend = B::open(2);
    let all: Vec<f32> = parts.iter().flat_map(|part| &part.out).copied().collect();
    let all_lse: Vec<f32> = parts.iter().flat_map(|part| &part.lse).copied().collect();
    let (mut partials, mut lse) = (backend.memory(&all), backend.memory(&all_lse));
    let addresses = (backend.span_mut(&mut partials).address(), backend.span_mut(&mut lse).address());
    {
        let stacked = [parts.len() * batch, seq, heads, dim];
        let from = Partials {
            out: DeviceTensor::contiguous("partials", backend.span(&partials), stacked).unwrap(),
            lse: backend.span(&lse),
            lse_stride: rows,
        };
        // SAFETY: elements of live memory; the merge reads each before it writes it.
        let (out, mut to_lse) = unsafe {
            (
                SpanMut::<B::Device, f32>::from_raw(addresses.0, rows * dim),
                SpanMut::from_raw(addresses.1, rows),
            )
        };
        let mut out = DeviceTensorMut::contiguous("out", out, shape).unwrap();
        merge(backend.device(), backend.stream(), &from, None, &mut out, Some(&mut to_lse)).unwrap();
    }
    let got = Data {
        shape,
        out: backend.read(&partials)[..rows * dim].to_vec(),
        lse: backend.read(&lse)[..rows].to_vec(),
    };
    let expected = merged::<B>(&parts.iter().collect::<Vec<_>>(), shape);
    assert_eq!(laws::bits(&got), laws::bits(&expected));
}

fn some(parts: &[Data]) -> bool {
    !parts.is_empty()
}

on_each_device! {
    fn is_the_softmax_over_the_union(parts in parts(9)) {
        laws::is_the_softmax_over_the_union(&merged::<B>, &parts);
        laws::takes_a_sink_for_a_part_without_values(&with_sinks::<B>, &merged::<B>, &parts);
    }

    fn is_commutative_and_associative(parts in parts(5).prop_filter("some", |p| p.len() > 2)) {
        laws::is_commutative_and_associative(&merged::<B>, &parts);
    }

    fn has_an_identity(parts in parts(1).prop_filter("one", |p| p.len() == 1)) {
        laws::has_an_identity(&merged::<B>, &parts[0]);
    }

    fn keeps_a_nan_in_its_row(
        parts in parts(9).prop_filter("some", |p| p.len() > 1),
        at in any::<prop::sample::Index>(),
    ) {
        laws::keeps_a_nan_in_its_row(&merged::<B>, &parts, at);
        laws::keeps_a_nan_in_its_row(&|parts, shape| with_sinks::<B>(parts, shape, &vec![1e4; shape[2]]), &parts, at);
    }

    fn every_pair_of_types_at_any_strides(
        parts in parts(5).prop_filter("some", |p| some(p)),
        layout in layouts(),
        align in any::<bool>(),
        dtypes in 0..7usize,
    ) {
        let layout = if align { aligned(&layout) } else { layout };
        match dtypes {
            0 => is_exact::<B, f32, f32>(&parts, &layout)?,
            1 => is_exact::<B, f32, f16>(&parts, &layout)?,
            2 => is_exact::<B, f32, bf16>(&parts, &layout)?,
            3 => is_exact::<B, f16, f32>(&parts, &layout)?,
            4 => is_exact::<B, f16, f16>(&parts, &layout)?,
            5 => is_exact::<B, bf16, f32>(&parts, &layout)?,
            _ => is_exact::<B, bf16, bf16>(&parts, &layout)?,
        }
    }

    fn may_be_in_place(parts in parts(5).prop_filter("some", |p| some(p))) {
        in_place::<B>(&parts);
    }

    fn extremes() {
        laws::takes_the_far_larger(&merged::<B>);
        laws::takes_no_infinite_lse_for_empty(&merged::<B>);
        laws::makes_nothing_of_nothing(&merged::<B>);
    }

    /// A thread for each head would be more than a block has.
    fn many_heads_and_many_partials() {
        for (shape, n) in [([1, 1, 2049, 8], 3), ([1, 3, 2, 128], 300), ([2, 5, 3, 1000], 4)] {
            laws::is_the_softmax_over_the_union(&merged::<B>, &Data::several(shape, n));
        }
    }
}
