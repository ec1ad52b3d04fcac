//! The laws of merging partials, whoever merges.

#![allow(dead_code)] // every test binary takes what it needs

use proptest::prelude::*;
use star_attention::merge::Partial;
use star_attention::{DType, TensorView};

/// `[batch, seq, heads, dim]` outputs and `[batch, heads, seq]` log-sum-exps.
#[derive(Clone, Debug)]
pub struct Data {
    pub shape: [usize; 4],
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
}

impl Data {
    pub fn identity(shape: [usize; 4]) -> Self {
        let [batch, seq, heads, dim] = shape;
        let rows = batch * seq * heads;
        Self { shape, out: vec![0.0; rows * dim], lse: vec![f32::NEG_INFINITY; rows] }
    }

    /// `n` parts of outputs within ±0.5, whose log-sum-exps are of one size.
    pub fn several(shape: [usize; 4], n: usize) -> Vec<Self> {
        let mut part = Self::identity(shape);
        let mut numbers = (1u32..).map(|i| (i.wrapping_mul(2_654_435_769) >> 8) as f32 / 2f32.powi(24));
        (0..n)
            .map(|_| {
                part.out.iter_mut().zip(&mut numbers).for_each(|(x, number)| *x = number - 0.5);
                part.lse.iter_mut().zip(&mut numbers).for_each(|(x, number)| *x = 4.0 * number - 2.0);
                part.clone()
            })
            .collect()
    }

    pub fn partial(&self) -> Partial<'_, f32> {
        Partial { out: TensorView::contiguous("partial", &self.out, self.shape).unwrap(), lse: &self.lse }
    }

    /// The row of an output that belongs to an entry of the log-sum-exp.
    pub fn row(&self, index: usize) -> &[f32] {
        let [_, seq, heads, dim] = self.shape;
        let (batch, head, token) = (index / seq / heads, index / seq % heads, index % seq);
        &self.out[((batch * seq + token) * heads + head) * dim..][..dim]
    }
}

/// The merge's definition, in f64.
pub fn exact(parts: &[&Data], index: usize, dim: usize) -> (Vec<f64>, f64) {
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

/// `merges` is how many times a log-sum-exp was rounded to f32 on the way and then weighed against
/// others: each time the weights move by as much, relatively, as it was rounded by.
pub fn assert_close(result: &Data, parts: &[&Data], merges: usize) {
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

/// Checks an output of type `dtype`: it may be off by its own rounding, and that of f32.
pub fn assert_rounded(result: &Data, parts: &[&Data], dtype: DType) {
    let unit = match dtype {
        DType::F16 => 1.0 / 2048.0,
        DType::BF16 => 1.0 / 256.0,
        _ => 0.0,
    };
    for index in 0..result.lse.len() {
        let (exact, _) = exact(parts, index, result.shape[3]);
        for (got, exact) in result.row(index).iter().zip(exact) {
            // The smallest step of f16 below its normal numbers is 6e-8.
            let bound = unit * exact.abs() + 5e-7 * (1 + parts.len()) as f64 + 6e-8;
            assert!((f64::from(*got) - exact).abs() <= bound, "{got} for {exact}");
        }
    }
}

pub fn parts(most: usize) -> impl Strategy<Value = Vec<Data>> {
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

pub fn bits(data: &Data) -> Vec<u32> {
    data.out.iter().chain(&data.lse).map(|x| x.to_bits()).collect()
}

/// A merge of parts of one shape.
pub type Merge<'a> = &'a dyn Fn(&[&Data], [usize; 4]) -> Data;

/// The same with a sink for each head.
pub type MergeWithSinks<'a> = &'a dyn Fn(&[&Data], [usize; 4], &[f32]) -> Data;

fn shape_of(parts: &[Data]) -> [usize; 4] {
    parts.first().map_or([1, 2, 3, 4], |part| part.shape)
}

pub fn is_the_softmax_over_the_union(merged: Merge<'_>, parts: &[Data]) {
    let all: Vec<&Data> = parts.iter().collect();
    assert_close(&merged(&all, shape_of(parts)), &all, 0);
}

/// A sink is one more part, of a log-sum-exp alone; one of -inf is none.
pub fn takes_a_sink_for_a_part_without_values(
    with_sinks: MergeWithSinks<'_>,
    merged: Merge<'_>,
    parts: &[Data],
) {
    let shape @ [_, seq, heads, _] = shape_of(parts);
    let all: Vec<&Data> = parts.iter().collect();
    for first in 0..4 {
        let sink = |head: usize| [0.5, f32::NEG_INFINITY, 1e4, -1e4][(first + head) % 4];
        let sinks: Vec<f32> = (0..heads).map(sink).collect();
        let mut part = Data::identity(shape);
        part.lse.iter_mut().enumerate().for_each(|(row, lse)| *lse = sinks[row / seq % heads]);
        let with_part: Vec<&Data> = all.iter().copied().chain([&part]).collect();
        assert_close(&with_sinks(&all, shape, &sinks), &with_part, 0);
        assert_eq!(bits(&with_sinks(&[], shape, &sinks)), bits(&part));
    }
    let none = vec![f32::NEG_INFINITY; heads];
    assert_eq!(bits(&with_sinks(&all, shape, &none)), bits(&merged(&all, shape)));
}

/// Of at least three parts.
pub fn is_commutative_and_associative(merged: Merge<'_>, parts: &[Data]) {
    let shape = shape_of(parts);
    let all: Vec<&Data> = parts.iter().collect();
    let mut reversed = all.clone();
    reversed.reverse();
    assert_close(&merged(&reversed, shape), &all, 0);
    let left = merged(&all[..2], shape);
    let right = merged(&all[2..], shape);
    assert_close(&merged(&[&left, &right], shape), &all, 2);
}

/// What a part of no weight holds does not matter, and one part is itself.
pub fn has_an_identity(merged: Merge<'_>, part: &Data) {
    let mut garbage = Data::identity(part.shape);
    garbage.out.fill(f32::NAN);
    let alone = merged(&[part], part.shape);
    assert_close(&alone, &[part], 0);
    for list in [[&garbage, part], [part, &garbage]] {
        assert_eq!(bits(&merged(&list, part.shape)), bits(&alone));
    }
}

/// A NaN or an infinity among the log-sum-exps of at least two parts, of which any may have it.
pub fn keeps_a_nan_in_its_row(merged: Merge<'_>, parts: &[Data], at: prop::sample::Index) {
    let shape = shape_of(parts);
    let hit = at.index(parts[0].lse.len());
    let clean = merged(&parts.iter().collect::<Vec<_>>(), shape);
    for value in [f32::NAN, f32::INFINITY] {
        let mut dirty = parts.to_vec();
        dirty[at.index(parts.len())].lse[hit] = value;
        let result = merged(&dirty.iter().collect::<Vec<_>>(), shape);
        for index in 0..clean.lse.len() {
            let all = [result.lse[index]].into_iter().chain(result.row(index).iter().copied());
            let nan: Vec<bool> = all.map(f32::is_nan).collect();
            assert!(nan.iter().all(|&nan| nan == (index == hit)), "row {index}, {value} in {hit}");
        }
    }
}

/// The larger of two parts whose log-sum-exps are far apart, in either order.
pub fn takes_the_far_larger(merged: Merge<'_>) {
    let shape = [1, 1, 1, 2];
    let far = |lse, x| Data { shape, out: vec![x; 2], lse: vec![lse] };
    let (low, high) = (far(-5e3, 7.0), far(5e3, 3.0));
    for list in [[&low, &high], [&high, &low]] {
        let result = merged(&list, shape);
        assert_eq!((result.out, result.lse), (vec![3.0; 2], vec![5e3]));
    }
}

/// An infinite log-sum-exp is no mark of an empty row, whatever it stands beside: the row is NaN,
/// not passed over.
pub fn takes_no_infinite_lse_for_empty(merged: Merge<'_>) {
    let shape = [1, 2, 1, 2];
    // As FlashAttention-2 leaves a row that saw no key, before one that has.
    let marked = Data { shape, out: vec![0.0, 0.0, 3.0, 3.0], lse: vec![f32::INFINITY, 1.0] };
    let (other, empty) = (Data { shape, out: vec![5.0; 4], lse: vec![1.0; 2] }, Data::identity(shape));
    for list in [&[&marked][..], &[&marked, &empty], &[&other, &marked], &[&marked, &marked]] {
        let result = merged(list, shape);
        assert!(result.row(0).iter().chain(&result.lse[..1]).all(|x| x.is_nan()), "{result:?}");
        assert!(result.row(1).iter().chain(&result.lse[1..]).all(|x| x.is_finite()), "{result:?}");
    }
}

/// Nothing at all, and parts of no weight.
pub fn makes_nothing_of_nothing(merged: Merge<'_>) {
    let empty = Data::identity([2, 3, 1, 4]);
    assert_eq!(bits(&merged(&[], empty.shape)), bits(&empty));
    assert_eq!(bits(&merged(&[&empty, &empty], empty.shape)), bits(&empty));
}
