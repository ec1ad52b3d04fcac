//! The kernels against the oracle, for any shape, strides, mask and type.

use crate::backend::Backend;
use crate::call::{kernel_cases, run_plan};
use crate::cases::{Case, RUBBISH};
use proptest::prelude::*;
use star_attention::cuda::HalfElement;
use star_attention::cuda::simt::Simt;
use star_attention::{Element, bf16, f16};

/// The call gives what the definition says, writes nothing else, and does not depend on whether the log-sum-exp is asked for.
fn equals_the_oracle<B: Backend, T: HalfElement, O: Element>(case: &Case) -> Result<(), TestCaseError> {
    let backend = B::open();
    let inputs = case.inputs::<T>();
    let plan = case.device_plan(&backend);
    let (out, lse) =
        run_plan(&backend, &plan, &inputs, case.output::<O>(), Some(case.shape.lse_len())).unwrap();
    let expected = case.expected(&inputs);
    expected.check_lse(&lse)?;
    expected.check_out(out.values())?;
    prop_assert!(out.padding_is(RUBBISH), "wrote between the rows of out");
    let (again, _) = run_plan(&backend, &plan, &inputs, case.output::<O>(), None).unwrap();
    prop_assert!(out.bits() == again.bits(), "no log-sum-exp changes the output");
    Ok(())
}

fn on<B: Backend>(case: &Case, dtypes: usize) -> Result<(), TestCaseError> {
    match dtypes {
        0 => equals_the_oracle::<B, f16, f16>(case),
        1 => equals_the_oracle::<B, f16, f32>(case),
        2 => equals_the_oracle::<B, bf16, bf16>(case),
        _ => equals_the_oracle::<B, bf16, f32>(case),
    }
}

proptest! {
    #[test]
    fn kernels_equal_the_oracle(case in kernel_cases(), dtypes in 0..4usize) {
        on::<Simt>(&case, dtypes)?;
    }
}
