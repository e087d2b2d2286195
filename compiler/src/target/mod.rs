//! CPU levels: what code may be generated for, what each needs, and what this machine has.
//!
//! A [`CpuLevel`] is a name and a set of [`moec_abi::features`] bits. [`levels`] is the table of names; `native` is what
//! [`host`] finds, and [`named`] which of the names that is. [`isa_for`] sets Cranelift up for such a set, and [`Tuning`] is how kernels are best written for it.
//! Deliberately absent: the choice of a level at run time, which is the runtime's.

mod detect;
mod isa;
pub mod machine;
mod models;
mod tuning;

pub use detect::host;
pub use isa::isa_for;
pub use models::{cpu_name, named};
pub use tuning::{Core, ProductShape, ProductTuning, Tile, Tuning};

use moec_abi::features::{
    AVX_VNNI, AVX2, AVX512, AVX512_BF16, AVX512_VBMI, AVX512_VNNI, DOTPROD, F16C, FMA, I8MM, NAMES, NEON, X86_64_V2,
};
use target_lexicon::{Architecture, Triple};

/// A CPU that code is generated for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CpuLevel {
    /// As on the command line.
    pub name: &'static str,
    /// What it needs: bits of [`moec_abi::features`].
    pub features: u64,
    /// Which CPUs have it.
    pub description: &'static str,
}

const V3: u64 = X86_64_V2 | AVX2 | FMA | F16C;
const V4: u64 = V3 | AVX512;
/// What the AVX-512 of Sapphire Rapids and Zen 5 has beyond.
const SPR: u64 = V4 | AVX512_VNNI | AVX512_BF16 | AVX512_VBMI | AVX_VNNI;

const X86_64: &[CpuLevel] = &[
    level("x86-64-v3", V3, "AVX2 and FMA: Intel since 2013 (Haswell), AMD since 2017 (Zen)"),
    level("haswell", V3, "Intel 2013"),
    level("skylake", V3, "Intel 2015, desktop"),
    level("znver1", V3, "AMD 2017"),
    level("znver2", V3, "AMD 2019"),
    level("znver3", V3, "AMD 2020"),
    level("alderlake", V3 | AVX_VNNI, "Intel 2021, desktop; AVX-VNNI"),
    level("sierraforest", V3 | AVX_VNNI, "Intel 2024, server E-cores; AVX-VNNI"),
    level("x86-64-v4", V4, "AVX-512: Intel servers since 2017, AMD since 2022 (Zen 4)"),
    level("skylake-avx512", V4, "Intel 2017, server"),
    level("cascadelake", V4 | AVX512_VNNI, "Intel 2019, server"),
    level("cooperlake", V4 | AVX512_VNNI | AVX512_BF16, "Intel 2020, server"),
    level("icelake-server", V4 | AVX512_VNNI | AVX512_VBMI, "Intel 2021, server"),
    level("sapphirerapids", SPR, "Intel 2023, server"),
    level("graniterapids", SPR, "Intel 2024, server"),
    level("znver4", V4 | AVX512_VNNI | AVX512_BF16 | AVX512_VBMI, "AMD 2022"),
    level("znver5", SPR, "AMD 2024"),
];

const AARCH64: &[CpuLevel] = &[
    level("armv8-a", NEON, "every AArch64 CPU"),
    level("cortex-a76", NEON | DOTPROD, "Arm 2018"),
    level("neoverse-n1", NEON | DOTPROD, "Graviton 2, Ampere Altra"),
    level("apple-m1", NEON | DOTPROD, "Apple 2020"),
    level("apple-m2", NEON | DOTPROD | I8MM, "Apple 2022"),
    level("neoverse-v1", NEON | DOTPROD | I8MM, "Graviton 3"),
    level("neoverse-n2", NEON | DOTPROD | I8MM, "Cobalt 100, Yitian 710"),
    level("neoverse-v2", NEON | DOTPROD | I8MM, "Graviton 4, Grace, Axion"),
];

const fn level(name: &'static str, features: u64, description: &'static str) -> CpuLevel {
    CpuLevel { name, features, description }
}

/// Why there is no code for a target.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum TargetError {
    /// Neither x86-64 nor AArch64.
    #[error("{0}: moec generates code for x86_64 and aarch64 only")]
    Architecture(Triple),
    /// Big-endian.
    #[error("{0}: moec generates little-endian code only, because weights are mapped as they lie")]
    Endianness(Triple),
    /// A CPU that is not in the table.
    #[error("no CPU is named `{name}`; for {architecture} there are native, {known}")]
    UnknownCpu {
        /// What was asked for.
        name: String,
        /// For which architecture.
        architecture: Architecture,
        /// What there is.
        known: String,
    },
    /// `native` for another machine.
    #[error("`--target-cpu native` means this machine, but code is generated for {0}; name a CPU")]
    NotNative(Triple),
    /// The CPU lacks what all generated code needs.
    #[error("`{cpu}` lacks {missing}: moec needs at least {least}")]
    TooOld {
        /// Which CPU.
        cpu: String,
        /// Names of the features it lacks.
        missing: String,
        /// The least level.
        least: &'static str,
    },
    /// Cranelift refuses the settings, which is a bug in moec.
    #[error("bug in moec: Cranelift refuses its settings for {triple}: {reason}")]
    Settings {
        /// For which target.
        triple: Triple,
        /// What Cranelift says.
        reason: String,
    },
}

/// The CPUs that have a name on this target's architecture, the least first. Empty when there are none.
pub fn levels(triple: &Triple) -> &'static [CpuLevel] {
    match triple.architecture {
        Architecture::X86_64 => X86_64,
        Architecture::Aarch64(_) => AARCH64,
        _ => &[],
    }
}

/// This machine.
pub fn native() -> CpuLevel {
    CpuLevel { name: "native", features: host(), description: "this machine" }
}

/// The CPU named `name`; `native` is this machine.
pub fn find_level(name: &str, triple: &Triple) -> Result<CpuLevel, TargetError> {
    let levels = levels(triple);
    let Some(least) = levels.first() else {
        return Err(TargetError::Architecture(triple.clone()));
    };
    let found = if name == "native" {
        if Triple::host().architecture != triple.architecture {
            return Err(TargetError::NotNative(triple.clone()));
        }
        native()
    } else {
        *levels.iter().find(|l| l.name == name).ok_or_else(|| TargetError::UnknownCpu {
            name: name.to_string(),
            architecture: triple.architecture,
            known: levels.iter().map(|l| l.name).collect::<Vec<_>>().join(", "),
        })?
    };
    let missing = least.features & !found.features;
    if missing != 0 {
        let (cpu, missing) = (name.to_string(), feature_names(missing).join(", "));
        return Err(TargetError::TooOld { cpu, missing, least: least.name });
    }
    Ok(found)
}

/// What code is made for when nobody says: this machine, or the least CPU of another target.
pub fn default_level(triple: &Triple) -> Result<CpuLevel, TargetError> {
    if Triple::host().architecture == triple.architecture {
        return find_level("native", triple);
    }
    levels(triple).first().copied().ok_or_else(|| TargetError::Architecture(triple.clone()))
}

/// The CPUs of a list such as `x86-64-v3,znver4`, each once, the one with most features first.
pub fn find_levels(list: &str, triple: &Triple) -> Result<Vec<CpuLevel>, TargetError> {
    let mut found: Vec<CpuLevel> = Vec::new();
    for name in list.split(',') {
        let level = find_level(name.trim(), triple)?;
        if found.iter().all(|l| l.features != level.features) {
            found.push(level);
        }
    }
    found.sort_by_key(|l| std::cmp::Reverse((l.features.count_ones(), l.features)));
    Ok(found)
}

/// Names of the bits of `features`.
pub fn feature_names(features: u64) -> Vec<&'static str> {
    NAMES.iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| *name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn x86() -> Triple {
        "x86_64-unknown-linux-gnu".parse().unwrap()
    }

    #[test]
    fn levels_are_found_by_name_best_first() {
        let levels = find_levels("x86-64-v3, znver5,haswell,x86-64-v4", &x86()).unwrap();
        assert_eq!(levels.iter().map(|l| l.name).collect::<Vec<_>>(), ["znver5", "x86-64-v4", "x86-64-v3"]);
    }

    #[test]
    fn every_level_includes_the_least() {
        for table in [X86_64, AARCH64] {
            for level in table {
                assert_eq!(level.features & table[0].features, table[0].features, "{}", level.name);
            }
        }
    }

    #[test]
    fn errors_say_what_there_is() {
        let error = find_level("pentium", &x86()).unwrap_err().to_string();
        assert!(
            error.starts_with("no CPU is named `pentium`; for x86_64 there are native, x86-64-v3, haswell"),
            "{error}"
        );
        let riscv: Triple = "riscv64gc-unknown-linux-gnu".parse().unwrap();
        assert!(matches!(find_level("native", &riscv), Err(TargetError::Architecture(_))));
    }

    #[test]
    fn this_machine_can_be_generated_for() {
        let native = find_level("native", &Triple::host()).unwrap();
        isa_for(native.features, &Triple::host()).unwrap();
    }

    #[test]
    fn every_level_has_an_isa() {
        let arm: Triple = "aarch64-unknown-linux-gnu".parse().unwrap();
        for (table, triple) in [(X86_64, x86()), (AARCH64, arm)] {
            for level in table {
                isa_for(level.features, &triple).unwrap();
            }
        }
    }
}
