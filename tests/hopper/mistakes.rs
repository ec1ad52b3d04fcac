//! Single mistakes, which `cuda/simt/mistakes.cu` makes when it is told to.

use crate::launch;
use star_attention::Error;
use star_attention::cuda::simt::{Simt, TensorMap, Tiling};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct MistakeParams {
    map: TensorMap,
    number: u64,
    mistake: u32,
    wrong: u32,
    padding: [u32; 12],
}

/// In the order of the kernel's cases, what each is refused for: one of these, as warps come.
const MISTAKES: &[&[&str]] = &[
    &["no barrier between thread"],
    &["no barrier between its init", "there is none"],
    &["no fence between its init"],
    &["not aligned to 1024"],
    &["no fence.proxy.async between"],
    &["nothing was written", "before thread 0 waited", "no barrier between a copy"],
    &["ends before all copies have landed", "nobody waited for"],
    &["A's registers were written"],
    &["accumulators were written"],
    &["no barrier between wgmma of warp group 0"],
    &["no barrier between a copy"],
    &["unequal warps of a group"],
    &["comes again", "the block ends"],
    &["has 128 threads come", "has 256 threads come"],
    &["names are 1 to 15"],
    &["an mbarrier"],
    &["there is none"],
    &["a count of 0"],
    &["waited for its copy", "no barrier between a copy"],
    &["wrong direction"],
    &["no tensor map"],
    &["global memory: "],
];

fn run(mistake: usize, wrong: bool, seed: u64) -> (star_attention::Result<()>, u32) {
    let simt = Simt::new(seed);
    let data = simt.buffer(&[0u16; 64 * 64]);
    let mut number = simt.buffer(&[0u32]);
    let map = Tiling {
        address: data.span().address(),
        element_bytes: 2,
        extents: [64, 64, 1, 1],
        strides: [128, 128 * 64, 128 * 64],
        extents_of_box: [64, 64, 1, 1],
        swizzled: true,
    };
    let params = MistakeParams {
        map: map.encode().unwrap(),
        number: number.span_mut().address(),
        mistake: mistake as u32,
        wrong: wrong.into(),
        padding: [0; 12],
    };
    let result = launch(&simt, "mistake", [1, 256, 1024 + 2 * 64 * 128], &params);
    (result, number.as_slice()[0])
}

#[test]
fn what_is_right_is_not_refused() {
    for mistake in 0..MISTAKES.len() {
        for seed in 0..20 {
            run(mistake, false, seed).0.unwrap_or_else(|error| panic!("{mistake}: {error}"));
        }
    }
}

#[test]
fn what_is_wrong_is_refused() {
    let mut missed = Vec::new();
    for (mistake, expected) in MISTAKES.iter().enumerate() {
        for seed in 0..20 {
            match run(mistake, true, seed).0 {
                Err(Error::Kernel { reason, .. })
                    if expected.iter().any(|expected| reason.contains(expected)) => {}
                other => missed.push((mistake, seed, other)),
            }
        }
    }
    assert!(missed.is_empty(), "{missed:#?}");
}

/// Eight warps count to six, and begin again.
#[test]
fn a_number_that_all_warps_count() {
    let (result, number) = run(MISTAKES.len() - 1, false, 5);
    result.unwrap();
    assert_eq!(number, 1);
}
