//! `moec build` and `moec run`.

use super::failure::Usage;
use super::output::say;
use super::report::{self, LimitsFrom};
use super::score;
use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use moec::emit::cache;
use moec::emit::library::Library;
use moec::expert_profile::ExpertProfile;
use moec::import::{self, Dtype, Model};
use moec::passes::{PassId, QuantConfig};
use moec::pipeline::{self, Options, Progress};
use moec::report::{Form, Inputs, Output, Predicted, gather, summary};
use moec::target;
use moec::target::machine;
use moec::tune::shipped;
use moec_abi::KvType;
use moec_ir::graph::{Layout, Role};
use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use target_lexicon::Triple;

/// What the executable is to be.
#[derive(Debug, Args)]
pub struct BuildOptions {
    /// Weights: none (as stored), f32, bf16, f16, q8, q4, or by role, e.g. q4,attention=q8; experts=auto by how often each is chosen
    ///
    /// Roles: embedding, norm, attention, router, experts, ffn, output. One layout without a role is for all others. Embedding and
    /// router are never quantized: they cost no time. With none, weights that are stored in blocks of integers keep their codes and scales to the
    /// bit (all types of GGUF that moec reads; GPTQ and AWQ with f16 scales for whole groups of 128), the embedding too; FP8 and other groups become
    /// q8, and the build says so. Routers are then f32, which holds all. q4 alone means experts=q4,ffn=q4,attention=q8,output=q8, which loses far less than 4 bits for all.
    ///
    /// With experts=auto, e.g. q4,experts=auto, the experts that --expert-profile says are chosen most are q8 and the others q4: as many q8 as --size-budget
    /// allows, over all layers.
    #[arg(long, value_name = "LAYOUT|ROLE=LAYOUT,…", default_value = "q8")]
    quant: QuantConfig,
    /// Element type of the KV cache
    #[arg(long, value_enum, default_value = "f16")]
    kv: Kv,
    /// Longest sequence in tokens; the model's own limit without this
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(u32).range(1..))]
    context: Option<u32>,
    /// CPUs to make code for, several in one file separated by commas; `moec targets` lists them
    ///
    /// Without this: native, or what every CPU of another --target has.
    #[arg(long, value_name = "CPU,…")]
    target_cpu: Option<String>,
    /// Tuning records, made by `moec tune` on the machines that this is for: kernels are written as was fastest there; or none
    ///
    /// A record is for the CPU level with exactly its features, and says something about some shapes of products; the rest is written by
    /// moec's defaults. One that is for no level of this build, or (for native) was measured on another machine, or by another version of moec, is
    /// ignored with a warning; two for one level are an error. A level without one has the record that moec carries for it, if it knows the model's shapes
    /// (`moec targets --verbose` lists them); `none` leaves those out. Results never depend on it, to the last bit.
    #[arg(long, value_name = "FILE,…|none", value_delimiter = ',')]
    tuning: Vec<PathBuf>,
    /// How often each expert is chosen, as an executable of the model wrote it with --expert-stats; several are added up
    ///
    /// Experts that are chosen often come first in the payload and lie next to each other, layer by layer. Experts keep their numbers, and results their
    /// bits; nothing was measured to be faster for that order. Predictions take experts to be chosen so, and --quant experts=auto gives bits by it.
    #[arg(long, value_name = "FILE,…", value_delimiter = ',')]
    expert_profile: Vec<PathBuf>,
    /// With --quant experts=auto: what the packed weights may take, e.g. 24GiB or 800MB
    ///
    /// It is for all that is packed: weights, tables and tokenizer, but not code, which is some megabytes. Experts get 8 bits instead of 4 in the order of
    /// how often the profile says they are chosen, over all layers together, for as long as they fit.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size_budget: Option<u64>,
    /// System to make code for, e.g. aarch64-unknown-linux-gnu; this one without this
    #[arg(long, value_name = "TRIPLE", value_parser = triple)]
    target: Option<Triple>,
    /// A pass to leave out, to see what it is worth; may be given several times
    #[arg(long, value_name = "PASS")]
    disable_pass: Vec<PassId>,
    /// Rewrites to apply at most, to find the one that breaks a model
    #[arg(long, value_name = "N")]
    stop_after_rewrites: Option<usize>,
    /// Starts the names of exported symbols
    #[arg(long, value_name = "SYMBOL_PREFIX", default_value = "model", value_parser = symbol)]
    name: String,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kv {
    /// Half precision
    F16,
    /// Single precision
    F32,
}

fn symbol(text: &str) -> Result<String, String> {
    let mut chars = text.chars();
    let starts = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    if text == "moec" {
        return Err("moec_model and moec.h are moec's own; choose another name".to_string());
    }
    if starts && chars.all(|c| c.is_ascii_alphanumeric() || c == '_') {
        Ok(text.to_string())
    } else {
        Err("a C identifier is letters, digits and _, and does not start with a digit".to_string())
    }
}

/// A number of bytes: `500000`, `800MB`, `1.5GB`, `24GiB`.
fn size(text: &str) -> Result<u64, String> {
    let wrong = || "a size is a number of bytes such as 500000, 800MB, 1.5GB or 24GiB".to_string();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    match number.parse::<f64>() {
        Ok(n) if n * (factor as f64) < 1e18 => Ok((n * factor as f64) as u64),
        _ => Err(wrong()),
    }
}

fn triple(text: &str) -> Result<Triple, String> {
    text.parse()
        .map_err(|error| format!("{error}; a target is ARCHITECTURE-VENDOR-SYSTEM, e.g. aarch64-unknown-linux-gnu"))
}

impl BuildOptions {
    /// As the library takes them.
    pub fn resolve(&self) -> anyhow::Result<Options> {
        let target = self.target.clone().unwrap_or_else(Triple::host);
        let levels = match &self.target_cpu {
            Some(list) => target::find_levels(list, &target).map_err(Usage::new)?,
            None => vec![target::default_level(&target)?],
        };
        let (tuning, carried_tuning) = shipped::given(&self.tuning)?;
        Ok(Options {
            quant: self.quant,
            kv: match self.kv {
                Kv::F16 => KvType::F16,
                Kv::F32 => KvType::F32,
            },
            context: self.context.map(|tokens| tokens as usize),
            target,
            levels,
            prefix: self.name.clone(),
            disabled: self.disable_pass.clone(),
            stop_after: None,
            stop_after_rewrites: self.stop_after_rewrites,
            tuning,
            carried_tuning,
            expert_profiles: self
                .expert_profile
                .iter()
                .map(|path| ExpertProfile::read(path))
                .collect::<Result<_, _>>()?,
            size_budget: self.size_budget,
        })
    }
}

/// `moec build`
#[derive(Debug, Args)]
pub struct Build {
    /// The model's directory, or a .gguf file
    #[arg(required_unless_present = "report")]
    model: Option<PathBuf>,
    /// The executable to write; the directory to write into for the other kinds
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// What to write
    #[arg(long, value_enum, default_value = "exe")]
    emit: Emit,
    /// Tell what was decided and what to expect: to standard output, or to a file ending in .html, .md or .json
    ///
    /// Without FILE, or with `-`: weights, sizes, errors, costs and stages as text. A file has more: predicted times of each kind of stage against the
    /// machine's limits, kernels and how they are written, the memory plan, the worst tensors, what each pass did. `moec report` sets measured times
    /// beside it.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    report: Option<PathBuf>,
    /// Score this text by the executable, and say how well it predicts it: the mean negative log likelihood of a token
    ///
    /// With --quant experts=auto, also by the same model with all experts as q4 and as q8, which are built for that beside OUT, one at a time, and removed:
    /// what the choice of bits costs and gains, with standard errors of the differences. The report has it, too.
    #[arg(long, value_name = "FILE")]
    score_text: Option<PathBuf>,
    /// The machine whose limits --report FILE predicts with: `here` measures this one in a second; a tuning record; none
    #[arg(long, value_name = "here|none|RECORD", default_value = "here")]
    limits: LimitsFrom,
    #[command(flatten)]
    options: BuildOptions,
}

/// What to write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Emit {
    /// A standalone executable
    Exe,
    /// NAME.o, which needs nothing, with NAME.h and NAME.weights: to run on threads of your own
    Object,
    /// libNAME.a with the runtime, moec.h, NAME.h, NAME.weights and NAME.pc
    Staticlib,
    /// libNAME.so with the runtime, moec.h, NAME.h and NAME.weights
    Cdylib,
}

impl Build {
    /// The model, and where and how the report is written. `--report` may stand before the model: what follows it is a report only by the name's end.
    fn arguments(&self) -> anyhow::Result<(PathBuf, Option<(PathBuf, Form)>)> {
        match (&self.model, &self.report) {
            (Some(model), None) => Ok((model.clone(), None)),
            (Some(model), Some(to)) => Ok((model.clone(), Some((to.clone(), Form::of(to).map_err(Usage::new)?)))),
            (None, Some(model)) if Form::of(model).is_err() => Ok((model.clone(), Some(("-".into(), Form::Text)))),
            (None, _) => Err(Usage::new("name the model to build").into()),
        }
    }

    pub fn run(self) -> anyhow::Result<u8> {
        let (path, report) = self.arguments()?;
        if let Some(text) = &self.score_text {
            if self.emit != Emit::Exe {
                return Err(Usage::new("--score-text runs what was built: it is for --emit exe").into());
            }
            // What cannot be read is told before the work.
            std::fs::File::open(text).with_context(|| format!("cannot read {}", text.display()))?;
        }
        let options = self.options.resolve()?;
        let model = import::open(&path)?;
        let library = match self.emit {
            Emit::Exe => None,
            Emit::Object => Some(Library::Object),
            Emit::Staticlib => Some(Library::Static),
            Emit::Cdylib => Some(Library::Shared),
        };
        if library.is_none() && self.output.is_dir() {
            bail!("{}: is a directory; name the file to write", self.output.display());
        }
        if library.is_some() && self.output.exists() && !self.output.is_dir() {
            bail!("{}: is a file; name the directory to write into", self.output.display());
        }
        warn(&model);
        let repacked = repacked(&model, &options);
        for line in &repacked {
            say(line);
        }
        // Before the build: a record that cannot be read is told at once, and the disk is quiet.
        let machines = match &report {
            Some((_, form)) if *form != Form::Text => report::machines(&options, &self.limits, machine::cores())?,
            _ => Vec::new(),
        };
        let bar = Bar::start();
        let built = match library {
            None => pipeline::build(&model, &options, &self.output, &bar),
            Some(kind) => pipeline::build_library(&model, &options, kind, &self.output, &bar),
        };
        bar.finish();
        let built = match built {
            Err(pipeline::BuildError::Cancelled) => {
                say("moec: interrupted; nothing was written");
                return Ok(130);
            }
            other => other?,
        };
        let weights = built.compiled.plan.payload.bytes as u64;
        let scores = match &self.score_text {
            None => None,
            Some(text) => match score::scores(&model, &options, &self.output, weights, text, &bar) {
                Err(error) if matches!(error.downcast_ref(), Some(pipeline::BuildError::Cancelled)) => {
                    say(format_args!("moec: interrupted; {} is built, and not compared", self.output.display()));
                    return Ok(130);
                }
                other => Some(other?),
            },
        };
        let output = Output { path: self.output.display().to_string(), bytes: built.bytes, copied: built.copied };
        let told = gather(&Inputs {
            model: &model,
            options: &options,
            compiled: &built.compiled,
            metadata: Some(&built.metadata),
            output: Some(&output),
            repacked: &repacked,
            scores: scores.as_ref(),
            machines: &machines,
            predicted: Predicted::default(),
        });
        if let Some((to, form)) = &report {
            report::write(&told, to, *form)?;
        }
        // A report as text has these lines itself.
        if report.as_ref().is_none_or(|(_, form)| *form != Form::Text) {
            for line in summary(&told) {
                say(line);
            }
        }
        if report.is_none() && !built.copied {
            for w in &told.weights {
                if let Some(loss) = w.error.as_ref().filter(|loss| loss.relative_rms > 0.0) {
                    let error = 100.0 * loss.relative_rms;
                    say(format_args!("{:>10}: {} weights, relative RMS error {error:.2} %", w.role, w.layout));
                }
            }
        }
        say(format_args!("wrote {} ({})", self.output.display(), indicatif::HumanBytes(built.bytes)));
        if let Some(kind) = library {
            say(format_args!("link it: {}", kind.link_line(&options.prefix, &self.output)));
        }
        Ok(0)
    }
}

/// Says what the importer wants to be known.
pub fn warn(model: &Model) {
    for warning in &model.warnings {
        say(format_args!("warning: {warning}"));
    }
}

/// For each role whose weights are stored in blocks of integers: in which, and what becomes of them.
pub fn repacked(model: &Model, options: &Options) -> Vec<String> {
    let mut counts: BTreeMap<(Role, Dtype, Layout), usize> = BTreeMap::new();
    for (role, stored, layout) in pipeline::layouts(model, options) {
        if !stored.is_float() {
            *counts.entry((role, stored, layout)).or_default() += 1;
        }
    }
    let line = |((role, stored, layout), count): ((Role, Dtype, Layout), usize)| {
        let tensors = if count == 1 { "weight" } else { "weights" };
        let (kept, wider) = (layout.is_exact() || layout == Layout::F32, options.quant.layout(role) == Layout::Stored);
        let becomes = match (kept, wider) {
            (true, _) => format!("kept to the bit, as {layout}"),
            (false, true) => format!("quantized again to {layout}, as no layout of moec holds {stored}"),
            (false, false) if role == Role::Experts && options.quant.by_heat() => {
                format!("to be {layout}, or {} where chosen often", QuantConfig::HOT)
            }
            (false, false) => format!("to be {layout}"),
        };
        format!("{:>10}: {count} {tensors} stored as {stored}, {becomes}", role.name())
    };
    counts.into_iter().map(line).collect()
}

/// `moec run`
#[derive(Debug, Args)]
pub struct Run {
    /// The model's directory, or a .gguf file
    model: PathBuf,
    #[command(flatten)]
    options: BuildOptions,
    /// Arguments of the executable, e.g. generate "Once upon a time"
    #[arg(last = true, value_name = "ARGUMENTS")]
    arguments: Vec<String>,
}

impl Run {
    pub fn run(self) -> anyhow::Result<u8> {
        let options = self.options.resolve()?;
        let model = import::open(&self.model)?;
        warn(&model);
        let executable = cached(&model, &options)?;
        if !executable.is_file() {
            let bar = Bar::start();
            let built = pipeline::build(&model, &options, &executable, &bar);
            bar.finish();
            match built {
                Err(pipeline::BuildError::Cancelled) => {
                    say("moec: interrupted");
                    return Ok(130);
                }
                other => other?,
            };
        }
        let error = Command::new(&executable).args(&self.arguments).exec();
        Err(error).with_context(|| format!("cannot run {}", executable.display()))
    }
}

/// Where the executable of a model and its options is kept: under the payload's key and a hash of what makes the code.
fn cached(model: &Model, options: &Options) -> anyhow::Result<PathBuf> {
    let compiled = pipeline::compile(model, options)?;
    let key = moec::emit::payload::key(&compiled.plan, model);
    let mut hash = blake3::Hasher::new();
    hash.update(&key);
    hash.update(compiled.plan.to_string().as_bytes());
    for level in &options.levels {
        hash.update(&level.features.to_le_bytes());
    }
    let this = std::env::current_exe().and_then(|path| path.metadata().map(|m| (path, m)));
    let (path, metadata) = this.context("cannot find moec's own executable")?;
    hash.update(path.as_os_str().as_encoded_bytes());
    hash.update(&metadata.len().to_le_bytes());
    if let Ok(age) = metadata.modified()?.duration_since(std::time::UNIX_EPOCH) {
        hash.update(&age.as_nanos().to_le_bytes());
    }
    let directory = cache::directory().context("no cache directory: set MOEC_CACHE or HOME, or use `moec build`")?;
    let directory = directory.join("run").join(&hash.finalize().to_hex()[..32]);
    std::fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
    Ok(directory.join(&model.name))
}

/// The progress bar of packing, and the flag that Ctrl-C sets.
pub struct Bar {
    bar: OnceLock<ProgressBar>,
    recording: OnceLock<ProgressBar>,
    cancelled: Arc<AtomicBool>,
}

impl Bar {
    fn start() -> Bar {
        let cancelled = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cancelled);
        // A second Ctrl-C ends the process at once. Without a handler Ctrl-C ends it too, but leaves a temporary file.
        let handled = ctrlc::set_handler(move || {
            if flag.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        });
        drop(handled);
        Bar { bar: OnceLock::new(), recording: OnceLock::new(), cancelled }
    }

    /// For another build in the same command.
    pub fn another(&self) -> Bar {
        Bar { bar: OnceLock::new(), recording: OnceLock::new(), cancelled: Arc::clone(&self.cancelled) }
    }

    /// Removes it from the screen.
    pub fn finish(&self) {
        [&self.bar, &self.recording].into_iter().filter_map(OnceLock::get).for_each(ProgressBar::finish_and_clear);
    }
}

impl Progress for Bar {
    fn begin(&self, bytes: u64, reused: bool) {
        let size = indicatif::HumanBytes(bytes);
        let how = if reused { "copying the weights of an earlier build" } else { "packing weights" };
        // A pipe that is gone is no reason to stop building.
        let _ = writeln!(std::io::stderr(), "{how}; the file will be {size}");
    }

    fn packed(&self, done: u64, all: u64) {
        let bar = self.bar.get_or_init(|| {
            let style = "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
            ProgressBar::new(all).with_style(ProgressStyle::with_template(style).expect("a valid template"))
        });
        bar.set_position(done);
    }

    fn end(&self) {
        self.finish();
    }

    fn note(&self, text: &str) {
        say(format_args!("moec: warning: {text}"));
    }

    fn recording(&self) {
        let bar = ProgressBar::new_spinner().with_message("running it once, to record what `selftest` compares with");
        bar.enable_steady_tick(Duration::from_millis(100));
        let _first = self.recording.set(bar);
    }

    fn cancelled(&self) -> &AtomicBool {
        &self.cancelled
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        let sizes = ["0", "500000", "800MB", "1.5GB", "24GiB", "24 gib"].map(|text| size(text).unwrap());
        assert_eq!(sizes, [0, 500_000, 800_000_000, 1_500_000_000, 24 << 30, 24 << 30]);
        assert!(["", "GiB", "1.5.2", "3 bananas", "-1", "99999999999TB"].iter().all(|text| size(text).is_err()));
    }
}
