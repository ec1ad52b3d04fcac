//! The laws of merging on a backend, of partials that lie apart.

use super::backend::merge_on;
use super::cases::RUBBISH;
use super::merge::{self as laws, Data, assert_rounded, parts};
use crate::common::{Layout, Rng, Tensor, aligned, layouts, named};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use star_attention::{Backend, Element};

/// A part's output in a layout, and its log-sum-exp.
fn stored<T: Element>(part: &Data, layout: &Layout) -> (Tensor<T>, Vec<f32>) {
    let mut out = part.out.iter();
    let tensor = Tensor::new("partial", part.shape, layout, f32::NAN, |_| *out.next().unwrap());
    (tensor, part.lse.clone())
}

/// The merge as the laws know it.
fn merged<B: Backend>(backend: &B, parts: &[&Data], shape: [usize; 4], sinks: Option<&[f32]>) -> Data {
    let partials: Vec<_> = parts.iter().map(|part| stored::<f32>(part, &Layout::CONTIGUOUS)).collect();
    let mut out = Tensor::<f32>::contiguous("out", shape, |_| f32::NAN);
    let mut lse = vec![f32::NAN; Data::identity(shape).lse.len()];
    merge_on(backend, &partials, sinks, &mut out, Some(&mut lse)).unwrap();
    Data { shape, out: out.values().collect(), lse }
}

/// Up to six parts, each in a layout of its own; the last layout is the output's.
pub fn scattered() -> impl Strategy<Value = (Vec<Data>, Vec<Layout>)> {
    let layouts = (prop::collection::vec(layouts(), 7), any::<bool>()).prop_map(|(layouts, align)| {
        layouts.iter().map(|layout| if align { aligned(layout) } else { layout.clone() }).collect()
    });
    (parts(6), layouts)
}

/// Partials of `T` at any strides become what the definition gives, rounded once to `O`; nothing is
/// written between the rows, and the log-sum-exp may be left out.
pub fn is_exact_at_any_strides<B: Backend, T: Element, O: Element>(
    backend: &B,
    parts: &[Data],
    layouts: &[Layout],
) -> Result<(), TestCaseError> {
    let shape = parts.first().map_or([1, 2, 3, 4], |part| part.shape);
    let round = |part: &Data| {
        let out = part.out.iter().map(|&x| T::from_f32(x).to_f32()).collect();
        Data { out, ..part.clone() }
    };
    let rounded: Vec<Data> = parts.iter().map(round).collect();
    let partials: Vec<_> =
        rounded.iter().zip(layouts).map(|(part, layout)| stored::<T>(part, layout)).collect();
    let output = || Tensor::<O>::new("out", shape, &layouts[6], RUBBISH, |_| f32::NAN);
    let (mut out, mut without) = (output(), output());
    let mut lse = vec![f32::NAN; Data::identity(shape).lse.len()];
    merge_on(backend, &partials, None, &mut out, Some(&mut lse)).unwrap();
    merge_on(backend, &partials, None, &mut without, None).unwrap();
    prop_assert!(out.padding_is(RUBBISH) && without.padding_is(RUBBISH), "wrote between rows");
    prop_assert!(out.bits() == without.bits(), "no log-sum-exp changes the output");
    let got = Data { shape, out: out.values().collect(), lse };
    assert_rounded(&got, &rounded.iter().collect::<Vec<_>>(), O::DTYPE);
    Ok(())
}

/// From no partial to `most`, of dims that are moved 16 bytes at a time and others; and the laws of
/// what has no weight, is far larger, or is NaN.
pub fn any_number_of_partials<B: Backend>(backend: &B, most: usize) {
    let merge = |parts: &[&Data], shape: [usize; 4]| merged(backend, parts, shape, None);
    let with_sinks =
        |parts: &[&Data], shape: [usize; 4], sinks: &[f32]| merged(backend, parts, shape, Some(sinks));
    for n in 0..=most {
        for shape in [[1, 2, 3, 64], [2, 1, 2, 5]] {
            let parts = Data::several(shape, n);
            laws::is_the_softmax_over_the_union(&merge, &parts);
            laws::takes_a_sink_for_a_part_without_values(&with_sinks, &merge, &parts);
            if n > 2 {
                laws::is_commutative_and_associative(&merge, &parts);
            }
        }
    }
    laws::has_an_identity(&merge, &Data::several([2, 3, 2, 8], 1)[0]);
    laws::takes_the_far_larger(&merge);
    laws::takes_no_infinite_lse_for_empty(&merge);
    laws::makes_nothing_of_nothing(&merge);
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let at = any::<prop::sample::Index>();
    for _ in 0..8 {
        let at = at.new_tree(&mut runner).unwrap().current();
        let parts = Data::several([2, 3, 2, 8], 5);
        laws::keeps_a_nan_in_its_row(&merge, &parts, at);
        laws::keeps_a_nan_in_its_row(&|parts, shape| with_sinks(parts, shape, &[1e4, 0.5]), &parts, at);
    }
}

/// Partials and outputs that do not fit together are named, and nothing is written.
pub fn what_does_not_fit_is_named<B: Backend>(backend: &B) {
    const SHAPE: [usize; 4] = [2, 3, 2, 8];
    let mut rng = Rng::new(1);
    let good = (Tensor::<f32>::normal("partial", SHAPE, &mut rng), vec![0.5f32; 12]);
    let refused = |second: &(Tensor<f32>, Vec<f32>), shape: [usize; 4], lse_len: usize| {
        let mut out = Tensor::<f32>::contiguous("out", shape, |_| RUBBISH);
        let mut lse = vec![RUBBISH; lse_len];
        let result = merge_on(backend, &[good.clone(), second.clone()], None, &mut out, Some(&mut lse));
        let untouched = out.values().chain(lse).all(|x| x == RUBBISH);
        assert!(result.is_ok() || untouched, "wrote in spite of the error");
        result.map_err(named)
    };
    refused(&good, SHAPE, 12).unwrap();
    for other in [[2, 3, 2, 16], [2, 3, 1, 8], [2, 4, 2, 8], [1, 3, 2, 8]] {
        let second = (Tensor::normal("partial", other, &mut rng), good.1.clone());
        assert_eq!(refused(&second, SHAPE, 12), Err(("shape", "partial")));
        let rows = other[0] * other[1] * other[2];
        assert_eq!(refused(&good, other, rows), Err(("shape", "partial")));
    }
    for len in [11, 13] {
        let second = (good.0.clone(), vec![0.5; len]);
        assert_eq!(refused(&second, SHAPE, 12), Err(("shape", "partial")));
        assert_eq!(refused(&good, SHAPE, len), Err(("shape", "lse")));
    }
    assert_eq!(refused(&good, [2, 3, 2, 0], 12), Err(("shape", "out")));
}

/// A last axis that is not contiguous, of a partial and of the output, is refused.
pub fn scattered_rows_are_refused<B: Backend>(backend: &B) {
    use star_attention::merge::PartialOf;
    let shape = [1, 2, 1, 4];
    let [near, far] = [[8, 4, 4, 1], [16, 8, 8, 2]];
    for (of_partial, of_out, argument) in [(far, near, "partial"), (near, far, "out")] {
        let rows = backend.buffer_of(&[0.5f32; 16]).unwrap();
        let lse = backend.buffer_of(&[0.5f32; 2]).unwrap();
        let mut out = backend.buffer_of(&[RUBBISH; 16]).unwrap();
        let view = B::view("partial", backend.slice(&rows, ..), shape, of_partial).unwrap();
        let partial = PartialOf { out: view, lse: backend.slice(&lse, ..) };
        let to = B::view_mut::<f32>("out", backend.slice_mut(&mut out, ..), shape, of_out).unwrap();
        let error = backend.merge(vec![partial], None, to, None).unwrap_err();
        assert_eq!(named(error), ("stride", argument));
        assert!(backend.read(&out).unwrap().iter().all(|&x| x == RUBBISH));
    }
}
