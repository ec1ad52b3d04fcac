//! Bugs planted into the kernels for Hopper GPUs: each barrier, arrival, wait and fence is needed.

use crate::faults::{case, run_on};
use crate::properties::cases::Case;
use star_attention::cuda::simt::{Fault, Simt};
use star_attention::{Element, Error, Mask, bf16};

/// Stages are used again and again; the last tiles of keys are of the border.
fn encode() -> Case {
    case(Mask::Causal, 130, 900, 128)
}

fn device(seed: u64) -> Simt {
    Simt::new(seed).with_hopper()
}

/// The fault is found, and named in one of these ways, whatever the order of warps.
fn found(fault: Fault, expected: &[&str]) {
    found_in::<f32>(&encode(), fault, expected);
}

/// The same in another call, with an output of another type.
fn found_in<O: Element>(case: &Case, fault: Fault, expected: &[&str]) {
    for seed in 0..3 {
        match run_on::<O>(&device(seed).with_fault(fault), case) {
            Err(Error::Kernel { kernel, reason }) => {
                assert_eq!(kernel, "encode_hopper_bf16_d128");
                assert!(expected.iter().any(|expected| reason.contains(expected)), "{fault:?}: {reason}");
            }
            other => panic!("{fault:?}, seed {seed}, was not found: {:?}", other.map(|_| "a result")),
        }
    }
}

#[test]
fn without_a_fault_any_order_gives_the_same_bits() {
    let first = run_on::<f32>(&device(0), &encode()).unwrap();
    for seed in 1..6 {
        assert_eq!(run_on::<f32>(&device(seed), &encode()).unwrap(), first);
    }
}

/// Between what all prepare and its use; before a group multiplies the queries that it copied, and
/// before outputs take their place.
#[test]
fn a_missing_barrier() {
    found(Fault::SkipBarrier(0), &["no barrier between", "there is none", "nothing was written"]);
    found(Fault::MoreAtBarriers(32), &["deadlock: "]);
    // Rows of 16 bits are gathered in shared memory before they are written, where lists are not
    // split.
    found_in::<bf16>(&case(Mask::Causal, 130, 300, 128), Fault::SkipWarpBarriers, &["no barrier between"]);
}

#[test]
fn an_arrival_too_few_or_too_many() {
    for n in 0..4 {
        found(Fault::SkipArrival(n), &["deadlock: "]);
    }
    // The stage is written while it is read, or the phases of its barriers part ways.
    let expected = ["deadlock: ", "arrive where 0 are expected", "no barrier between", "during a copy"];
    found(Fault::ArriveTwice(0), &expected);
}

/// It blocks, or passes too early: what follows meets others.
#[test]
fn a_wait_for_the_other_parity() {
    let expected = [
        "deadlock: ",
        "waited for its copy",
        "no barrier between",
        "nothing was written",
        "during a copy",
        "arrive where 0 are expected",
        "copies that nobody waited for",
    ];
    for n in 0..4 {
        found(Fault::OtherParity(n), &expected);
    }
}

#[test]
fn a_wait_for_fewer_copies_or_products() {
    found(Fault::WaitForFewer, &["waited for its copy"]);
    let expected = ["no barrier between wgmma of warp group", "were written before wgmma.wait_group"];
    found(Fault::WaitForFewerProducts, &expected);
}

#[test]
fn a_missing_fence() {
    found(Fault::SkipProxyFences, &["no fence.proxy.async between"]);
    found(Fault::SkipWgmmaFences, &["no wgmma.fence"]);
}

#[test]
fn registers_that_are_handed_over_wrongly() {
    found(Fault::MoreRegisters(4), &["no multiple of 8"]);
    found(Fault::MoreRegisters(8), &["deadlock: "]);
    found(Fault::KeepRegisters, &["unequal warps of a group"]);
}

/// Beyond what is there for tiles to begin at a multiple of 1,024.
#[test]
fn shared_memory_out_of_bounds() {
    found(Fault::LessShared(1024 + 16), &["shared memory: bytes"]);
}
