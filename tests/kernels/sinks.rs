//! Attention sinks on the kernels, beside what the oracle's cases have of them.

use crate::call::{kernel_dims, on_each_device};
use crate::common::aligned;
use crate::engine::Engine;
use crate::properties::backend::On;
use crate::properties::batches::batches;
use crate::properties::sinks::{
    minus_infinity_is_no_sink, rows_without_keys_have_their_sink_and_nan_stays, what_does_not_fit_is_named,
};
use star_attention::{bf16, f16};

on_each_device! {
    fn a_sink_of_minus_infinity_is_none(case in batches(kernel_dims()), dtypes in 0..4usize) {
        let mut case = case;
        case.layouts = case.layouts.map(|layout| aligned(&layout));
        let by = On(B::cuda(case.seed));
        match dtypes {
            0 => minus_infinity_is_no_sink::<_, f16, f16>(&by, &case)?,
            1 => minus_infinity_is_no_sink::<_, f16, f32>(&by, &case)?,
            2 => minus_infinity_is_no_sink::<_, bf16, bf16>(&by, &case)?,
            _ => minus_infinity_is_no_sink::<_, bf16, f32>(&by, &case)?,
        }
    }

    fn rows_without_keys_and_rows_that_are_nan() {
        rows_without_keys_have_their_sink_and_nan_stays::<_, bf16, bf16>(&On(B::cuda(1)));
        rows_without_keys_have_their_sink_and_nan_stays::<_, f16, f32>(&On(B::cuda(2)));
    }

    fn sinks_that_do_not_fit_are_named_and_nothing_is_written() {
        what_does_not_fit_is_named::<_, bf16>(&B::cuda(3), false);
    }
}
