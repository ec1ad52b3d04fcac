//! The laws of merging partials on the CPU, at once and one after another.

#[path = "properties/merge.rs"]
mod laws;

use laws::{Data, assert_close, bits, parts};
use proptest::prelude::*;
use star_attention::merge::{Partial, merge, merge_into, merge_with_sinks};
use star_attention::{Element, Error, TensorView, TensorViewMut, bf16, f16};

fn merged(parts: &[&Data], shape: [usize; 4]) -> Data {
    let mut result = Data::identity(shape);
    result.out.fill(f32::NAN);
    result.lse.fill(f32::NAN);
    let partials: Vec<_> = parts.iter().map(|part| part.partial()).collect();
    let out = TensorViewMut::contiguous("out", &mut result.out, shape).unwrap();
    merge(&partials, out, &mut result.lse).unwrap();
    result
}

fn with_sinks(parts: &[&Data], shape: [usize; 4], sinks: &[f32]) -> Data {
    let mut result = Data::identity(shape);
    result.out.fill(f32::NAN);
    let partials: Vec<_> = parts.iter().map(|part| part.partial()).collect();
    let out = TensorViewMut::contiguous("out", &mut result.out, shape).unwrap();
    merge_with_sinks(&partials, sinks, out, &mut result.lse).unwrap();
    result
}

fn pairwise(parts: &[&Data], shape: [usize; 4]) -> Data {
    let mut result = Data::identity(shape);
    // What an output holds before any key was seen must not matter.
    result.out.fill(f32::NAN);
    for part in parts {
        let out = TensorViewMut::contiguous("out", &mut result.out, shape).unwrap();
        merge_into(out, &mut result.lse, &part.partial()).unwrap();
    }
    result
}

proptest! {
    #[test]
    fn both_merges_are_the_softmax_over_the_union(parts in parts(9)) {
        laws::is_the_softmax_over_the_union(&merged, &parts);
        laws::takes_a_sink_for_a_part_without_values(&with_sinks, &merged, &parts);
        if let Some(part) = parts.first() {
            let all: Vec<&Data> = parts.iter().collect();
            assert_close(&pairwise(&all, part.shape), &all, parts.len());
        }
    }

    #[test]
    fn merging_is_commutative_and_associative_up_to_rounding(parts in parts(5).prop_filter("some", |p| p.len() > 2)) {
        laws::is_commutative_and_associative(&merged, &parts);
    }

    #[test]
    fn the_identity_changes_nothing_and_one_partial_is_itself(parts in parts(1).prop_filter("one", |p| p.len() == 1)) {
        laws::has_an_identity(&merged, &parts[0]);
        let mut garbage = Data::identity(parts[0].shape);
        garbage.out.fill(f32::NAN);
        for list in [[&garbage, &parts[0]], [&parts[0], &garbage]] {
            assert_close(&pairwise(&list, parts[0].shape), &[&parts[0]], 1);
        }
    }

    #[test]
    fn threads_do_not_change_a_bit(parts in parts(6)) {
        let parts: Vec<&Data> = parts.iter().collect();
        let shape = parts.first().map_or([1, 2, 3, 4], |part| part.shape);
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        prop_assert_eq!(bits(&pool.install(|| merged(&parts, shape))), bits(&one.install(|| merged(&parts, shape))));
    }

    #[test]
    fn a_nan_stays_in_its_row(parts in parts(4).prop_filter("some", |p| p.len() > 1), at in any::<prop::sample::Index>()) {
        laws::keeps_a_nan_in_its_row(&merged, &parts, at);
        laws::keeps_a_nan_in_its_row(&pairwise, &parts, at);
        laws::keeps_a_nan_in_its_row(&|parts, shape| with_sinks(parts, shape, &vec![1e4; shape[2]]), &parts, at);
    }
}

#[test]
fn partials_1e4_apart_are_the_larger_one_in_either_order() {
    laws::takes_the_far_larger(&merged);
    laws::takes_the_far_larger(&pairwise);
    laws::takes_no_infinite_lse_for_empty(&merged);
    laws::takes_no_infinite_lse_for_empty(&pairwise);
}

#[test]
fn nothing_at_all_is_the_identity() {
    laws::makes_nothing_of_nothing(&merged);
}

fn low_precision<T: Element>(epsilon: f32) {
    let shape = [1, 4, 2, 64];
    let out: Vec<T> = (0..512).map(|i| T::from_f32((i % 37) as f32 / 37.0 - 0.5)).collect();
    let wide = Data { shape, out: out.iter().map(|x| x.to_f32()).collect(), lse: vec![0.25; 8] };
    let partial = Partial { out: TensorView::contiguous("partial", &out, shape).unwrap(), lse: &wide.lse };
    let (mut result, mut lse) = (vec![T::default(); 512], [0.0; 8]);
    let view = TensorViewMut::contiguous("out", &mut result, shape).unwrap();
    merge(&[partial; 3], view, &mut lse).unwrap();
    for (got, expected) in result.iter().zip(&wide.out) {
        assert!((got.to_f32() - expected).abs() <= epsilon * expected.abs());
    }
    assert!(lse.iter().all(|lse| (lse - (0.25 + 3f32.ln())).abs() < 1e-6));
}

#[test]
fn halves_are_rounded_once() {
    low_precision::<f16>(1.0 / 1024.0);
    low_precision::<bf16>(1.0 / 128.0);
}

#[test]
fn strides_do_not_matter() {
    // The same partial with heads before tokens, and with gaps between rows.
    let (seq, heads, dim) = (3, 2, 5);
    let plain: Vec<f32> = (0..30).map(|i| i as f32).collect();
    let mut permuted = vec![f32::NAN; 2 * 30];
    for (i, &x) in plain.iter().enumerate() {
        let (token, head, d) = (i / dim / heads, i / dim % heads, i % dim);
        permuted[(head * seq + token) * 2 * dim + d] = x;
    }
    let lse = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6];
    let first =
        Partial { out: TensorView::contiguous("partial", &plain, [1, seq, heads, dim]).unwrap(), lse: &lse };
    let view = TensorView::new("partial", &permuted, [1, heads, seq, dim], [60, 30, 10, 1]).unwrap();
    let second = Partial { out: view.swap_seq_heads(), lse: &lse };
    let (mut out, mut merged_lse) = (vec![7.0; 60], [0.0; 6]);
    let view = TensorViewMut::new("out", &mut out, [1, heads, seq, dim], [60, 30, 10, 1]).unwrap();
    merge(&[first, second], view.swap_seq_heads(), &mut merged_lse).unwrap();
    for (got, x) in out.iter().zip(&permuted) {
        assert!(if x.is_nan() { *got == 7.0 } else { (got - x).abs() <= 1e-6 * x }, "{got} {x}");
    }
}

#[test]
fn what_does_not_fit_is_named_and_nothing_is_written() {
    let data = Data { shape: [1, 2, 1, 4], out: vec![1.0; 8], lse: vec![0.0; 2] };
    let (mut out, mut lse) = ([7.0f32; 8], [7.0f32; 2]);
    let mut attempt = |shape: [usize; 4], len: usize, lse_len: usize, partial: Partial<'_, f32>| {
        let view = TensorViewMut::contiguous("out", &mut out[..len], shape).unwrap();
        let first = merge(&[partial], view, &mut lse[..lse_len]).unwrap_err();
        let view = TensorViewMut::contiguous("out", &mut out[..len], shape).unwrap();
        let second = merge_into(view, &mut lse[..lse_len], &partial).unwrap_err();
        assert_eq!(first.to_string(), second.to_string());
        first
    };
    let good = data.partial();
    let short = Partial { lse: &data.lse[..1], ..good };
    assert!(matches!(attempt([1, 1, 1, 4], 4, 1, good), Error::Shape { argument: "partial", .. }));
    assert!(matches!(attempt([1, 2, 1, 4], 8, 1, good), Error::Shape { argument: "lse", .. }));
    assert!(matches!(attempt([1, 2, 1, 4], 8, 2, short), Error::Shape { argument: "partial", .. }));
    assert!(matches!(attempt([1, 2, 1, 0], 0, 2, good), Error::Shape { argument: "out", .. }));
    let scattered = TensorView::new("partial", &data.out, [1, 2, 1, 4], [8, 1, 8, 2]).unwrap();
    let scattered = Partial { out: scattered, lse: &data.lse };
    assert!(matches!(attempt([1, 2, 1, 4], 8, 2, scattered), Error::Stride { argument: "partial", .. }));
    for (sinks, kind) in
        [(&[0.0; 2][..], "shape"), (&[], "shape"), (&[f32::NAN], "value"), (&[f32::INFINITY], "value")]
    {
        let view = TensorViewMut::contiguous("out", &mut out, [1, 2, 1, 4]).unwrap();
        match (merge_with_sinks(&[good], sinks, view, &mut lse).unwrap_err(), kind) {
            (Error::Shape { argument: "sinks", .. }, "shape") => {}
            (Error::Value { argument: "sinks", expected, .. }, "value") => {
                assert!(expected.ends_with("head 0"))
            }
            (error, _) => panic!("{error}"),
        }
    }
    assert_eq!((out, lse), ([7.0; 8], [7.0; 2]));
}

#[test]
fn partials_are_summed_in_the_order_given_however_many_there_are() {
    // Rows that fill blocks and rows that do not, vectors and their rest; some see no key.
    for (count, shape) in
        [(1, [1, 3, 2, 128]), (3, [2, 40, 3, 20]), (4, [1, 70, 2, 129]), (9, [2, 33, 5, 64])]
    {
        let mut parts = Data::several(shape, count);
        for (i, part) in parts.iter_mut().enumerate() {
            part.lse.iter_mut().skip(i).step_by(5).for_each(|lse| *lse = f32::NEG_INFINITY);
        }
        let result = merged(&parts.iter().collect::<Vec<_>>(), shape);
        for index in 0..result.lse.len() {
            let seen = || parts.iter().filter(|part| part.lse[index] != f32::NEG_INFINITY);
            let max = seen().map(|part| part.lse[index]).fold(f32::NEG_INFINITY, f32::max);
            let (mut sum, mut total) = (0.0, vec![0f32; shape[3]]);
            for part in seen() {
                let weight = (part.lse[index] - max).exp();
                sum += weight;
                total.iter_mut().zip(part.row(index)).for_each(|(total, x)| *total += weight * x);
            }
            let (scale, lse) = if seen().count() == 0 { (0.0, max) } else { (1.0 / sum, max + sum.ln()) };
            assert_eq!(result.lse[index].to_bits(), lse.to_bits());
            for (got, total) in result.row(index).iter().zip(total) {
                assert_eq!(got.to_bits(), (scale * total).to_bits());
            }
        }
    }
}
