//! NaN and infinities in the data: they stay in the rows that see them.

use super::Attend;
use super::cases::{Case, Inputs, Spot, Values, spots};
use crate::common::Tensor;
use proptest::prelude::*;
use star_attention::cpu::reference::sees;
use star_attention::{AttentionConfig, DType, Element, Mask};

/// A call on normal values, and up to four elements of one of its inputs that are not finite.
pub fn spotted(cases: impl Strategy<Value = Case>) -> impl Strategy<Value = (Case, Vec<Spot>)> {
    let normal = cases.prop_map(|case| Case { values: Values::Normal, sinks: false, ..case });
    (normal, prop::collection::vec(spots(), 1..=4)).prop_map(|(case, mut spots)| {
        // A score of -inf and a NaN in that key's value: the definition leaves open what that is.
        let tensor = spots[0].tensor;
        spots.iter_mut().for_each(|spot| spot.tensor = tensor);
        (case, spots)
    })
}

/// Where the definition is not finite, neither is the result, in the same way; elsewhere it is
/// right. Rows that see none of the spots keep their bits. `keys_keep_bits`: also where the spot is
/// in a query or key, whose scores may move the base of other rows.
pub fn spots_stay_in_their_rows<T: Element, O: Element>(
    by: &impl Attend<T>,
    case: &Case,
    spots: &[Spot],
    keys_keep_bits: bool,
) -> Result<(), TestCaseError> {
    let shape = case.shape;
    if shape.query_shape().contains(&0) || shape.key_len == 0 {
        return Ok(());
    }
    let run = |inputs: &Inputs<T>| {
        let mut out = case.output::<O>();
        let mut lse = vec![f32::NAN; shape.lse_len()];
        by.attend(&case.config, None, inputs, &mut out, Some(&mut lse));
        (out, lse)
    };
    let mut inputs = case.inputs::<T, T>();
    let (clean_out, clean_lse) = run(&inputs);
    let places: Vec<(usize, [usize; 4])> = spots
        .iter()
        .map(|spot| {
            let extents = [shape.query_shape(), shape.key_shape(), shape.value_shape()][spot.tensor];
            (spot.tensor, std::array::from_fn(|axis| spot.index[axis].index(extents[axis])))
        })
        .collect();
    for (spot, &(tensor, index)) in spots.iter().zip(&places) {
        let Inputs { query, key, value } = &mut inputs;
        [query, key, value][tensor].set(index, T::from_f32(spot.value));
    }
    let (out, lse) = run(&inputs);
    let expected = case.expected(&inputs);
    expected.check_lse(&lse)?;
    expected.check_out(out.values())?;

    if !keys_keep_bits && places.iter().any(|&(tensor, _)| tensor < 2) {
        return Ok(());
    }
    let reaches = |&(tensor, [batch, seq, head, _]): &(usize, [usize; 4]), [b, row, h]: [usize; 3]| {
        let seen = || sees(&case.config.mask, shape.query_len, shape.key_len, row, seq);
        b == batch && if tensor == 0 { (row, h) == (seq, head) } else { h / shape.group() == head && seen() }
    };
    for b in 0..shape.batch {
        for row in 0..shape.query_len {
            for h in 0..shape.query_heads {
                if places.iter().any(|place| reaches(place, [b, row, h])) {
                    continue;
                }
                let at = (b * shape.query_heads + h) * shape.query_len + row;
                prop_assert_eq!(clean_lse[at].to_bits(), lse[at].to_bits(), "lse[{}, {}, {}]", b, h, row);
                for d in 0..shape.value_dim {
                    let bits = [&clean_out, &out].map(|out| out.get([b, row, h, d]).to_f32().to_bits());
                    prop_assert_eq!(bits[0], bits[1], "out[{}, {}, {}, {}]", b, row, h, d);
                }
            }
        }
    }
    Ok(())
}

/// Rows, keys, and a key: few rows and many, more than a block of rows has, few over so many keys
/// that these are split; the key is among the last, or the last one that the first row sees, where
/// that ends a tile of keys.
pub const PLACES: [(usize, usize, usize); 8] = [
    (2, 2, 0),
    (16, 16, 14),
    (64, 64, 62),
    (200, 200, 198),
    (3, 1100, 1098),
    (16, 1100, 1098),
    (3, 514, 511),
    (40, 423, 383),
];

/// Under a causal mask the values of two keys, `at` and the next, reach the rows that see them and
/// no other (flash-attention#1745). Where they are not finite, a row becomes what the sum of those
/// is that it sees. Rows that see neither are as if both were 0, bit for bit.
pub fn values_reach_the_rows_that_see_them<T: Element, O: Element>(
    by: &impl Attend<T>,
    head_dim: usize,
    (rows, keys, at): (usize, usize, usize),
) {
    const HEADS: usize = 2;
    let config = AttentionConfig::new(Mask::Causal);
    let tensor = |name, seq, two: [f32; 2]| {
        Tensor::<T>::contiguous(name, [1, seq, HEADS, head_dim], |[_, s, h, d]| match s.wrapping_sub(at) {
            i @ 0..2 => two[i],
            _ => ((s * 7 + h * 3 + d) % 13) as f32 / 13.0 - 0.5,
        })
    };
    let run = |two| {
        let (query, key) = (tensor("query", rows, [0.25; 2]), tensor("key", keys, [0.5; 2]));
        let mut out = Tensor::<O>::contiguous("out", query.shape(), |_| f32::NAN);
        by.attend(&config, None, &Inputs { query, key, value: tensor("value", keys, two) }, &mut out, None);
        out
    };
    let zero = run([0.0; 2]);
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    // With an exponent near the largest, but finite: it counts by its weight.
    let large = if T::DTYPE == DType::F16 { 2f32.powi(15) } else { 2f32.powi(122) };
    let one = [[nan, 0.0], [0.0, nan], [0.0, inf], [0.0, -inf], [0.0, large]];
    let both = [[inf, inf], [inf, -inf], [-inf, inf]];
    for two in one.into_iter().chain(both) {
        for (i, (got, clean)) in run(two).values().zip(zero.values()).enumerate() {
            let row = i / (HEADS * head_dim);
            let seen = |key: usize| if key <= keys - rows + row { two[key - at] } else { 0.0 };
            let right = match seen(at) + seen(at + 1) {
                x if x.is_nan() => got.is_nan(),
                x if x.is_infinite() => got == x,
                x if x > 0.0 => 0.0 < got && got < x,
                _ => got.to_bits() == clean.to_bits(),
            };
            assert!(
                right,
                "{got} in row {row} of {rows} over {keys} keys, d {head_dim}, {two:?} from {at} on"
            );
        }
    }
}
