//! NaN and infinities in the data, and softcaps of any size, on the CPU.

use crate::phases::Flash;
use crate::properties::cases::cases;
use crate::properties::nonfinite::{
    spots_stay_in_their_rows, spotted, the_last_value_reaches_the_last_row_alone,
};
use crate::properties::softcap::large_caps_change_nothing;
use proptest::prelude::*;
use star_attention::cpu::InstructionSet;
use star_attention::{bf16, f16};

proptest! {
    #[test]
    fn what_is_not_finite_stays_in_its_rows((case, spots) in spotted(cases()), dtype in 0..4) {
        let by = Flash(case.instructions);
        match dtype {
            0 | 1 => spots_stay_in_their_rows::<f32>(&by, &case, &spots, true)?,
            2 => spots_stay_in_their_rows::<f16>(&by, &case, &spots, true)?,
            _ => spots_stay_in_their_rows::<bf16>(&by, &case, &spots, true)?,
        }
    }
}

#[test]
fn a_value_behind_the_mask_reaches_no_row() {
    for by in InstructionSet::available().into_iter().map(Flash) {
        for rows in [2, 16, 64, 200] {
            the_last_value_reaches_the_last_row_alone::<f32>(&by, 64, rows);
            the_last_value_reaches_the_last_row_alone::<bf16>(&by, 40, rows);
        }
    }
}

#[test]
fn large_softcaps_change_nothing() {
    for by in InstructionSet::available().into_iter().map(Flash) {
        for rows in [1, 130] {
            large_caps_change_nothing::<f32>(&by, 24, rows);
            large_caps_change_nothing::<f16>(&by, 64, rows);
            large_caps_change_nothing::<bf16>(&by, 128, rows);
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
