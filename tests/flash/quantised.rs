//! Keys and values in fp8 on the CPU.

use crate::common::{Tensor, named};
use crate::phases::each_cpu;
use crate::properties::append::{appends, each_row_is_in_its_place};
use crate::properties::backend::On;
use crate::properties::batches::batches;
use crate::properties::cases::dims;
use crate::properties::nonfinite::PLACES;
use crate::properties::quantised::{
    a_store_keeps_its_codes, appended_codes_are_those_of_the_quotients, attention_equals_the_oracle,
    every_code_counts_for_what_it_says, nan_reaches_the_rows_that_see_it, plans, what_does_not_fit_is_named,
};
use proptest::prelude::*;
use star_attention::cpu::{Cpu, InstructionSet, reference};
use star_attention::{AttentionConfig, F8E4M3, Inputs, Scales, bf16, f16};

proptest! {
    #[test]
    fn attention_over_codes_equals_the_oracle(
        case in batches(dims()),
        config in plans(),
        instructions in prop::sample::select(InstructionSet::available()),
        dtype in 0..4,
    ) {
        let by = On(Cpu::new().with_instructions(instructions).unwrap());
        match dtype {
            0 => attention_equals_the_oracle::<_, f32, f32>(&by, &case, &config)?,
            1 => attention_equals_the_oracle::<_, f16, f16>(&by, &case, &config)?,
            2 => attention_equals_the_oracle::<_, bf16, f32>(&by, &case, &config)?,
            _ => attention_equals_the_oracle::<_, bf16, bf16>(&by, &case, &config)?,
        }
    }

    #[test]
    fn codes_go_to_their_places(case in appends(), dtype in 0..3) {
        let cpu = Cpu::new();
        match dtype {
            0 => each_row_is_in_its_place::<_, f32, F8E4M3>(&cpu, &case)?,
            1 => each_row_is_in_its_place::<_, f16, F8E4M3>(&cpu, &case)?,
            _ => each_row_is_in_its_place::<_, bf16, F8E4M3>(&cpu, &case)?,
        }
    }
}

/// Few rows, and more than the kernel for few takes.
#[test]
fn each_of_the_256_codes_counts_for_what_it_says() {
    for by in each_cpu() {
        for rows in [1, 9] {
            every_code_counts_for_what_it_says::<_, f32, f32>(&by, [24, 40], rows);
            every_code_counts_for_what_it_says::<_, bf16, f32>(&by, [64, 64], rows);
            every_code_counts_for_what_it_says::<_, f16, f16>(&by, [128, 8], rows);
            every_code_counts_for_what_it_says::<_, bf16, bf16>(&by, [7, 65], rows);
        }
    }
}

#[test]
fn nan_reaches_the_rows_that_see_it_alone() {
    for by in each_cpu() {
        for place in PLACES {
            nan_reaches_the_rows_that_see_it::<_, f32, f32>(&by, [64, 64], place, true);
            nan_reaches_the_rows_that_see_it::<_, bf16, bf16>(&by, [40, 24], place, true);
        }
    }
}

#[test]
fn caches_of_codes() {
    appended_codes_are_those_of_the_quotients::<_, f32>(&Cpu::new(), true);
    appended_codes_are_those_of_the_quotients::<_, f16>(&Cpu::new(), true);
    appended_codes_are_those_of_the_quotients::<_, bf16>(&Cpu::new(), true);
    a_store_keeps_its_codes(&Cpu::new());
}

#[test]
fn scales_that_do_not_fit_are_named_and_nothing_is_written() {
    what_does_not_fit_is_named::<_, f32>(&On(Cpu::new()), true);
    what_does_not_fit_is_named::<_, bf16>(&On(Cpu::new()), true);
}

#[test]
fn the_oracle_refuses_what_plans_refuse() {
    let query = Tensor::<f32>::contiguous("query", [1, 2, 3, 8], |_| 0.5);
    let key = Tensor::<F8E4M3>::contiguous("key", [1, 2, 3, 8], |_| 0.5);
    let config = AttentionConfig::default();
    let refused = |key_scales: &[f32], value_scales: &[f32]| {
        let inputs = Inputs::new(query.view(), key.view(), key.view());
        let inputs = inputs.with_scales(Scales::new(key_scales, value_scales));
        reference::attention_of(&config, inputs).map(drop).map_err(named)
    };
    assert_eq!(refused(&[1.0, 2.0, 3.0], &[0.5]), Ok(()));
    assert_eq!(refused(&[1.0, 2.0], &[0.5]), Err(("shape", "key scales")));
    assert_eq!(refused(&[1.0], &[0.5, 2.0]), Err(("shape", "value scales")));
    assert_eq!(refused(&[0.0], &[0.5]), Err(("value", "key scales")));
    assert_eq!(refused(&[1.0], &[f32::NAN]), Err(("value", "value scales")));
    let scales = Scales::new(&[1.0f32][..], &[1.0f32][..]);
    let inputs = Inputs::new(query.view(), query.view(), query.view());
    let refused = reference::attention_of(&config, inputs.with_scales(scales));
    assert_eq!(named(refused.unwrap_err()), ("dtype", "key"));
    let refused = reference::attention_of(&config, inputs.with_prefix(query.view(), query.view()));
    assert_eq!(named(refused.unwrap_err()), ("value", "prefix"));
}
