//! NaN and infinities in the data: they stay in the rows that see them.

use crate::properties::cases::{Case, Inputs, Spot, Values, cases, spots};
use proptest::prelude::*;
use star_attention::cpu::reference::sees;
use star_attention::{Element, bf16, f16};

fn normal_cases() -> impl Strategy<Value = Case> {
    cases().prop_map(|mut case| {
        case.values = Values::Normal;
        case
    })
}

fn spot_stays_in_its_rows<T: Element>(case: &Case, spot: Spot) -> Result<(), TestCaseError> {
    let shape = case.shape;
    let extents = if spot.tensor == 0 { shape.query_shape() } else { shape.key_shape() };
    if extents.contains(&0) {
        return Ok(());
    }
    let mut inputs = case.inputs::<T>();
    let (clean_out, clean_lse) = case.run::<T, f32>(&inputs);
    let mut axis = 0;
    let index = extents.map(|extent| {
        axis += 1;
        spot.index[axis - 1].index(extent)
    });
    let Inputs { query, key, value } = &mut inputs;
    [query, key, value][spot.tensor].set(index, T::from_f32(spot.value));

    // Where the definition is not finite, neither is the result, in the same way; elsewhere it is right.
    let expected = case.expected(&inputs);
    let (out, lse) = case.run::<T, f32>(&inputs);
    expected.check_lse(&lse)?;
    expected.check_out(out.values())?;

    // Rows that do not see it keep their bits.
    let [batch, seq, head, _] = index;
    for b in 0..shape.batch {
        for row in 0..shape.query_len {
            for h in 0..shape.query_heads {
                let touched = b == batch
                    && if spot.tensor == 0 {
                        (row, h) == (seq, head)
                    } else {
                        h / shape.group() == head
                            && sees(case.config.mask, shape.query_len, shape.key_len, row, seq)
                    };
                if touched {
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

proptest! {
    #[test]
    fn what_is_not_finite_stays_in_its_rows(case in normal_cases(), spot in spots(), dtype in 0..4) {
        match dtype {
            0 | 1 => spot_stays_in_its_rows::<f32>(&case, spot)?,
            2 => spot_stays_in_its_rows::<f16>(&case, spot)?,
            _ => spot_stays_in_its_rows::<bf16>(&case, spot)?,
        }
    }
}

/// Everything NaN: every row that sees a key is NaN, every other one is the identity.
#[test]
fn all_nan() {
    use crate::common::{Layout, Tensor};
    use star_attention::cpu::flash;
    use star_attention::{AttentionConfig, Mask};
    let tensor = |name, seq| Tensor::<f32>::contiguous(name, [1, seq, 2, 24], |_| f32::NAN);
    let (query, key, value) = (tensor("query", 70), tensor("key", 40), tensor("value", 40));
    let mut out = Tensor::<f32>::new("out", [1, 70, 2, 24], &Layout::CONTIGUOUS, 0.0, |_| 1.0);
    let mut lse = vec![1.0; 140];
    let config = AttentionConfig::new(Mask::Causal);
    flash::attention(&config, query.view(), key.view(), value.view(), out.view_mut(), Some(&mut lse))
        .unwrap();
    for (i, out) in out.values().enumerate() {
        // Rows 0..30 stand before the first key.
        if i / 48 < 30 { assert_eq!(out, 0.0) } else { assert!(out.is_nan()) }
    }
    for (i, &lse) in lse.iter().enumerate() {
        if i % 70 < 30 { assert_eq!(lse, f32::NEG_INFINITY) } else { assert!(lse.is_nan()) }
    }
}
