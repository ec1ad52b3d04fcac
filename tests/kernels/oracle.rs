//! The kernels and their variants against the oracle, for any shape, strides, mask and type.

use crate::backend::Backend;
use crate::call::{Variant, kernel_cases, on_each_device, run_call, variant_cases};
use crate::properties::cases::{Case, RUBBISH};
use crate::properties::nonfinite::{spots_stay_in_their_rows, spotted};
use proptest::prelude::*;
use star_attention::cuda::HalfElement;
use star_attention::cuda::flash::variants;
use star_attention::{Element, bf16, f16};

/// The call gives what the definition says, writes nothing else, and does not depend on whether the
/// log-sum-exp is asked for.
pub fn equals_the_oracle<B: Backend, T: HalfElement, O: Element>(case: &Case) -> Result<(), TestCaseError> {
    let backend = B::open(case.seed);
    let inputs = case.inputs::<T, T>();
    let plan = case.device_plan(&backend);
    let mut out = case.output::<O>();
    let mut lse = vec![RUBBISH; case.shape.lse_len()];
    let sinks = case.sinks();
    let call = inputs.call(sinks.as_deref(), &None);
    run_call(&backend, &plan, call, &mut out, Some(&mut lse)).unwrap();
    let expected = case.expected(&inputs);
    expected.check_lse(&lse)?;
    expected.check_out(out.values())?;
    prop_assert!(out.padding_is(RUBBISH), "wrote between the rows of out");
    let mut again = case.output::<O>();
    run_call(&backend, &plan, call, &mut again, None).unwrap();
    prop_assert!(out.bits() == again.bits(), "no log-sum-exp changes the output");
    Ok(())
}

on_each_device! {
    fn kernels_equal_the_oracle(case in kernel_cases(), dtypes in 0..4usize) {
        match dtypes {
            0 => equals_the_oracle::<B, f16, f16>(&case)?,
            1 => equals_the_oracle::<B, f16, f32>(&case)?,
            2 => equals_the_oracle::<B, bf16, bf16>(&case)?,
            _ => equals_the_oracle::<B, bf16, f32>(&case)?,
        }
    }

    fn variants_equal_the_oracle(spotted in spotted(variant_cases()), bf in any::<bool>()) {
        let (mut case, spots) = spotted;
        // As for the kernels themselves: a scale of 0 becomes the smallest positive number.
        case.config.scale = case.config.scale.filter(|&scale| scale > 0.0);
        for name in variants(case.shape.head_dim) {
            let by = Variant(B::open(case.seed), name);
            if bf {
                spots_stay_in_their_rows::<bf16, bf16>(&by, &case, &spots, false)?;
            } else {
                spots_stay_in_their_rows::<f16, f32>(&by, &case, &spots, false)?;
            }
        }
    }
}
