//! The rates of the machine's instruction sets, in turn.

use super::call::Call;
use super::turns::{median, seconds};
use star_attention::cpu::{InstructionSet, flash::Plan};
use star_attention::{AttentionConfig, AttentionShape, Element, Mask, bf16, f16};

/// Prints the rates for each input type and kind of work, with a mark on the set that the library
/// takes.
pub fn print_table(quick: bool) {
    let mut sets = InstructionSet::available();
    // Models are for tests, and plain Rust for CPUs without vectors.
    let slow = [InstructionSet::AmxModel, InstructionSet::Avx512Bf16Model, InstructionSet::Portable];
    sets.retain(|set| *set == InstructionSet::best() || !slow.contains(set));
    println!("\nInstruction sets in turn: the library takes the marked one, and the fastest is in bold\n");
    let names = sets.iter().map(|&set| match set {
        set if set == InstructionSet::best() => format!(" {set:?} (taken) |"),
        set => format!(" {set:?} |"),
    });
    println!("| case |{} unit |", names.collect::<String>());
    println!("|---|{}---|", "---:|".repeat(sets.len()));
    let scale = if quick { 16 } else { 1 };
    for (rows, keys, mask) in
        [(2048, 2048, Mask::Causal), (1, 32 * 1024, Mask::Full), (16, 32 * 1024, Mask::Full)]
    {
        let [rows, keys] = [if rows > 16 { rows / scale } else { rows }, keys / scale];
        line::<f32>(&sets, rows, keys, &mask, quick);
        line::<f16>(&sets, rows, keys, &mask, quick);
        line::<bf16>(&sets, rows, keys, &mask, quick);
    }
}

/// A line of the table: so many query rows and keys, 32/8 heads of 128.
fn line<T: Element>(sets: &[InstructionSet], query_len: usize, key_len: usize, mask: &Mask, quick: bool) {
    const ROUNDS: usize = 7;
    let shape = AttentionShape {
        batch: 1,
        query_len,
        key_len,
        query_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        value_dim: 128,
    };
    let plan = Plan::new(&AttentionConfig::new(mask.clone()), &shape).unwrap();
    let (work, unit) = match query_len {
        1 => ((2 * shape.key_shape().iter().product::<usize>() * T::DTYPE.size()) as f64, "GB/s"),
        _ => (plan.flops() as f64, "GFLOP/s"),
    };
    let plans: Vec<Plan> = sets.iter().map(|&set| plan.clone().with_instructions(set).unwrap()).collect();
    // One workspace for all.
    let largest = plans.iter().max_by_key(|plan| plan.workspace_bytes());
    let mut call = Call::<T>::of(largest.unwrap_or(&plan).clone());
    let mut samples = vec![Vec::new(); sets.len()];
    for round in 0..if quick { 1 } else { 1 + ROUNDS } {
        for (plan, samples) in plans.iter().zip(&mut samples) {
            call.plan = plan.clone();
            let seconds = seconds(&mut || call.run());
            // The first round warms up.
            if round > 0 || quick {
                samples.push(seconds);
            }
        }
    }
    let rates: Vec<f64> = samples.into_iter().map(|samples| work / median(samples) / 1e9).collect();
    let fastest = rates.iter().copied().fold(0.0, f64::max);
    let cells = rates.iter().map(|&rate| {
        let mark = if rate == fastest && rates.len() > 1 { "**" } else { "" };
        format!(" {mark}{rate:.1}{mark} |")
    });
    let rows = if mask == &Mask::Causal { "causal".into() } else { format!("{query_len} rows") };
    println!("| {} {rows}, {key_len} keys |{} {unit} |", T::DTYPE, cells.collect::<String>());
}
