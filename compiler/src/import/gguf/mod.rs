//! GGUF files: one file, or several parts, with configuration, tokenizer and weights.
//!
//! [`open`] is the way in. Deliberately absent: everything that is the same for a Hugging Face directory — the checks of the configuration, the
//! matching of tensors with weights, the graph.

mod container;
mod metadata;
mod pre_tokenizers;
mod tokenizer;

use super::dtype::Dtype;
use super::error::ImportError;
use super::header::Element;
use super::names::{GGUF_LONG_DIVISORS, GGUF_ROPE_DIVISORS, Naming};
use super::rope::RopeScaling;
use super::shards::{Files, Shard};
use super::tensors::TensorTable;
use super::{Model, dequantize};
use container::{Container, Value};
use metadata::Metadata;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Opens a GGUF file; of a split one, any part.
pub(super) fn open(path: &Path) -> Result<Model, ImportError> {
    let (files, keys) = parts(path)?;
    let metadata = Metadata { path, keys: &keys };
    if let Some(kind) = metadata.text("general.type")?.filter(|kind| *kind != "model") {
        return Err(metadata.unsupported("general.type", format!("\"{kind}\""), "\"model\""));
    }
    let shapes: HashMap<&str, &Vec<usize>> =
        files.tensors.iter().map(|(_, entry)| (entry.name.as_str(), &entry.shape)).collect();
    let mut config = metadata.config(&|name| shapes.get(name).map(|shape| (*shape).clone()))?;
    let pairs = config.rope.rotated.unwrap_or(config.head_dim) / 2;
    if let Some(divisors) = rope_divisors(&files, GGUF_ROPE_DIVISORS, pairs)? {
        config.rope.scaling = RopeScaling::Divided { divisors };
    }
    let [short, long] = GGUF_LONG_DIVISORS.map(|name| rope_divisors(&files, name, pairs));
    if let Some((original_context, attention_factor)) = metadata.long_rope(&config)? {
        let missing = |name: &str| {
            ImportError::tensor(path, name, "the divisors of LongRoPE, for each rotated pair of a head", "none")
        };
        config.rope.scaling = RopeScaling::Long {
            short: short?.ok_or_else(|| missing(GGUF_LONG_DIVISORS[0]))?,
            long: long?.ok_or_else(|| missing(GGUF_LONG_DIVISORS[1]))?,
            original_context,
            attention_factor,
        };
    } else if long?.is_some() || short?.is_some() {
        return Err(metadata.no_original_context(&config));
    }
    let tokenizer = tokenizer::read(&metadata, config.vocab)?;
    let further = tokenizer::further_eos(&metadata)?.into_iter().filter(|&id| (id as usize) < config.vocab);
    config.eos_token_ids.extend(further);
    config.eos_token_ids.sort_unstable();
    config.eos_token_ids.dedup();
    let tensors = TensorTable::new(files, &config, Naming::Gguf, path)?;
    config.tied = tensors.is_tied();
    let name = path.file_stem().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned());
    let directory = path.parent().unwrap_or(Path::new("")).to_path_buf();
    Ok(Model { name, directory, config, tensors, tokenizer, warnings: metadata.warnings() })
}

/// All files of a model, and the metadata of the first.
fn parts(path: &Path) -> Result<(Files, BTreeMap<String, Value>), ImportError> {
    let read = |path: &Path| -> Result<(Shard, Container), ImportError> {
        Shard::open(path.into(), |bytes, path| {
            let container = Container::parse(bytes, path)?;
            Ok((container.hash, container))
        })
    };
    let number = |path: &Path, container: &Container, key: &str| match container.metadata.get(key) {
        None => Ok(None),
        Some(&Value::Unsigned(number)) if number <= 1 << 16 => Ok(Some(number as usize)),
        Some(other) => Err(Metadata { path, keys: &container.metadata }.wrong(key, "a small number", other.describe())),
    };
    let (shard, container) = read(path)?;
    let count = number(path, &container, "split.count")?.unwrap_or(1);
    let mut opened = vec![(shard, container)];
    if count > 1 {
        let own = number(path, &opened[0].1, "split.no")?.unwrap_or(0);
        let Some(names) = part_names(path, own, count) else {
            let what =
                format!("part {} of {count}; expected a name that ends in -{:05}-of-{count:05}.gguf", own + 1, own + 1);
            return Err(ImportError::path(path, what));
        };
        let first = opened.pop();
        for (part, name) in names.iter().enumerate() {
            if part == own {
                continue;
            }
            if !name.exists() {
                let what =
                    format!("this part of the model is missing ({} has part {} of {count})", path.display(), own + 1);
                return Err(ImportError::path(name, what));
            }
            let (shard, container) = read(name)?;
            let found = (number(name, &container, "split.no")?, number(name, &container, "split.count")?);
            if found != (Some(part), Some(count)) {
                let keys = &container.metadata;
                let expected = format!("{part}, as the file's name says (and split.count {count})");
                let found = format!("{} of {}", found.0.unwrap_or(0), found.1.unwrap_or(1));
                return Err(Metadata { path: name, keys }.wrong("split.no", expected, found));
            }
            opened.push((shard, container));
        }
        opened.extend(first);
        opened.sort_by_key(|(_, container)| match container.metadata.get("split.no") {
            Some(&Value::Unsigned(number)) => number,
            _ => 0,
        });
    }
    let mut files = Files { shards: Vec::new(), tensors: Vec::new() };
    let mut keys = None;
    for (index, (shard, container)) in opened.into_iter().enumerate() {
        files.shards.push(shard);
        files.tensors.extend(container.entries.into_iter().map(|entry| (index, entry)));
        keys.get_or_insert(container.metadata);
    }
    files.check_names()?;
    Ok((files, keys.expect("there is at least one part")))
}

/// The paths of all parts, from that of part `own`.
fn part_names(path: &Path, own: usize, count: usize) -> Option<Vec<PathBuf>> {
    let name = path.file_name()?.to_str()?;
    let stem = name.strip_suffix(&format!("-{:05}-of-{count:05}.gguf", own + 1))?;
    Some((1..=count).map(|part| path.with_file_name(format!("{stem}-{part:05}-of-{count:05}.gguf"))).collect())
}

/// The divisors of the rotary frequencies in the tensor `name`, if the file has it.
fn rope_divisors(files: &Files, name: &str, pairs: usize) -> Result<Option<Vec<f32>>, ImportError> {
    let Some((shard, entry)) = files.tensors.iter().find(|(_, entry)| entry.name == name) else {
        return Ok(None);
    };
    let path = &files.shards[*shard].path;
    if entry.element != Element::Known(Dtype::F32) || entry.shape != [pairs] {
        let expected = format!("f32 of shape [{pairs}], one for each rotated pair of a head");
        return Err(ImportError::tensor(
            path,
            &entry.name,
            expected,
            format!("{} of shape {:?}", entry.element, entry.shape),
        ));
    }
    let mut divisors = vec![0.0; pairs];
    dequantize::read(Dtype::F32, files.shards[*shard].bytes(entry.offset..entry.offset + entry.bytes), &mut divisors);
    match divisors.iter().find(|&&divisor| !(divisor > 0.0 && divisor.is_finite())) {
        Some(odd) => Err(ImportError::tensor(path, &entry.name, "numbers above 0", odd.to_string())),
        None => Ok(Some(divisors)),
    }
}
