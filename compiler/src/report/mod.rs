//! What was built and what to expect of it, as data: `moec build --report`, `moec report`.
//!
//! [`gather()`] collects it from a compiled model; [`render`] writes it as text, Markdown, HTML or JSON; [`measured`] sets what a benchmark measured beside what was
//! predicted. Every number is in bytes, seconds or units a second; only the renderings round. Deliberately absent: the plan line by line (`moec inspect`).

mod experts;
mod gather;
mod html;
mod markdown;
pub mod measured;
mod page;
mod text;
mod units;

pub use gather::{Inputs, Predicted, gather};
pub use text::summary;

use crate::predict::{Expected, Target};
use measured::Comparison;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The version of the form that this moec writes and reads.
pub const VERSION: u32 = 1;

/// Why a report cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The name does not say how it is to be written.
    #[error(
        "{0}: a report is written as .html, .md or .json, by the name of its file; name one of these, or `-` for text"
    )]
    Form(String),
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{path}: {what}, at `{key}`: {reason}")]
    Content {
        /// Which.
        path: String,
        /// What it should be.
        what: &'static str,
        /// Where in it.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A report of another version.
    #[error(
        "{path}: a report of version {found}, and this moec reads version {VERSION}; make it again with `moec build --report`"
    )]
    Version {
        /// Which.
        path: String,
        /// What it says.
        found: String,
    },
    /// Two files that do not belong together.
    #[error("{measured} does not belong to {report}: {reason}")]
    Foreign {
        /// The benchmark.
        measured: String,
        /// The report.
        report: String,
        /// What differs.
        reason: String,
    },
}

/// How a report is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// For a terminal.
    Text,
    /// A self-contained page.
    Html,
    /// For a repository.
    Markdown,
    /// The data itself.
    Json,
}

impl Form {
    /// By the name of the file; `-` is text.
    ///
    /// # Errors
    /// When the name ends otherwise.
    pub fn of(path: &Path) -> Result<Form, ReportError> {
        match path.extension().and_then(|e| e.to_str()) {
            _ if path.as_os_str() == "-" => Ok(Form::Text),
            Some("html" | "htm") => Ok(Form::Html),
            Some("md") => Ok(Form::Markdown),
            Some("json") => Ok(Form::Json),
            _ => Err(ReportError::Form(path.display().to_string())),
        }
    }
}

/// All of it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// [`VERSION`].
    pub version: u32,
    /// The version of moec.
    pub moec: String,
    /// The model.
    pub model: Model,
    /// What was written; `None` when nothing was built.
    pub output: Option<Output>,
    /// The weights by role and layout; an embedding that is the output, too, has both roles.
    pub weights: Vec<Weights>,
    /// What becomes of weights that are stored as codes, a sentence for each kind.
    pub repacked: Vec<String>,
    /// Memory that the model takes.
    pub memory: Memory,
    /// How often experts are chosen, where a profile says so.
    pub experts: Option<Experts>,
    /// How well the model predicts a text, where it was asked to.
    pub scores: Option<Scores>,
    /// What one token costs.
    pub token: Token,
    /// What each pass did.
    pub passes: Vec<Pass>,
    /// The code of each CPU level, the best first.
    pub levels: Vec<Level>,
    /// What was measured, beside what was predicted.
    pub measured: Option<Comparison>,
}

/// A model's numbers.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// Its name.
    pub name: String,
    /// As in `config.json`.
    pub architecture: String,
    /// Weights in its files.
    pub parameters: u64,
    /// Transformer blocks.
    pub layers: usize,
    /// Elements of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Width of an expert or of the dense FFN.
    pub ffn: usize,
    /// Experts of a layer; 0 for a dense model.
    pub experts: usize,
    /// Experts for each token.
    pub experts_per_token: usize,
    /// Vocabulary.
    pub vocab: usize,
    /// Longest sequence in tokens.
    pub context: usize,
    /// Keys that a token sees, where all layers see few.
    pub sliding_window: Option<usize>,
}

/// What was written.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// Where.
    pub path: String,
    /// Bytes of all of it.
    pub bytes: u64,
    /// Whether the weights were copied from an earlier build.
    pub copied: bool,
}

/// The weights of one role and layout.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weights {
    /// What they are for; `tables` for those that moec computes.
    pub role: String,
    /// How they are stored.
    pub layout: String,
    /// How many.
    pub count: u64,
    /// Bytes that they take, padding and scales included.
    pub bytes: u64,
    /// What storing them lost; `None` where nobody has packed them yet.
    pub error: Option<Loss>,
}

/// What storing weights lost: √(Σ (weight − stored)² / Σ weight²).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Loss {
    /// Of all together: the root of the mean of the squares of the tensors' own, by their numbers of weights.
    pub relative_rms: f64,
    /// The tensor with the largest.
    pub worst: String,
    /// Its own.
    pub worst_relative_rms: f64,
}

/// How often experts are chosen, and which have more bits for it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    /// The profiles, added up.
    pub profiles: Vec<String>,
    /// Tokens that chose.
    pub tokens: u64,
    /// For each layer how often each expert was chosen.
    pub counts: Vec<Vec<u64>>,
    /// The choice of bits by heat.
    pub by_heat: Option<ByHeat>,
}

/// The choice of bits by heat.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ByHeat {
    /// The layout of experts that are chosen often.
    pub hot: String,
    /// The layout of the others.
    pub cold: String,
    /// For each layer those that are chosen often enough.
    pub experts: Vec<Vec<usize>>,
    /// The share of all choices that met one of these.
    pub covered: f64,
    /// Bytes that the weights may take.
    pub budget: u64,
    /// Bytes that they would take with all experts in the one layout.
    pub all_cold: u64,
    /// And in the other.
    pub all_hot: u64,
}

/// How well a model and variants of it predict a text.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    /// The text's file.
    pub text: String,
    /// Tokens that were predicted.
    pub tokens: u64,
    /// The model as it was built, then variants.
    pub of: Vec<Score>,
}

/// How well one model predicts the text.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    /// Which.
    pub what: String,
    /// Bytes of its weights.
    pub weights: u64,
    /// The mean negative log likelihood of a token.
    pub mean_nll: f64,
    /// How much that is more than of the model as it was built; `None` of itself.
    pub more: Option<More>,
}

/// A difference.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct More {
    /// The mean.
    pub mean: f64,
    /// Its standard error, from differences of each token.
    pub standard_error: f64,
}

/// Memory that the model takes, in bytes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// The payload: weights, tables, tokenizer; mapped, and shared by all processes.
    pub weights: u64,
    /// Keys and values of one token.
    pub kv_per_token: u64,
    /// Tokens whose keys and values are taken at once.
    pub page_tokens: u64,
    /// Bytes of these.
    pub page: u64,
    /// Keys and values of the longest sequence; with a sliding window, of what it sees.
    pub kv_at_context: u64,
    /// Working memory that all threads share.
    pub scratch: u64,
    /// Working memory of each thread.
    pub thread_scratch: u64,
}

/// What one decoded token costs.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Bytes of weights that it reads.
    pub weight_bytes: u64,
    /// Multiply-adds with weights, without those for logits.
    pub multiply_adds: u64,
    /// Multiply-adds of a row of logits.
    pub multiply_adds_per_logit_row: u64,
    /// Whether most of them are of bytes.
    pub integer: bool,
}

/// What a pass did.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pass {
    /// Its name.
    pub name: String,
    /// What it does.
    pub doc: String,
    /// Whether it was left out.
    pub disabled: bool,
    /// Rewrites of the graph of one token.
    pub decode: usize,
    /// Rewrites of the graph of many.
    pub batch: usize,
    /// The first rewrite.
    pub first: Option<String>,
}

/// The code of one CPU level.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Level {
    /// Its name.
    pub name: String,
    /// What it needs.
    pub features: Vec<String>,
    /// The tuning record that it was made with, and how many of its shapes that knows.
    pub tuning: Option<String>,
    /// The machine that is predicted for.
    pub machine: Option<Machine>,
    /// Steps of one token.
    pub decode: Program,
    /// Steps of many.
    pub batch: Program,
}

/// The machine that is predicted for.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Its CPU.
    pub cpu: String,
    /// Where its limits are from.
    pub source: String,
    /// What it can do.
    pub target: Target,
    /// Whether the level uses all that the CPU has, so that its peak is the machine's.
    pub full: bool,
}

/// What the workers do in one kind of step.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// Stages.
    pub stages: usize,
    /// Barriers between them.
    pub barriers: usize,
    /// Kernels that they call.
    pub kernels: usize,
    /// Stages with the same operations, in the order of their first.
    pub kinds: Vec<Kind>,
    /// The step that is predicted.
    pub step: Option<Step>,
}

/// A step that is predicted.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Tokens in it.
    pub tokens: usize,
    /// Tokens of the sequence before them.
    pub depth: usize,
    /// Seconds of all its stages.
    pub seconds: f64,
}

/// Stages with the same operations, one in each layer or a single one.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kind {
    /// The operations.
    pub operations: String,
    /// How many stages.
    pub stages: usize,
    /// Bytes of weights that they read for one token, all together.
    pub weight_bytes: u64,
    /// Multiply-adds with weights for one token, all together.
    pub multiply_adds: u64,
    /// Products with weights.
    pub products: Vec<Product>,
    /// Other kernels that they call, by family.
    pub kernels: Vec<String>,
    /// What all together are expected to take in the step that is predicted.
    pub expected: Option<Expected>,
    /// Where stages differ: each sort, with the numbers of its stages among those of the kind.
    pub variants: Vec<Variant>,
}

/// Stages of a kind that are alike.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// Their numbers among those of the kind, from 0: the layer, where each has one.
    pub stages: Vec<usize>,
    /// Bytes of weights that each reads for one token.
    pub weight_bytes: u64,
    /// Multiply-adds with weights of each for one token.
    pub multiply_adds: u64,
    /// What each is expected to take.
    pub expected: Option<Expected>,
}

/// A product with a weight.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Product {
    /// Format, columns and epilogue: what it is tuned by.
    pub shape: String,
    /// Rows of one matrix.
    pub rows: usize,
    /// Of so many matrices …
    pub experts: usize,
    /// … each token meets so many, on average.
    pub matrices: f64,
    /// The kernel of the most tokens at once.
    pub kernel: String,
    /// How it is written, and how rows and tokens are gone through.
    pub choice: String,
}

/// The report in one of its forms.
pub fn render(report: &Report, form: Form) -> String {
    match form {
        Form::Text => text::text(report),
        Form::Html => html::html(report),
        Form::Markdown => markdown::markdown(report),
        Form::Json => serde_json::to_string_pretty(report).expect("a report is plain data") + "\n",
    }
}

/// Reads a report in JSON.
///
/// # Errors
/// When it is not there, or no report of this version.
pub fn read(path: &Path) -> Result<Report, ReportError> {
    let value = read_json(path, "a report of moec")?;
    let found = value.get("version").map_or("none".to_string(), ToString::to_string);
    if found != VERSION.to_string() {
        return Err(ReportError::Version { path: path.display().to_string(), found });
    }
    from_json(path, "a report of moec", value)
}

/// Reads JSON.
fn read_json(path: &Path, what: &'static str) -> Result<serde_json::Value, ReportError> {
    let name = || path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| ReportError::Read { path: name(), source })?;
    serde_json::from_str(&text).map_err(|error| ReportError::Content {
        path: name(),
        what,
        key: format!("line {}", error.line()),
        reason: error.to_string(),
    })
}

/// What JSON from a file says.
fn from_json<T: serde::de::DeserializeOwned>(
    path: &Path,
    what: &'static str,
    value: serde_json::Value,
) -> Result<T, ReportError> {
    serde_path_to_error::deserialize(value).map_err(|error| ReportError::Content {
        path: path.display().to_string(),
        what,
        key: error.path().to_string(),
        reason: error.inner().to_string(),
    })
}
