//! The emulator finds what it is there to find: each test plants a bug into kernels that are right.

use crate::backend::Backend;
use crate::call::{Memory, run_plan};
use crate::common::{Layout, Tensor, extents};
use crate::properties::cases::{Case, Inputs, RUBBISH, Values};
use star_attention::cpu::InstructionSet;
use star_attention::cuda::flash::Plan;
use star_attention::cuda::simt::{Fault, Simt};
use star_attention::cuda::{DeviceTensor, DeviceTensorMut, Span, SpanMut};
use star_attention::{AttentionConfig, Element, Error, Mask, Result, bf16};

#[allow(dead_code, missing_docs)]
#[rustfmt::skip]
#[path = "../../src/cuda/params.rs"]
mod params;
use params::StarTile;

const STAR: Mask = Mask::Star { anchor_len: 20, block_len: 50, first_block_len: 30, left: None };

/// A call on one sequence with one pair of heads, small enough that no keys are split.
pub fn case(mask: Mask, query_len: usize, key_len: usize, head_dim: usize) -> Case {
    Case {
        shape: extents([1, query_len, key_len], [2, 1], [head_dim, head_dim]),
        config: AttentionConfig::new(mask),
        layouts: [Layout::CONTIGUOUS; 4],
        values: Values::Normal,
        instructions: InstructionSet::Portable,
        sinks: false,
        seed: 1,
    }
}

/// Context encoding, whose warps share keys, and query attention, whose warps have keys of their
/// own.
fn both_kernels() -> [Case; 2] {
    [case(Mask::Causal, 130, 130, 128), case(Mask::Full, 4, 400, 64)]
}

pub fn run_on<O: Element>(simt: &Simt, case: &Case) -> Result<Vec<u32>> {
    let mut out = case.output::<O>();
    run_plan(simt, &case.device_plan(simt), &case.inputs::<bf16, bf16>(), &mut out, None)?;
    Ok(out.bits())
}

/// The fault is found, and named as expected, whatever the order of warps.
fn found(case: &Case, fault: Fault, expected: &str) {
    found_in::<f32>(case, fault, expected);
}

/// The same with an output of another type.
fn found_in<O: Element>(case: &Case, fault: Fault, expected: &str) {
    for seed in 0..3 {
        match run_on::<O>(&Simt::new(seed).with_fault(fault), case) {
            Err(Error::Kernel { reason, .. }) => {
                assert!(reason.contains(expected), "{fault:?}: {reason}");
            }
            other => panic!("{fault:?} was not found: {:?}", other.map(|_| "a result")),
        }
    }
}

#[test]
fn without_a_fault_any_order_gives_the_same_bits() {
    for case in both_kernels() {
        let first = run_on::<f32>(&Simt::new(0), &case).unwrap();
        for seed in 1..10 {
            assert_eq!(run_on::<f32>(&Simt::new(seed), &case).unwrap(), first);
        }
    }
}

/// Each of the barriers that a block comes to is needed. A thread that runs ahead meets what others
/// have not written, or still use.
#[test]
fn a_missing_barrier() {
    let [encode, query] = both_kernels();
    // Before the list is read, and two for each of three tiles of keys.
    for barrier in 0..7 {
        found(&encode, Fault::SkipBarrier(barrier), "shared memory: ");
    }
    // Before outputs take the place of queries that were never used.
    let blind = case(Mask::Full, 70, 0, 64);
    found_in::<bf16>(&blind, Fault::SkipBarrier(1), "shared memory: ");
    // After the queries' copy, before the rings are used for the warps' results, and before those
    // are read.
    for barrier in 0..3 {
        found(&query, Fault::SkipBarrier(barrier), "shared memory: ");
    }
}

#[test]
fn a_missing_barrier_of_a_warp() {
    let [_, query] = both_kernels();
    found(&query, Fault::SkipWarpBarriers, "no barrier between");
    // Rows of 16 bits are gathered in shared memory before they are written.
    let [encode, _] = both_kernels();
    found_in::<bf16>(&encode, Fault::SkipWarpBarriers, "no barrier between");
}

#[test]
fn a_copy_read_before_its_wait() {
    for case in both_kernels() {
        found(&case, Fault::WaitForFewer, "waited for its copy");
    }
}

#[test]
fn shared_memory_out_of_bounds() {
    for case in both_kernels() {
        found(&case, Fault::LessShared(16), "shared memory: bytes");
    }
}

/// A thread that has left is missed at the barriers of its block, and in its warp.
#[test]
fn a_barrier_that_not_all_threads_reach() {
    for case in both_kernels() {
        for thread in [0, 17, 127] {
            for barrier in 0..3 {
                found(&case, Fault::Leave { thread, barrier }, "barrier:");
            }
        }
    }
}

/// Tensors that claim to be longer than their allocations, on either side of the call.
#[test]
fn global_memory_out_of_bounds() {
    let simt = Simt::new(0);
    for case in both_kernels() {
        let plan = case.device_plan(&simt);
        let Inputs { query, key, value } = case.inputs::<bf16, bf16>();
        let mut workspace = simt.buffer(&vec![0u8; plan.workspace_bytes()]);
        for short in 0..4 {
            let [query, key, value] = [&query, &key, &value].map(Tensor::buffer);
            let cut = |i: usize, len: usize| if i == short { len - 8 } else { len };
            let buffers: Vec<_> = [query, key, value]
                .iter()
                .enumerate()
                .map(|(i, x)| simt.buffer(&x[..cut(i, x.len())]))
                .collect();
            let out = simt.buffer(&vec![RUBBISH; cut(3, query.len())]);
            let address = |i: usize| buffers[i].span().address();
            // SAFETY: they are not as long as they claim: the device must refuse to touch what is
            // beyond.
            let (q, k, v, out) = unsafe {
                (
                    Span::<Simt, bf16>::from_raw(address(0), query.len()),
                    Span::<Simt, bf16>::from_raw(address(1), key.len()),
                    Span::<Simt, bf16>::from_raw(address(2), value.len()),
                    SpanMut::<Simt, f32>::from_raw(out.span().address(), query.len()),
                )
            };
            let mut out = DeviceTensorMut::contiguous("out", out, case.shape.query_shape()).unwrap();
            let result = plan.prepare(&simt, &(), workspace.span_mut()).unwrap().run(
                star_attention::Inputs::new(
                    &DeviceTensor::contiguous("query", q, case.shape.query_shape()).unwrap(),
                    &DeviceTensor::contiguous("key", k, case.shape.key_shape()).unwrap(),
                    &DeviceTensor::contiguous("value", v, case.shape.key_shape()).unwrap(),
                ),
                &mut out,
                None,
            );
            let error = result.unwrap_err().to_string();
            assert!(error.contains("global memory: ") && error.contains("of an allocation"), "{error}");
        }
    }
}

/// One field of a tile, moved by one.
#[derive(Clone, Copy, Debug)]
struct Edge {
    name: &'static str,
    up: bool,
    field: fn(&mut StarTile) -> &mut u32,
    /// Whether it is an edge of this tile.
    applies: fn(&StarTile) -> bool,
}

/// All edges of the mask and of the tile's rows. A limit that is too high shows where no row's own
/// limit, the tile's end, comes before it.
fn edges() -> Vec<Edge> {
    let edge = |name, up, field, applies| Edge { name, up, field, applies };
    vec![
        edge("anchor", true, |tile| &mut tile.anchor, |_| true),
        edge("anchor", false, |tile| &mut tile.anchor, |tile| tile.anchor > 0),
        edge("start", true, |tile| &mut tile.start, |_| true),
        edge("start", false, |tile| &mut tile.start, |tile| tile.start > 0),
        edge("visible", true, |tile| &mut tile.visible, |tile| tile.end - tile.visible > 0),
        edge("visible", false, |tile| &mut tile.visible, |_| true),
        edge("causal", true, |tile| &mut tile.causal, |tile| tile.end - tile.visible > 1),
        edge("causal", false, |tile| &mut tile.causal, |tile| tile.end - tile.visible > 0),
        edge("key_start", true, |tile| &mut tile.key_start, |_| true),
        edge("begin", true, |tile| &mut tile.begin, |_| true),
        edge("end", false, |tile| &mut tile.end, |_| true),
        edge("rows", false, |tile| &mut tile.rows, |_| true),
    ]
}

/// Runs a case with one tile of its plan changed by `change`; whether the result is what it ought
/// to be.
fn is_right(case: &Case, plan: &Plan, at: usize, change: impl FnOnce(&mut StarTile)) -> bool {
    let simt = Simt::new(0);
    let inputs = case.inputs::<bf16, bf16>();
    let [query, key, value] =
        [&inputs.query, &inputs.key, &inputs.value].map(|tensor| Memory::of(&simt, tensor));
    let mut out = case.output::<f32>();
    let mut out_memory = Memory::of(&simt, &out);
    let mut lse = simt.buffer(&vec![RUBBISH; case.shape.lse_len()]);
    let mut workspace = simt.buffer(&vec![0u8; plan.workspace_bytes()]);
    // SAFETY: the buffer lives; between the upload of the tiles and the launch nothing else uses
    // it.
    let span = unsafe { SpanMut::from_raw(workspace.span().address(), workspace.as_slice().len()) };
    let mut prepared = plan.prepare(&simt, &(), span).unwrap();
    let bytes = &mut workspace.as_mut_slice()[at * size_of::<StarTile>()..][..size_of::<StarTile>()];
    // SAFETY: a tile was uploaded there; it is plain numbers.
    let mut tile: StarTile = unsafe { bytes.as_ptr().cast::<StarTile>().read_unaligned() };
    change(&mut tile);
    // SAFETY: as above.
    unsafe { bytes.as_mut_ptr().cast::<StarTile>().write_unaligned(tile) };
    let ran = prepared.run(
        star_attention::Inputs::new(
            &query.view(&simt, "query"),
            &key.view(&simt, "key"),
            &value.view(&simt, "value"),
        ),
        &mut out_memory.view_mut(&simt, "out"),
        Some(&mut lse.span_mut()),
    );
    out.buffer_mut().copy_from_slice(&simt.read(&out_memory.memory));
    let expected = case.expected(&inputs);
    ran.is_ok() && expected.check_lse(lse.as_slice()).is_ok() && expected.check_out(out.values()).is_ok()
}

/// Every edge of every tile, moved by one, gives a result that the property tests refuse.
#[test]
fn an_off_by_one_at_every_mask_edge() {
    let cases = [
        case(Mask::Full, 100, 70, 64),
        case(Mask::Full, 3, 70, 64),
        case(Mask::Causal, 100, 90, 64),
        case(Mask::Causal, 3, 70, 64),
        case(STAR, 150, 150, 64),
        case(STAR, 9, 150, 64),
    ];
    let mut planted = 0;
    for case in cases {
        let plan = case.device_plan(&Simt::new(0));
        assert_eq!(plan.splits(), 1);
        let tiles = plan.workspace_bytes() / size_of::<StarTile>();
        for tile in 0..tiles {
            assert!(is_right(&case, &plan, tile, |_| {}));
            for edge in edges() {
                let mut applies = false;
                let right = is_right(&case, &plan, tile, |tile| {
                    // Rows that see nothing have no edges.
                    applies = tile.end > 0 && (edge.applies)(tile);
                    if applies {
                        let field = (edge.field)(tile);
                        *field = if edge.up { *field + 1 } else { *field - 1 };
                    }
                });
                let (name, step) = (edge.name, if edge.up { "+ 1" } else { "- 1" });
                assert_eq!(right, !applies, "{name} {step} in tile {tile} of {:?}", case.config.mask);
                planted += usize::from(applies);
            }
        }
    }
    // The count is printed where tests are asked to print.
    println!("{planted} edges moved by one, all found");
    assert!(planted > 100);
}
