//! NaN and infinities in the data, and softcaps of any size, on the CPU.

use crate::phases::each_cpu;
use crate::properties::backend::On;
use crate::properties::cases::{cases, dims};
use crate::properties::extremes::extremes_are_exact;
use crate::properties::nonfinite::{
    PLACES, spots_stay_in_their_rows, spotted, values_reach_the_rows_that_see_them,
};
use crate::properties::packed::{a_sequence_of_nan_stays_alone, packed};
use crate::properties::softcap::{large_caps_change_nothing, one_key_has_its_capped_score, small_caps_hold};
use proptest::prelude::*;
use star_attention::cpu::Cpu;
use star_attention::{bf16, f16};

proptest! {
    #[test]
    fn what_is_not_finite_stays_in_its_rows((case, spots) in spotted(cases()), dtype in 0..4) {
        let by = On(Cpu::new().with_instructions(case.instructions).unwrap());
        match dtype {
            0 | 1 => spots_stay_in_their_rows::<f32, f32>(&by, &case, &spots, true)?,
            2 => spots_stay_in_their_rows::<f16, f32>(&by, &case, &spots, true)?,
            _ => spots_stay_in_their_rows::<bf16, bf16>(&by, &case, &spots, true)?,
        }
    }

    #[test]
    fn a_sequence_of_what_is_not_finite_leaves_the_others_alone(
        packed in packed(dims()),
        index in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![f32::NAN, f32::INFINITY]),
    ) {
        for by in each_cpu() {
            a_sequence_of_nan_stays_alone::<f32, f32>(&by, &packed, index, value)?;
            a_sequence_of_nan_stays_alone::<bf16, bf16>(&by, &packed, index, value)?;
        }
    }
}

#[test]
fn values_reach_the_rows_that_see_them_alone() {
    for by in each_cpu() {
        for place in PLACES {
            values_reach_the_rows_that_see_them::<f32, f32>(&by, 64, place);
            values_reach_the_rows_that_see_them::<bf16, bf16>(&by, 40, place);
        }
    }
}

#[test]
fn numbers_at_the_ends_of_their_types() {
    for by in each_cpu() {
        extremes_are_exact::<f32>(&by);
        extremes_are_exact::<f16>(&by);
        extremes_are_exact::<bf16>(&by);
    }
}

#[test]
fn softcaps_of_any_size() {
    for by in each_cpu() {
        one_key_has_its_capped_score::<f32>(&by, 24);
        one_key_has_its_capped_score::<bf16>(&by, 64);
        for rows in [1, 130] {
            large_caps_change_nothing::<f32>(&by, 24, rows);
            large_caps_change_nothing::<f16>(&by, 64, rows);
            large_caps_change_nothing::<bf16>(&by, 128, rows);
            small_caps_hold::<f32>(&by, 24, rows);
            small_caps_hold::<bf16>(&by, 64, rows);
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
