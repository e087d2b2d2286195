//! Which of the named CPUs a machine is: by the family and model numbers that its vendor gave it.
//!
//! After the vendors' lists of models as LLVM has them (`llvm/lib/TargetParser/Host.cpp`). Deliberately absent: CPUs that no level is named after.

use super::machine::Machine;
use super::{CpuLevel, levels};
use std::ops::RangeInclusive;
use target_lexicon::Triple;

/// A level's name, the family, and the models.
type Row = (&'static str, u32, &'static [RangeInclusive<u32>]);

/// Where several rows fit, features decide.
const MODELS: &[Row] = &[
    ("haswell", 6, &[60..=60, 63..=63, 69..=70]),
    ("skylake", 6, &[78..=78, 94..=94, 142..=142, 158..=158, 165..=166]),
    ("alderlake", 6, &[151..=151, 154..=154, 183..=183, 186..=186, 191..=191]),
    ("sierraforest", 6, &[175..=175]),
    ("skylake-avx512", 6, &[85..=85]),
    ("cascadelake", 6, &[85..=85]),
    ("cooperlake", 6, &[85..=85]),
    ("icelake-server", 6, &[106..=106, 108..=108]),
    // With Emerald Rapids, which has the same cores.
    ("sapphirerapids", 6, &[143..=143, 207..=207]),
    ("graniterapids", 6, &[173..=174]),
    ("znver1", 23, &[0..=47]),
    ("znver2", 23, &[48..=175]),
    ("znver3", 25, &[0..=15, 32..=95]),
    ("znver4", 25, &[16..=31, 96..=127, 160..=175]),
    ("znver5", 26, &[0..=119, 208..=215]),
];

/// The level that is named after `machine`'s CPU, when that has exactly the level's features.
pub fn named(machine: &Machine, features: u64, triple: &Triple) -> Option<&'static CpuLevel> {
    let (family, model) = machine.numbers()?;
    let fits = |name: &str| {
        let mut rows = MODELS.iter().filter(|(row, ..)| *row == name);
        rows.any(|(_, of, models)| *of == family && models.iter().any(|range| range.contains(&model)))
    };
    levels(triple).iter().find(|level| level.features == features && fits(level.name))
}

/// The name of the CPU that `level` is for; of `native` that of this machine, if there is a level for it.
pub fn cpu_name(level: &CpuLevel, triple: &Triple) -> Option<&'static str> {
    match level.name {
        "native" => named(&Machine::this(), level.features, triple).map(|level| level.name),
        name => Some(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::find_level;

    fn x86() -> Triple {
        "x86_64-unknown-linux-gnu".parse().unwrap()
    }

    fn name(cpu: &str, like: &str) -> Option<&'static str> {
        let machine = Machine { cpu: cpu.to_string(), caches: Vec::new() };
        let features = find_level(like, &x86()).unwrap().features;
        named(&machine, features, &x86()).map(|level| level.name)
    }

    #[test]
    fn machines_are_named_by_numbers_and_features() {
        assert_eq!(name("AMD EPYC, family 25 model 17", "znver4"), Some("znver4"));
        assert_eq!(name("AMD EPYC, family 25 model 17", "x86-64-v3"), None, "not with the features of another");
        assert_eq!(name("Intel(R) Xeon(R) Processor @ 2.8GHz, family 6 model 85", "cascadelake"), Some("cascadelake"));
        assert_eq!(name("Intel(R) Xeon(R) Processor @ 2.8GHz, family 6 model 85", "x86-64-v4"), Some("skylake-avx512"));
        assert_eq!(name("AMD EPYC, family 26 model 2", "znver5"), Some("znver5"));
        assert_eq!(name("Intel(R) Xeon(R) 6, family 6 model 143", "znver5"), Some("sapphirerapids"));
        assert_eq!(name("a family 25 model 17 of another kind", "znver4"), None);
        assert_eq!(name("unknown", "znver4"), None);
    }

    #[test]
    fn every_row_is_of_a_level() {
        for (row, ..) in MODELS {
            find_level(row, &x86()).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}
