//! The weight files of a model directory, mapped: one `model.safetensors`, or shards named by an index.
//!
//! Deliberately absent: what the tensors are for.

use super::error::ImportError;
use super::header::{Entry, Header};
use super::json::{self, Object, describe};
use memmap2::{Advice, Mmap, UncheckedAdvice};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What tells one state of a weight file from another without reading it whole.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardIdentity {
    /// The file's name in the model directory.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// When it was last written, in nanoseconds since 1970.
    pub modified_ns: i128,
    /// BLAKE3 of its header: every tensor's name, dtype, shape and place.
    pub header_hash: [u8; 32],
}

/// A mapped weight file.
#[derive(Debug)]
pub(crate) struct Shard {
    pub(crate) path: PathBuf,
    pub(crate) identity: ShardIdentity,
    map: Mmap,
}

impl Shard {
    /// Maps a file. `parse` reads its header and gives the header's hash with whatever else it finds.
    pub(crate) fn open<T>(
        path: PathBuf,
        parse: impl FnOnce(&[u8], &Path) -> Result<([u8; 32], T), ImportError>,
    ) -> Result<(Shard, T), ImportError> {
        let fail = |error| ImportError::read(&path, error);
        let metadata = std::fs::metadata(&path).map_err(fail)?;
        if !metadata.is_file() {
            return Err(ImportError::path(&path, "expected a regular file"));
        }
        let file = File::open(&path).map_err(fail)?;
        // SAFETY: the mapping is read-only and private. That nobody writes to a model's files while it is compiled is what every
        // reader of mapped files relies on; the data are plain numbers, of which any value is sound.
        let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
        let (header_hash, found) = parse(&map, &path)?;
        let identity = ShardIdentity {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes: map.len() as u64,
            modified_ns: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
            header_hash,
        };
        Ok((Shard { path, identity, map }, found))
    }

    /// Bytes of the file.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.map[range]
    }

    /// Lets the system take back the memory of a range; it comes back from the file when read again.
    pub(crate) fn release(&self, range: Range<usize>) {
        // SAFETY: the mapping is of a file and never written to, so dropped pages come back as they were.
        let _advice = unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
    }

    /// Starts reading a range from disk.
    pub(crate) fn prefetch(&self, range: Range<usize>) {
        let _advice = self.map.advise_range(Advice::WillNeed, range.start, range.len());
    }
}

/// All weight files of a directory.
#[derive(Debug)]
pub(crate) struct Files {
    pub(crate) shards: Vec<Shard>,
    /// Every tensor, with the number of its shard.
    pub(crate) tensors: Vec<(usize, Entry)>,
}

/// What `model.safetensors.index.json` says.
#[derive(Debug)]
pub(crate) struct Index {
    /// Names of the files, sorted.
    files: Vec<String>,
    /// Which file (by number) each tensor should be in.
    places: Vec<(String, usize)>,
}

/// Maps all weight files of a directory.
pub(crate) fn open(directory: &Path) -> Result<Files, ImportError> {
    let single = directory.join(SINGLE);
    let (files, places) = if single.exists() {
        (vec![single], Vec::new())
    } else {
        let index = directory.join(INDEX);
        match json::read(&index)? {
            Some(bytes) => {
                let index = parse_index(&bytes, &index)?;
                (index.files.into_iter().map(|name| directory.join(name)).collect(), index.places)
            }
            None => return Err(no_weights(directory)),
        }
    };
    let mut shards = Vec::with_capacity(files.len());
    let mut tensors = Vec::new();
    for (number, file) in files.into_iter().enumerate() {
        if !file.exists() {
            let what = format!("this file is missing, and `{INDEX}` names it; download it");
            return Err(ImportError::path(&file, what));
        }
        let (shard, entries) = Shard::open(file, |bytes, path| {
            let header = Header::parse(bytes, path)?;
            Ok((header.hash, header.entries))
        })?;
        shards.push(shard);
        tensors.extend(entries.into_iter().map(|entry| (number, entry)));
    }
    let files = Files { shards, tensors };
    check_places(&files, &places)?;
    Ok(files)
}

fn no_weights(directory: &Path) -> ImportError {
    let names: Vec<String> = std::fs::read_dir(directory)
        .map(|entries| entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    let has = |suffix: &str| names.iter().any(|name| name.ends_with(suffix));
    let what = if has(".safetensors") {
        format!("there are .safetensors files, but neither `{SINGLE}` nor `{INDEX}`, which says what is in which")
    } else if has(".bin") || has(".pt") || has(".pth") {
        "its weights are PyTorch pickles; moec reads safetensors (transformers' `save_pretrained` writes them)".into()
    } else {
        format!("no weights: neither `{SINGLE}` nor `{INDEX}` is there")
    };
    ImportError::path(directory, what)
}

/// Reads the index. Files are named plainly: a name that leads out of the directory is refused.
pub(crate) fn parse_index(bytes: &[u8], path: &Path) -> Result<Index, ImportError> {
    let map = json::parse(bytes, path)?;
    let index = Object { path, prefix: "", map: &map };
    let Some(weights) = index.object("weight_map")?.some() else {
        return Err(index.wrong("weight_map", "an object from tensors to files", "none"));
    };
    let weights = Object { path, prefix: "weight_map.", map: weights };
    let mut files: BTreeMap<&str, usize> = BTreeMap::new();
    for (tensor, file) in weights.map {
        let plain = |name: &&str| {
            let mut parts = Path::new(name).components();
            matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == *name)
        };
        let Some(name) = file.as_str().filter(plain) else {
            let expected = "the plain name of a file in the model directory";
            return Err(weights.wrong(tensor, expected, describe(file)));
        };
        files.insert(name, 0);
    }
    if files.is_empty() {
        return Err(index.wrong("weight_map", "at least one tensor", "none"));
    }
    files.values_mut().enumerate().for_each(|(number, value)| *value = number);
    let places =
        weights.map.iter().filter_map(|(tensor, file)| Some((tensor.clone(), files[file.as_str()?]))).collect();
    Ok(Index { files: files.keys().map(|&name| name.to_owned()).collect(), places })
}

impl Files {
    /// Which file each tensor is in; it is in one only.
    pub(crate) fn check_names(&self) -> Result<HashMap<&str, usize>, ImportError> {
        let mut found_in: HashMap<&str, usize> = HashMap::with_capacity(self.tensors.len());
        for (shard, entry) in &self.tensors {
            if let Some(other) = found_in.insert(&entry.name, *shard) {
                let (path, found) =
                    (&self.shards[*shard].path, format!("another in {}", self.shards[other].path.display()));
                return Err(ImportError::tensor(path, &entry.name, "one tensor of this name", found));
            }
        }
        Ok(found_in)
    }
}

/// Every tensor is in one file only, and in the file where the index says it is.
fn check_places(files: &Files, places: &[(String, usize)]) -> Result<(), ImportError> {
    let (found_in, shards) = (files.check_names()?, &files.shards);
    for (tensor, shard) in places {
        if found_in.get(tensor.as_str()) != Some(shard) {
            let found = match found_in.get(tensor.as_str()) {
                Some(&other) => format!("it in {}", shards[other].path.display()),
                None => "no such tensor there".into(),
            };
            let expected = format!("to be in this file, as `{INDEX}` says");
            return Err(ImportError::tensor(&shards[*shard].path, tensor, expected, found));
        }
    }
    Ok(())
}
