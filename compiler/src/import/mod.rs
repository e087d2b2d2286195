//! From a model directory or a GGUF file to a checked configuration, a table of stored weights and the tokenizer's files.
//!
//! [`open`] is the way in. It reads configurations and headers only, and refuses whatever later steps could stumble over: a model that
//! opens has every weight, in the shape that its configuration calls for. Deliberately absent: reading weights before somebody asks for
//! rows of them.

pub mod architecture;
pub mod build;
pub mod config;
mod dequantize;
mod dtype;
mod error;
mod gguf;
mod header;
mod json;
pub(crate) mod names;
mod packed;
mod rope;
mod shards;
mod tensors;
mod tokenizer;

pub use architecture::{Activation, Architecture, HeadNorm};
pub use build::{WeightInfo, build_graph};
pub use config::{Experts, ModelConfig};
pub use dequantize::codes::{BlockScale, CodedRows};
pub use dtype::Dtype;
pub use error::ImportError;
pub use packed::Packing;
pub use rope::{Rope, RopeScaling};
pub use shards::ShardIdentity;
pub use tensors::{RawRows, TensorInfo, TensorTable};
pub use tokenizer::TokenizerFiles;

use std::path::{Path, PathBuf};

/// A model as it lies in its files, checked.
#[derive(Debug)]
pub struct Model {
    /// The name of the directory, or of the GGUF file without its extension.
    pub name: String,
    /// The directory that its files are in.
    pub directory: PathBuf,
    /// The shape of the model.
    pub config: ModelConfig,
    /// Its weights.
    pub tensors: TensorTable,
    /// Its tokenizer.
    pub tokenizer: TokenizerFiles,
    /// What users should know of it although it can be compiled, a sentence each.
    pub warnings: Vec<String>,
}

/// Opens a model directory (`config.json`, `*.safetensors`, `tokenizer.json`, and what else there is beside them) or a GGUF file.
///
/// # Errors
/// Whatever keeps the model from being compiled, in words for the user.
pub fn open(path: &Path) -> Result<Model, ImportError> {
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) && path.is_file() {
        return gguf::open(path);
    }
    let directory = directory(path)?;
    let file = directory.join("config.json");
    let Some(bytes) = json::read(&file)? else {
        return Err(ImportError::path(&file, "missing; expected a Hugging Face model directory, which has one"));
    };
    let mut config = ModelConfig::parse(&bytes, &file)?;
    let tokenizer = tokenizer::open(&directory, &mut config)?;
    let tensors = TensorTable::open(&directory, &config)?;
    config.tied = tensors.is_tied();
    let name = directory.canonicalize().ok().and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
    let name = name.unwrap_or_else(|| "model".into());
    Ok(Model { name, directory, config, tensors, tokenizer, warnings: Vec::new() })
}

fn directory(path: &Path) -> Result<PathBuf, ImportError> {
    const WANTED: &str = "expected a model directory (config.json, *.safetensors, tokenizer.json) or a .gguf file";
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(ImportError::path(path, format!("no such file or directory; {WANTED}")));
        }
        Err(error) => return Err(ImportError::read(path, error)),
    };
    if metadata.is_dir() {
        return Ok(path.into());
    }
    let what = match path.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors" | "json") => format!("this is one file of a model; {WANTED}: give the one that it is in"),
        _ => format!("this is a file; {WANTED}"),
    };
    Err(ImportError::path(path, what))
}
