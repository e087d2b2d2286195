//! Model directories of full shape with random weights, for benchmarks and tests that need no download.
//!
//! A directory is made under a temporary name beside the wanted one and renamed when it is whole. The same preset, layers and seed give
//! the same bytes; a layer's weights do not depend on how many layers there are. Weights are normal with the deviation that keeps
//! activations near 1 through all layers. Deliberately absent: models that say something.

mod files;
mod gauss;
mod preset;

pub use preset::Preset;

use crate::disk;
use crate::import::ModelConfig;
use files::Shard;
use serde_json::Value;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Why a directory could not be made. Nothing is left under its name.
#[derive(Debug, thiserror::Error)]
pub enum SynthError {
    /// The name is taken.
    #[error("{}: already there; give the name of a directory that does not exist, or remove it", .0.display())]
    Exists(PathBuf),
    /// The number of layers makes no model.
    #[error("--layers: expected 1 to 1024, found {0}")]
    Layers(usize),
    /// The disk is too full.
    #[error(
        "{}: the model takes {}, but only {} are free there; free some, or give fewer --layers",
        path.display(), size(*needed), size(*free)
    )]
    NoSpace {
        /// Where it was to be.
        path: PathBuf,
        /// Bytes of the model.
        needed: u64,
        /// Bytes that the disk has left.
        free: u64,
    },
    /// The system refused to write.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// `progress` asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Makes a model directory.
///
/// `layers` other than the preset's own may be given. With `sparse` all weights are zeros, and the weight files are holes, which take no room
/// on file systems that know them: for measuring what a compiler needs for a model that the disk has no room for. `progress` is called from many threads with the bytes written and those to
/// write in all; when it breaks, everything written is removed.
///
/// # Errors
/// A name that is taken, a full disk, an unwritable place, a break by `progress`. Then nothing is left under the name.
pub fn write(
    preset: Preset,
    layers: Option<usize>,
    seed: u64,
    sparse: bool,
    directory: &Path,
    progress: &(dyn Fn(u64, u64) -> ControlFlow<()> + Sync),
) -> Result<(), SynthError> {
    let layers = layers.unwrap_or(preset.layers());
    if !(1..=1024).contains(&layers) {
        return Err(SynthError::Layers(layers));
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| SynthError::Write { path, source: disk::plain(source) }
    };
    match std::fs::read_dir(directory).map(|mut entries| entries.next().is_none()) {
        Ok(true) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Ok(false) | Err(_) => return Err(SynthError::Exists(directory.into())),
    }
    let parent = match directory.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) | None => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(failed(parent))?;

    let config = text(&preset.config(layers));
    let model = ModelConfig::parse(config.as_bytes(), Path::new("config.json")).expect("the presets are models");
    let shards = files::lay_out(&model, seed);
    let mut prefix = directory.file_name().unwrap_or_default().to_owned();
    prefix.push(".partial-");
    let partial = tempfile::Builder::new()
        .prefix(&prefix)
        .permissions(std::fs::Permissions::from_mode(0o777))
        .tempdir_in(parent)
        .map_err(failed(parent))?;
    let weights = if sparse { 0 } else { shards.iter().map(Shard::bytes).sum::<u64>() };
    let needed = weights + (4 << 20);
    let free = disk::free_bytes(parent).map_err(failed(parent))?;
    if free < needed {
        return Err(SynthError::NoSpace { path: directory.into(), needed, free });
    }
    let put = |name: &str, content: &str| {
        let path = partial.path().join(name);
        std::fs::write(&path, content).map_err(failed(&path))
    };
    put("config.json", &config)?;
    put("tokenizer.json", &text(&preset::tokenizer(model.vocab)))?;
    put("tokenizer_config.json", &text(&preset::tokenizer_config()))?;
    if let [_, _, ..] = shards.as_slice() {
        put("model.safetensors.index.json", &text(&files::index(&shards)))?;
    }
    if sparse {
        files::write_sparse(partial.path(), &shards)?;
    } else {
        files::write(partial.path(), &shards, progress)?;
    }
    std::fs::rename(partial.path(), directory).map_err(failed(directory))?;
    let _renamed = partial.keep();
    Ok(())
}

fn size(bytes: u64) -> String {
    if bytes < 1_000_000_000 {
        format!("{:.1} MB", bytes as f64 / 1e6)
    } else {
        format!("{:.1} GB", bytes as f64 / 1e9)
    }
}

fn text(value: &Value) -> String {
    format!("{value:#}\n")
}
