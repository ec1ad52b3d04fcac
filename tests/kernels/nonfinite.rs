//! NaN and infinities in the data, and softcaps of any size, on the kernels.

use crate::backend::Backend;
use crate::call::{Kernels, kernel_cases, on_each_device};
use crate::properties::nonfinite::{
    spots_stay_in_their_rows, spotted, the_last_value_reaches_the_last_row_alone,
};
use crate::properties::softcap::large_caps_change_nothing;
use proptest::prelude::*;
use star_attention::cuda::HEAD_DIMS;
use star_attention::{bf16, f16};

on_each_device! {
    fn what_is_not_finite_stays_in_its_rows(spotted in spotted(kernel_cases()), bf in any::<bool>()) {
        let (mut case, spots) = spotted;
        // The kernels take the smallest positive number for a scale of 0: it times infinity is no NaN.
        case.config.scale = case.config.scale.filter(|&scale| scale > 0.0);
        let by = Kernels(B::open(case.seed));
        if bf {
            spots_stay_in_their_rows::<bf16>(&by, &case, &spots, false)?;
        } else {
            spots_stay_in_their_rows::<f16>(&by, &case, &spots, false)?;
        }
    }

    fn a_value_behind_the_mask_reaches_no_row() {
        let by = Kernels(B::open(1));
        for dim in HEAD_DIMS {
            // Few rows and many, and more than a block of rows has.
            for rows in [2, 16, 64, 200] {
                the_last_value_reaches_the_last_row_alone::<bf16>(&by, dim, rows);
                the_last_value_reaches_the_last_row_alone::<f16>(&by, dim, rows);
            }
        }
    }

    fn large_softcaps_change_nothing() {
        let by = Kernels(B::open(2));
        for rows in [1, 130] {
            large_caps_change_nothing::<f16>(&by, 64, rows);
            large_caps_change_nothing::<bf16>(&by, 128, rows);
        }
    }
}
