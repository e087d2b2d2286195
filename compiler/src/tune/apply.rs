//! Which record is for which level of a build.
//!
//! A record is for the level with exactly its features, whatever machine builds; for `native` it must be of this machine's CPU, too. A record that is for no
//! level, of another version of moec, or without any of the model's shapes is left aside, and the user told: the build is as good as without it. Two records
//! for one level are an error, since nothing says which is meant. A level without one has that which moec [carries](super::shipped), if any.

use super::products::Product;
use super::record::Record;
use super::shipped;
use crate::lower::backend;
use crate::target::machine::Machine;
use crate::target::{CpuLevel, Tuning, feature_names};
use std::fmt;
use target_lexicon::Triple;

/// Two records for one level.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the tuning records {first} and {second} are both for {level}; give one of them")]
pub struct Ambiguous {
    /// The level's name.
    pub level: &'static str,
    /// A record.
    pub first: String,
    /// Another.
    pub second: String,
}

/// The record of a level.
#[derive(Clone, PartialEq, Debug)]
pub struct Used {
    /// The record.
    pub record: Record,
    /// Whether it is one that moec carries.
    pub shipped: bool,
    /// Of the model's shapes of products those that it knows …
    pub known: usize,
    /// … and all.
    pub shapes: usize,
}

impl fmt::Display for Used {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Used { record, known, shapes, .. } = self;
        write!(f, "{}, which knows {known} of {shapes} shapes of products", record.source)?;
        match &record.team {
            Some(team) if team.best < record.threads => {
                write!(f, " and was fastest with {} of {} threads", team.best, record.threads)
            }
            _ => Ok(()),
        }
    }
}

/// The choices for each level, and what the user should know of records that do not fit.
#[derive(Clone, PartialEq, Debug)]
pub struct Applied {
    /// One for each level.
    pub tunings: Vec<Tuning>,
    /// The record of each level, if it has one.
    pub records: Vec<Option<Used>>,
    /// For people, a sentence each.
    pub notes: Vec<String>,
}

/// The choices for `levels` out of `records`; out of those that moec carries, if `carried`; or else the defaults.
///
/// # Errors
/// When two records are for one level.
pub fn apply(records: &[Record], carried: bool, levels: &[CpuLevel], target: &Triple) -> Result<Applied, Ambiguous> {
    let tunings = levels.iter().map(|level| backend::tuning(level, target)).collect();
    let mut applied = Applied { tunings, records: vec![None; levels.len()], notes: Vec::new() };
    for record in records {
        let mut ignore =
            |why: String| applied.notes.push(format!("the tuning record {} is ignored: {why}", record.source));
        if record.moec != env!("CARGO_PKG_VERSION") {
            let this = env!("CARGO_PKG_VERSION");
            ignore(format!("it was made by moec {}, and this is {this}, whose kernels may differ", record.moec));
            continue;
        }
        let Some(at) = levels.iter().position(|level| level.features == record.features) else {
            let features = feature_names(record.features).join(" ");
            let built: Vec<&str> = levels.iter().map(|level| level.name).collect();
            ignore(format!("it is for CPUs with {features}, and this build is for {}", built.join(", ")));
            continue;
        };
        let this = (levels[at].name == "native").then(Machine::this);
        if let Some(this) = this.filter(|this| record.machine != *this) {
            ignore(format!("it was measured on {}, and this machine is {}", told(&record.machine), told(&this)));
            continue;
        }
        if let Some(first) = &applied.records[at] {
            let (first, second) = (first.record.source.clone(), record.source.clone());
            return Err(Ambiguous { level: levels[at].name, first, second });
        }
        applied.take(at, record, false);
    }
    for (at, level) in levels.iter().enumerate().filter(|_| carried) {
        if let (None, Some(record)) = (&applied.records[at], shipped::record(level, target)) {
            applied.take(at, record, true);
        }
    }
    Ok(applied)
}

/// A machine in words.
fn told(machine: &Machine) -> String {
    let caches: Vec<String> = machine.caches.iter().map(|bytes| format!("{} KiB", bytes >> 10)).collect();
    format!("{} with caches of {}", machine.cpu, caches.join(", "))
}

impl Applied {
    /// Takes the choices of `record` for a level.
    fn take(&mut self, at: usize, record: &Record, shipped: bool) {
        let products = record.products.iter().map(|(shape, found)| (*shape, found.tuning.clone()));
        self.tunings[at].products.extend(products);
        self.records[at] = Some(Used { record: record.clone(), shipped, known: 0, shapes: 0 });
    }

    /// Counts how many of the model's shapes the records say something about, and notes where one of the user's does not know all. One that knows none is
    /// none.
    pub fn compare(&mut self, products: &[Product]) {
        let Applied { records, notes, .. } = self;
        for slot in records {
            let Some(used) = slot else { continue };
            let Record { source, products: known, .. } = &used.record;
            used.known = products.iter().filter(|product| known.contains_key(&product.shape)).count();
            used.shapes = products.len();
            if !used.shipped && (used.known == 0 || used.known < used.shapes) {
                notes.push(match used.known {
                    0 => format!(
                        "the tuning record {source} is ignored: none of its {} shapes is in this model as it is built; was it made with another --quant?",
                        known.len()
                    ),
                    some => format!(
                        "the tuning record {source} knows {some} of {} shapes of products; the others are written by the defaults",
                        used.shapes
                    ),
                });
            }
            if used.known == 0 {
                *slot = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Epilogue, MatmulTuning};
    use crate::plan::layout::Format;
    use crate::target::{ProductShape, ProductTuning, find_levels};
    use crate::tune::limits::Limits;
    use crate::tune::search::Found;

    const SHAPE: ProductShape = ProductShape { format: Format::Q4, k: 64, epilogue: Epilogue::Store };

    fn x86() -> Triple {
        "x86_64-unknown-linux-gnu".parse().unwrap()
    }

    /// A record for `level` in which a product takes `block` row tiles.
    fn record(source: &str, level: &str, block: usize) -> Record {
        let kernels = vec![MatmulTuning::plain(Format::Q4)];
        let tuning = ProductTuning { kernels, block, activation_bytes: 4096, columns: 0, ahead: false };
        Record {
            source: source.to_string(),
            moec: env!("CARGO_PKG_VERSION").to_string(),
            machine: Machine { cpu: "a machine of old".to_string(), caches: vec![32 << 10] },
            features: find_levels(level, &x86()).unwrap()[0].features,
            threads: 2,
            limits: Limits::usual(4e11, 1e11, 3e10, 2),
            team: None,
            steps: None,
            products: [(SHAPE, Found { tuning, measured: Vec::new() })].into(),
        }
    }

    #[test]
    fn records_of_several_machines_go_to_their_levels() {
        let levels = find_levels("znver5,x86-64-v3", &x86()).unwrap();
        let records = [record("b.toml", "x86-64-v3", 7), record("a.toml", "znver5", 5)];
        let applied = apply(&records, true, &levels, &x86()).unwrap();
        assert_eq!(applied.tunings.iter().map(|t| t.product(SHAPE).block).collect::<Vec<_>>(), [5, 7]);
        assert_eq!(applied.notes, Vec::<String>::new());
    }

    #[test]
    fn records_that_do_not_fit_are_ignored_and_told() {
        let levels = find_levels("znver4", &x86()).unwrap();
        let old = Record { moec: "0.0.1".to_string(), ..record("old.toml", "znver4", 5) };
        let applied = apply(&[record("v3.toml", "x86-64-v3", 5), old], false, &levels, &x86()).unwrap();
        assert_eq!(applied.tunings, [backend::tuning(&levels[0], &x86())]);
        assert!(applied.notes[0].contains("v3.toml is ignored: it is for CPUs with"), "{:?}", applied.notes);
        assert!(applied.notes[1].contains("made by moec 0.0.1"), "{:?}", applied.notes);
    }

    #[test]
    fn native_is_this_machine_only() {
        let level = CpuLevel { name: "native", ..find_levels("znver4", &x86()).unwrap()[0] };
        let mut applied = apply(&[record("a.toml", "znver4", 5)], true, &[level], &x86()).unwrap();
        assert!(applied.notes[0].contains("measured on a machine of old with caches of 32 KiB"), "{:?}", applied.notes);
        let here = Record { machine: Machine::this(), ..record("a.toml", "znver4", 5) };
        applied = apply(std::slice::from_ref(&here), true, &[level], &x86()).unwrap();
        assert_eq!(applied.tunings[0].product(SHAPE).block, 5);
        applied.compare(&[]);
        assert!(applied.notes[0].contains("none of its 1 shapes is in this model"), "{:?}", applied.notes);
    }

    #[test]
    fn a_level_without_a_record_has_that_of_moec() {
        let levels = find_levels("znver5,x86-64-v3", &x86()).unwrap();
        let carried = shipped::record(&levels[0], &x86()).unwrap();
        let applied = apply(&[], true, &levels, &x86()).unwrap();
        assert_eq!(
            applied.records.iter().map(|r| r.as_ref().map(|used| used.shipped)).collect::<Vec<_>>(),
            [Some(true), None]
        );
        let (shape, found) = carried.products.iter().next().unwrap();
        assert_eq!(applied.tunings[0].product(*shape), found.tuning);
        let off = apply(&[], false, &levels, &x86()).unwrap();
        assert_eq!(off.records, [None, None]);
        let own = apply(&[record("mine.toml", "znver5", 5)], true, &levels, &x86()).unwrap();
        assert!(own.records[0].as_ref().is_some_and(|used| !used.shipped));
        assert_eq!(own.tunings[0].product(*shape), backend::tuning(&levels[0], &x86()).product(*shape), "not both");
    }

    #[test]
    fn two_records_for_one_level_are_an_error() {
        let levels = find_levels("znver4", &x86()).unwrap();
        let records = [record("a.toml", "znver4", 5), record("b.toml", "znver4", 6)];
        let error = apply(&records, true, &levels, &x86()).unwrap_err().to_string();
        assert_eq!(error, "the tuning records a.toml and b.toml are both for znver4; give one of them");
    }
}
