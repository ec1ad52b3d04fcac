//! Queries of one element type over keys and values of another.

use crate::common::{Tensor, views};
use crate::properties::cases::{Case, Inputs, cases};
use proptest::prelude::*;
use star_attention::cpu::InstructionSet;
use star_attention::{DType, Element, F8E4M3, bf16, f16};

/// The same numbers as f32, into which each type converts exactly.
fn wide<T: Element>(name: &'static str, tensor: &Tensor<T>) -> Tensor<f32> {
    Tensor::contiguous(name, tensor.shape(), |index| tensor.get(index).to_f32())
}

/// Whether probabilities of inputs of one low type are rounded: to bf16 where all are bf16, to two
/// bf16 terms where a matrix unit multiplies f16.
fn rounds(instructions: InstructionSet, inputs: [DType; 2]) -> bool {
    use InstructionSet::{Amx, AmxModel, Avx512Bf16, Avx512Bf16Model};
    match inputs {
        [DType::BF16, DType::BF16] => {
            matches!(instructions, Avx512Bf16 | Avx512Bf16Model | Amx | AmxModel)
        }
        [DType::F16, DType::F16] => matches!(instructions, Amx | AmxModel),
        _ => false,
    }
}

/// The bits of an output. fp8 elements are added up times 2⁻⁸, which rounds more where a
/// number is hardly above what f32 has.
fn beyond_underflow<T: Element>(x: f32) -> u32 {
    if T::DTYPE == DType::F8E4M3 && x.abs() < 1e-34 { 0 } else { x.to_bits() }
}

/// Nothing is rounded but what f32 rounds: within f32's tolerance of the oracle, and the bits of a
/// call on the same numbers in f32. Low types whose probabilities are rounded are the exception.
fn is_as_good_as_f32<Q: Element, T: Element>(case: &Case) -> Result<(), TestCaseError> {
    let inputs = case.inputs::<Q, T>();
    let sinks = case.sinks();
    let views = views(inputs.call(sinks.as_deref(), &None));
    let exact = Inputs {
        query: wide("query", &inputs.query),
        key: wide("key", &inputs.key),
        value: wide("value", &inputs.value),
    };
    let expected = case.expected(&exact);
    for instructions in InstructionSet::available() {
        let on = |error: TestCaseError| TestCaseError::fail(format!("{instructions:?}: {error}"));
        let plan = case.plan().with_instructions(instructions).unwrap();
        let mut workspace = vec![0xffu8; plan.workspace_bytes()];
        let (mut out, mut lse) = (case.output::<f32>(), vec![f32::NAN; case.shape.lse_len()]);
        plan.run(views, out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
        if rounds(instructions, [Q::DTYPE, T::DTYPE]) {
            let expected = case.expected(&inputs);
            expected.check_out(out.values()).map_err(on)?;
            expected.check_lse(&lse).map_err(on)?;
            continue;
        }
        expected.check_out(out.values()).map_err(on)?;
        expected.check_lse(&lse).map_err(on)?;
        let (in_f32, lse_in_f32) = case.run_plan::<f32, f32, f32>(&plan, &exact);
        let [got, wide] = [&out, &in_f32].map(|out| out.values().map(beyond_underflow::<T>));
        prop_assert!(got.eq(wide), "{instructions:?}: other bits than in f32");
        let bits = |lse: Vec<f32>| lse.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        prop_assert!(bits(lse) == bits(lse_in_f32), "{instructions:?}: other bits of lse than in f32");
    }
    Ok(())
}

/// Keys and values in fp8 with scales: within f32's tolerance of the oracle, whatever the
/// queries.
fn scales_are_as_good_as_f32<Q: Element>(case: &Case) -> Result<(), TestCaseError> {
    let Inputs { query, key, value } = case.inputs::<Q, F8E4M3>();
    let expected =
        case.expected(&Inputs { query: wide("query", &query), key: key.clone(), value: value.clone() });
    let inputs = Inputs { query, key, value };
    for instructions in InstructionSet::available() {
        let on = |error: TestCaseError| TestCaseError::fail(format!("{instructions:?}: {error}"));
        let plan = case.plan().with_instructions(instructions).unwrap();
        let (out, lse) = case.run_plan::<Q, F8E4M3, f32>(&plan, &inputs);
        expected.check_out(out.values()).map_err(on)?;
        expected.check_lse(&lse).map_err(on)?;
    }
    Ok(())
}

proptest! {
    #[test]
    fn queries_and_keys_of_any_two_types(case in cases(), pair in 0..15) {
        match pair {
            9 => is_as_good_as_f32::<f32, F8E4M3>(&case)?,
            10 => is_as_good_as_f32::<f16, F8E4M3>(&case)?,
            11 => is_as_good_as_f32::<bf16, F8E4M3>(&case)?,
            12 => scales_are_as_good_as_f32::<f32>(&case)?,
            13 => scales_are_as_good_as_f32::<f16>(&case)?,
            14 => scales_are_as_good_as_f32::<bf16>(&case)?,
            0 => is_as_good_as_f32::<f32, f32>(&case)?,
            1 => is_as_good_as_f32::<f32, f16>(&case)?,
            2 => is_as_good_as_f32::<f32, bf16>(&case)?,
            3 => is_as_good_as_f32::<f16, f32>(&case)?,
            4 => is_as_good_as_f32::<f16, f16>(&case)?,
            5 => is_as_good_as_f32::<f16, bf16>(&case)?,
            6 => is_as_good_as_f32::<bf16, f32>(&case)?,
            7 => is_as_good_as_f32::<bf16, f16>(&case)?,
            _ => is_as_good_as_f32::<bf16, bf16>(&case)?,
        }
    }
}
