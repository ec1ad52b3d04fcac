//! Plain Rust, for any CPU: lanes that the compiler may vectorise.

use super::matrix::{Model, NoUnit, TILE, add_pair};
use super::{F32Product, Product, Simd, Task};
use crate::F8E4M3;
use half::{bf16, f16};

/// An element times 2⁻⁸.
#[inline(always)]
fn as_f16(x: F8E4M3) -> f16 {
    let bits = u16::from(x.to_bits());
    f16::from_bits((bits & 0x80) << 8 | (bits & 0x7f) << 7)
}

/// Any CPU.
#[derive(Clone, Copy)]
pub(crate) struct Portable<const LANES: usize>;

#[inline(always)]
fn map<const LANES: usize>(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl<const LANES: usize> Simd for Portable<LANES> {
    type V = [f32; LANES];
    const LANES: usize = LANES;
    const TILE_ROWS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<Self::V>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f16; LANES]>().read_unaligned() }.map(f16::to_f32)
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[bf16; LANES]>().read_unaligned() }.map(bf16::to_f32)
    }

    #[inline(always)]
    unsafe fn load_f8e4m3(self, from: *const F8E4M3) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[F8E4M3; LANES]>().read_unaligned() }.map(|x| as_f16(x).to_f32())
    }

    #[inline(always)]
    unsafe fn store(self, x: Self::V, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<Self::V>().write_unaligned(x) }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        map(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        map(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        map(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        map(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.add(self.mul(a, b), c)
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        map(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn if_greater(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { x[i] } else { y[i] })
    }

    #[inline(always)]
    fn split_exponent(self, x: Self::V) -> (Self::V, Self::V) {
        let whole = x.map(f32::round_ties_even);
        (self.sub(x, whole), whole)
    }

    #[inline(always)]
    fn scale_exponent(self, y: Self::V, r: Self::V) -> Self::V {
        // 2^r by its bits, 0 below the normal range. A NaN casts to 0, and stays in `y`.
        map(
            y,
            r,
            |y, r| if r < -126.0 { 0.0 * y } else { y * f32::from_bits(((r as i32 + 127) as u32) << 23) },
        )
    }

    #[inline(always)]
    fn sum_lanes(self, x: Self::V) -> f32 {
        x.iter().sum()
    }

    #[inline(always)]
    fn fold_two(self, a: Self::V, b: Self::V) -> Self::V {
        let half = Self::LANES / 2;
        std::array::from_fn(|i| if i < half { a[i] + a[i + half] } else { b[i - half] + b[i] })
    }

    #[inline(always)]
    fn sum_folded(self, [ab, cd]: [Self::V; 2]) -> [f32; 4] {
        let half = Self::LANES / 2;
        [&ab[..half], &ab[half..], &cd[..half], &cd[half..]].map(|lanes| lanes.iter().sum())
    }

    #[inline(always)]
    fn max_lanes(self, x: Self::V) -> f32 {
        x.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        task.run(self, F32Product(self))
    }
}

/// Products of bf16 pairs.
#[derive(Clone, Copy)]
pub(crate) struct PortablePairs;

impl PortablePairs {
    /// Runs `task` with as many lanes as AVX-512 has.
    pub(crate) fn run<T: Task>(task: T) -> T::Output {
        task.run(Portable::<16>, Self)
    }
}

impl Product<Portable<16>> for PortablePairs {
    type Unit = NoUnit;
    const ELEMENTS: usize = 2;

    #[inline(always)]
    fn fma(self, a: [f32; TILE], b: [f32; TILE], sum: [f32; TILE]) -> [f32; TILE] {
        std::array::from_fn(|i| add_pair(a[i], b[i], sum[i]))
    }

    #[inline(always)]
    unsafe fn store_pair(self, first: [f32; TILE], second: [f32; TILE], to: *mut f32, _next: usize) {
        let word = |i: usize| {
            let [low, high] = [first[i], second[i]].map(|x| u32::from(bf16::from_f32(x).to_bits()));
            f32::from_bits(low | high << 16)
        };
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; TILE]>().write_unaligned(std::array::from_fn(word)) }
    }

    fn unit(self) -> Option<NoUnit> {
        None
    }
}

/// Products of f32 beside a [`Model`] of a matrix unit.
#[derive(Clone, Copy)]
pub(crate) struct PortableUnit;

impl PortableUnit {
    /// Runs `task` with as many lanes as a tile has words in a row.
    pub(crate) fn run<T: Task>(task: T) -> T::Output {
        task.run(Portable::<TILE>, Self)
    }
}

impl Product<Portable<TILE>> for PortableUnit {
    type Unit = Model;
    const HAS_UNIT: bool = true;
    const ELEMENTS: usize = 1;

    #[inline(always)]
    fn fma(self, a: [f32; TILE], b: [f32; TILE], sum: [f32; TILE]) -> [f32; TILE] {
        Portable::<TILE>.fma(a, b, sum)
    }

    #[inline(always)]
    unsafe fn store_pair(self, first: [f32; TILE], second: [f32; TILE], to: *mut f32, next: usize) {
        // SAFETY: the caller's promise.
        unsafe { F32Product(Portable::<TILE>).store_pair(first, second, to, next) }
    }

    fn unit(self) -> Option<Model> {
        Some(Model::default())
    }
}
