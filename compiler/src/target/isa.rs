//! Cranelift's settings for a set of features.
//!
//! Code is position-independent, calls nothing (no stack probes, no library functions), and has no unwind tables: nothing
//! in it unwinds.
//!
//! Cranelift's optimizer is off: it moves every instruction without effects down to where its result is needed, after all the
//! loads of the block, and kernels, whose authors chose an order that fits the registers, then spill (an unrolled `q8` matrix
//! product: 534 instructions that touch the stack instead of 11). Instruction selection, which folds addresses and
//! finds dot products, does not depend on it; what equal constants would cost, [`crate::lower::cranelift`] avoids by itself.

use cranelift_codegen::isa::{self, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable, SetError};
use moec_abi::features::{AVX_VNNI, AVX2, AVX512, AVX512_VNNI, DOTPROD, FMA, I8MM, X86_64_V2};
use target_lexicon::{Architecture, Endianness, Triple};

use super::TargetError;

/// Flags that are the same everywhere. The verifier runs in debug builds.
const SHARED: &[(&str, &str)] = &[
    ("is_pic", "true"),
    ("opt_level", "none"),
    ("enable_probestack", "false"),
    ("unwind_info", "false"),
    ("enable_verifier", if cfg!(debug_assertions) { "true" } else { "false" }),
];

/// Features that Cranelift's x86-64 back end knows: the bit that implies each.
const X86_64: &[(u64, &[&str])] = &[
    (X86_64_V2, &["has_sse3", "has_ssse3", "has_sse41", "has_sse42", "has_popcnt", "has_cmpxchg16b"]),
    (AVX2, &["has_avx", "has_avx2", "has_bmi1", "has_bmi2", "has_lzcnt"]),
    (FMA, &["has_fma"]),
    (AVX512, &["has_avx512f", "has_avx512dq", "has_avx512vl"]),
    (AVX512_VNNI, &["has_avx512vnni"]),
    (AVX_VNNI, &["has_avx_vnni"]),
];

/// The same for AArch64.
const AARCH64: &[(u64, &[&str])] = &[(DOTPROD, &["has_dotprod"]), (I8MM, &["has_i8mm"])];

/// Cranelift's code generator for CPUs with these features.
pub fn isa_for(features: u64, triple: &Triple) -> Result<OwnedTargetIsa, TargetError> {
    let table = match triple.architecture {
        Architecture::X86_64 => X86_64,
        Architecture::Aarch64(_) => AARCH64,
        _ => return Err(TargetError::Architecture(triple.clone())),
    };
    if triple.endianness() != Ok(Endianness::Little) {
        return Err(TargetError::Endianness(triple.clone()));
    }
    let refused = |reason: String| TargetError::Settings { triple: triple.clone(), reason };
    let build = || -> Result<_, SetError> {
        let mut shared = settings::builder();
        for (name, value) in SHARED {
            shared.set(name, value)?;
        }
        Ok(settings::Flags::new(shared))
    };
    let shared = build().map_err(|e| refused(e.to_string()))?;
    let mut builder = isa::lookup(triple.clone()).map_err(|e| refused(e.to_string()))?;
    for (bit, names) in table {
        for name in names.iter().filter(|_| features & bit != 0) {
            builder.enable(name).map_err(|e| refused(e.to_string()))?;
        }
    }
    builder.finish(shared).map_err(|e| refused(e.to_string()))
}
