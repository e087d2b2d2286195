//! Multiply-adds in registers, by all of a model's threads.

use moec_runtime::Model;
use std::hint::black_box;
use std::time::Instant;

/// The most multiply-adds per second that all threads reach out of registers.
pub struct Peak {
    /// With which instruction.
    pub what: &'static str,
    /// How many.
    pub multiply_adds_per_second: f64,
}

/// A loop of multiply-adds: runs `iterations` times and returns something that depends on all of them.
type Loop = fn(u64) -> u64;

impl Peak {
    /// Measures dot products of bytes (`bytes`) or f32 multiply-adds, with the widest instruction there is.
    pub fn measure(model: &Model, bytes: bool) -> Peak {
        let (what, per_iteration, work) = candidates(bytes);
        let seconds = |iterations: u64| {
            let started = Instant::now();
            model.on_workers(&|_| {
                black_box(work(iterations));
            });
            started.elapsed().as_secs_f64()
        };
        let mut iterations = 1000;
        while seconds(iterations) < 0.01 && iterations < 1 << 40 {
            iterations *= 2;
        }
        // The fastest of several: nothing but disturbance makes a run slower.
        let best = (0..9).map(|_| seconds(iterations)).fold(f64::INFINITY, f64::min);
        let total = iterations as f64 * per_iteration as f64 * model.workers() as f64;
        Peak { what, multiply_adds_per_second: total / best }
    }
}

/// Independent accumulators: enough to keep two pipes of latency 5 busy.
const ACCUMULATORS: usize = 12;

/// Where a product takes several instructions, which need registers as well.
#[cfg(target_arch = "x86_64")]
const FEW_ACCUMULATORS: usize = 8;

/// Name, multiply-adds per iteration, and the loop.
fn candidates(bytes: bool) -> (&'static str, usize, Loop) {
    #[cfg(target_arch = "x86_64")]
    {
        if bytes && is_x86_feature_detected!("avx512vnni") {
            let work: Loop = |n| {
                // SAFETY: chosen only where the feature is there.
                unsafe { x86::dot_512(n) }
            };
            return ("512-bit vpdpbusd", ACCUMULATORS * 64, work);
        }
        if bytes && is_x86_feature_detected!("avxvnni") {
            let work: Loop = |n| {
                // SAFETY: chosen only where the feature is there.
                unsafe { x86::dot_256(n) }
            };
            return ("256-bit vpdpbusd", ACCUMULATORS * 32, work);
        }
        if bytes && is_x86_feature_detected!("avx512bw") {
            let work: Loop = |n| {
                // SAFETY: chosen only where the feature is there.
                unsafe { x86::small_512(n) }
            };
            return ("512-bit vpmaddubsw twice, vpaddw, vpmaddwd, vpaddd", FEW_ACCUMULATORS * 128, work);
        }
        if is_x86_feature_detected!("avx512f") {
            let work: Loop = |n| {
                // SAFETY: chosen only where the feature is there.
                unsafe { x86::fma_512(n) }
            };
            return ("512-bit f32 FMA", ACCUMULATORS * 16, work);
        }
        if bytes && is_x86_feature_detected!("avx2") {
            let work: Loop = |n| {
                // SAFETY: chosen only where the feature is there.
                unsafe { x86::small_256(n) }
            };
            return ("256-bit vpmaddubsw twice, vpaddw, vpmaddwd, vpaddd", FEW_ACCUMULATORS * 64, work);
        }
        if is_x86_feature_detected!("fma") {
            let work: Loop = |n| {
                // SAFETY: chosen only where the feature is there.
                unsafe { x86::fma_256(n) }
            };
            return ("256-bit f32 FMA", ACCUMULATORS * 8, work);
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        let _ = bytes;
        return ("128-bit f32 FMA", ACCUMULATORS * 4, arm::fma_128);
    }
    #[cfg(not(target_arch = "aarch64"))]
    {
        ("scalar f32", ACCUMULATORS, scalar)
    }
}

#[cfg(not(target_arch = "aarch64"))]
fn scalar(iterations: u64) -> u64 {
    let (a, b) = (black_box(0.999f32), black_box(0.001f32));
    let mut sums = [1f32; ACCUMULATORS];
    for _ in 0..iterations {
        sums.iter_mut().for_each(|sum| *sum = *sum * a + b);
    }
    u64::from(sums.iter().sum::<f32>().to_bits())
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{ACCUMULATORS, FEW_ACCUMULATORS};
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn dot_512(iterations: u64) -> u64 {
        let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-5)));
        let mut sums = [_mm512_setzero_si512(); ACCUMULATORS];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        let all = sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi32(a, b));
        _mm512_reduce_add_epi32(all) as u64
    }

    #[target_feature(enable = "avx2,avxvnni")]
    pub fn dot_256(iterations: u64) -> u64 {
        let (a, b) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(-5)));
        let mut sums = [_mm256_setzero_si256(); ACCUMULATORS];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
            }
        }
        let all = sums.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_add_epi32(a, b));
        _mm256_extract_epi64::<0>(all) as u64
    }

    /// Dot products of bytes without an instruction of their own, the fastest that kernels have, which is that of small values: pairs of products, two and
    /// two added up in 16 bits before they are in 32. The compiler would take all but the last out of the loop.
    macro_rules! small {
        ($register:ident, $sum:expr, $iterations:expr, $w:expr, $a:expr, $ones:expr) => {{
            let mut sums = [$sum; FEW_ACCUMULATORS];
            for _ in 0..$iterations {
                for sum in &mut sums {
                    // SAFETY: it needs the features of the function around it, and touches the named registers only.
                    unsafe {
                        asm!(
                            "vpmaddubsw {x}, {w}, {a}",
                            "vpmaddubsw {y}, {w}, {a}",
                            "vpaddw {x}, {x}, {y}",
                            "vpmaddwd {x}, {x}, {ones}",
                            "vpaddd {sum}, {sum}, {x}",
                            x = out($register) _,
                            y = out($register) _,
                            w = in($register) $w,
                            a = in($register) $a,
                            ones = in($register) $ones,
                            sum = inout($register) *sum,
                            options(pure, nomem, nostack, preserves_flags)
                        );
                    }
                }
            }
            sums
        }};
    }

    #[target_feature(enable = "avx2")]
    pub fn small_256(iterations: u64) -> u64 {
        let (w, a) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(-5)));
        let sums = small!(ymm_reg, _mm256_setzero_si256(), iterations, w, a, _mm256_set1_epi16(1));
        let all = sums.into_iter().fold(_mm256_setzero_si256(), |a, b| _mm256_add_epi32(a, b));
        _mm256_extract_epi64::<0>(all) as u64
    }

    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn small_512(iterations: u64) -> u64 {
        let (w, a) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-5)));
        let sums = small!(zmm_reg, _mm512_setzero_si512(), iterations, w, a, _mm512_set1_epi16(1));
        let all = sums.into_iter().fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi32(a, b));
        _mm512_reduce_add_epi32(all) as u64
    }

    #[target_feature(enable = "avx512f")]
    pub fn fma_512(iterations: u64) -> u64 {
        let (a, b) = (_mm512_set1_ps(black_box(0.999)), _mm512_set1_ps(black_box(0.001)));
        let mut sums = [_mm512_setzero_ps(); ACCUMULATORS];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        let all = sums.into_iter().fold(_mm512_setzero_ps(), |a, b| _mm512_add_ps(a, b));
        u64::from(_mm512_reduce_add_ps(all).to_bits())
    }

    #[target_feature(enable = "avx,fma")]
    pub fn fma_256(iterations: u64) -> u64 {
        let (a, b) = (_mm256_set1_ps(black_box(0.999)), _mm256_set1_ps(black_box(0.001)));
        let mut sums = [_mm256_setzero_ps(); ACCUMULATORS];
        for _ in 0..iterations {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        let all = sums.into_iter().fold(_mm256_setzero_ps(), |a, b| _mm256_add_ps(a, b));
        u64::from(_mm256_cvtss_f32(all).to_bits())
    }
}

#[cfg(target_arch = "aarch64")]
mod arm {
    use super::ACCUMULATORS;
    use std::arch::aarch64::*;
    use std::hint::black_box;

    pub fn fma_128(iterations: u64) -> u64 {
        // SAFETY: every AArch64 CPU has these instructions.
        unsafe {
            let (a, b) = (vdupq_n_f32(black_box(0.999)), vdupq_n_f32(black_box(0.001)));
            let mut sums = [vdupq_n_f32(0.0); ACCUMULATORS];
            for _ in 0..iterations {
                for sum in &mut sums {
                    *sum = vfmaq_f32(b, *sum, a);
                }
            }
            let all = sums.into_iter().fold(vdupq_n_f32(0.0), |a, b| vaddq_f32(a, b));
            u64::from(vaddvq_f32(all).to_bits())
        }
    }
}
