//! Merges on the CPU as a backend.

use crate::properties::separate::{
    any_number_of_partials, is_exact_at_any_strides, scattered, scattered_rows_are_refused,
    what_does_not_fit_is_named,
};
use proptest::prelude::*;
use star_attention::cpu::Cpu;
use star_attention::{bf16, f16};

proptest! {
    #[test]
    fn every_pair_of_types_at_any_strides((parts, layouts) in scattered(), dtypes in 0..9usize) {
        let cpu = Cpu::new();
        match dtypes {
            0 => is_exact_at_any_strides::<_, f32, f32>(&cpu, &parts, &layouts)?,
            1 => is_exact_at_any_strides::<_, f32, f16>(&cpu, &parts, &layouts)?,
            2 => is_exact_at_any_strides::<_, f32, bf16>(&cpu, &parts, &layouts)?,
            3 => is_exact_at_any_strides::<_, f16, f32>(&cpu, &parts, &layouts)?,
            4 => is_exact_at_any_strides::<_, f16, f16>(&cpu, &parts, &layouts)?,
            5 => is_exact_at_any_strides::<_, f16, bf16>(&cpu, &parts, &layouts)?,
            6 => is_exact_at_any_strides::<_, bf16, f32>(&cpu, &parts, &layouts)?,
            7 => is_exact_at_any_strides::<_, bf16, f16>(&cpu, &parts, &layouts)?,
            _ => is_exact_at_any_strides::<_, bf16, bf16>(&cpu, &parts, &layouts)?,
        }
    }
}

/// Also more than kernels take at once.
#[test]
fn any_number_of_partials_can_be_merged() {
    any_number_of_partials(&Cpu::new(), 40);
}

#[test]
fn what_does_not_fit_is_named_and_nothing_is_written() {
    what_does_not_fit_is_named(&Cpu::new());
    scattered_rows_are_refused(&Cpu::new());
}
