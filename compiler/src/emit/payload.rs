//! What surrounds the weights in a payload: its key, its header, the metadata and the tokenizer.
//!
//! The key names the model: equal keys mean equal bytes and an equal configuration, so that a second build for another CPU need not pack again. It is made
//! from what they are made from — the weight files' identities, the configuration, the payload's map, the tokenizer — and not from the bytes, which would have to be read to be hashed.
//! Deliberately absent: the weights ([`super::pack`]).

use super::EmitError;
use super::pack::PackReport;
use crate::import::Model;
use crate::plan::Plan;
use crate::plan::layout::CODEBOOK;
use crate::plan::payload::{Arrangement, PayloadMap};
use moec_abi::metadata::{Metadata, WeightEntry};
use moec_abi::{ABI_VERSION, PAYLOAD_MAGIC, PayloadHeader, Plain};
use moec_ir::graph::Role;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Changes when the same input gives other payload bytes than before.
const FORMAT: u32 = 4;

/// Room for the digits that a measured error takes in the metadata, for each weight.
const ERROR_ROOM: usize = 24;

/// Gives metadata and tokenizer their places after the weights.
pub fn seal(payload: &mut PayloadMap, model: &Model) {
    let metadata = json(&metadata(payload, model, None)).len() + ERROR_ROOM * payload.items.len();
    payload.seal(metadata, model.tokenizer.json.len());
}

/// The payload's key.
pub fn key(plan: &Plan, model: &Model) -> [u8; 32] {
    let mut hash = blake3::Hasher::new();
    let mut part = |bytes: &[u8]| {
        hash.update(&(bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(&FORMAT.to_le_bytes());
    part(&ABI_VERSION.to_le_bytes());
    part(&CODEBOOK);
    for shard in model.tensors.identities() {
        part(shard.file.as_bytes());
        part(&shard.bytes.to_le_bytes());
        part(&shard.modified_ns.to_le_bytes());
        part(&shard.header_hash);
    }
    part(plan.payload.to_string().as_bytes());
    part(format!("{:?}", model.config).as_bytes());
    part(&model.tokenizer.json);
    part(json(&metadata(&plan.payload, model, None)).as_bytes());
    *hash.finalize().as_bytes()
}

/// Makes `file` as long as it is with its payload, which ends on a whole page.
///
/// # Errors
/// When it cannot be.
pub fn make_room(file: &File, end: u64) -> Result<(), EmitError> {
    file.set_len(end).map_err(EmitError::io("cannot make room for", "the weights"))
}

/// Writes the header, the metadata and the tokenizer of the payload that starts at `start` of `file`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_frame(
    file: &File,
    start: u64,
    plan: &Plan,
    model: &Model,
    key: [u8; 32],
    report: &PackReport,
) -> Result<(), EmitError> {
    let payload = &plan.payload;
    let mut text = json(&metadata(payload, model, Some(report)));
    assert!(text.len() <= payload.metadata.1, "the metadata fits its room");
    // JSON may end in spaces; the room was measured before the errors were known.
    text.extend(std::iter::repeat_n(' ', payload.metadata.1 - text.len()));
    let header = PayloadHeader {
        magic: PAYLOAD_MAGIC,
        abi_version: ABI_VERSION,
        header_bytes: size_of::<PayloadHeader>() as u32,
        key,
        payload_bytes: payload.bytes as u64,
        metadata_offset: payload.metadata.0 as u64,
        metadata_bytes: payload.metadata.1 as u64,
        tokenizer_offset: payload.tokenizer.0 as u64,
        tokenizer_bytes: payload.tokenizer.1 as u64,
    };
    let write = |bytes: &[u8], at: usize| {
        file.write_all_at(bytes, start + at as u64).map_err(EmitError::io("cannot write", "the weights"))
    };
    write(header.as_bytes(), 0)?;
    write(text.as_bytes(), payload.metadata.0)?;
    write(&model.tokenizer.json, payload.tokenizer.0)
}

/// What the payload that starts at `start` of `file` says of itself.
///
/// # Errors
/// When it cannot be read, or is not the one that was planned.
pub fn read_metadata(file: &File, start: u64, plan: &Plan) -> Result<Metadata, EmitError> {
    let (at, length) = plan.payload.metadata;
    let mut bytes = vec![0; length];
    let failed = EmitError::io("cannot read the description of", "the weights");
    let read = file.read_exact_at(&mut bytes, start + at as u64);
    read.and_then(|()| Ok(serde_json::from_slice(&bytes)?)).map_err(failed)
}

fn json(metadata: &Metadata) -> String {
    serde_json::to_string(metadata).expect("metadata is plain data")
}

fn metadata(payload: &PayloadMap, model: &Model, report: Option<&PackReport>) -> Metadata {
    let mut quantization: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    let mut weights = Vec::new();
    for (i, item) in payload.items.iter().enumerate() {
        let table = if matches!(item.arrangement, Arrangement::ExpertPlaces { .. }) { "places" } else { "rope" };
        let role = item.role.map_or(table, |role| role.name());
        let also = item.shared.as_ref().map(|_| Role::Output.name().to_string());
        for role in [Some(role), also.as_deref()].into_iter().flatten() {
            let layouts: &mut Vec<_> = quantization.entry(role.to_string()).or_default();
            if !layouts.contains(&item.format.name()) {
                layouts.push(item.format.name());
            }
        }
        weights.push(WeightEntry {
            name: item.name.clone(),
            role: role.to_string(),
            also,
            layout: item.format.name().to_string(),
            rows: (item.experts * item.rows) as u64,
            cols: item.columns as u64,
            offset: item.offset as u64,
            bytes: item.bytes() as u64,
            // Six digits are enough for people, and a bounded length.
            relative_rms_error: report.map_or(0.0, |r| (r.items[i].relative_rms() * 1e6).round() / 1e6),
        });
    }
    quantization.retain(|role, _| !matches!(role.as_str(), "rope" | "places"));
    Metadata {
        name: model.name.clone(),
        architecture: model.config.architecture.name().to_string(),
        parameters: model.tensors.parameters(),
        quantization: quantization.into_iter().map(|(role, layouts)| (role, layouts.join("+"))).collect(),
        bos_token_id: model.config.bos_token_id,
        eos_token_ids: model.config.eos_token_ids.clone(),
        chat_template: model.tokenizer.chat_template.clone(),
        bos_token: model.tokenizer.bos_token.clone(),
        eos_token: model.tokenizer.eos_token.clone(),
        packed_by: concat!("moec ", env!("CARGO_PKG_VERSION")).to_string(),
        weights,
    }
}

#[cfg(test)]
mod tests {
    use super::key;
    use crate::import;
    use crate::pipeline::{Options, compile};
    use crate::target::find_level;
    use std::path::Path;
    use target_lexicon::Triple;

    #[test]
    fn a_key_is_of_weights_and_configuration_and_not_of_the_cpu() {
        let mut model = import::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/numerals")).unwrap();
        let key_for = |model: &import::Model, cpu: &str| {
            let triple = Triple { architecture: target_lexicon::Architecture::X86_64, ..Triple::host() };
            let options =
                Options { levels: vec![find_level(cpu, &triple).unwrap()], target: triple, ..Options::default() };
            key(&compile(model, &options).unwrap().plan, model)
        };
        let first = key_for(&model, "x86-64-v3");
        assert_eq!(first, key_for(&model, "znver4"));
        // Leaves no trace in the bytes, yet sessions of the one are wrong for the other.
        model.config.norm_eps *= 2.0;
        assert_ne!(first, key_for(&model, "x86-64-v3"));
    }
}
