//! NEON: 4 lanes.

use super::{F32Product, Simd, Task};
use crate::F8E4M3;
use half::{bf16, f16};
use std::arch::aarch64::*;
use std::arch::asm;

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
    const LANE_OPERANDS: bool = true;
    const KEYS_TOGETHER: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    unsafe fn splat_four(self, from: *const f32) -> [float32x4_t; 4] {
        // One load: the compiler makes lanes of it operands of the multiply-adds.
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe {
            let x = vld1q_f32(from);
            [
                vdupq_laneq_f32::<0>(x),
                vdupq_laneq_f32::<1>(x),
                vdupq_laneq_f32::<2>(x),
                vdupq_laneq_f32::<3>(x),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe { vld1q_f32(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> float32x4_t {
        // Rust 1.89 has no vectors of f16, so the instruction is written out.
        let wide;
        // SAFETY: `self` proves that the CPU has the instructions, which are part of NEON; the
        // memory is the caller's promise.
        unsafe {
            asm!(
                "fcvtl {wide:v}.4s, {x:v}.4h",
                x = in(vreg) vld1_u16(from.cast()),
                wide = lateout(vreg) wide,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        wide
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instructions; the memory is the caller's
        // promise.
        unsafe {
            // Zeros below each: many CPUs have more units for this than for shifts.
            let x = vld1_u16(from.cast());
            vreinterpretq_f32_u16(vzip1q_u16(vdupq_n_u16(0), vcombine_u16(x, x)))
        }
    }

    #[inline(always)]
    unsafe fn load_f8e4m3(self, from: *const F8E4M3) -> float32x4_t {
        // SAFETY: the caller's promise.
        let codes = unsafe { from.cast::<u32>().read_unaligned() };
        let wide;
        // The sign comes to two places, of which the lower one is the exponent's highest bit.
        // SAFETY: `self` proves that the CPU has the instructions, which are part of NEON and touch
        // nothing but their operands.
        unsafe {
            asm!(
                "sshll {x:v}.8h, {x:v}.8b, #7",
                "bic {x:v}.4h, #0x40, lsl #8",
                "fcvtl {wide:v}.4s, {x:v}.4h",
                x = inout(vreg) vdup_n_u32(codes) => _,
                wide = lateout(vreg) wide,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        wide
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
    fn fold_two(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: `self` proves that the CPU has the instruction.
        unsafe { vpaddq_f32(a, b) }
    }

    #[inline(always)]
    fn sum_folded(self, [ab, cd]: [float32x4_t; 2]) -> [f32; 4] {
        // SAFETY: `self` proves that the CPU has the instruction; the transmute renames four f32.
        unsafe { std::mem::transmute::<float32x4_t, [f32; 4]>(vpaddq_f32(ab, cd)) }
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
