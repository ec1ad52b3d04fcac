//! The default backend against the oracle, for any shape, strides, mask and type.

use crate::cases::{Case, Inputs, RUBBISH, cases};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;
use star_attention::{Element, bf16, f16};

/// The call gives what the definition says, writes nothing else, and does not depend on what it finds in the workspace
/// or on whether the log-sum-exp is asked for.
fn equals_the_oracle<T: Element, O: Element>(case: &Case) -> Result<(), TestCaseError> {
    let inputs = case.inputs::<T>();
    let expected = case.expected(&inputs);
    let Inputs { query, key, value } = &inputs;
    let plan = case.plan();
    let mut workspace = vec![f32::NAN; plan.workspace_len()];
    let mut out = case.output::<O>();
    let mut lse = vec![RUBBISH; case.shape.lse_len()];
    plan.run(query.view(), key.view(), value.view(), out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
    expected.check_lse(&lse)?;
    expected.check_out(out.values())?;
    prop_assert!(out.padding_is(RUBBISH), "wrote between the rows of out");

    let mut again = case.output::<O>();
    plan.run(query.view(), key.view(), value.view(), again.view_mut(), None, &mut workspace).unwrap();
    prop_assert_eq!(out.bits(), again.bits(), "a used workspace, or no log-sum-exp, changes the output");
    prop_assert!(again.padding_is(RUBBISH), "wrote between the rows of out");
    Ok(())
}

/// As many threads as there are, the bits are the same.
fn same_on_any_threads<T: Element, O: Element>(case: &Case) -> Result<(), TestCaseError> {
    let inputs = case.inputs::<T>();
    let run = |threads| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (out, lse) = pool.install(|| case.run::<T, O>(&inputs));
        (out.bits(), lse.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let one = run(1);
    for threads in [2, 3] {
        prop_assert!(one == run(threads), "{threads} threads give other bits than one");
    }
    Ok(())
}

proptest! {
    #[test]
    fn f32_equals_the_oracle(case in cases()) {
        equals_the_oracle::<f32, f32>(&case)?;
    }

    #[test]
    fn f16_equals_the_oracle(case in cases(), f32_out in any::<bool>()) {
        if f32_out {
            equals_the_oracle::<f16, f32>(&case)?;
        } else {
            equals_the_oracle::<f16, f16>(&case)?;
        }
    }

    #[test]
    fn bf16_equals_the_oracle(case in cases(), f32_out in any::<bool>()) {
        if f32_out {
            equals_the_oracle::<bf16, f32>(&case)?;
        } else {
            equals_the_oracle::<bf16, bf16>(&case)?;
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing(case in cases(), dtype in 0..3) {
        match dtype {
            0 => same_on_any_threads::<f32, f32>(&case)?,
            1 => same_on_any_threads::<f16, f16>(&case)?,
            _ => same_on_any_threads::<bf16, f32>(&case)?,
        }
    }
}
