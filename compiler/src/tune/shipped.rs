//! The records that moec carries: what `moec tune` measured on CPUs that were at hand, for the shapes of models that many have.
//!
//! Each is for the level that it is named after, and for `native` on a machine that is such a CPU, whatever its caches. One is added by a file in `shipped/` and a row here.
//! Deliberately absent: who uses them ([`super::apply`]).

use super::record::{Record, RecordError};
use crate::target::{CpuLevel, cpu_name};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use target_lexicon::Triple;

/// What `--tuning` has in place of a file to leave out the records that moec carries.
const NONE: &str = "none";

/// Levels and the text of their records.
const TEXTS: &[(&str, &str)] =
    &[("znver4", include_str!("shipped/znver4.toml")), ("znver5", include_str!("shipped/znver5.toml"))];

static RECORDS: LazyLock<Vec<(&str, Record)>> = LazyLock::new(|| {
    let parse = |&(level, text): &(&'static str, &str)| {
        let source = format!("moec's record for {level}");
        (level, Record::parse(text, &source).unwrap_or_else(|e| panic!("bug in moec: {e}")))
    };
    TEXTS.iter().map(parse).collect()
});

/// All records, each with the level that it is for.
pub fn records() -> &'static [(&'static str, Record)] {
    &RECORDS
}

/// The record for `level` of `target`.
pub fn record(level: &CpuLevel, target: &Triple) -> Option<&'static Record> {
    let name = cpu_name(level, target)?;
    records().iter().find(|(of, _)| *of == name).map(|(_, record)| record)
}

/// What `--tuning` names: records of the user's, and whether those that moec carries are used beside them, which `none` among the files forbids.
///
/// # Errors
/// When a record cannot be read.
pub fn given(files: &[PathBuf]) -> Result<(Vec<Record>, bool), RecordError> {
    let is_none = |path: &&PathBuf| path.as_path() == Path::new(NONE);
    let records = files.iter().filter(|path| !is_none(path)).map(|path| Record::read(path));
    Ok((records.collect::<Result<_, _>>()?, !files.iter().any(|path| is_none(&path))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Matmul;
    use crate::lower::backend::{self, KernelBackend};
    use crate::target::machine::Machine;
    use crate::target::{find_level, isa_for, named};

    fn x86() -> Triple {
        "x86_64-unknown-linux-gnu".parse().unwrap()
    }

    #[test]
    fn every_record_is_of_its_level_and_of_this_moec() {
        for (i, (name, record)) in records().iter().enumerate() {
            assert!(records()[..i].iter().all(|(other, _)| other != name), "{name} has two");
            let level = find_level(name, &x86()).unwrap();
            assert_eq!(record.features, level.features, "{name}");
            assert_eq!(record.moec, env!("CARGO_PKG_VERSION"), "{name}");
            let machine = named(&record.machine, record.features, &x86()).map(|level| level.name);
            assert_eq!(machine, Some(*name), "{name} was measured on {}", record.machine.cpu);
            assert_eq!(super::record(&level, &x86()), Some(record));
        }
    }

    /// A record of older kernels may ask for more registers than there are now; one that says nothing is not worth its place.
    #[test]
    fn every_record_changes_something_and_its_kernels_compile() {
        for (name, record) in records() {
            let level = find_level(name, &x86()).unwrap();
            let (backend, isa) =
                (KernelBackend::choose(level.features, &x86()), isa_for(level.features, &x86()).unwrap());
            let default = backend::tuning(&level, &x86());
            let other = record.products.iter().filter(|(shape, found)| default.product(**shape) != found.tuning);
            assert!(other.count() > 0, "{name} is the default");
            for (shape, found) in &record.products {
                for tokens in 1..=found.tuning.tokens() {
                    let kernel = Matmul {
                        part: None,
                        fetch: false,
                        format: shape.format,
                        k: shape.k,
                        tokens,
                        row: shape.format.row(),
                        dot: default.dot(shape.format),
                        epilogue: shape.epilogue,
                        y_stride: if tokens > 1 { 1 << 14 } else { 0 },
                        tuning: found.tuning.kernel(tokens),
                    };
                    let parts = found.tuning.parts(shape.k);
                    let walks = parts.iter().map(|columns| found.tuning.in_walk(kernel.in_part(columns)));
                    for kernel in walks.chain([kernel.clone(), found.tuning.in_walk(kernel.clone())]) {
                        let compiled = backend.compile(&kernel.generate(), &*isa);
                        compiled.unwrap_or_else(|e| panic!("{name}: {shape}, {}: {e}", kernel.name()));
                    }
                }
            }
        }
    }

    #[test]
    fn native_has_the_record_of_the_cpu_that_it_is() {
        let level = CpuLevel { name: "native", ..find_level("znver5", &x86()).unwrap() };
        let here = named(&Machine::this(), level.features, &x86()).is_some_and(|level| level.name == "znver5");
        assert_eq!(record(&level, &x86()).is_some(), here);
        assert_eq!(record(&find_level("haswell", &x86()).unwrap(), &x86()), None);
    }

    #[test]
    fn none_is_no_file() {
        assert_eq!(given(&[]).unwrap(), (vec![], true));
        assert_eq!(given(&["none".into()]).unwrap(), (vec![], false));
        assert!(given(&["./none".into()]).unwrap_err().to_string().contains("./none"));
    }
}
