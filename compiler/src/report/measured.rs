//! What a benchmark measured, beside what was predicted.
//!
//! The predictions are made for the machine's limits when the report was made. Memory is shared with neighbours and clocks change, so they are scaled by the limits
//! that the benchmark found in its own run: what is compared is then the prediction, and not the weather. Deliberately absent: measuring, which `bench` of the
//! executable does.

use super::{Level, Report, ReportError, from_json, read_json};
use crate::predict::Expected;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What `bench --json` wrote, as far as it is needed.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct Bench {
    /// The model's name.
    pub model: String,
    /// The CPU level whose code ran.
    pub level: String,
    /// Tokens before those that were measured.
    pub depth: usize,
    /// Texts that went through together.
    #[serde(default = "one")]
    pub sequences: usize,
    /// The prompt.
    pub prefill: Run,
    /// The tokens after it, one at a time.
    pub decode: Run,
    /// The machine as it was meanwhile.
    pub machine: Found,
    /// With `--profile`: one more run of each, stage by stage.
    pub profile: Option<Profile>,
}

fn one() -> usize {
    1
}

/// Tokens that went through, and how long it took.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct Run {
    /// How many.
    pub tokens: usize,
    /// The median of the runs.
    pub seconds: f64,
}

/// A machine's limits in a run.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct Found {
    /// Bytes read from memory in a second.
    pub read_bytes_per_s: f64,
    /// Multiply-adds in a second …
    pub peak_multiply_adds_per_s: f64,
    /// … by this instruction.
    pub peak_of: String,
    /// Threads that ran.
    pub threads: usize,
}

/// The times of stages.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct Profile {
    /// Of the prompt.
    pub prefill: Vec<Row>,
    /// Of all decoded tokens together.
    pub decode: Vec<Row>,
}

/// The stages with the same operations.
#[derive(Clone, PartialEq, Debug, Deserialize)]
pub struct Row {
    /// The operations.
    pub operations: String,
    /// Seconds of all of them.
    pub seconds: f64,
}

/// Predicted and measured.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// The file that the benchmark wrote.
    pub source: String,
    /// The level whose code ran, by its place in the report.
    pub level: usize,
    /// Bytes that the machine read in a second, in that run.
    pub read: f64,
    /// How much faster that is than what was predicted with.
    pub read_scale: f64,
    /// How much faster the machine multiplied and added; 1 where the benchmark's peak is of other instructions than the level's.
    pub compute_scale: f64,
    /// The prompt.
    pub prefill: Phase,
    /// One decoded token.
    pub decode: Phase,
}

/// One of the two.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// Tokens in it.
    pub tokens: usize,
    /// Seconds predicted, scaled.
    pub predicted: f64,
    /// Seconds measured: the median of the benchmark's runs.
    pub measured: f64,
    /// Stage by stage, in the report's order; measured in a run of its own. Empty without a profile.
    pub kinds: Vec<Compared>,
}

/// Stages with the same operations.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Compared {
    /// The operations.
    pub operations: String,
    /// Seconds predicted, scaled.
    pub predicted: f64,
    /// Seconds measured.
    pub measured: f64,
}

impl Phase {
    /// Measured over predicted: above 1 where it took longer.
    pub fn ratio(&self) -> f64 {
        self.measured / self.predicted
    }
}

impl Compared {
    /// Measured over predicted.
    pub fn ratio(&self) -> f64 {
        self.measured / self.predicted
    }
}

/// Reads what `bench --json` wrote.
///
/// # Errors
/// When it is not there, or something else.
pub fn read(path: &Path) -> Result<Bench, ReportError> {
    const WHAT: &str = "what `bench --profile --json` of an executable prints";
    from_json(path, WHAT, read_json(path, WHAT)?)
}

/// Sets `bench`, which the file `source` holds, beside the predictions of `report`.
///
/// # Errors
/// When it is of another model or level, or measured what is not predicted; `name` is the report's, for the message.
pub fn compare(report: &Report, name: &str, bench: &Bench, source: &str) -> Result<Comparison, ReportError> {
    let foreign =
        |reason: String| ReportError::Foreign { measured: source.to_string(), report: name.to_string(), reason };
    if bench.model != report.model.name {
        return Err(foreign(format!("it is of the model {}, and the report of {}", bench.model, report.model.name)));
    }
    let index = report.levels.iter().position(|level| level.name == bench.level).ok_or_else(|| {
        let levels: Vec<&str> = report.levels.iter().map(|level| level.name.as_str()).collect();
        foreign(format!("the code of {} ran, and the report has {}", bench.level, levels.join(", ")))
    })?;
    let level = &report.levels[index];
    let (Some(machine), Some(decode), Some(prefill)) = (&level.machine, level.decode.step, level.batch.step) else {
        let how = "make it with --limits here, or --limits and a tuning record";
        return Err(foreign(format!("the report predicts nothing for {}; {how}", level.name)));
    };
    if bench.sequences != 1 {
        return Err(foreign(format!(
            "it decoded {} texts together, and what is predicted is one; measure without --sequences",
            bench.sequences
        )));
    }
    let again = "give the model in place of the report, and what was measured is predicted";
    let target = &machine.target;
    for (what, found, predicted) in [
        ("threads", bench.machine.threads, target.threads),
        ("tokens of a prompt", bench.prefill.tokens, prefill.tokens),
        ("tokens before it", bench.depth, prefill.depth),
    ] {
        if found != predicted {
            return Err(foreign(format!("it measured {found} {what}, and the report is for {predicted}; {again}")));
        }
    }
    let middle = bench.depth + bench.decode.tokens / 2;
    if middle.abs_diff(decode.depth) > 64 {
        let depth = decode.depth;
        return Err(foreign(format!(
            "it decoded after {middle} tokens on average, the report is for {depth}; {again}"
        )));
    }
    for (key, value) in [
        ("prefill.seconds", bench.prefill.seconds),
        ("decode.seconds", bench.decode.seconds),
        ("machine.read_bytes_per_s", bench.machine.read_bytes_per_s),
        ("machine.peak_multiply_adds_per_s", bench.machine.peak_multiply_adds_per_s),
    ] {
        if !(value.is_finite() && value > 0.0) {
            return Err(foreign(format!("`{key}` is {value}, which nothing can be compared with")));
        }
    }
    let peak = if report.token.integer { target.limits.dots } else { target.limits.fmas };
    let read_scale = bench.machine.read_bytes_per_s / target.limits.read;
    let compute_scale = if machine.full { bench.machine.peak_multiply_adds_per_s / peak } else { 1.0 };
    let scaled = |e: Expected| e.scaled(read_scale, compute_scale).seconds();
    let phase = |level: &Level, decode: bool, run: &Run| {
        let (program, tokens) = if decode { (&level.decode, 1) } else { (&level.batch, run.tokens) };
        let runs = if decode { run.tokens as f64 } else { 1.0 };
        let rows = bench.profile.as_ref().map(|p| if decode { &p.decode } else { &p.prefill });
        let expected = program.kinds.iter().filter_map(|kind| Some((kind, scaled(kind.expected?))));
        let compared = expected.clone().filter_map(|(kind, predicted)| {
            let row = rows?.iter().find(|row| row.operations == kind.operations)?;
            Some(Compared { operations: kind.operations.clone(), predicted, measured: row.seconds / runs })
        });
        Phase {
            tokens,
            predicted: expected.map(|(_, seconds)| seconds).sum(),
            measured: run.seconds / runs,
            kinds: compared.collect(),
        }
    };
    Ok(Comparison {
        source: source.to_string(),
        level: index,
        read: bench.machine.read_bytes_per_s,
        read_scale,
        compute_scale,
        prefill: phase(level, false, &bench.prefill),
        decode: phase(level, true, &bench.decode),
    })
}
