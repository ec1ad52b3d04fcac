//! Inputs with their element type erased, so that the kernels are compiled once per instruction set
//! and not once per type, and the forms in which tiles of them are packed.

use crate::element::sealed::{AnySlice, Sealed};
use crate::simd::{Simd, widen};
use crate::{Element, TensorView};
use std::ops::Range;

/// The rows (one head of one token each) of an input `[batch, seq, heads, dim]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    data: AnySlice<'a>,
    strides: [usize; 4],
    dim: usize,
}

impl<'a> Rows<'a> {
    /// The last axis of `view` must be contiguous.
    pub fn new<T: Element>(view: TensorView<'a, T>) -> Self {
        Self { data: Sealed::erase(view.data()), strides: view.strides(), dim: view.shape()[3] }
    }

    /// All elements, in their type.
    pub fn elements(&self) -> AnySlice<'a> {
        self.data
    }

    /// Elements from one token's row to the next.
    #[inline(always)]
    pub fn seq_stride(&self) -> usize {
        self.strides[1]
    }

    /// Elements from one head's row to the next.
    #[inline(always)]
    pub fn head_stride(&self) -> usize {
        self.strides[2]
    }

    /// The row at a place on the axes batch, seq and heads.
    #[inline(always)]
    pub fn row(&self, place: [usize; 3]) -> AnySlice<'a> {
        let start = self.start(place);
        self.slice(start..start + self.dim)
    }

    /// All elements from the row at a place on.
    #[inline(always)]
    pub fn rows_from(&self, place: [usize; 3]) -> AnySlice<'a> {
        let len = match self.data {
            AnySlice::F32(data) => data.len(),
            AnySlice::F16(data) => data.len(),
            AnySlice::BF16(data) => data.len(),
            AnySlice::F8E4M3(data) => data.len(),
        };
        self.slice(self.start(place)..len)
    }

    #[inline(always)]
    fn start(&self, [batch, seq, head]: [usize; 3]) -> usize {
        batch * self.strides[0] + seq * self.strides[1] + head * self.strides[2]
    }

    #[inline(always)]
    fn slice(&self, range: Range<usize>) -> AnySlice<'a> {
        match self.data {
            AnySlice::F32(data) => AnySlice::F32(&data[range]),
            AnySlice::F16(data) => AnySlice::F16(&data[range]),
            AnySlice::BF16(data) => AnySlice::BF16(&data[range]),
            AnySlice::F8E4M3(data) => AnySlice::F8E4M3(&data[range]),
        }
    }
}

/// Writes a row as words of `ELEMENTS` elements (see `Product`), padded with zeros.
#[inline(always)]
pub(super) fn pack_words<S: Simd, const ELEMENTS: usize>(simd: S, row: AnySlice<'_>, words: &mut [f32]) {
    let used = match row {
        AnySlice::F32(row) => {
            words[..row.len()].copy_from_slice(row);
            row.len()
        }
        AnySlice::F16(row) => {
            widen(simd, row, words);
            row.len()
        }
        AnySlice::BF16(row) if ELEMENTS == 1 => {
            widen(simd, row, words);
            row.len()
        }
        AnySlice::F8E4M3(row) => {
            widen(simd, row, words);
            row.len()
        }
        AnySlice::BF16(row) => {
            let (pairs, rest) = row.as_chunks::<2>();
            for (word, [low, high]) in words.iter_mut().zip(pairs) {
                *word = f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16);
            }
            if let [last] = rest {
                words[pairs.len()] = f32::from_bits(u32::from(last.to_bits()));
            }
            row.len().div_ceil(2)
        }
    };
    words[used..].fill(0.0);
}

/// Writes one word of each column of values: of the keys `word · ELEMENTS ..` among `count`, which
/// `rows` gives; missing keys are zeros. Returns whether all elements were finite.
#[inline(always)]
pub(super) fn pack_value_words<'a, S: Simd, const ELEMENTS: usize>(
    simd: S,
    rows: &impl Fn(usize) -> AnySlice<'a>,
    count: usize,
    word: usize,
    to: &mut [f32],
) -> bool {
    let first = word * ELEMENTS;
    if first >= count {
        to.fill(0.0);
        return true;
    }
    if ELEMENTS == 1 {
        pack_words::<S, 1>(simd, rows(first), to);
        return all_finite(to);
    }
    let AnySlice::BF16(low) = rows(first) else { unreachable!("pairs are made of bf16 alone") };
    let high = if first + 1 < count { rows(first + 1) } else { AnySlice::BF16(&[]) };
    let AnySlice::BF16(high) = high else { unreachable!("pairs are made of bf16 alone") };
    let mut special = false;
    let is_special = |x: u32| x & 0x7f80 == 0x7f80;
    if high.is_empty() {
        for (word, low) in to.iter_mut().zip(low) {
            let low = u32::from(low.to_bits());
            special |= is_special(low);
            *word = f32::from_bits(low);
        }
    } else {
        for ((word, low), high) in to.iter_mut().zip(low).zip(high) {
            let (low, high) = (u32::from(low.to_bits()), u32::from(high.to_bits()));
            special |= is_special(low) | is_special(high);
            *word = f32::from_bits(low | high << 16);
        }
    }
    to[low.len()..].fill(0.0);
    !special
}

/// Whether no element is infinite or NaN.
#[inline(always)]
fn all_finite(row: &[f32]) -> bool {
    let mut special = false;
    for x in row {
        special |= x.to_bits() & 0x7f80_0000 == 0x7f80_0000;
    }
    !special
}

/// Zeroes the non-finite elements of packed values.
pub(super) fn clear_special<const ELEMENTS: usize>(panels: &mut [f32]) {
    for word in panels {
        let bits = word.to_bits();
        *word = if ELEMENTS == 1 {
            if word.is_finite() { *word } else { 0.0 }
        } else {
            let keep = |half: u32| if half & 0x7f80 == 0x7f80 { 0 } else { half };
            f32::from_bits(keep(bits & 0xffff) | keep(bits >> 16) << 16)
        };
    }
}

/// Calls `found(column, x)` for each infinite or NaN element of a row.
pub(super) fn for_each_special(row: AnySlice<'_>, mut found: impl FnMut(usize, f32)) {
    fn scan<T: Element>(row: &[T], found: &mut impl FnMut(usize, f32)) {
        for (column, x) in row.iter().enumerate() {
            let x = x.to_f32();
            if !x.is_finite() {
                found(column, x);
            }
        }
    }
    match row {
        AnySlice::F32(row) => scan(row, &mut found),
        AnySlice::F16(row) => scan(row, &mut found),
        AnySlice::BF16(row) => scan(row, &mut found),
        AnySlice::F8E4M3(row) => scan(row, &mut found),
    }
}
