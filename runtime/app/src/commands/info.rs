//! `info`: what this file is. Opens the payload, but needs neither the CPU nor the memory to run the model.

use super::Context;
use crate::args::Info;
use crate::failure::Result;
use crate::output;
use moec_abi::{KvType, PAGE_TOKENS};
use moec_runtime::error::{hex, human_bytes};
use moec_runtime::kv::Sequence;
use moec_runtime::{Payload, cpus};
use serde_json::{Value, json};
use std::collections::BTreeMap;

pub(super) fn run(context: &Context, args: &Info) -> Result<()> {
    let report = report(context)?;
    let text = if args.json { format!("{report}\n") } else { table(&report) };
    output::print(&text)
}

fn report(context: &Context) -> Result<Value> {
    let d = context.descriptor;
    let payload = Payload::open(&context.payload, d.payload())?;
    let metadata = payload.metadata()?;
    let shared: BTreeMap<&str, &str> =
        metadata.weights.iter().filter_map(|weight| Some((weight.also.as_deref()?, weight.role.as_str()))).collect();
    let present = cpus::detected_features();
    let threads = cpus::default_threads();
    let pages = Sequence::pages_for(d.context as usize, d.max_tokens as usize, d.window()) as u64;
    let levels: Vec<Value> = d
        .levels()
        .iter()
        .map(|level| {
            let features = level.features();
            json!({
                "name": level.name(),
                "features": cpus::feature_names(features),
                "missing": cpus::feature_names(features & !present),
            })
        })
        .collect();
    Ok(json!({
        "name": metadata.name,
        "architecture": metadata.architecture,
        "parameters": metadata.parameters,
        "quantization": metadata.quantization,
        "shared_weights": shared,
        "packed_by": metadata.packed_by,
        "layers": d.layers,
        "hidden": d.hidden,
        "ffn": d.ffn,
        "heads": d.heads,
        "kv_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "experts": d.experts,
        "experts_per_token": d.experts_per_token,
        "vocab": d.vocab,
        "context": d.context,
        "sliding_window": d.window(),
        "bos_token_id": metadata.bos_token_id,
        "eos_token_ids": metadata.eos_token_ids,
        "tokenizer": payload.tokenizer().is_some(),
        "chat_template": metadata.chat_template.is_some(),
        "levels": levels,
        "level": d.choose_level(None, present).ok().map(|level| level.name()),
        "threads": threads,
        "max_tokens_per_step": d.max_tokens,
        "multiply_adds_per_token": d.multiply_adds_per_token + d.multiply_adds_per_logit_row,
        "decode_weight_bytes": d.decode_weight_bytes,
        "memory": {
            "weights_bytes": d.payload_bytes,
            "scratch_bytes": d.scratch_for(threads),
            "kv_type": match d.kv_type() { KvType::F16 => "f16", KvType::F32 => "f32" },
            "kv_page_bytes": d.page_bytes,
            "kv_bytes_per_token": d.page_bytes / PAGE_TOKENS as u64,
            "kv_bytes_at_full_context": pages * d.page_bytes,
        },
        "payload": {
            "path": payload.path().display().to_string(),
            "bytes": d.payload_bytes,
            "key": hex(&d.payload_key),
            "weights": metadata.weights.len(),
        },
    }))
}

fn table(report: &Value) -> String {
    let text = |value: &Value| match value {
        Value::String(text) => text.clone(),
        Value::Null => "none".into(),
        other => other.to_string(),
    };
    let get = |key: &str| text(&report[key]);
    let bytes = |key: &str| human_bytes(report["memory"][key].as_u64().unwrap_or(0));
    let quantization = report["quantization"].as_object().map_or_else(String::new, |roles| {
        let one = |(role, layout): (&String, &Value)| match report["shared_weights"][role].as_str() {
            Some(other) => format!("{role} {} (the same weights as {other})", text(layout)),
            None => format!("{role} {}", text(layout)),
        };
        roles.iter().map(one).collect::<Vec<_>>().join(", ")
    });
    let experts = if report["experts"] == 0 {
        "none (dense)".into()
    } else {
        format!("{}, {} per token", get("experts"), get("experts_per_token"))
    };
    let levels: Vec<String> = report["levels"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|level| {
            let missing: Vec<String> = level["missing"].as_array().into_iter().flatten().map(text).collect();
            let name = text(&level["name"]);
            match missing.is_empty() {
                _ if level["name"] == report["level"] => format!("{name} (used here)"),
                true => name,
                false => format!("{name} (this CPU lacks {})", missing.join(", ")),
            }
        })
        .collect();
    let rows = [
        ("model", format!("{} ({}, {} parameters)", get("name"), get("architecture"), count(&report["parameters"]))),
        ("quantization", quantization),
        ("layers", format!("{} of width {}, FFN {}", get("layers"), get("hidden"), get("ffn"))),
        (
            "attention",
            format!("{} heads of {}, {} for keys and values", get("heads"), get("head_dim"), get("kv_heads")),
        ),
        ("experts", experts),
        ("vocabulary", format!("{} tokens", get("vocab"))),
        ("context", format!("{} tokens, sliding window in every layer: {}", get("context"), get("sliding_window"))),
        ("code for", levels.join("; ")),
        ("threads", get("threads")),
        (
            "weights",
            format!(
                "{}, {} per token read",
                bytes("weights_bytes"),
                human_bytes(report["decode_weight_bytes"].as_u64().unwrap_or(0))
            ),
        ),
        ("scratch", bytes("scratch_bytes")),
        (
            "KV cache",
            format!(
                "{} per token ({}), {} at full context",
                bytes("kv_bytes_per_token"),
                text(&report["memory"]["kv_type"]),
                bytes("kv_bytes_at_full_context")
            ),
        ),
        ("tokenizer", if report["tokenizer"] == true { "yes".into() } else { "none".into() }),
        ("chat template", if report["chat_template"] == true { "yes".into() } else { "none".into() }),
        ("payload", format!("{} in {}", text(&report["payload"]["key"]), text(&report["payload"]["path"]))),
    ];
    rows.iter().map(|(key, value)| format!("{key:<14} {value}\n")).collect()
}

/// A large number for people: 46.7 B.
fn count(value: &Value) -> String {
    let n = value.as_u64().unwrap_or(0) as f64;
    match n {
        _ if n >= 1e9 => format!("{:.1} B", n / 1e9),
        _ if n >= 1e6 => format!("{:.1} M", n / 1e6),
        _ => format!("{n}"),
    }
}
