//! NaN and infinities in the data, and softcaps of any size, on the kernels.

use crate::call::{kernel_cases, kernel_dims, on_each_device};
use crate::common::aligned;
use crate::engine::Engine;
use crate::properties::backend::On;
use crate::properties::extremes::extremes_are_exact;
use crate::properties::nonfinite::{
    PLACES, spots_stay_in_their_rows, spotted, values_reach_the_rows_that_see_them,
};
use crate::properties::packed::{a_sequence_of_nan_stays_alone, packed};
use crate::properties::softcap::{large_caps_change_nothing, one_key_has_its_capped_score, small_caps_hold};
use proptest::prelude::*;
use star_attention::cuda::HEAD_DIMS;
use star_attention::{bf16, f16};

on_each_device! {
    fn what_is_not_finite_stays_in_its_rows(spotted in spotted(kernel_cases()), dtypes in 0..4usize) {
        let (mut case, spots) = spotted;
        // The kernels take the smallest positive number for a scale of 0: it times infinity is no
        // NaN.
        case.config.scale = case.config.scale.filter(|&scale| scale > 0.0);
        let by = On(B::cuda(case.seed));
        match dtypes {
            0 => spots_stay_in_their_rows::<f16, f16>(&by, &case, &spots, false)?,
            1 => spots_stay_in_their_rows::<f16, f32>(&by, &case, &spots, false)?,
            2 => spots_stay_in_their_rows::<bf16, bf16>(&by, &case, &spots, false)?,
            _ => spots_stay_in_their_rows::<bf16, f32>(&by, &case, &spots, false)?,
        }
    }

    fn a_sequence_of_what_is_not_finite_leaves_the_others_alone(
        packed in packed(kernel_dims()),
        index in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![f32::NAN, f32::INFINITY]),
        bf in any::<bool>(),
    ) {
        let by = On(B::cuda(3));
        let mut packed = packed;
        packed.layouts = packed.layouts.map(|layout| aligned(&layout));
        if bf {
            a_sequence_of_nan_stays_alone::<bf16, bf16>(&by, &packed, index, value)?;
        } else {
            a_sequence_of_nan_stays_alone::<f16, f32>(&by, &packed, index, value)?;
        }
    }

    fn values_reach_the_rows_that_see_them_alone() {
        let by = On(B::cuda(1));
        for dim in HEAD_DIMS {
            for place in PLACES {
                values_reach_the_rows_that_see_them::<bf16, bf16>(&by, dim, place);
            }
        }
        for place in PLACES {
            values_reach_the_rows_that_see_them::<f16, f32>(&by, 64, place);
        }
    }

    fn numbers_at_the_ends_of_their_types() {
        let by = On(B::cuda(2));
        extremes_are_exact::<f16>(&by);
        extremes_are_exact::<bf16>(&by);
    }

    fn softcaps_of_any_size() {
        let by = On(B::cuda(2));
        one_key_has_its_capped_score::<bf16>(&by, 64);
        one_key_has_its_capped_score::<f16>(&by, 96);
        for rows in [1, 130] {
            large_caps_change_nothing::<f16>(&by, 64, rows);
            large_caps_change_nothing::<bf16>(&by, 128, rows);
            small_caps_hold::<f16>(&by, 64, rows);
            small_caps_hold::<bf16>(&by, 128, rows);
        }
    }
}
