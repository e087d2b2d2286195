//! Tuning records: choices that were measured, as a file.
//!
//! ```toml
//! version = 1                       # of this form
//! moec = "0.1.0"                    # whose kernels were measured
//! threads = 2
//!
//! [machine]
//! cpu = "AMD EPYC, family 25 model 17"
//! features = ["avx2", "fma", …]     # of the level that was measured
//! caches = [32768, 1048576, 33554432]
//!
//! [limits]                          # in units a second, all threads together
//! dots = 460e9
//! fmas = 115e9
//! read = 57e9
//! ops = 15e9                        # this and the rest only predict; without them, what is usual
//! latency = 1.1e-9                  # seconds
//! barrier = 0.3e-6
//!
//! [team]                            # of threads; absent where nobody measured it
//! best = 2                          # all, unless fewer were faster for certain
//! measured = [{ threads = 2, decode = 0.021, prefill = 2.3 }, …]   # seconds of the products of the model that was measured first
//!
//! [steps]                           # of a whole model; absent where nobody compared them since a shape was measured
//! layers = 1                        # so many of its layers, the first
//! measured = [{ tokens = 64, default = 0.0412, tuned = 0.0405 }, …]   # seconds without the record and with it
//!
//! [[product]]                       # one for each shape
//! format = "q4"
//! k = 4096
//! epilogue = "silu"
//! rows = [2, 4, 4, 2, 2, 2]         # row tiles of the kernels for 1, 2, … tokens at once
//! unroll = [1, 1, 1, 1, 1, 1]
//! prefetch = [0, 512, 0, 0, 0, 0]   # bytes ahead; 0 leaves it to the CPU
//! streams = [0, 0, 0, 4, 4, 4]      # in which the next rows are prefetched, instead of bytes ahead; none, or nothing: 0
//! block = 2                         # row tiles for one walk over the tokens
//! activation_bytes = 2097152        # of one walk over the rows
//! columns = 3584                    # of one walk over the rows, at most; 0, or nothing, for all
//! ahead = true                      # whether a walk over tokens prefetches the next rows as a whole, and its kernels not by `prefetch`
//! measured = [{ step = 512, tokens = 128, default_share = 0.71, tuned_share = 0.74 }]
//! ```
//! What is not understood, or would not be legal for a kernel, is an error that names the key. Deliberately absent: which record is for which build
//! ([`super::apply`]).

use super::limits::Limits;
use super::search::{Found, Measured};
use super::team_size::{Sized, TeamSize};
use super::trial::{StepTime, WholeSteps};
use crate::kernels::{Epilogue, MAX_TOKENS, MatmulTuning, Prefetch};
use crate::plan::MAX_STEP_TOKENS;
use crate::plan::layout::{Format, GROUP};
use crate::target::machine::Machine;
use crate::target::{ProductShape, ProductTuning, feature_names};
use moec_abi::features::NAMES;
use moec_ir::graph::Activation;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The version of the form that this moec reads and writes.
pub const VERSION: i64 = 1;

/// Most bytes of a record that are read.
const MOST_BYTES: u64 = 4 << 20;

/// Most sums that a kernel may keep: far more than registers, and few enough to compile in no time.
const MOST_SUMS: usize = 64;

/// Most streams of a kernel.
const MOST_STREAMS: usize = 16;

/// Most layers of a model that a record may speak of: far more than any has.
const MOST_LAYERS: usize = 1 << 16;

/// What was measured on one machine for one CPU level.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    /// Where it comes from, for messages.
    pub source: String,
    /// The version of moec.
    pub moec: String,
    /// The machine.
    pub machine: Machine,
    /// The level: bits of [`moec_abi::features`].
    pub features: u64,
    /// Threads that measured together.
    pub threads: usize,
    /// What the machine can do.
    pub limits: Limits,
    /// How many threads a model is fastest with.
    pub team: Option<TeamSize>,
    /// What whole steps of a model take without the choices and with them.
    pub steps: Option<WholeSteps>,
    /// The choices, by shape.
    pub products: BTreeMap<ProductShape, Found>,
}

/// Why a record cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The file cannot be read.
    #[error("cannot read the tuning record {path}: {source}")]
    Read {
        /// Which.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// It is no TOML.
    #[error("the tuning record {path} is not TOML: {reason}")]
    Syntax {
        /// Which.
        path: String,
        /// Where, and what is wrong.
        reason: String,
    },
    /// It is of another version.
    #[error(
        "the tuning record {path} is of version {found}, and this moec reads version {VERSION}; make a new one with `moec tune`"
    )]
    Version {
        /// Which.
        path: String,
        /// What it says.
        found: String,
    },
    /// A key has a value that is not understood.
    #[error("the tuning record {path}: `{key}`: {reason}")]
    Key {
        /// Which.
        path: String,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A record as the file has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: i64,
    moec: String,
    threads: usize,
    machine: MachineTable,
    limits: LimitsTable,
    #[serde(skip_serializing_if = "Option::is_none")]
    team: Option<TeamTable>,
    #[serde(skip_serializing_if = "Option::is_none")]
    steps: Option<StepsTable>,
    #[serde(default)]
    product: Vec<ProductTable>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MachineTable {
    cpu: String,
    features: Vec<String>,
    caches: Vec<usize>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitsTable {
    dots: f64,
    fmas: f64,
    read: f64,
    ops: Option<f64>,
    latency: Option<f64>,
    barrier: Option<f64>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TeamTable {
    best: usize,
    measured: Vec<SizedTable>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SizedTable {
    threads: usize,
    decode: f64,
    prefill: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StepsTable {
    layers: usize,
    measured: Vec<StepTable>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StepTable {
    tokens: usize,
    default: f64,
    tuned: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProductTable {
    format: String,
    k: usize,
    epilogue: String,
    rows: Vec<usize>,
    unroll: Vec<usize>,
    prefetch: Vec<usize>,
    #[serde(default)]
    streams: Vec<usize>,
    block: usize,
    activation_bytes: usize,
    #[serde(default)]
    columns: usize,
    ahead: bool,
    #[serde(default)]
    measured: Vec<MeasuredTable>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MeasuredTable {
    step: usize,
    tokens: usize,
    default_share: f64,
    tuned_share: f64,
}

const EPILOGUES: [Epilogue; 4] =
    [Epilogue::Store, Epilogue::Add, Epilogue::Gated(Activation::Silu), Epilogue::Gated(Activation::Gelu)];

impl Record {
    /// Reads the record at `path`.
    ///
    /// # Errors
    /// When it is not there, or not understood.
    pub fn read(path: &Path) -> Result<Record, RecordError> {
        let name = path.display().to_string();
        let failed = |source| RecordError::Read { path: name.clone(), source };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        if metadata.len() > MOST_BYTES {
            return Err(failed(std::io::Error::other(format!(
                "it has more than {MOST_BYTES} bytes, which no record has"
            ))));
        }
        let text = std::fs::read_to_string(path).map_err(failed)?;
        Record::parse(&text, &name)
    }

    /// The record that `text` from `path` says.
    ///
    /// # Errors
    /// When it is not understood.
    pub fn parse(text: &str, path: &str) -> Result<Record, RecordError> {
        let path = path.to_string();
        let table: toml::Table = text
            .parse()
            .map_err(|e: toml::de::Error| RecordError::Syntax { path: path.clone(), reason: e.to_string() })?;
        match table.get("version") {
            Some(toml::Value::Integer(VERSION)) => {}
            found => {
                let found = found.map_or("no number".to_string(), ToString::to_string);
                return Err(RecordError::Version { path, found });
            }
        }
        let file: File = serde_path_to_error::deserialize(toml::Value::Table(table)).map_err(|e| RecordError::Key {
            path: path.clone(),
            key: e.path().to_string(),
            reason: e.inner().message().trim().to_string(),
        })?;
        file.check()
            .map_err(|(key, reason)| RecordError::Key { path: path.clone(), key, reason })
            .map(|record| Record { source: path.clone(), ..record })
    }

    /// Whether two records were measured on the same machine for the same level by the same moec, so that they can be one.
    pub fn same_key(&self, other: &Record) -> bool {
        (&self.machine, self.features, &self.moec, self.threads)
            == (&other.machine, other.features, &other.moec, other.threads)
    }

    /// As the file has it.
    pub fn to_toml(&self) -> String {
        let product = |(shape, found): (&ProductShape, &Found)| {
            let kernels = || found.tuning.kernels.iter();
            ProductTable {
                format: shape.format.name().to_string(),
                k: shape.k,
                epilogue: shape.epilogue.name().to_string(),
                rows: kernels().map(|k| k.tiles).collect(),
                unroll: kernels().map(|k| k.unroll).collect(),
                prefetch: kernels().map(|k| if let Prefetch::Ahead(bytes) = k.prefetch { bytes } else { 0 }).collect(),
                streams: kernels()
                    .map(|k| if let Prefetch::Next(streams) = k.prefetch { streams } else { 0 })
                    .collect(),
                block: found.tuning.block,
                activation_bytes: found.tuning.activation_bytes,
                columns: found.tuning.columns,
                ahead: found.tuning.ahead,
                measured: found.measured.iter().map(MeasuredTable::from).collect(),
            }
        };
        let file = File {
            version: VERSION,
            moec: self.moec.clone(),
            threads: self.threads,
            machine: MachineTable {
                cpu: self.machine.cpu.clone(),
                features: feature_names(self.features).into_iter().map(str::to_string).collect(),
                caches: self.machine.caches.clone(),
            },
            limits: LimitsTable {
                dots: self.limits.dots.round(),
                fmas: self.limits.fmas.round(),
                read: self.limits.read.round(),
                ops: Some(self.limits.ops.round()),
                latency: Some(self.limits.latency),
                barrier: Some(self.limits.barrier),
            },
            team: self.team.as_ref().map(TeamTable::from),
            steps: self.steps.as_ref().map(StepsTable::from),
            product: self.products.iter().map(product).collect(),
        };
        let text = toml::to_string(&file).expect("a record is plain tables and numbers");
        format!(
            "# A tuning record: `moec tune` measured it, `moec build --tuning` uses it. Speed depends on it, results never.\n{text}"
        )
    }
}

impl From<&TeamSize> for TeamTable {
    fn from(team: &TeamSize) -> TeamTable {
        let sized = |s: &Sized| SizedTable {
            threads: s.threads,
            decode: nanoseconds(s.decode),
            prefill: nanoseconds(s.prefill),
        };
        TeamTable { best: team.best, measured: team.measured.iter().map(sized).collect() }
    }
}

impl From<&WholeSteps> for StepsTable {
    fn from(steps: &WholeSteps) -> StepsTable {
        let step =
            |s: &StepTime| StepTable { tokens: s.tokens, default: nanoseconds(s.default), tuned: nanoseconds(s.tuned) };
        StepsTable { layers: steps.layers, measured: steps.measured.iter().map(step).collect() }
    }
}

/// Seconds without what is less than a billionth.
fn nanoseconds(seconds: f64) -> f64 {
    (seconds * 1e9).round() / 1e9
}

impl From<&Measured> for MeasuredTable {
    fn from(m: &Measured) -> MeasuredTable {
        let round = |x: f64| (x * 1e4).round() / 1e4;
        let (default_share, tuned_share) = (round(m.default_share), round(m.tuned_share));
        MeasuredTable { step: m.step, tokens: m.tokens, default_share, tuned_share }
    }
}

/// A key, and what is wrong with it.
type Wrong = (String, String);

impl File {
    /// The record, when all its values are legal.
    fn check(self) -> Result<Record, Wrong> {
        let mut features = 0;
        for (i, name) in self.machine.features.iter().enumerate() {
            let known = NAMES.iter().find(|(_, known)| known == name);
            let (bit, _) = known.ok_or_else(|| {
                let all: Vec<&str> = NAMES.iter().map(|(_, name)| *name).collect();
                (
                    format!("machine.features[{i}]"),
                    format!("no feature is named `{name}`; there are {}", all.join(", ")),
                )
            })?;
            features |= bit;
        }
        let LimitsTable { dots, fmas, read, ops, latency, barrier } = self.limits;
        let all = [("dots", dots), ("fmas", fmas), ("read", read)].map(|(key, value)| (key, Some(value)));
        for (key, value) in all.into_iter().chain([("ops", ops), ("latency", latency), ("barrier", barrier)]) {
            value.map_or(Ok(()), |value| above_zero(format!("limits.{key}"), value, "limit"))?;
        }
        within("threads", self.threads, 1..=1 << 16)?;
        let mut products = BTreeMap::new();
        for (i, table) in self.product.iter().enumerate() {
            let (shape, found) = table.check().map_err(|(key, reason)| (format!("product[{i}].{key}"), reason))?;
            if products.insert(shape, found).is_some() {
                return Err((format!("product[{i}]"), format!("there is another for {shape}; leave one of them")));
            }
        }
        let machine = Machine { cpu: self.machine.cpu, caches: self.machine.caches };
        let usual = Limits::usual(dots, fmas, read, self.threads);
        let limits = Limits {
            ops: ops.unwrap_or(usual.ops),
            latency: latency.unwrap_or(usual.latency),
            barrier: barrier.unwrap_or(usual.barrier),
            ..usual
        };
        Ok(Record {
            source: String::new(),
            moec: self.moec,
            machine,
            features,
            threads: self.threads,
            limits,
            team: self.team.map(|team| team.check(self.threads)).transpose()?,
            steps: self.steps.map(StepsTable::check).transpose()?,
            products,
        })
    }
}

impl TeamTable {
    fn check(self, threads: usize) -> Result<TeamSize, Wrong> {
        within("team.best", self.best, 1..=threads)?;
        let sized = |(i, s): (usize, SizedTable)| {
            within(format!("team.measured[{i}].threads"), s.threads, 1..=threads)?;
            above_zero(format!("team.measured[{i}].decode"), s.decode, "time")?;
            above_zero(format!("team.measured[{i}].prefill"), s.prefill, "time")?;
            Ok(Sized { threads: s.threads, decode: s.decode, prefill: s.prefill })
        };
        let measured = self.measured.into_iter().enumerate().map(sized).collect::<Result<_, Wrong>>()?;
        Ok(TeamSize { best: self.best, measured })
    }
}

impl StepsTable {
    fn check(self) -> Result<WholeSteps, Wrong> {
        within("steps.layers", self.layers, 1..=MOST_LAYERS)?;
        let step = |(i, s): (usize, StepTable)| {
            within(format!("steps.measured[{i}].tokens"), s.tokens, 1..=MAX_STEP_TOKENS)?;
            above_zero(format!("steps.measured[{i}].default"), s.default, "time")?;
            above_zero(format!("steps.measured[{i}].tuned"), s.tuned, "time")?;
            Ok(StepTime { tokens: s.tokens, default: s.default, tuned: s.tuned })
        };
        let measured = self.measured.into_iter().enumerate().map(step).collect::<Result<_, Wrong>>()?;
        Ok(WholeSteps { layers: self.layers, measured })
    }
}

/// Fails unless `value` is one of `legal`.
fn within(key: impl Into<String>, value: usize, legal: std::ops::RangeInclusive<usize>) -> Result<(), Wrong> {
    if legal.contains(&value) {
        return Ok(());
    }
    Err((key.into(), format!("{value} is not within {} and {}", legal.start(), legal.end())))
}

/// Fails unless `value` is a number above 0.
fn above_zero(key: String, value: f64, what: &str) -> Result<(), Wrong> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err((key, format!("{value} is no {what}; it must be above 0")))
}

impl ProductTable {
    fn check(&self) -> Result<(ProductShape, Found), Wrong> {
        let named = |key: &str, name: &str, all: Vec<&'static str>| {
            let at = all.iter().position(|known| *known == name);
            at.ok_or_else(|| (key.to_string(), format!("there is no `{name}`; there are {}", all.join(", "))))
        };
        let format = Format::ALL[named("format", &self.format, Format::ALL.map(Format::name).to_vec())?];
        let epilogue = EPILOGUES[named("epilogue", &self.epilogue, EPILOGUES.map(Epilogue::name).to_vec())?];
        within("k", self.k, 1..=1 << 24)?;
        within("block", self.block, 1..=64)?;
        within("activation_bytes", self.activation_bytes, 1 << 10..=1 << 30)?;
        if !self.columns.is_multiple_of(GROUP) || self.columns > 1 << 24 {
            return Err(("columns".into(), format!("{} is no multiple of {GROUP}, as whole groups are", self.columns)));
        }
        let tokens = self.rows.len();
        if !(1..=MAX_TOKENS).contains(&tokens) {
            return Err(("rows".to_string(), format!("{tokens} numbers; there must be 1 to {MAX_TOKENS}")));
        }
        let streams = if self.streams.is_empty() { &vec![0; tokens] } else { &self.streams };
        for (key, list) in [("unroll", &self.unroll), ("prefetch", &self.prefetch), ("streams", streams)] {
            if list.len() != tokens {
                let reason = format!("{} numbers, and `rows` has {tokens}: there must be one for each", list.len());
                return Err((key.to_string(), reason));
            }
        }
        let mut kernels = Vec::new();
        for (i, &tiles) in self.rows.iter().enumerate() {
            if !matches!(tiles, 1 | 2 | 4 | 8) {
                return Err((format!("rows[{i}]"), format!("{tiles} is none of 1, 2, 4, 8")));
            }
            if tiles * (i + 1) > MOST_SUMS {
                let reason = format!("{tiles} row tiles of {} tokens are more than {MOST_SUMS} sums", i + 1);
                return Err((format!("rows[{i}]"), reason));
            }
            let unroll = self.unroll[i];
            within(format!("unroll[{i}]"), unroll, 1..=if format.is_quantized() { 4 } else { 16 })?;
            let prefetch = match (self.prefetch[i], streams[i]) {
                (0, 0) => Prefetch::None,
                (bytes, 0) => {
                    within(format!("prefetch[{i}]"), bytes, 64..=1 << 16)?;
                    Prefetch::Ahead(bytes)
                }
                (0, streams) => {
                    within(format!("streams[{i}]"), streams, 1..=MOST_STREAMS)?;
                    Prefetch::Next(streams)
                }
                (bytes, _) => {
                    let reason = format!("kernel {i} prefetches {bytes} bytes ahead (`prefetch`), and so no streams");
                    return Err((format!("streams[{i}]"), reason));
                }
            };
            kernels.push(MatmulTuning { tiles, unroll, prefetch });
        }
        let measured = |m: &MeasuredTable| Measured {
            step: m.step,
            tokens: m.tokens,
            default_share: m.default_share,
            tuned_share: m.tuned_share,
        };
        let tuning = ProductTuning {
            kernels,
            block: self.block,
            activation_bytes: self.activation_bytes,
            columns: self.columns,
            ahead: self.ahead,
        };
        let found = Found { tuning, measured: self.measured.iter().map(measured).collect() };
        Ok((ProductShape { format, k: self.k, epilogue }, found))
    }
}

#[cfg(test)]
mod tests;
