//! Models in Rust programs: what a build script calls.
//!
//! ```no_run
//! // build.rs
//! moec::build("models/Mixtral-8x7B-Instruct-v0.1").name("mixtral").quant("q4").compile();
//! ```
//! and the program includes what was made with `moec_runtime::include_model!(mixtral)`. Deliberately absent: anything that the
//! [pipeline](crate::pipeline) does; this is a way into it, as the command line is another.

use crate::emit::library::Library;
use crate::expert_profile::ExpertProfile;
use crate::import;
use crate::passes::QuantConfig;
use crate::pipeline::{self, BuildError, Options, Progress};
use crate::target::{self, TargetError};
use crate::tune::{RecordError, shipped};
use moec_abi::KvType;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use target_lexicon::Triple;

/// Why a build script's model was not built.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// The pipeline failed.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// There is no code for the target.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A tuning record cannot be read.
    #[error(transparent)]
    Tuning(#[from] RecordError),
    /// The layouts of weights are not understood.
    #[error("quant({text:?}): {reason}")]
    Quant {
        /// What was asked for.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The target is none.
    #[error("target {text:?}: {reason}")]
    Triple {
        /// What was asked for, by cargo or the script.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The name cannot begin a symbol.
    #[error("name({0:?}): a name is a Rust identifier of ASCII letters, digits and _, and not `moec`")]
    Name(String),
    /// Nobody says where to write.
    #[error("OUT_DIR is not set: call this in a build script, or say where to write with out_dir()")]
    NoDirectory,
}

/// A model to be compiled by a build script.
#[derive(Clone, Debug)]
#[must_use = "nothing happens before compile()"]
pub struct Builder {
    model: PathBuf,
    name: String,
    quant: Option<String>,
    kv: KvType,
    context: Option<usize>,
    target: Option<String>,
    target_cpu: Option<String>,
    tuning: Vec<PathBuf>,
    expert_profile: Vec<PathBuf>,
    size_budget: Option<u64>,
    directory: Option<PathBuf>,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The directory with everything.
    pub directory: PathBuf,
    /// The weights; a program that is moved to another machine takes them along.
    pub weights: PathBuf,
    /// The file that `include_model!` includes.
    pub bindings: PathBuf,
}

/// Begins to build the model in the directory `model`, with the defaults of `moec build`.
pub fn build(model: impl AsRef<Path>) -> Builder {
    Builder {
        model: model.as_ref().to_path_buf(),
        name: "model".to_string(),
        quant: None,
        kv: KvType::F16,
        context: None,
        target: None,
        target_cpu: None,
        tuning: Vec::new(),
        expert_profile: Vec::new(),
        size_budget: None,
        directory: None,
    }
}

impl Builder {
    /// The module that `include_model!` makes, and the beginning of symbols and file names; `model` without this.
    pub fn name(mut self, name: &str) -> Builder {
        self.name = name.to_string();
        self
    }

    /// Layouts of weights, as `--quant`; `q8` without this.
    pub fn quant(mut self, quant: &str) -> Builder {
        self.quant = Some(quant.to_string());
        self
    }

    /// Element type of the cache of keys and values; `f16` without this.
    pub fn kv(mut self, kv: KvType) -> Builder {
        self.kv = kv;
        self
    }

    /// Longest sequence in tokens; the model's own limit without this.
    pub fn context(mut self, tokens: usize) -> Builder {
        self.context = Some(tokens);
        self
    }

    /// CPUs, as `--target-cpu`; without this, the machine that compiles, or the least CPU of another target.
    pub fn target_cpu(mut self, cpus: &str) -> Builder {
        self.target_cpu = Some(cpus.to_string());
        self
    }

    /// A tuning record, as `--tuning`; may be said several times. A warning of cargo tells when it does not fit. `none` in place of one leaves out those that
    /// moec carries.
    pub fn tuning(mut self, record: impl AsRef<Path>) -> Builder {
        self.tuning.push(record.as_ref().to_path_buf());
        self
    }

    /// How often each expert is chosen, as `--expert-profile`; may be said several times, and profiles are added up.
    pub fn expert_profile(mut self, profile: impl AsRef<Path>) -> Builder {
        self.expert_profile.push(profile.as_ref().to_path_buf());
        self
    }

    /// With `quant("…experts=auto")`: bytes that the packed weights may take, as `--size-budget`.
    pub fn size_budget(mut self, bytes: u64) -> Builder {
        self.size_budget = Some(bytes);
        self
    }

    /// The system to compile for; cargo's `TARGET` without this.
    pub fn target(mut self, triple: &str) -> Builder {
        self.target = Some(triple.to_string());
        self
    }

    /// Where to write; cargo's `OUT_DIR` without this.
    pub fn out_dir(mut self, directory: impl AsRef<Path>) -> Builder {
        self.directory = Some(directory.as_ref().to_path_buf());
        self
    }

    /// Compiles the model, and tells cargo how to link it and when to do it again.
    ///
    /// # Panics
    /// When that fails, which is how a build script fails; the message says what to do. [`try_compile`](Builder::try_compile) returns it instead.
    pub fn compile(self) -> Compiled {
        let model = self.model.clone();
        self.try_compile().unwrap_or_else(|error| panic!("moec cannot build {}: {error}", model.display()))
    }

    /// As [`compile`](Builder::compile).
    ///
    /// # Errors
    /// Whatever keeps the model from being built.
    pub fn try_compile(self) -> Result<Compiled, ScriptError> {
        let options = self.options()?;
        let cargo = std::env::var_os("OUT_DIR").map(PathBuf::from);
        let directory = self.directory.clone().or_else(|| cargo.clone()).ok_or(ScriptError::NoDirectory)?;
        if cargo.is_some() {
            for path in std::iter::once(&self.model).chain(&self.tuning).chain(&self.expert_profile) {
                println!("cargo::rerun-if-changed={}", path.display());
            }
        }
        let model = import::open(&self.model).map_err(BuildError::from)?;
        let silent = Silent { cargo: cargo.is_some(), cancelled: AtomicBool::new(false) };
        pipeline::build_library(&model, &options, Library::Crate, &directory, &silent)?;
        if cargo.is_some() {
            println!("cargo::rustc-link-search=native={}", directory.display());
            println!("cargo::rustc-link-lib=static={}", self.name);
        }
        Ok(Compiled {
            weights: directory.join(format!("{}.weights", self.name)),
            bindings: directory.join(format!("{}.rs", self.name)),
            directory,
        })
    }

    fn options(&self) -> Result<Options, ScriptError> {
        let mut chars = self.name.chars();
        let starts = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
        if !starts || !chars.all(|c| c.is_ascii_alphanumeric() || c == '_') || matches!(&*self.name, "moec" | "_") {
            return Err(ScriptError::Name(self.name.clone()));
        }
        let target = match self.target.clone().or_else(|| std::env::var("TARGET").ok()) {
            Some(text) => text.parse().map_err(|reason| ScriptError::Triple { reason: format!("{reason}"), text })?,
            None => Triple::host(),
        };
        let levels = match &self.target_cpu {
            Some(list) => target::find_levels(list, &target)?,
            None => vec![target::default_level(&target)?],
        };
        let quant = match &self.quant {
            Some(text) => text
                .parse::<QuantConfig>()
                .map_err(|reason| ScriptError::Quant { text: text.clone(), reason: reason.to_string() })?,
            None => QuantConfig::default(),
        };
        let prefix = self.name.clone();
        let (tuning, carried_tuning) = shipped::given(&self.tuning)?;
        let profiles = self.expert_profile.iter().map(|path| ExpertProfile::read(path));
        Ok(Options {
            quant,
            kv: self.kv,
            context: self.context,
            target,
            levels,
            prefix,
            tuning,
            carried_tuning,
            expert_profiles: profiles.collect::<Result<_, _>>().map_err(BuildError::from)?,
            size_budget: self.size_budget,
            ..Options::default()
        })
    }
}

/// Cargo shows a build script's output only when it fails.
struct Silent {
    cargo: bool,
    cancelled: AtomicBool,
}

impl Progress for Silent {
    fn begin(&self, _bytes: u64, _reused: bool) {}
    fn packed(&self, _done: u64, _all: u64) {}
    fn end(&self) {}
    fn note(&self, text: &str) {
        if self.cargo {
            println!("cargo::warning={text}");
        }
    }
    fn recording(&self) {}
    fn cancelled(&self) -> &AtomicBool {
        &self.cancelled
    }
}
