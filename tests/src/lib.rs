//! Helpers shared by the end-to-end tests: tiny models with golden outputs, and compiled models to run.

pub mod blocks;
pub mod filetest;
pub mod gguf;
pub mod native;
pub mod reference;
pub mod simulate;

use moec::emit::executable::output_when_closed;
use moec::import;
use moec::pipeline::{self, Options, Progress};
use moec_abi::KvType;
use safetensors::SafeTensors;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;

/// The tiny models that ship with the tests; with `MOEC_TEST_MODELS` those in that directory (`tests/data/make_odd_models.py` makes more).
pub fn models() -> Vec<PathBuf> {
    let shipped = || Path::new(env!("CARGO_MANIFEST_DIR")).join("data/models");
    let data = std::env::var_os("MOEC_TEST_MODELS").map_or_else(shipped, PathBuf::from);
    let entries = std::fs::read_dir(&data).unwrap_or_else(|e| panic!("{}: {e}", data.display()));
    let mut found: Vec<PathBuf> = entries.map(|e| e.expect("a readable directory").path()).collect();
    found.sort();
    assert!(!found.is_empty(), "no models in {}", data.display());
    found
}

/// What transformers computed for a model.
#[derive(Debug)]
pub struct Golden {
    /// The prompt.
    pub input_ids: Vec<u32>,
    /// Its greedy continuation.
    pub greedy_ids: Vec<u32>,
    /// Both.
    pub full_ids: Vec<u32>,
    /// Logits of all, `[T, vocab]`.
    pub full_logits: Vec<f32>,
    /// For each layer the experts of each token, `[T, k]`.
    pub experts: Vec<Vec<u32>>,
}

fn integers(file: &SafeTensors<'_>, name: &str) -> Vec<u32> {
    let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as u32).collect()
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
}

fn experts(file: &SafeTensors<'_>) -> Vec<Vec<u32>> {
    (0..)
        .map(|layer| format!("selected_experts.{layer}"))
        .take_while(|name| file.tensor(name).is_ok())
        .map(|name| integers(file, &name))
        .collect()
}

impl Golden {
    /// Reads `golden.safetensors` of a model.
    pub fn read(model: &Path) -> Golden {
        let bytes = std::fs::read(model.join("golden.safetensors")).expect("golden values beside the model");
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        Golden {
            input_ids: integers(&file, "input_ids"),
            greedy_ids: integers(&file, "greedy_ids"),
            full_ids: integers(&file, "full_ids"),
            full_logits: floats(&file, "full_logits"),
            experts: experts(&file),
        }
    }
}

/// A standalone executable, removed when dropped.
#[derive(Debug)]
pub struct Compiled {
    directory: TempDir,
    /// The executable.
    pub path: PathBuf,
    /// Whether the model has experts.
    experts: bool,
}

/// What the `logits` command gave.
#[derive(Debug)]
pub struct Logits {
    /// `[T, vocab]`.
    pub logits: Vec<f32>,
    /// For each layer the experts of each token, `[T, k]`.
    pub experts: Vec<Vec<u32>>,
}

impl Logits {
    /// The logits' bits.
    pub fn bits(&self) -> Vec<u32> {
        self.logits.iter().map(|x| x.to_bits()).collect()
    }
}

struct Quiet(AtomicBool);

impl Progress for Quiet {
    fn begin(&self, _: u64, _: bool) {}
    fn packed(&self, _: u64, _: u64) {}
    fn end(&self) {}
    fn note(&self, _: &str) {}
    fn recording(&self) {}
    fn cancelled(&self) -> &AtomicBool {
        &self.0
    }
}

/// Compiles a model for this machine.
pub fn build(model: &Path, quant: &str, kv: &str) -> Compiled {
    let options = Options {
        quant: quant.parse().expect("a quantization"),
        kv: if kv == "f32" { KvType::F32 } else { KvType::F16 },
        ..Options::default()
    };
    build_with(model, &options)
}

/// Compiles a model.
pub fn build_with(model: &Path, options: &Options) -> Compiled {
    let opened = import::open(model).unwrap_or_else(|e| panic!("{}: {e}", model.display()));
    let directory = TempDir::new().expect("a temporary directory");
    let path = directory.path().join("model");
    let built = pipeline::build(&opened, options, &path, &Quiet(AtomicBool::new(false)));
    built.unwrap_or_else(|e| panic!("{}: {e}", model.display()));
    Compiled { directory, path, experts: opened.config.experts.is_some() }
}

fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

impl Compiled {
    /// Runs the executable; panics with what it says when it fails.
    pub fn run(&self, arguments: &[&str]) -> String {
        let done = output_when_closed(Command::new(&self.path).args(arguments)).expect("the executable starts");
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{arguments:?}: {}: {stderr}", done.status);
        String::from_utf8(done.stdout).expect("text")
    }

    /// The logits of `ids`.
    pub fn logits(&self, ids: &[u32], more: &[&str]) -> Logits {
        let file = self.directory.path().join("logits.safetensors");
        let ids = list(ids);
        let output = file.to_str().expect("a plain path");
        let mut arguments = vec!["logits", "--tokens", &ids, "-o", output];
        if self.experts {
            arguments.push("--routes");
        }
        arguments.extend(more);
        self.run(&arguments);
        let bytes = std::fs::read(&file).expect("the logits");
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        Logits { logits: floats(&file, "logits"), experts: experts(&file) }
    }

    /// The greedy continuation of `ids`, `count` tokens.
    pub fn greedy(&self, ids: &[u32], count: usize) -> Vec<u32> {
        let (ids, count) = (list(ids), count.to_string());
        let text =
            self.run(&["generate", "--tokens", &ids, "--max-tokens", &count, "--temperature", "0", "--print-tokens"]);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("a list of ids, found {text:?}: {e}"))
    }
}
