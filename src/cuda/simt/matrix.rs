//! What the lanes of a warp do together.

use super::block::{Lane, Stop, WARP};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// Each lane gets the value of the lane whose number differs in the bits `lanes`.
pub fn shuffle(stops: &[Stop; WARP], replies: &mut [Lane]) {
    for (lane, Lane { reply, .. }) in replies.iter_mut().enumerate() {
        let Stop::Shuffle { lanes, .. } = stops[lane] else { unreachable!("all are at a shuffle") };
        if let Stop::Shuffle { value, .. } = stops[(lane ^ lanes as usize) % WARP] {
            reply.value = value;
        }
    }
}

/// Banks of 16 bytes: what rows of a matrix may not share, or their load takes several turns.
const BANKS: u32 = 8;

/// `ldmatrix.x4`: lanes 8i..8i+8 give the rows of matrix i; lane l gets of each the elements 2(l %
/// 4) and 2(l % 4) + 1 of row l / 4, or of column l / 4 if transposed.
pub fn load(
    stops: &[Stop; WARP],
    mut read: impl FnMut(usize, u32) -> Result<[u8; 16], String>,
) -> Result<(), String> {
    let mut matrices = [[[0u16; 8]; 8]; 4];
    let mut banks = [0u32; 4];
    for (lane, stop) in stops.iter().enumerate() {
        let Stop::LoadMatrices { row, .. } = *stop else { unreachable!("all are at a matrix load") };
        let bytes = read(lane, row)?;
        let bank = 1 << (row / 16 % BANKS);
        if banks[lane / 8] & bank != 0 {
            return Err(format!("shared memory: lane {lane} meets another row of its matrix in a bank"));
        }
        banks[lane / 8] |= bank;
        for (i, element) in matrices[lane / 8][lane % 8].iter_mut().enumerate() {
            *element = u16::from_ne_bytes([bytes[2 * i], bytes[2 * i + 1]]);
        }
    }
    for (lane, stop) in stops.iter().enumerate() {
        let Stop::LoadMatrices { to, transposed, .. } = *stop else {
            unreachable!("all are at a matrix load")
        };
        let (row, column) = (lane / 4, lane % 4 * 2);
        let words = matrices.map(|m| {
            let (low, high) = if transposed {
                (m[column][row], m[column + 1][row])
            } else {
                (m[row][column], m[row][column + 1])
            };
            u32::from(low) | u32::from(high) << 16
        });
        // SAFETY: the lane waits for its four words, on its stack.
        unsafe { *to = words };
    }
    Ok(())
}

/// The two elements of each word, in f32.
pub fn unpack<const WORDS: usize, const ELEMENTS: usize>(words: [u32; WORDS], bf16: bool) -> [f32; ELEMENTS] {
    let mut out = [0f32; ELEMENTS];
    if bf16 {
        for (pair, word) in out.as_chunks_mut::<2>().0.iter_mut().zip(words) {
            *pair = [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
        }
    } else {
        let mut halves = [f16::ZERO; ELEMENTS];
        for (pair, word) in halves.as_chunks_mut::<2>().0.iter_mut().zip(words) {
            *pair = [f16::from_bits(word as u16), f16::from_bits((word >> 16) as u16)];
        }
        halves.convert_to_f32_slice(&mut out);
    }
    out
}

/// `mma.m16n8k16`: c (16×8) += a (16×16) b (16×8). Lane l has of c the rows g = l / 4 and g + 8 at
/// columns t = 2(l % 4) and t + 1; of a the same rows at columns t, t + 1 and t + 8, t + 9; of b
/// the rows t, t + 1, t + 8, t + 9 at column g.
pub fn multiply_add(stops: &[Stop; WARP]) {
    let (mut a, mut b, mut c) = ([[0f32; 16]; 16], [[0f32; 8]; 16], [[0f32; 8]; 16]);
    let place = |lane: usize| (lane / 4, lane % 4 * 2);
    for (lane, stop) in stops.iter().enumerate() {
        let Stop::MultiplyAdd { c: c_at, a: a_at, b: b_at, bf16 } = *stop else {
            unreachable!("all are at a product")
        };
        let (g, t) = place(lane);
        // SAFETY: the lane waits, with its operands on its stack.
        let (x, y, z) = unsafe { (unpack::<4, 8>(*a_at, bf16), unpack::<2, 4>(*b_at, bf16), *c_at) };
        for (i, pair) in x.as_chunks::<2>().0.iter().enumerate() {
            a[g + i % 2 * 8][t + i / 2 * 8..][..2].copy_from_slice(pair);
        }
        (b[t][g], b[t + 1][g], b[t + 8][g], b[t + 9][g]) = (y[0], y[1], y[2], y[3]);
        c[g][t..][..2].copy_from_slice(&z[..2]);
        c[g + 8][t..][..2].copy_from_slice(&z[2..]);
    }
    for (row, c) in a.iter().zip(&mut c) {
        for (&x, b) in row.iter().zip(&b) {
            c.iter_mut().zip(b).for_each(|(c, &y)| *c += x * y);
        }
    }
    for (lane, stop) in stops.iter().enumerate() {
        let Stop::MultiplyAdd { c: to, .. } = *stop else { unreachable!("all are at a product") };
        let (g, t) = place(lane);
        // SAFETY: as above.
        unsafe { *to = [c[g][t], c[g][t + 1], c[g + 8][t], c[g + 8][t + 1]] };
    }
}

/// Two numbers in a word of 16-bit elements, rounded to nearest even.
pub fn pack(low: f32, high: f32, bf16: bool) -> u32 {
    let bits = |x: f32| if bf16 { bf16::from_f32(x).to_bits() } else { f16::from_f32(x).to_bits() };
    u32::from(bits(low)) | u32::from(bits(high)) << 16
}
