//! Batches on the CPU: sequences of any lengths, places and masks, and the bits of a row under a
//! fixed split length.

use crate::common::{Tensor, views};
use crate::phases::each_cpu;
use crate::properties::backend::On;
use crate::properties::batches::{
    BatchCase, a_request_keeps_its_bits_among_others, batches, each_sequence_of_a_batch_stands_alone,
    keys_in_pages_of_48_and_528_keep_their_bits, many_packed_keys_of_one_head,
};
use crate::properties::cases::{Inputs, dims};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;
use star_attention::cpu::flash::Plan;
use star_attention::cpu::{Cpu, InstructionSet};
use star_attention::{Batch, Element, F8E4M3, PlanConfig, Sequence, bf16, f16};

/// Keys of a split in these tests: some sequences have several, most have one.
const SPLIT_KEYS: usize = 192;

/// The case's call by a plan.
fn run<Q: Element, K: Element>(
    case: &BatchCase,
    plan: &Plan,
    inputs: &Inputs<Q, K>,
) -> (Tensor<f32>, Vec<f32>) {
    let mut out = Tensor::contiguous("out", plan.batch().out_shape(), |_| 0.0);
    let mut lse = vec![0.0; plan.batch().lse_len()];
    let mut workspace = vec![0xffu8; plan.workspace_bytes()];
    let (sinks, scales) = (case.sinks(), case.scales::<K>());
    let views = views(inputs.call(sinks.as_deref(), &scales));
    plan.run(views, out.view_mut(), Some(&mut lse), &mut workspace).unwrap();
    (out, lse)
}

fn stands_alone<T: Element, O: Element>(
    case: &BatchCase,
    instructions: InstructionSet,
    fixed: bool,
) -> Result<(), TestCaseError> {
    let by = On(Cpu::new().with_instructions(instructions).unwrap());
    each_sequence_of_a_batch_stands_alone::<T, T, O>(case, |batch, score, inputs, out, lse| {
        let config = PlanConfig::from(*score);
        let config = if fixed { config.with_split_keys(SPLIT_KEYS) } else { config };
        by.run_call(&config, batch, inputs.call(case.sinks().as_deref(), &None), out, lse).unwrap();
    })
}

/// The bits of every sequence, in a batch and alone, on any number of threads.
fn keeps_its_bits<Q: Element, K: Element>(
    case: &BatchCase,
    instructions: InstructionSet,
) -> Result<(), TestCaseError> {
    let batch = case.batch();
    let inputs = case.inputs::<Q, K>(&batch);
    let results = |batch: &Batch, threads: usize| {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let config = PlanConfig::from(case.score).with_split_keys(SPLIT_KEYS);
            let plan = Plan::for_batch(&config, batch.clone()).unwrap();
            run(case, &plan.with_instructions(instructions).unwrap(), &inputs)
        })
    };
    let (together, lse) = results(&batch, 3);
    for threads in [1, 16] {
        let (again, _) = results(&batch, threads);
        prop_assert!(together.bits() == again.bits(), "other bits on {threads} threads than on 3");
    }
    let [_, seq, heads, _] = batch.query_shape();
    for sequence in batch.sequences() {
        let alone = Batch::new(batch.query_shape(), batch.key_shape()).unwrap();
        let mut alone = alone.with_value_dim(batch.value_dim()).unwrap();
        alone.push(sequence.clone()).unwrap();
        let (out, own_lse) = results(&alone, 1);
        let Sequence { batch: b, ref rows, .. } = *sequence;
        for (row, head) in rows.clone().flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let at = (b * heads + head) * seq + row;
            prop_assert_eq!(own_lse[at].to_bits(), lse[at].to_bits(), "lse of row {}, head {}", row, head);
            for d in 0..batch.value_dim() {
                let [alone, together] = [&out, &together].map(|out| out.get([b, row, head, d]));
                prop_assert_eq!(alone.to_bits(), together.to_bits(), "row {}, head {}", row, head);
            }
        }
    }
    Ok(())
}

/// The same sequences with their keys in pages and in rows: where they lie changes no bit.
fn pages_change_no_bit<Q: Element, K: Element>(
    case: &BatchCase,
    instructions: InstructionSet,
) -> Result<(), TestCaseError> {
    let paged = case.batch();
    let inputs = case.inputs::<Q, K>(&paged);
    let (rows, as_rows) = case.in_rows(&paged, &inputs);
    let [first, second] = [(&paged, &inputs), (&rows, &as_rows)].map(|(batch, inputs)| {
        let plan = Plan::for_batch(&case.score.into(), batch.clone()).unwrap();
        let (out, lse) = run(case, &plan.with_instructions(instructions).unwrap(), inputs);
        (out.bits(), lse.into_iter().map(f32::to_bits).collect::<Vec<_>>())
    });
    prop_assert!(first == second, "other bits from pages than from rows");
    Ok(())
}

fn instructions() -> impl Strategy<Value = InstructionSet> {
    prop::sample::select(InstructionSet::available())
}

proptest! {
    #[test]
    fn each_sequence_stands_alone(
        case in batches(dims()),
        instructions in instructions(),
        dtype in 0..5,
        fixed in any::<bool>(),
    ) {
        match dtype {
            0 | 1 => stands_alone::<f32, f32>(&case, instructions, fixed)?,
            2 => stands_alone::<f16, f32>(&case, instructions, fixed)?,
            3 => stands_alone::<bf16, f32>(&case, instructions, fixed)?,
            _ => stands_alone::<bf16, bf16>(&case, instructions, fixed)?,
        }
    }

    #[test]
    fn under_a_fixed_split_length_a_row_keeps_its_bits(
        case in batches(dims()),
        instructions in instructions(),
        dtype in 0..3,
    ) {
        match dtype {
            0 => keeps_its_bits::<f32, f32>(&case, instructions)?,
            1 => keeps_its_bits::<bf16, bf16>(&case, instructions)?,
            _ => keeps_its_bits::<bf16, F8E4M3>(&case, instructions)?,
        }
    }

    #[test]
    fn where_keys_lie_changes_no_bit(case in batches(dims()), instructions in instructions(), dtype in 0..3) {
        match dtype {
            0 => pages_change_no_bit::<f32, f32>(&case, instructions)?,
            1 => pages_change_no_bit::<bf16, bf16>(&case, instructions)?,
            _ => pages_change_no_bit::<f16, F8E4M3>(&case, instructions)?,
        }
    }
}

#[test]
fn pages_of_hybrid_models_change_no_bit() {
    for by in each_cpu() {
        keys_in_pages_of_48_and_528_keep_their_bits::<_, f32, f32>(&by, 64);
        keys_in_pages_of_48_and_528_keep_their_bits::<_, bf16, bf16>(&by, 40);
        keys_in_pages_of_48_and_528_keep_their_bits::<_, bf16, F8E4M3>(&by, 64);
    }
}

/// On any number of threads.
#[test]
fn a_long_request_keeps_its_bits_among_others() {
    fn of<Q: Element, K: Element>() {
        let on_threads = |threads: usize| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let by = On(Cpu::new());
            let run = || a_request_keeps_its_bits_among_others::<_, Q, K>(&by, 8192, 64, 512);
            let (out, lse) = pool.install(run);
            (out.bits(), lse)
        };
        let [one, three, sixteen] = [1, 3, 16].map(on_threads);
        assert!(one == three && one == sixteen, "the number of threads changes bits");
    }
    of::<f32, f32>();
    of::<bf16, bf16>();
    of::<f32, F8E4M3>();
}

/// 128 query heads on one KV head, and 16,777,216 packed keys of 64 sequences.
#[test]
fn many_packed_keys_of_one_head_can_be_planned() {
    let batch = many_packed_keys_of_one_head();
    let plan = Plan::for_batch(&PlanConfig::new(), batch).unwrap();
    // Every key counts for every head.
    assert_eq!(plan.flops(), 4 * 128 * 128 * 16_777_216);
}
