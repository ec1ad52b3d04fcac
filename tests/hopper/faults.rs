//! The emulator finds what a Hopper GPU would punish: each test plants a bug into a kernel that is
//! right.

use crate::ring::{Way, is_right, run};
use star_attention::Error;
use star_attention::cuda::simt::{Fault, Simt};

const BOXES: Way = Way { by_threads: false, early: false };
const THREADS: Way = Way { by_threads: true, early: false };
/// Seven steps, so that stages are used again.
const DEPTH: usize = 448;

/// The fault is found, and named in one of these ways, whatever the order of warps.
fn found(way: Way, fault: Option<Fault>, expected: &[&str]) {
    for seed in 0..12 {
        let simt = Simt::new(seed);
        let simt = fault.map_or(simt.clone(), |fault| simt.with_fault(fault));
        match run(&simt, DEPTH, way) {
            Err(Error::Kernel { reason, .. }) => {
                assert!(expected.iter().any(|expected| reason.contains(expected)), "{fault:?}: {reason}");
            }
            other => panic!("{fault:?}, seed {seed}, was not found: {:?}", other.map(|_| "a result")),
        }
    }
}

#[test]
fn an_arrival_that_is_skipped() {
    for way in [BOXES, THREADS] {
        for n in 0..5 {
            found(way, Some(Fault::SkipArrival(n)), &["deadlock: "]);
        }
    }
}

#[test]
fn an_arrival_too_many() {
    found(BOXES, Some(Fault::ArriveTwice(0)), &["1 arrive where 0 are expected"]);
}

#[test]
fn a_wait_for_the_other_parity() {
    // It blocks, or passes too early: what follows meets others.
    let expected = [
        "deadlock: ",
        "before ",
        "no barrier between",
        "nothing was written",
        "during a copy",
        "1 arrive where 0 are expected",
    ];
    for n in 0..5 {
        found(BOXES, Some(Fault::OtherParity(n)), &expected);
    }
}

#[test]
fn more_bytes_than_expected() {
    found(BOXES, Some(Fault::ExpectFewer(128)), &["tx-count overflow"]);
}

#[test]
fn a_box_one_row_short() {
    found(BOXES, Some(Fault::ShortBoxes), &["lacks 0 arrivals and 384 bytes"]);
}

/// Nothing can be refused: the numbers are wrong.
#[test]
fn a_box_without_its_swizzle() {
    for seed in 0..4 {
        let simt = Simt::new(seed).with_fault(Fault::UnswizzledBoxes);
        assert!(!is_right(&run(&simt, DEPTH, BOXES).unwrap(), DEPTH));
    }
}

#[test]
fn a_stage_released_early() {
    found(Way { early: true, ..BOXES }, None, &["no barrier between wgmma of warp group"]);
    found(Way { early: true, ..THREADS }, None, &["no barrier between wgmma of warp group"]);
}

#[test]
fn a_missing_fence_between_threads_and_products() {
    found(THREADS, Some(Fault::SkipProxyFences), &["no fence.proxy.async between"]);
}

#[test]
fn a_missing_fence_of_registers() {
    found(BOXES, Some(Fault::SkipWgmmaFences), &["no wgmma.fence"]);
}

#[test]
fn a_wait_for_fewer_products() {
    let expected = ["no barrier between wgmma of warp group", "without waiting for its products"];
    found(BOXES, Some(Fault::WaitForFewerProducts), &expected);
}

#[test]
fn registers_that_are_handed_over_wrongly() {
    found(BOXES, Some(Fault::MoreRegisters(4)), &["no multiple of 8"]);
    found(BOXES, Some(Fault::MoreRegisters(24)), &["not 24 to 256"]);
    // 48 and 264 are refused one by one; 32 and 248 together are more than there are.
    found(BOXES, Some(Fault::MoreRegisters(8)), &["deadlock: "]);
    found(BOXES, Some(Fault::KeepRegisters), &["unequal warps of a group"]);
}

#[test]
fn a_named_barrier_for_others() {
    found(BOXES, Some(Fault::MoreAtBarriers(32)), &["deadlock: "]);
    found(BOXES, Some(Fault::MoreAtBarriers(16)), &["144 threads"]);
    found(BOXES, Some(Fault::MoreAtBarriers(512)), &["640 threads"]);
}
