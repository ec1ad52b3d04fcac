//! Programs that every rank of a group runs, over any engine. They panic where something does not
//! hold.

mod deliver;
mod encode;
mod generate;
mod merge;
mod serve;

use crate::common::Tensor;
use star_attention::comm::{Collective, Traffic};
use star_attention::{TensorView, cpu::reference};

/// A program, under the name by which a process is told to run it.
pub type Program = (&'static str, fn(&dyn Collective));

/// All of them, one after another on the same group.
pub const PROGRAMS: [Program; 6] = [
    ("deliver", deliver::deliver),
    ("broadcast", deliver::broadcast_long),
    ("encode", encode::encode),
    ("merge", merge::merge),
    ("generate", generate::generate),
    ("serve", serve::serve),
];

/// Refuses bits that are not the same on every rank.
pub fn assert_same_everywhere(group: &dyn Collective, bits: &[u32]) {
    let mine: &[u8] = bytemuck::cast_slice(bits);
    let mut all = vec![0; group.size() * mine.len()];
    group.all_gather(mine, &mut all).unwrap();
    for (rank, theirs) in all.chunks_exact(mine.len().max(1)).enumerate() {
        assert!(theirs == mine, "rank {rank} has other bits than rank {}", group.rank());
    }
}

/// Refuses an output and log-sum-exp further from the oracle's than `bound`.
pub fn assert_near(out: TensorView<'_, f32>, lse: &[f32], expected: &reference::Reference, bound: f64) {
    for (x, y) in Tensor::of(out).values().zip(&expected.out) {
        assert!((f64::from(x) - y).abs() <= bound, "{x} for {y}");
    }
    for (&x, &y) in lse.iter().zip(&expected.lse) {
        assert!(f64::from(x) == y || (f64::from(x) - y).abs() <= bound, "{x} for {y}");
    }
}

/// Cuts `total` into as many parts as there are ranks, the same on each: uneven, and some empty.
pub fn cuts(rng: &mut crate::common::Rng, total: usize, parts: usize) -> Vec<usize> {
    let mut cuts: Vec<usize> = (1..parts).map(|_| rng.below(total + 1)).collect();
    cuts.extend([0, total]);
    cuts.sort_unstable();
    cuts
}

/// What a rank sends in collectives of so many bytes to each of the others.
pub fn traffic(group: &dyn Collective, bytes: &[usize]) -> Traffic {
    let others = group.size() as u64 - 1;
    Traffic {
        collectives: bytes.len() as u64,
        messages: bytes.len() as u64 * others,
        bytes: others * bytes.iter().sum::<usize>() as u64,
    }
}
