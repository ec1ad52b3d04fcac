//! AMX: Intel's matrix unit, with products of bf16 pairs.
//!
//! Its instructions are written as assembly, since their intrinsics are not stable. The compiler
//! does not use tiles itself, so what a tile holds stays from one instruction to the next.

use super::avx512::{Avx512, round_pair};
use super::matrix::{Matrix, TILE};
use super::{F32Product, Product, Simd, Task};
use std::arch::asm;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// A thread whose tiles are set up. Dropping it frees them.
pub(crate) struct Amx {
    simd: Avx512,
    /// Tiles are a thread's own.
    not_send: PhantomData<*const ()>,
}

impl Amx {
    /// Whether the CPU has the unit, with products of bf16, and the system lets this process use
    /// it.
    pub(crate) fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            Avx512::new().is_some() && is_x86_feature_detected!("avx512bf16") && has_tiles() && is_permitted()
        })
    }

    /// Sets up the tiles of this thread, where there are any.
    pub(crate) fn new() -> Option<Self> {
        let simd = Avx512::new().filter(|_| Self::is_available())?;
        /// Palette 1, and for each of the eight tiles the bytes of a row and the rows.
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].fill(4 * TILE as u16);
        rows[..8].fill(TILE as u8);
        let config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: the unit is there and permitted; `config` is what the instruction reads.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Some(Self { simd, not_send: PhantomData })
    }
}

impl Drop for Amx {
    fn drop(&mut self) {
        // SAFETY: the unit is there; no tile is used after this.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// A CPU with AMX, beside which vectors multiply f32.
#[derive(Clone, Copy)]
pub(crate) struct AmxProduct(Avx512);

impl AmxProduct {
    pub(crate) fn new() -> Option<Self> {
        Avx512::new().filter(|_| Amx::is_available()).map(Self)
    }

    /// As [`Simd::run`], with the unit.
    pub(crate) fn run<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
        fn enter<T: Task>(product: AmxProduct, task: T) -> T::Output {
            task.run(product.0, product)
        }
        // SAFETY: `self` proves that the CPU has these instructions.
        unsafe { enter(self, task) }
    }
}

impl Product<Avx512> for AmxProduct {
    type Unit = Amx;
    const HAS_UNIT: bool = true;
    const ELEMENTS: usize = 1;

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, sum: __m512) -> __m512 {
        self.0.fma(a, b, sum)
    }

    #[inline(always)]
    unsafe fn store_pair(self, first: __m512, second: __m512, to: *mut f32, next: usize) {
        // SAFETY: the caller's promise.
        unsafe { F32Product(self.0).store_pair(first, second, to, next) }
    }

    #[inline(always)]
    fn unit(self) -> Option<Amx> {
        Amx::new()
    }
}

/// Whether the CPU has tiles and their products of bf16, and the system saves them.
fn has_tiles() -> bool {
    /// Bits of EDX of leaf 7: products of bf16, and tiles.
    const FEATURES: u32 = 1 << 22 | 1 << 24;
    /// Bits of XCR0: the tiles' configuration and data.
    const STATE: u64 = 0b11 << 17;
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: the function is called where the CPU and the system have XSAVE alone.
        unsafe { _xgetbv(0) }
    }
    let features = __cpuid_count(7, 0).edx;
    // SAFETY: the feature is checked first.
    features & FEATURES == FEATURES
        && is_x86_feature_detected!("xsave")
        && unsafe { saved() } & STATE == STATE
}

/// Asks the system to save tiles for this process, which Linux does only for those that ask.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    /// The tiles' data, as a state component.
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: a system call that reads and writes no memory of the process. It refuses what it does
    // not know, and overwrites RCX and R11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

impl Matrix<Avx512> for Amx {
    #[inline(always)]
    fn zero<const T: usize>(&mut self) {
        // SAFETY: `self` proves that the tiles are set up.
        unsafe { asm!("tilezero tmm{}", const T, options(nostack, nomem)) };
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const f32, stride: usize) {
        // SAFETY: `self` proves that the tiles are set up; the memory is the caller's promise.
        unsafe {
            asm!("tileloadd tmm{}, [{} + {}]", const T, in(reg) from, in(reg) 4 * stride, options(nostack, readonly));
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut f32, stride: usize) {
        // SAFETY: `self` proves that the tiles are set up; the memory is the caller's promise.
        unsafe {
            asm!("tilestored [{} + {}], tmm{}", in(reg) to, in(reg) 4 * stride, const T, options(nostack));
        }
    }

    #[inline(always)]
    fn add_product<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: `self` proves that the tiles are set up.
        unsafe {
            asm!("tdpbf16ps tmm{}, tmm{}, tmm{}", const C, const A, const B, options(nostack, nomem));
        }
    }

    #[inline(always)]
    fn round_pair(&self, first: __m512, second: __m512) -> (__m512, [__m512; 2]) {
        // SAFETY: `self` proves that the CPU has the instructions.
        unsafe {
            let words = _mm512_castps_si512(round_pair(first, second));
            let low = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words));
            let high = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(!0xffff)));
            let rest = [_mm512_sub_ps(first, low), _mm512_sub_ps(second, high)];
            (_mm512_castsi512_ps(words), rest)
        }
    }

    #[inline(always)]
    unsafe fn transpose(&self, from: *const f32, stride: usize, to: *mut f32, to_stride: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.simd.transpose(from, stride, to, to_stride) }
    }
}
