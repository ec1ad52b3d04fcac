//! Matrices in shared memory, as the descriptors of `wgmma` name them: 16-bit elements, swizzled
//! over 128 bytes.

use super::shared::SharedMemory;
use super::tensor::swizzle;
use half::{bf16, f16};
use std::ops::Range;

/// The depth of a product.
const DEPTH: usize = 16;
/// Elements of a piece of 16 bytes.
const PIECE: usize = 8;

/// Where the elements of an operand are, by row (of A) or column (of B), and depth.
pub struct Descriptor {
    start: u32,
    leading: u32,
    stride: u32,
    transposed: bool,
}

impl Descriptor {
    /// `transposed`: rows are contiguous (MN-major), not the depth (K-major).
    pub fn new(bits: u64, transposed: bool) -> Result<Self, String> {
        let field = |from: u32| (bits >> from & 0x3fff) as u32 * 16;
        let (start, leading, stride) = (field(0), field(16), field(32));
        if bits >> 62 != 1 || bits >> 49 & 7 != 0 {
            return Err(format!("wgmma: descriptor {bits:#x} is not of the 128-byte swizzle, base offset 0"));
        }
        // Eight rows of 128 bytes repeat the swizzle's pattern.
        let within = start % 1024;
        if within % 32 != 0 || within >= if transposed { 32 } else { 128 } {
            return Err(format!(
                "wgmma: operand at {start}, {within} from where the swizzle's pattern begins"
            ));
        }
        Ok(Self { start, leading, stride, transposed })
    }

    fn address(&self, row: u32, k: u32) -> u32 {
        swizzle(if self.transposed {
            self.start + row / 64 * self.leading + k / 8 * self.stride + k % 8 * 128 + row % 64 * 2
        } else {
            self.start + row / 8 * self.stride + row % 8 * 128 + 2 * k
        })
    }

    /// Row and depth of the first element of each piece.
    fn pieces(&self, rows: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
        let (row_step, depth_step) = if self.transposed { (PIECE, 1) } else { (1, PIECE) };
        rows.step_by(row_step).flat_map(move |row| (0..DEPTH).step_by(depth_step).map(move |k| (row, k)))
    }

    /// The addresses of all pieces of some rows.
    pub fn chunks(&self, rows: Range<usize>) -> Vec<u32> {
        self.pieces(rows).map(|(row, k)| self.address(row as u32, k as u32)).collect()
    }

    /// Some rows in f32, row by row.
    pub fn matrix(&self, shared: &SharedMemory, rows: Range<usize>, is_bf16: bool) -> Vec<f32> {
        let mut out = vec![0.0; rows.len() * DEPTH];
        let first = rows.start;
        for (row, k) in self.pieces(rows) {
            let address = self.address(row as u32, k as u32) as usize;
            let piece = &shared.bytes()[address..][..2 * PIECE];
            for (i, bytes) in piece.as_chunks::<2>().0.iter().enumerate() {
                let (row, k) = if self.transposed { (row + i, k) } else { (row, k + i) };
                out[(row - first) * DEPTH + k] = if is_bf16 {
                    bf16::from_ne_bytes(*bytes).to_f32()
                } else {
                    f16::from_ne_bytes(*bytes).to_f32()
                };
            }
        }
        out
    }
}
