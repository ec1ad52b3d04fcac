//! NaN and infinities in the data: they stay in the rows that see them.

use super::Attend;
use super::cases::{Case, Inputs, Spot, Values, spots};
use crate::common::Tensor;
use proptest::prelude::*;
use star_attention::cpu::reference::sees;
use star_attention::{AttentionConfig, Element, Mask};

/// A call on normal values, and up to four elements of one of its inputs that are not finite.
pub fn spotted(cases: impl Strategy<Value = Case>) -> impl Strategy<Value = (Case, Vec<Spot>)> {
    let normal = cases.prop_map(|case| Case { values: Values::Normal, ..case });
    (normal, prop::collection::vec(spots(), 1..=4)).prop_map(|(case, mut spots)| {
        // A score of -inf and a NaN in that key's value: the definition leaves open what that is.
        let tensor = spots[0].tensor;
        spots.iter_mut().for_each(|spot| spot.tensor = tensor);
        (case, spots)
    })
}

/// Where the definition is not finite, neither is the result, in the same way; elsewhere it is right. Rows that see
/// none of the spots keep their bits. `keys_keep_bits`: also where the spot is in a query or key, whose
/// scores may move the base of other rows.
pub fn spots_stay_in_their_rows<T: Element>(
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
        let mut out = case.output::<f32>();
        let mut lse = vec![f32::NAN; shape.lse_len()];
        by.attend(&case.config, None, inputs, &mut out, Some(&mut lse));
        (out, lse)
    };
    let mut inputs = case.inputs::<T>();
    let (clean_out, clean_lse) = run(&inputs);
    let places: Vec<(usize, [usize; 4])> = spots
        .iter()
        .map(|spot| {
            let extents = if spot.tensor == 0 { shape.query_shape() } else { shape.key_shape() };
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
        let seen = || sees(case.config.mask, shape.query_len, shape.key_len, row, seq);
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
                for d in 0..shape.head_dim {
                    let bits = [&clean_out, &out].map(|out| out.get([b, row, h, d]).to_bits());
                    prop_assert_eq!(bits[0], bits[1], "out[{}, {}, {}, {}]", b, row, h, d);
                }
            }
        }
    }
    Ok(())
}

/// Under a causal mask the last value of each head is seen by the last row alone (flash-attention#1745). Rows before it are
/// as if that value were 0, bit for bit.
pub fn the_last_value_reaches_the_last_row_alone<T: Element>(
    by: &impl Attend<T>,
    head_dim: usize,
    rows: usize,
) {
    let config = AttentionConfig::new(Mask::Causal);
    let shape = [1, rows, 2, head_dim];
    let value = |name, last: f32| {
        Tensor::<T>::contiguous(name, shape, |[_, s, h, d]| {
            if s + 1 == rows { last } else { ((s * 7 + h * 3 + d) % 13) as f32 / 13.0 - 0.5 }
        })
    };
    let inputs = |last| Inputs::<T> {
        query: value("query", 0.25),
        key: value("key", 0.5),
        value: value("value", last),
    };
    let run = |last| {
        let mut out = Tensor::<f32>::contiguous("out", shape, |_| f32::NAN);
        by.attend(&config, None, &inputs(last), &mut out, None);
        out
    };
    let zero = run(0.0);
    for last in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let out = run(last);
        for (i, (got, clean)) in out.values().zip(zero.values()).enumerate() {
            if i / (2 * head_dim) + 1 < rows {
                assert!(got.to_bits() == clean.to_bits(), "{got} for {clean} in row {}", i / (2 * head_dim));
            } else {
                assert!(
                    got.to_bits() == last.to_bits() || (got.is_nan() && last.is_nan()),
                    "{got} for {last}"
                );
            }
        }
    }
}
