//! Attention sinks on the CPU, beside what the oracle's cases have of them.

use crate::phases::each_cpu;
use crate::properties::backend::On;
use crate::properties::batches::batches;
use crate::properties::cases::dims;
use crate::properties::sinks::{
    minus_infinity_is_no_sink, rows_without_keys_have_their_sink_and_nan_stays, what_does_not_fit_is_named,
};
use proptest::prelude::*;
use star_attention::bf16;
use star_attention::cpu::{Cpu, InstructionSet};

proptest! {
    #[test]
    fn a_sink_of_minus_infinity_is_none(
        case in batches(dims()),
        instructions in prop::sample::select(InstructionSet::available()),
        bf in any::<bool>(),
    ) {
        let by = On(Cpu::new().with_instructions(instructions).unwrap());
        if bf {
            minus_infinity_is_no_sink::<_, bf16, bf16>(&by, &case)?;
        } else {
            minus_infinity_is_no_sink::<_, f32, f32>(&by, &case)?;
        }
    }
}

#[test]
fn rows_without_keys_and_rows_that_are_nan() {
    for by in each_cpu() {
        rows_without_keys_have_their_sink_and_nan_stays::<_, f32, f32>(&by);
        rows_without_keys_have_their_sink_and_nan_stays::<_, bf16, bf16>(&by);
    }
}

#[test]
fn sinks_that_do_not_fit_are_named_and_nothing_is_written() {
    what_does_not_fit_is_named::<_, f32>(&Cpu::new(), true);
}
