//! From a model directory to a checked configuration, a table of stored weights and the tokenizer's files.
//!
//! [`open`] is the way in. It reads configurations and headers only, and refuses whatever later steps could stumble over: a model that
//! opens has every weight, in the shape that its configuration calls for. Deliberately absent: GGUF, and reading weights before
//! somebody asks for rows of them.

pub mod build;
pub mod config;
mod error;
mod header;
mod json;
pub(crate) mod names;
mod shards;
mod tensors;
mod tokenizer;

pub use build::{WeightInfo, build_graph};
pub use config::{Architecture, Experts, ModelConfig, Rope, RopeScaling};
pub use error::ImportError;
pub use shards::ShardIdentity;
pub use tensors::{Dtype, RawRows, TensorInfo, TensorTable};
pub use tokenizer::TokenizerFiles;

use std::path::{Path, PathBuf};

/// A model as it lies in its directory, checked.
#[derive(Debug)]
pub struct Model {
    /// The directory's name.
    pub name: String,
    /// The directory.
    pub directory: PathBuf,
    /// The shape of the model.
    pub config: ModelConfig,
    /// Its weights.
    pub tensors: TensorTable,
    /// Its tokenizer.
    pub tokenizer: TokenizerFiles,
}

/// Opens a model directory: `config.json`, `*.safetensors`, `tokenizer.json`, and what else there is beside them.
///
/// # Errors
/// Whatever keeps the model from being compiled, in words for the user.
pub fn open(path: &Path) -> Result<Model, ImportError> {
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
    Ok(Model { name: name.unwrap_or_else(|| "model".into()), directory, config, tensors, tokenizer })
}

fn directory(path: &Path) -> Result<PathBuf, ImportError> {
    const WANTED: &str = "expected a model directory (config.json, *.safetensors, tokenizer.json)";
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
        Some("gguf") => format!("GGUF files are not supported yet; {WANTED}"),
        Some("safetensors" | "json") => format!("this is one file of a model; {WANTED}: give the one that it is in"),
        _ => format!("this is a file; {WANTED}"),
    };
    Err(ImportError::path(path, what))
}
