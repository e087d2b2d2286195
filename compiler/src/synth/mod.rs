//! Model directories of full shape with random weights, for benchmarks and tests that need no download.
//!
//! A directory is made under a temporary name beside the wanted one and renamed when it is whole. The same preset, layers and seed give
//! the same bytes; a layer's weights do not depend on how many layers there are. Weights are normal with the deviation that keeps
//! activations near 1 through all layers. Deliberately absent: models that say something.

mod gauss;
mod preset;

pub use preset::Preset;

use crate::import::ModelConfig;
use crate::import::names::{Part, for_each_slot};
use gauss::Normal;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Most bytes of tensors in one file.
const SHARD: u64 = 5_000_000_000;

/// Bytes that a worker makes and writes at once.
const CHUNK: u64 = 4 << 20;

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
    #[error("{}: the model has {:.1} GB, but only {:.1} GB are free there; free some, or give fewer --layers",
        path.display(), *needed as f64 / 1e9, *free as f64 / 1e9)]
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
/// `layers` other than the preset's own may be given. `progress` is called from many threads with the bytes written and those to
/// write in all; when it breaks, everything written is removed.
///
/// # Errors
/// A name that is taken, a full disk, an unwritable place, a break by `progress`. Then nothing is left under the name.
pub fn write(
    preset: Preset,
    layers: Option<usize>,
    seed: u64,
    directory: &Path,
    progress: &(dyn Fn(u64, u64) -> ControlFlow<()> + Sync),
) -> Result<(), SynthError> {
    let layers = layers.unwrap_or(preset.layers());
    if !(1..=1024).contains(&layers) {
        return Err(SynthError::Layers(layers));
    }
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| SynthError::Write { path, source }
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
    let shards = lay_out(&model, seed);
    let needed = shards.iter().map(Shard::bytes).sum::<u64>() + (4 << 20);
    let free = free_bytes(parent).map_err(failed(parent))?;
    if free < needed {
        return Err(SynthError::NoSpace { path: directory.into(), needed, free });
    }

    let mut prefix = directory.file_name().unwrap_or_default().to_owned();
    prefix.push(".partial-");
    let partial = tempfile::Builder::new()
        .prefix(&prefix)
        .permissions(std::fs::Permissions::from_mode(0o777))
        .tempdir_in(parent)
        .map_err(failed(parent))?;
    let put = |name: &str, content: &str| {
        let path = partial.path().join(name);
        std::fs::write(&path, content).map_err(failed(&path))
    };
    put("config.json", &config)?;
    put("tokenizer.json", &text(&preset::tokenizer(model.vocab)))?;
    put("tokenizer_config.json", &text(&preset::tokenizer_config()))?;
    if let [_, _, ..] = shards.as_slice() {
        put("model.safetensors.index.json", &text(&index(&shards)))?;
    }
    write_shards(partial.path(), &shards, progress)?;
    std::fs::rename(partial.path(), directory).map_err(failed(directory))?;
    let _renamed = partial.keep();
    Ok(())
}

fn text(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Bytes that an ordinary user may still write on the disk of `path`.
fn free_bytes(path: &Path) -> io::Result<u64> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `name` ends with NUL, and `stat` has room for the answer.
    if unsafe { libc::statvfs(name.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it filled `stat`.
    let stat = unsafe { stat.assume_init() };
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// A tensor to be made.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    bytes: u64,
    /// Seeds its elements.
    key: u64,
    mean: f64,
    deviation: f64,
}

/// A file to be made.
struct Shard {
    name: String,
    tensors: Vec<Tensor>,
}

impl Shard {
    fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The start of the file: the header and its length.
    fn header(&self) -> Vec<u8> {
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut offset = 0;
        for tensor in &self.tensors {
            let end = offset + tensor.bytes;
            let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [offset, end]});
            entries.insert(tensor.name.clone(), entry);
            offset = end;
        }
        let mut json = Value::Object(entries).to_string();
        while !json.len().is_multiple_of(8) {
            json.push(' ');
        }
        [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat()
    }
}

/// Spreads the tensors of a model over files.
fn lay_out(model: &ModelConfig, seed: u64) -> Vec<Shard> {
    let mut shards: Vec<Vec<Tensor>> = Vec::new();
    let mut filled = SHARD;
    let placed: Result<(), Infallible> = for_each_slot(
        model,
        |_| false,
        |slot| {
            for Part { stored, stored_shape: shape, .. } in slot.parts {
                let bytes = 2 * shape.iter().product::<usize>() as u64;
                let (mean, deviation) = match (slot.weight.as_str(), shape.as_slice()) {
                    ("embed", _) => (0.0, 1.0),
                    (_, [.., _, columns]) => (0.0, 1.0 / (*columns as f64).sqrt()),
                    (_, _) => (1.0, 0.1),
                };
                let hash = blake3::hash(stored.as_bytes());
                let key = hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
                let key = key ^ seed.wrapping_mul(0xd134_2543_de82_ef95);
                if filled + bytes > SHARD {
                    shards.push(Vec::new());
                    filled = 0;
                }
                filled += bytes;
                let tensor = Tensor { name: stored, shape, bytes, key, mean, deviation };
                shards.last_mut().expect("the first tensor opens a shard").push(tensor);
            }
            Ok(())
        },
    );
    let Ok(()) = placed;
    let count = shards.len();
    let name = |number: usize| match count {
        1 => "model.safetensors".into(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    shards.into_iter().enumerate().map(|(number, tensors)| Shard { name: name(number), tensors }).collect()
}

/// `model.safetensors.index.json`.
fn index(shards: &[Shard]) -> Value {
    let size: u64 = shards.iter().map(Shard::bytes).sum();
    let places: BTreeMap<&str, &str> = shards
        .iter()
        .flat_map(|shard| shard.tensors.iter().map(|tensor| (tensor.name.as_str(), shard.name.as_str())))
        .collect();
    json!({"metadata": {"total_size": size}, "weight_map": places})
}

/// A run of elements of one tensor, made and written at once.
struct Chunk {
    shard: usize,
    tensor: usize,
    /// Bytes of the tensor before it.
    start: u64,
    bytes: u64,
    /// Bytes of the file before it.
    offset: u64,
}

fn write_shards(
    directory: &Path,
    shards: &[Shard],
    progress: &(dyn Fn(u64, u64) -> ControlFlow<()> + Sync),
) -> Result<(), SynthError> {
    let failed = |name: &str, source| SynthError::Write { path: directory.join(name), source };
    let mut files = Vec::with_capacity(shards.len());
    let mut chunks = Vec::new();
    for (number, shard) in shards.iter().enumerate() {
        let header = shard.header();
        let create = || {
            let mut file = File::create_new(directory.join(&shard.name))?;
            file.write_all(&header)?;
            Ok(file)
        };
        files.push(create().map_err(|source| failed(&shard.name, source))?);
        let mut base = header.len() as u64;
        for (tensor, Tensor { bytes, .. }) in shard.tensors.iter().enumerate() {
            let starts = (0..*bytes).step_by(CHUNK as usize);
            chunks.extend(starts.map(|start| Chunk {
                shard: number,
                tensor,
                start,
                bytes: CHUNK.min(bytes - start),
                offset: base + start,
            }));
            base += bytes;
        }
    }
    let total: u64 = shards.iter().map(Shard::bytes).sum();
    let (next, done, stop) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let failure = Mutex::new(None);
    let fail = |error| {
        stop.store(true, Ordering::Relaxed);
        failure.lock().expect("no worker panics").get_or_insert(error);
    };
    let work = || {
        let mut buffer = vec![0; CHUNK as usize];
        let mut normal: Option<((usize, usize), Normal)> = None;
        while !stop.load(Ordering::Relaxed) {
            let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
            let shard = &shards[chunk.shard];
            let tensor = &shard.tensors[chunk.tensor];
            let of = (chunk.shard, chunk.tensor);
            let normal = match &normal {
                Some((same, normal)) if *same == of => normal,
                _ => &normal.insert((of, Normal::new(tensor.mean, tensor.deviation))).1,
            };
            let out = &mut buffer[..chunk.bytes as usize];
            normal.fill(tensor.key, chunk.start / 2, out);
            if let Err(source) = files[chunk.shard].write_all_at(out, chunk.offset) {
                return fail(failed(&shard.name, source));
            }
            let written = done.fetch_add(chunk.bytes, Ordering::Relaxed) + chunk.bytes;
            if progress(written, total).is_break() {
                return fail(SynthError::Interrupted);
            }
        }
    };
    let workers = std::thread::available_parallelism().map_or(1, |count| count.get());
    std::thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(work);
        }
        work();
    });
    failure.into_inner().expect("no worker panics").map_or(Ok(()), Err)
}
