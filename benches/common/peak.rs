//! What the machine can do at best, over all of rayon's threads: the rulers of the benchmarks.

use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// The machine's ceilings.
pub struct Peaks {
    /// Multiply-adds of f32, counted as two operations, per second.
    pub f32_flops: f64,
    /// The same for pairs of bf16 with f32 sums, where the CPU has an instruction for them.
    pub bf16_flops: Option<f64>,
    /// The same on AMX tiles, where the CPU has them.
    pub amx_flops: Option<f64>,
    /// Bytes per second of a sum over memory larger than the caches.
    pub read_bytes: f64,
    /// Bytes read and bytes written, added up, per second of a copy larger than the caches.
    pub copy_bytes: f64,
}

/// Bytes that are read, and of each side of the copy: well beyond the last-level cache.
const COPY: usize = 256 << 20;

impl Peaks {
    pub fn measure() -> Self {
        let source = vec![1u8; COPY];
        let mut target = vec![0u8; COPY];
        let part = COPY.div_ceil(4 * rayon::current_num_threads());
        let copy = best(8, || {
            let parts = target.par_chunks_mut(part).zip(source.par_chunks(part));
            parts.for_each(|(target, source)| target.copy_from_slice(source));
        });
        let read = best(8, || {
            black_box(source.par_chunks(part).map(sum).reduce(|| 0, u64::wrapping_add));
        });
        Self {
            f32_flops: flops(multiply_add::f32_peak()).unwrap_or(f64::NAN),
            bf16_flops: flops(multiply_add::bf16_peak()),
            amx_flops: flops(multiply_add::amx_peak()),
            read_bytes: COPY as f64 / read,
            copy_bytes: 2.0 * COPY as f64 / copy,
        }
    }
}

/// The sum of all words, read as four streams: one alone leaves a core waiting.
fn sum(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks::<8>();
    let (low, high) = words.split_at(words.len() / 2);
    let [(a, b), (c, d)] = [low, high].map(|half| half.split_at(half.len() / 2));
    let mut sums = [0u64; 4];
    for (((a, b), c), d) in a.iter().zip(b).zip(c).zip(d) {
        for (sum, word) in sums.iter_mut().zip([a, b, c, d]) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// The least seconds of several runs.
fn best(runs: usize, mut run: impl FnMut()) -> f64 {
    let mut seconds = || {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(|_| seconds()).fold(f64::INFINITY, f64::min)
}

/// A loop of so many rounds, and the operations of one.
type Kernel = (fn(u64) -> f32, u64);

/// Runs a kernel on every thread at once: operations of all threads per second.
fn flops(kernel: Option<Kernel>) -> Option<f64> {
    const ROUNDS: u64 = 20_000_000;
    let (kernel, flops_per_round) = kernel?;
    let threads = rayon::current_num_threads();
    let seconds = best(5, || {
        rayon::broadcast(|_| black_box(kernel(black_box(ROUNDS))));
    });
    Some((ROUNDS * flops_per_round) as f64 * threads as f64 / seconds)
}

/// Loops of independent multiply-adds.
#[cfg(target_arch = "x86_64")]
mod multiply_add {
    use super::Kernel;
    use star_attention::cpu::InstructionSet;
    use std::arch::asm;
    use std::arch::x86_64::*;

    /// Sums that are worked on at a time: more than latency times throughput of any such CPU.
    const SUMS: usize = 10;

    pub fn f32_peak() -> Option<Kernel> {
        #[target_feature(enable = "avx512f")]
        fn avx512(rounds: u64) -> f32 {
            let x = _mm512_set1_ps(0.5);
            let mut sums = [x; SUMS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_fmadd_ps(x, x, *sum);
                }
            }
            sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(rounds: u64) -> f32 {
            let x = _mm256_set1_ps(0.5);
            let mut sums = [x; SUMS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm256_fmadd_ps(x, x, *sum);
                }
            }
            sums.iter().map(|&sum| _mm256_cvtss_f32(sum)).sum()
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the CPU has AVX-512 F.
            return Some((|rounds| unsafe { avx512(rounds) }, 2 * 16 * SUMS as u64));
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the CPU has AVX2 and FMA.
            return Some((|rounds| unsafe { avx2(rounds) }, 2 * 8 * SUMS as u64));
        }
        None
    }

    pub fn bf16_peak() -> Option<Kernel> {
        #[target_feature(enable = "avx512f,avx512bf16")]
        fn avx512(rounds: u64) -> f32 {
            let half = _mm512_set1_ps(0.5);
            let x = _mm512_cvtne2ps_pbh(half, half);
            let mut sums = [half; SUMS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = _mm512_dpbf16_ps(*sum, x, x);
                }
            }
            sums.iter().map(|&sum| _mm512_reduce_add_ps(sum)).sum()
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16") {
            // SAFETY: the CPU has AVX-512 F and BF16.
            return Some((|rounds| unsafe { avx512(rounds) }, 2 * 32 * SUMS as u64));
        }
        None
    }

    /// Products of tiles, four independent ones at a time.
    pub fn amx_peak() -> Option<Kernel> {
        fn amx(rounds: u64) -> f32 {
            #[repr(C, align(64))]
            struct Config([u8; 64]);
            // Palette 1, and tiles of 16 rows of 64 bytes.
            let mut config = Config([0; 64]);
            config.0[0] = 1;
            for tile in 0..8 {
                (config.0[16 + 2 * tile], config.0[48 + tile]) = (64, 16);
            }
            // SAFETY: the caller has checked that the unit is there and that this process may use it;
            // the first instruction reads `config`, the others read and write tiles alone.
            unsafe {
                asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly));
                for _ in 0..rounds {
                    asm!(
                        "tdpbf16ps tmm0, tmm4, tmm5",
                        "tdpbf16ps tmm1, tmm4, tmm5",
                        "tdpbf16ps tmm2, tmm4, tmm5",
                        "tdpbf16ps tmm3, tmm4, tmm5",
                        options(nostack, nomem)
                    );
                }
                asm!("tilerelease", options(nostack, nomem));
            }
            0.0
        }
        let available = InstructionSet::available().contains(&InstructionSet::Amx);
        available.then_some((amx, 4 * 2 * 16 * 16 * 32))
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod multiply_add {
    use super::Kernel;

    /// Sums that are worked on at a time: some vectors' worth, for the compiler to spread.
    const SUMS: usize = 64;

    pub fn f32_peak() -> Option<Kernel> {
        fn plain(rounds: u64) -> f32 {
            let mut sums = [0.5f32; SUMS];
            for _ in 0..rounds {
                for sum in &mut sums {
                    *sum = f32::mul_add(0.5, 0.5, *sum);
                }
            }
            sums.iter().sum()
        }
        Some((plain, 2 * SUMS as u64))
    }

    pub fn bf16_peak() -> Option<Kernel> {
        None
    }

    pub fn amx_peak() -> Option<Kernel> {
        None
    }
}
