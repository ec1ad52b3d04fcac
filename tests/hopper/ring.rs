//! A product by a producer and two consumers, through a ring of two stages.

use crate::launch;
use star_attention::cuda::simt::{Simt, TensorMap, Tiling};
use star_attention::{Result, bf16};

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct RingParams {
    a: TensorMap,
    b: TensorMap,
    b_data: u64,
    out: u64,
    depth: u32,
    by_threads: u32,
    early: u32,
    padding: [u32; 9],
}

/// How it is computed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Way {
    /// Threads copy B, not the unit for boxes.
    pub by_threads: bool,
    /// Stages are released before they were read.
    pub early: bool,
}

const BLOCKS: usize = 2;
const ROWS: usize = 128 * BLOCKS;
const COLUMNS: usize = 64;
const SHARED_BYTES: u32 = 1024 + 1024 + 10 * 64 * 128;

/// Small whole numbers: sums are exact in any order.
fn numbers(len: usize, step: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * step + i / 7) % 9) as f32 - 4.0).collect()
}

fn plain(depth: usize) -> Vec<f32> {
    let (a, b) = (numbers(ROWS * depth, 5), numbers(depth * COLUMNS, 11));
    let mut out = vec![0.0; ROWS * COLUMNS];
    for (row, a) in out.chunks_mut(COLUMNS).zip(a.chunks(depth)) {
        for (x, b) in a.iter().zip(b.chunks(COLUMNS)) {
            row.iter_mut().zip(b).for_each(|(sum, y)| *sum += x * y);
        }
    }
    out
}

fn tiling(address: u64, rows: usize, row_len: usize) -> Tiling {
    let bytes = 2 * row_len as u64;
    Tiling {
        address,
        element_bytes: 2,
        extents: [row_len as u64, rows as u64, 1, 1],
        strides: [bytes, bytes * rows as u64, bytes * rows as u64],
        extents_of_box: [64, 64, 1, 1],
        swizzled: true,
    }
}

/// The product by the kernel, on a device.
pub fn run(simt: &Simt, depth: usize, way: Way) -> Result<Vec<f32>> {
    let round = |numbers: Vec<f32>| numbers.into_iter().map(bf16::from_f32).collect::<Vec<_>>();
    let a = simt.buffer(&round(numbers(ROWS * depth, 5)));
    let b = simt.buffer(&round(numbers(depth * COLUMNS, 11)));
    let mut out = simt.buffer(&vec![f32::NAN; ROWS * COLUMNS]);
    let params = RingParams {
        a: tiling(a.span().address(), ROWS, depth).encode()?,
        b: tiling(b.span().address(), depth, COLUMNS).encode()?,
        b_data: b.span().address(),
        out: out.span_mut().address(),
        depth: depth as u32,
        by_threads: way.by_threads.into(),
        early: way.early.into(),
        padding: [0; 9],
    };
    launch(simt, "probe_ring", [BLOCKS as u32, 384, SHARED_BYTES], &params)?;
    Ok(out.as_slice().to_vec())
}

/// Whether the result is the product.
pub fn is_right(out: &[f32], depth: usize) -> bool {
    out == plain(depth)
}

#[test]
fn the_product_is_right_in_any_order() {
    for seed in 0..40 {
        for by_threads in [false, true] {
            for depth in [64, 192, 448] {
                let out = run(&Simt::new(seed), depth, Way { by_threads, early: false });
                assert!(is_right(&out.unwrap(), depth), "depth {depth}, seed {seed}, {by_threads}");
            }
        }
    }
}
