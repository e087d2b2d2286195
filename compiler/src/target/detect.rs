//! What the CPU that runs the compiler offers, as [`moec_abi::features`] bits.
//!
//! Deliberately absent: caches and core counts.

/// The features of this machine; 0 on an architecture that moec does not generate code for.
pub fn host() -> u64 {
    features()
}

#[cfg(target_arch = "x86_64")]
fn features() -> u64 {
    use moec_abi::features::{AVX_VNNI, AVX2, AVX512, AVX512_BF16, AVX512_VBMI, AVX512_VNNI, F16C, FMA, X86_64_V2};
    macro_rules! all {
        ($($name:tt),+) => { $(std::is_x86_feature_detected!($name))&&+ };
    }
    let found = [
        (X86_64_V2, all!("sse3", "ssse3", "sse4.1", "sse4.2", "popcnt")),
        (AVX2, all!("avx2", "bmi1", "bmi2", "lzcnt", "movbe")),
        (FMA, all!("fma")),
        (F16C, all!("f16c")),
        (AVX512, all!("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
        (AVX512_VNNI, all!("avx512vnni")),
        (AVX_VNNI, all!("avxvnni")),
        (AVX512_BF16, all!("avx512bf16")),
        (AVX512_VBMI, all!("avx512vbmi")),
    ];
    collect(&found)
}

#[cfg(target_arch = "aarch64")]
fn features() -> u64 {
    use moec_abi::features::{DOTPROD, I8MM, NEON};
    collect(&[
        (NEON, std::arch::is_aarch64_feature_detected!("neon")),
        (DOTPROD, std::arch::is_aarch64_feature_detected!("dotprod")),
        (I8MM, std::arch::is_aarch64_feature_detected!("i8mm")),
    ])
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> u64 {
    collect(&[])
}

fn collect(found: &[(u64, bool)]) -> u64 {
    found.iter().filter(|(_, has)| *has).fold(0, |all, (bit, _)| all | bit)
}
