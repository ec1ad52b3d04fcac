//! Merges of partials that lie apart, by the kernel.

use crate::call::on_each_device;
use crate::common::{Tensor, named};
use crate::engine::Engine;
use crate::properties::backend::merge_on;
use crate::properties::cases::RUBBISH;
use crate::properties::separate::{
    any_number_of_partials, is_exact_at_any_strides, scattered, scattered_rows_are_refused,
    what_does_not_fit_is_named,
};
use star_attention::cuda::MOST_PARTIALS;
use star_attention::{Element, bf16, f16};

/// Merges `n` partials of one row each; the error's kind and argument, if it is refused.
fn merge_of<B: Engine, T: Element, O: Element>(n: usize) -> Result<(), (&'static str, &'static str)> {
    let shape = [1, 1, 1, 8];
    let partials = vec![(Tensor::<T>::contiguous("partial", shape, |_| 1.0), vec![0.0]); n];
    let mut out = Tensor::<O>::contiguous("out", shape, |_| RUBBISH);
    let result = merge_on(&B::cuda(0), &partials, None, &mut out, None);
    let expected = if result.is_ok() { 1.0 } else { O::from_f32(RUBBISH).to_f32() };
    assert!(out.values().all(|x| x == expected), "{n} partials");
    result.map_err(named)
}

on_each_device! {
    fn every_pair_of_types_at_any_strides(case in scattered(), dtypes in 0..7usize) {
        let ((parts, layouts), backend) = (case, B::cuda(1));
        match dtypes {
            0 => is_exact_at_any_strides::<_, f32, f32>(&backend, &parts, &layouts)?,
            1 => is_exact_at_any_strides::<_, f32, f16>(&backend, &parts, &layouts)?,
            2 => is_exact_at_any_strides::<_, f32, bf16>(&backend, &parts, &layouts)?,
            3 => is_exact_at_any_strides::<_, f16, f32>(&backend, &parts, &layouts)?,
            4 => is_exact_at_any_strides::<_, f16, f16>(&backend, &parts, &layouts)?,
            5 => is_exact_at_any_strides::<_, bf16, f32>(&backend, &parts, &layouts)?,
            _ => is_exact_at_any_strides::<_, bf16, bf16>(&backend, &parts, &layouts)?,
        }
    }

    fn any_number_of_partials_up_to_the_most() {
        any_number_of_partials(&B::cuda(2), MOST_PARTIALS);
        merge_of::<B, bf16, bf16>(MOST_PARTIALS).unwrap();
        assert_eq!(merge_of::<B, bf16, bf16>(MOST_PARTIALS + 1), Err(("value", "partials")));
    }

    fn what_does_not_fit_is_named_and_nothing_is_written() {
        what_does_not_fit_is_named(&B::cuda(3));
        scattered_rows_are_refused(&B::cuda(3));
        assert_eq!(merge_of::<B, f16, bf16>(2), Err(("dtype", "out")));
        assert_eq!(merge_of::<B, bf16, f16>(2), Err(("dtype", "out")));
    }
}
