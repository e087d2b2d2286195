//! The weight files: which tensor goes where, and writing them with all cores.
//!
//! A file is a function from an offset to bytes, so any worker makes and writes any part of it. Writing goes past the page cache where the file
//! system can: copying into it takes longer than making the bytes, and would push out what other programs use.
//! Deliberately absent: the directory and its temporary name ([`super::write`]).

use super::SynthError;
use super::gauss::{Normal, Quantiles};
use crate::import::ModelConfig;
use crate::import::names::{Naming, Part, for_each_slot};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Most bytes of tensors in one file.
const SHARD: u64 = 5_000_000_000;

/// Bytes that a worker makes and writes at once.
const CHUNK: usize = 4 << 20;

/// Alignment of offsets, sizes and memory in writes past the page cache; headers are padded to it.
const ALIGN: usize = 4096;

/// How the elements of a tensor are distributed.
#[derive(Clone, Copy, PartialEq)]
struct Distribution {
    mean: f64,
    deviation: f64,
}

/// A tensor to be made.
struct Tensor {
    name: String,
    shape: Vec<usize>,
    /// Bytes of the tensors before it in its file.
    start: u64,
    bytes: u64,
    /// Seeds its elements.
    key: u64,
    distribution: Distribution,
}

/// A file to be made.
pub(super) struct Shard {
    name: String,
    tensors: Vec<Tensor>,
}

/// Spreads the tensors of a model over files.
pub(super) fn lay_out(model: &ModelConfig, seed: u64) -> Vec<Shard> {
    let mut shards: Vec<Vec<Tensor>> = Vec::new();
    let mut start = SHARD;
    let placed: Result<(), Infallible> = for_each_slot(model, Naming::HuggingFace, &|_| None, |slot| {
        for Part { stored: name, stored_shape: shape, .. } in slot.parts {
            let bytes = 2 * shape.iter().product::<usize>() as u64;
            let distribution = match (slot.weight.as_str(), shape.as_slice()) {
                ("embed", _) => Distribution { mean: 0.0, deviation: 1.0 },
                (_, [_, columns]) => Distribution { mean: 0.0, deviation: 1.0 / (*columns as f64).sqrt() },
                (_, _) => Distribution { mean: 1.0, deviation: 0.1 },
            };
            let hash = blake3::Hasher::new().update(&seed.to_le_bytes()).update(name.as_bytes()).finalize();
            let key = hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            if start + bytes > SHARD {
                shards.push(Vec::new());
                start = 0;
            }
            let tensor = Tensor { name, shape, start, bytes, key, distribution };
            start += bytes;
            shards.last_mut().expect("the first tensor opens a shard").push(tensor);
        }
        Ok(())
    });
    let Ok(()) = placed;
    let count = shards.len();
    let name = |number: usize| match count {
        1 => "model.safetensors".into(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
    };
    shards.into_iter().enumerate().map(|(number, tensors)| Shard { name: name(number), tensors }).collect()
}

/// `model.safetensors.index.json`.
pub(super) fn index(shards: &[Shard]) -> Value {
    let size: u64 = shards.iter().map(Shard::bytes).sum();
    let places: BTreeMap<&str, &str> = shards
        .iter()
        .flat_map(|shard| shard.tensors.iter().map(|tensor| (tensor.name.as_str(), shard.name.as_str())))
        .collect();
    json!({"metadata": {"total_size": size}, "weight_map": places})
}

impl Shard {
    /// Bytes of its tensors.
    pub(super) fn bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The start of the file: the header's length and the header.
    fn header(&self) -> Vec<u8> {
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), json!({"format": "pt"}));
        for Tensor { name, shape, start, bytes, .. } in &self.tensors {
            let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, start + bytes]});
            entries.insert(name.clone(), entry);
        }
        let mut header = vec![0; 8];
        header.extend(Value::Object(entries).to_string().into_bytes());
        header.resize(header.len().next_multiple_of(ALIGN), b' ');
        let length = header.len() as u64 - 8;
        header[..8].copy_from_slice(&length.to_le_bytes());
        header
    }
}

/// A file being written.
struct Target<'a> {
    shard: &'a Shard,
    header: Vec<u8>,
    file: File,
}

impl Target<'_> {
    fn create<'a>(directory: &Path, shard: &'a Shard) -> io::Result<Target<'a>> {
        let path = directory.join(&shard.name);
        let mut options = OpenOptions::new();
        options.write(true).create(true);
        let file = match options.clone().custom_flags(libc::O_DIRECT).open(&path) {
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => options.open(&path)?,
            result => result?,
        };
        Ok(Target { shard, header: shard.header(), file })
    }

    fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.shard.bytes()
    }

    /// The content of the file from `offset` on. Bytes after its end are left as they are.
    fn fill(&self, normals: &[(Distribution, Normal)], offset: u64, out: &mut [u8]) {
        let header = self.header.len() as u64;
        if offset < header {
            let bytes = &self.header[offset as usize..];
            let bytes = &bytes[..bytes.len().min(out.len())];
            out[..bytes.len()].copy_from_slice(bytes);
        }
        let end = offset + out.len() as u64;
        let first = self.shard.tensors.partition_point(|tensor| header + tensor.start + tensor.bytes <= offset);
        for tensor in &self.shard.tensors[first..] {
            let base = header + tensor.start;
            let (from, to) = (base.max(offset), (base + tensor.bytes).min(end));
            if from >= to {
                break;
            }
            let (_, normal) = normals
                .iter()
                .find(|(distribution, _)| *distribution == tensor.distribution)
                .expect("every distribution has its values");
            normal.fill(tensor.key, from - base, &mut out[(from - offset) as usize..(to - offset) as usize]);
        }
    }
}

/// Writes the headers of all files, and leaves their tensors to be holes: zeros that take no room on the disk.
pub(super) fn write_sparse(directory: &Path, shards: &[Shard]) -> Result<(), SynthError> {
    for shard in shards {
        let (path, header) = (directory.join(&shard.name), shard.header());
        let written = File::create(&path).and_then(|file| {
            file.write_all_at(&header, 0)?;
            file.set_len(header.len() as u64 + shard.bytes())
        });
        written.map_err(|source| SynthError::Write { path, source })?;
    }
    Ok(())
}

/// Writes all files. `progress` is called as [`super::write`] says.
pub(super) fn write(
    directory: &Path,
    shards: &[Shard],
    progress: &(dyn Fn(u64, u64) -> ControlFlow<()> + Sync),
) -> Result<(), SynthError> {
    let failed = |shard: &Shard, source| SynthError::Write { path: directory.join(&shard.name), source };
    let mut targets = Vec::with_capacity(shards.len());
    for shard in shards {
        targets.push(Target::create(directory, shard).map_err(|source| failed(shard, source))?);
    }
    let chunks: Vec<(&Target, u64)> = targets
        .iter()
        .flat_map(|target| (0..target.bytes()).step_by(CHUNK).map(move |offset| (target, offset)))
        .collect();
    let total: u64 = targets.iter().map(Target::bytes).sum();
    let normals = normals(shards);
    let (next, done, stop) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let failure = Mutex::new(None);
    let fail = |error| {
        stop.store(true, Ordering::Relaxed);
        failure.lock().expect("no worker panics").get_or_insert(error);
    };
    let work = || {
        let mut memory = vec![0; CHUNK + ALIGN];
        let aligned = memory.as_ptr().align_offset(ALIGN);
        let buffer = &mut memory[aligned..aligned + CHUNK];
        while !stop.load(Ordering::Relaxed) {
            let Some((target, offset)) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
            let bytes = (target.bytes() - offset).min(CHUNK as u64);
            let out = &mut buffer[..(bytes as usize).next_multiple_of(ALIGN)];
            target.fill(&normals, *offset, out);
            if let Err(source) = target.file.write_all_at(out, *offset) {
                return fail(failed(target.shard, source));
            }
            let written = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
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
    if let Some(error) = failure.into_inner().expect("no worker panics") {
        return Err(error);
    }
    for target in &targets {
        target.file.set_len(target.bytes()).map_err(|source| failed(target.shard, source))?;
    }
    Ok(())
}

/// The values of every distribution that occurs.
fn normals(shards: &[Shard]) -> Vec<(Distribution, Normal)> {
    let quantiles = Quantiles::new();
    let mut normals: Vec<(Distribution, Normal)> = Vec::new();
    for tensor in shards.iter().flat_map(|shard| &shard.tensors) {
        let wanted = tensor.distribution;
        if !normals.iter().any(|(distribution, _)| *distribution == wanted) {
            normals.push((wanted, Normal::new(&quantiles, wanted.mean, wanted.deviation)));
        }
    }
    normals
}
