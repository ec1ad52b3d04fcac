//! NEON: 4 lanes.

use super::portable::as_f16;
use super::{F32Product, Simd, Task};
use crate::F8E4M3;
use half::{bf16, f16};
use std::arch::aarch64::*;

/// A CPU with NEON.
#[derive(Clone, Copy)]
pub(crate) struct Neon(());

impl Neon {
    pub(crate) fn new() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }
}

impl Simd for Neon {
    type V = float32x4_t;
    const LANES: usize = 4;
    const TILE_ROWS: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> float32x4_t {
        // Half-precision vectors are not stable in Rust yet: convert lane by lane.
        // SAFETY: the caller's promise.
        let x = unsafe { from.cast::<[f16; 4]>().read_unaligned() }.map(f16::to_f32);
        // SAFETY: `self` proves that the CPU has the instruction; `x` is 4 f32.
        unsafe { vld1q_f32(x.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_f8e4m3(self, from: *const F8E4M3) -> float32x4_t {
        // As f16: lane by lane.
        // SAFETY: the caller's promise.
        let x = unsafe { from.cast::<[F8E4M3; 4]>().read_unaligned() }.map(|x| as_f16(x).to_f32());
        // SAFETY: `self` proves that the CPU has the instruction; `x` is 4 f32.
        unsafe { vld1q_f32(x.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn store(self, x: float32x4_t, to: *mut f32) {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe { vst1q_f32(to, x) }
    }

    #[inline(always)]
    fn add(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vaddq_f32(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vsubq_f32(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn div(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vdivq_f32(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn max(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        self.if_greater(a, b, a, b)
    }

    #[inline(always)]
    fn if_greater(self, a: float32x4_t, b: float32x4_t, x: float32x4_t, y: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vbslq_f32(vcgtq_f32(a, b), x, y) }
    }

    #[inline(always)]
    fn split_exponent(self, x: float32x4_t) -> (float32x4_t, float32x4_t) {
        // SAFETY: `self` proves that the CPU has the instruction.
        let whole = unsafe { vrndnq_f32(x) };
        (self.sub(x, whole), whole)
    }

    #[inline(always)]
    fn scale_exponent(self, y: float32x4_t, r: float32x4_t) -> float32x4_t {
        // 2^r by its bits; below the normal range the shifted exponent would wrap, and the power is
        // 0. SAFETY: `self` proves that the CPU has the instructions.
        let power = unsafe {
            let biased = vaddq_s32(vcvtnq_s32_f32(r), vdupq_n_s32(127));
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased))
        };
        let power = self.if_greater(self.splat(-126.0), r, self.splat(0.0), power);
        self.mul(y, power)
    }

    #[inline(always)]
    fn sum_lanes(self, x: float32x4_t) -> f32 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vaddvq_f32(x) }
    }

    #[inline(always)]
    fn max_lanes(self, x: float32x4_t) -> f32 {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vmaxvq_f32(x) }
    }

    #[inline(always)]
    fn run<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "neon")]
        fn enter<T: Task>(simd: Neon, task: T) -> T::Output {
            task.run(simd, F32Product(simd))
        }
        // SAFETY: `self` proves that the CPU has the features that `enter` is compiled with.
        unsafe { enter(self, task) }
    }
}
