//! `moec report`, and how `moec build --report` writes.

use super::build::{BuildOptions, repacked, warn};
use super::failure::Usage;
use super::output::{print_line, say};
use clap::Args;
use moec::emit::files::Unfinished;
use moec::import;
use moec::pipeline::{self, Options};
use moec::report::{self, Form, Inputs, Machine, Predicted, Report, measured};
use moec::target::machine::{self, Machine as ThisMachine};
use moec::target::{self, CpuLevel};
use moec::tune::Record;
use moec_abi::metadata::Metadata;
use std::path::{Path, PathBuf};
use target_lexicon::Triple;

/// Where the limits of the machine are from that is predicted for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LimitsFrom {
    /// They are measured here.
    Here,
    /// Nothing is predicted.
    None,
    /// A tuning record.
    Record(PathBuf),
}

impl std::str::FromStr for LimitsFrom {
    type Err = String;

    fn from_str(text: &str) -> Result<LimitsFrom, String> {
        match text {
            "here" => Ok(LimitsFrom::Here),
            "none" => Ok(LimitsFrom::None),
            "" => Err("say here, none, or name a tuning record".to_string()),
            path => Ok(LimitsFrom::Record(path.into())),
        }
    }
}

/// The machines to predict for, one for each level of `options`. What cannot be had is told, and not predicted for.
pub fn machines(options: &Options, from: &LimitsFrom, threads: usize) -> anyhow::Result<Vec<Option<Machine>>> {
    let record = match from {
        LimitsFrom::Record(path) => Some(Record::read(path)?),
        LimitsFrom::None => return Ok(vec![None; options.levels.len()]),
        LimitsFrom::Here => None,
    };
    let one = |level: &CpuLevel| match &record {
        Some(record) if record.features == level.features => Ok(Some(of_record(record, level))),
        Some(record) => {
            say(format_args!(
                "moec: warning: {} has the limits of another level than {}, for which nothing is predicted",
                record.source, level.name
            ));
            Ok(None)
        }
        None => here(level, threads),
    };
    if record.is_none() && options.target.architecture != Triple::host().architecture {
        say(
            "moec: warning: this machine cannot run that code, so no times are predicted; --limits takes a tuning record of one that can",
        );
        return Ok(vec![None; options.levels.len()]);
    }
    options.levels.iter().map(one).collect()
}

fn of_record(record: &Record, level: &CpuLevel) -> Machine {
    let full = record.machine == ThisMachine::this() && level.features == target::host();
    Machine {
        cpu: record.machine.cpu.clone(),
        source: format!("limits of {}", record.source),
        target: moec::predict::Target {
            limits: record.limits,
            threads: record.threads,
            cache: record.machine.largest_cache(),
        },
        full,
    }
}

fn here(level: &CpuLevel, threads: usize) -> anyhow::Result<Option<Machine>> {
    if level.features & !target::host() != 0 {
        let name = level.name;
        say(format_args!("moec: warning: this machine cannot run code for {name}, so no times are predicted for it"));
        return Ok(None);
    }
    let (limits, busy) = moec::tune::limits_here(*level, threads)?;
    if busy {
        say("moec: warning: other programs use the same cores; predicted times are for the machine as it is now");
    }
    let this = ThisMachine::this();
    Ok(Some(Machine {
        source: "limits measured when this was written".to_string(),
        target: moec::predict::Target { limits, threads, cache: this.largest_cache() },
        cpu: this.cpu,
        full: level.features == target::host(),
    }))
}

/// Writes a report where it was asked for; `-` is standard output.
pub fn write(report: &Report, to: &Path, form: Form) -> anyhow::Result<()> {
    let text = report::render(report, form);
    if form == Form::Text {
        return print_line(text);
    }
    Unfinished::with_content(to, text.as_bytes())?.finish(0o666)?;
    say(format_args!("wrote the report to {}", to.display()));
    Ok(())
}

/// `moec report`
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    moec build MODEL -o m --report m.json && ./m bench --profile --json > bench.json\n  \
    moec report m.json --measured bench.json                 what was predicted beside what was measured, as text\n  \
    moec report m.json --measured bench.json -o m.html       the whole report with it, as a page\n  \
    moec report MODEL --quant q4 --measured bench.json       the same, for whatever prompt, depth and threads were measured\n\n\
    Predictions are scaled by the limits that the benchmark found in its own run, since the bandwidth of many machines changes with their neighbours.")]
pub struct ReportCommand {
    /// A report in JSON (`moec build --report FILE.json`); or a model, which is then compiled and reported on without being built
    #[arg(value_name = "REPORT.json|MODEL")]
    of: PathBuf,
    /// Set what `bench --profile --json` of the executable printed beside what is predicted
    #[arg(long, value_name = "BENCH.json")]
    measured: Option<PathBuf>,
    /// Where to write, as .html, .md or .json; `-` is standard output, as text
    #[arg(short, long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Of a model: the machine to predict for: here, none, or a tuning record
    #[arg(long, value_name = "here|none|RECORD", default_value = "here")]
    limits: LimitsFrom,
    /// Of a model: threads to predict for; without this those that were measured, or all physical cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    options: BuildOptions,
}

impl ReportCommand {
    pub fn run(self) -> anyhow::Result<u8> {
        let form = Form::of(&self.output).map_err(Usage::new)?;
        let bench = self.measured.as_deref().map(measured::read).transpose()?;
        let name = self.of.display().to_string();
        let mut report = if self.of.extension().is_some_and(|e| e == "json") && !self.of.is_dir() {
            report::read(&self.of)?
        } else {
            self.of_model(bench.as_ref())?
        };
        if let (Some(bench), Some(path)) = (&bench, &self.measured) {
            report.measured = Some(measured::compare(&report, &name, bench, &path.display().to_string())?);
        }
        write(&report, &self.output, form)?;
        Ok(0)
    }

    fn of_model(&self, bench: Option<&measured::Bench>) -> anyhow::Result<Report> {
        let options = self.options.resolve()?;
        let model = import::open(&self.of)?;
        warn(&model);
        let compiled = pipeline::compile(&model, &options)?;
        for note in &compiled.tuned.notes {
            say(format_args!("moec: warning: {note}"));
        }
        let threads = match (self.threads, bench) {
            (Some(threads), _) => usize::from(threads),
            (None, Some(bench)) => bench.machine.threads.clamp(1, 1024),
            (None, None) => machine::cores(),
        };
        let metadata: Option<Metadata> = pipeline::earlier_metadata(&model, &compiled);
        let predicted = bench.map_or(Predicted::default(), |bench| Predicted {
            prompt: bench.prefill.tokens,
            depth: bench.depth,
            new: bench.decode.tokens,
        });
        Ok(report::gather(&Inputs {
            model: &model,
            options: &options,
            compiled: &compiled,
            metadata: metadata.as_ref(),
            output: None,
            repacked: &repacked(&model, &options),
            scores: None,
            machines: &machines(&options, &self.limits, threads)?,
            predicted,
        }))
    }
}
