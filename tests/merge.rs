//! The laws of merging partials.

use proptest::prelude::*;
use star_attention::merge::{Partial, merge, merge_into};
use star_attention::{Element, Error, TensorView, TensorViewMut, bf16, f16};

/// `[batch, seq, heads, dim]` outputs and `[batch, heads, seq]` log-sum-exps.
#[derive(Clone, Debug)]
struct Data {
    shape: [usize; 4],
    out: Vec<f32>,
    lse: Vec<f32>,
}

impl Data {
    fn identity(shape: [usize; 4]) -> Self {
        let [batch, seq, heads, dim] = shape;
        let rows = batch * seq * heads;
        Self { shape, out: vec![0.0; rows * dim], lse: vec![f32::NEG_INFINITY; rows] }
    }

    fn partial(&self) -> Partial<'_, f32> {
        Partial { out: TensorView::contiguous("partial", &self.out, self.shape).unwrap(), lse: &self.lse }
    }

    /// The row of an output that belongs to an entry of the log-sum-exp.
    fn row(&self, index: usize) -> &[f32] {
        let [_, seq, heads, dim] = self.shape;
        let (batch, head, token) = (index / seq / heads, index / seq % heads, index % seq);
        &self.out[((batch * seq + token) * heads + head) * dim..][..dim]
    }
}

fn merged(parts: &[&Data], shape: [usize; 4]) -> Data {
    let mut result = Data::identity(shape);
    result.out.fill(f32::NAN);
    result.lse.fill(f32::NAN);
    let partials: Vec<_> = parts.iter().map(|part| part.partial()).collect();
    let out = TensorViewMut::contiguous("out", &mut result.out, shape).unwrap();
    merge(&partials, out, &mut result.lse).unwrap();
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

/// The merge's definition, in f64.
fn exact(parts: &[&Data], index: usize, dim: usize) -> (Vec<f64>, f64) {
    let lse: Vec<f64> = parts.iter().map(|part| f64::from(part.lse[index])).collect();
    let max = lse.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return (vec![0.0; dim], max);
    }
    let sum: f64 = lse.iter().map(|lse| (lse - max).exp()).sum();
    let mut out = vec![0.0; dim];
    for (part, lse) in parts.iter().zip(&lse).filter(|(_, lse)| **lse > f64::NEG_INFINITY) {
        let weight = (lse - max).exp() / sum;
        out.iter_mut().zip(part.row(index)).for_each(|(out, x)| *out += weight * f64::from(*x));
    }
    (out, max + sum.ln())
}

/// `merges` is how many times a log-sum-exp was rounded to f32 on the way and then weighed against others: each time the weights move
/// by as much, relatively, as it was rounded by.
fn assert_close(result: &Data, parts: &[&Data], merges: usize) {
    for index in 0..result.lse.len() {
        let (out, lse) = exact(parts, index, result.shape[3]);
        let got = f64::from(result.lse[index]);
        let rounding = f64::from(f32::EPSILON) * if lse.is_finite() { lse.abs() } else { 0.0 };
        assert!(got == lse || (got - lse).abs() <= 4e-7 + (1 + merges) as f64 * rounding, "lse {got} {lse}");
        // Outputs are at most 1: each partial's weight, product and sum round by some 6e-8.
        let bound = 5e-7 * (1 + parts.len()) as f64 + merges as f64 * rounding;
        for (got, out) in result.row(index).iter().zip(out) {
            assert!((f64::from(*got) - out).abs() <= bound, "out {got} {out}");
        }
    }
}

fn parts(most: usize) -> impl Strategy<Value = Vec<Data>> {
    let shape = (1..3usize, 1..6usize, 1..5usize, prop_oneof![1..8usize, 120..140usize]);
    (0..=most, shape).prop_flat_map(|(count, (batch, seq, heads, dim))| {
        let rows = batch * seq * heads;
        let lse = prop_oneof![
            4 => -3.0..3.0f32,
            1 => Just(f32::NEG_INFINITY),
            1 => Just(0.5f32),
            1 => prop_oneof![Just(1e4f32), Just(-1e4f32)],
        ];
        let part = (prop::collection::vec(lse, rows), prop::collection::vec(-1.0..1.0f32, rows * dim));
        let shape = [batch, seq, heads, dim];
        prop::collection::vec(part.prop_map(move |(lse, out)| Data { shape, out, lse }), count)
    })
}

fn bits(data: &Data) -> Vec<u32> {
    data.out.iter().chain(&data.lse).map(|x| x.to_bits()).collect()
}

proptest! {
    #[test]
    fn both_merges_are_the_softmax_over_the_union(parts in parts(9)) {
        let parts: Vec<&Data> = parts.iter().collect();
        let shape = parts.first().map_or([1, 2, 3, 4], |part| part.shape);
        assert_close(&merged(&parts, shape), &parts, 0);
        if !parts.is_empty() {
            assert_close(&pairwise(&parts, shape), &parts, parts.len());
        }
    }

    #[test]
    fn merging_is_commutative_and_associative_up_to_rounding(parts in parts(5).prop_filter("some", |p| p.len() > 2)) {
        let shape = parts[0].shape;
        let all: Vec<&Data> = parts.iter().collect();
        let mut reversed = all.clone();
        reversed.reverse();
        assert_close(&merged(&reversed, shape), &all, 0);
        let left = merged(&all[..2], shape);
        let right = merged(&all[2..], shape);
        assert_close(&merged(&[&left, &right], shape), &all, 2);
    }

    #[test]
    fn the_identity_changes_nothing_and_one_partial_is_itself(parts in parts(1).prop_filter("one", |p| p.len() == 1)) {
        let part = &parts[0];
        let mut garbage = Data::identity(part.shape);
        garbage.out.fill(f32::NAN);
        let alone = merged(&[part], part.shape);
        assert_close(&alone, &[part], 0);
        for list in [[&garbage, part], [part, &garbage]] {
            prop_assert_eq!(bits(&merged(&list, part.shape)), bits(&alone));
            assert_close(&pairwise(&list, part.shape), &[part], 1);
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
        let shape = parts[0].shape;
        let hit = at.index(parts[0].lse.len());
        let clean = merged(&parts.iter().collect::<Vec<_>>(), shape);
        let mut dirty = parts.clone();
        dirty[1].lse[hit] = f32::NAN;
        let dirty = dirty.iter().collect::<Vec<_>>();
        for result in [merged(&dirty, shape), pairwise(&dirty, shape)] {
            for index in 0..clean.lse.len() {
                if index == hit {
                    prop_assert!(result.lse[index].is_nan() && result.row(index).iter().all(|x| x.is_nan()));
                } else {
                    prop_assert!(!result.lse[index].is_nan() && result.row(index).iter().all(|x| !x.is_nan()));
                }
            }
        }
    }
}

#[test]
fn partials_1e4_apart_are_the_larger_one_in_either_order() {
    let shape = [1, 1, 1, 2];
    let far = |lse, x| Data { shape, out: vec![x; 2], lse: vec![lse] };
    let (low, high) = (far(-5e3, 7.0), far(5e3, 3.0));
    for list in [[&low, &high], [&high, &low]] {
        for result in [merged(&list, shape), pairwise(&list, shape)] {
            assert_eq!((result.out, result.lse), (vec![3.0; 2], vec![5e3]));
        }
    }
}

#[test]
fn nothing_at_all_is_the_identity() {
    let shape = [2, 3, 1, 4];
    assert_eq!(bits(&merged(&[], shape)), bits(&Data::identity(shape)));
    let empty = Data::identity(shape);
    assert_eq!(bits(&merged(&[&empty, &empty], shape)), bits(&empty));
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
    assert_eq!((out, lse), ([7.0; 8], [7.0; 2]));
}
