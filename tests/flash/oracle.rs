//! The default backend against the oracle, for any shape, strides, mask and type.

use crate::common::views;
use crate::properties::cases::{Case, RUBBISH, cases};
use proptest::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use star_attention::cpu::InstructionSet;
use star_attention::{Element, F8E4M3, bf16, f16};

/// On any instructions the call gives what the definition says, writes nothing else, and does not
/// depend on what it finds in the workspace or on whether the log-sum-exp is asked for.
fn equals_the_oracle<Q: Element, K: Element, O: Element>(case: &Case) -> Result<(), TestCaseError> {
    let inputs = case.inputs::<Q, K>();
    let expected = case.expected(&inputs);
    let (sinks, scales) = (case.sinks(), case.scales::<K>());
    let views = views(inputs.call(sinks.as_deref(), &scales));
    for instructions in InstructionSet::available() {
        let on = |error: TestCaseError| TestCaseError::fail(format!("{instructions:?}: {error}"));
        let plan = case.plan().with_instructions(instructions).unwrap();
        let mut workspace = vec![0xffu8; plan.workspace_bytes()];
        let mut out = case.output::<O>();
        let mut lse = vec![RUBBISH; case.shape.lse_len()];
        plan.run(views, out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
        expected.check_lse(&lse).map_err(on)?;
        expected.check_out(out.values()).map_err(on)?;
        prop_assert!(out.padding_is(RUBBISH), "{instructions:?} wrote between the rows of out");

        let mut again = case.output::<O>();
        plan.run(views, again.view_mut(), None, &mut workspace).unwrap();
        prop_assert!(out.bits() == again.bits(), "a used workspace, or no log-sum-exp, changes the output");
        prop_assert!(again.padding_is(RUBBISH), "{instructions:?} wrote between the rows of out");
    }
    Ok(())
}

/// However many threads there are, when the plan is made or when it runs, the bits are the same.
fn same_on_any_threads<Q: Element, K: Element, O: Element>(case: &Case) -> Result<(), TestCaseError> {
    let inputs = case.inputs::<Q, K>();
    let pools = [1, 2, 3].map(|threads| ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    let run = |planning: &ThreadPool, running: &ThreadPool| {
        let plan = planning.install(|| case.plan());
        let (out, lse) = running.install(|| case.run_plan::<Q, K, O>(&plan, &inputs));
        (out.bits(), lse.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let [one, two, three] = &pools;
    let alone = run(one, one);
    for (planning, running) in [(two, two), (three, three), (three, one), (one, three)] {
        let threads = [planning, running].map(ThreadPool::current_num_threads);
        prop_assert!(alone == run(planning, running), "other bits on {threads:?} threads than on one");
    }
    Ok(())
}

proptest! {
    #[test]
    fn f32_equals_the_oracle(case in cases()) {
        equals_the_oracle::<f32, f32, f32>(&case)?;
    }

    #[test]
    fn f16_equals_the_oracle(case in cases(), f32_out in any::<bool>()) {
        if f32_out {
            equals_the_oracle::<f16, f16, f32>(&case)?;
        } else {
            equals_the_oracle::<f16, f16, f16>(&case)?;
        }
    }

    #[test]
    fn bf16_equals_the_oracle(case in cases(), f32_out in any::<bool>()) {
        if f32_out {
            equals_the_oracle::<bf16, bf16, f32>(&case)?;
        } else {
            equals_the_oracle::<bf16, bf16, bf16>(&case)?;
        }
    }

    #[test]
    fn the_number_of_threads_changes_nothing(case in cases(), dtype in 0..4) {
        match dtype {
            0 => same_on_any_threads::<f32, f32, f32>(&case)?,
            1 => same_on_any_threads::<f16, f16, f16>(&case)?,
            2 => same_on_any_threads::<bf16, F8E4M3, bf16>(&case)?,
            _ => same_on_any_threads::<bf16, bf16, f32>(&case)?,
        }
    }
}
