//! `logits`: the logits of every token, and on request its routes, as a safetensors file.

use super::{Context, id_argument, session};
use crate::args::LogitsArgs;
use crate::failure::{Failure, Result};
use crate::interrupt;
use moec_runtime::Routes;
use safetensors::tensor::{Dtype, TensorView};
use std::fs;
use std::path::{Path, PathBuf};

pub(super) fn run(context: &Context, args: &LogitsArgs) -> Result<()> {
    let interrupt = interrupt::listen();
    let model = context.open(&args.run)?;
    let tokens = id_argument(&args.tokens, "the list")?;
    let mut session = session(&model, &args.run, &interrupt);
    if args.routes {
        session.record_routes(true)?;
    }
    let vocab = context.descriptor.vocab as usize;
    let bytes = tokens.len() as u64 * vocab as u64 * 4;
    moec_runtime::memory::check("the logits of all tokens", bytes, "give fewer tokens")?;
    let mut logits: Vec<u8> = Vec::with_capacity(bytes as usize);
    session.feed_each(&tokens, |_, row| logits.extend(row.iter().flat_map(|value| value.to_le_bytes())))?;

    let mut tensors =
        vec![Tensor { name: "logits".into(), dtype: Dtype::F32, shape: vec![tokens.len(), vocab], bytes: logits }];
    if let Some(routes) = session.routes() {
        tensors.extend(route_tensors(routes));
    }
    write(&args.output, &tensors)
}

struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn route_tensors(routes: &Routes) -> Vec<Tensor> {
    let shape = vec![routes.tokens(), routes.per_token];
    let mut tensors = Vec::new();
    for layer in 0..routes.layers {
        tensors.push(Tensor {
            name: format!("selected_experts.{layer}"),
            dtype: Dtype::I64,
            shape: shape.clone(),
            bytes: routes.experts[layer].iter().flat_map(|id| i64::from(*id).to_le_bytes()).collect(),
        });
        tensors.push(Tensor {
            name: format!("routing_weights.{layer}"),
            dtype: Dtype::F32,
            shape: shape.clone(),
            bytes: routes.weights[layer].iter().flat_map(|weight| weight.to_le_bytes()).collect(),
        });
    }
    tensors
}

/// Writes under a temporary name and renames, so that the file is either whole or not there.
fn write(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let failed = |what: String| Failure::Write { path: path.to_owned(), what };
    let views: std::result::Result<Vec<_>, _> = tensors
        .iter()
        .map(|t| Ok::<_, safetensors::SafeTensorError>((&t.name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes)?)))
        .collect();
    let views = views.map_err(|error| failed(error.to_string()))?;
    // Devices and pipes cannot be renamed over.
    if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        let bytes = safetensors::serialize(views, None).map_err(|error| failed(error.to_string()))?;
        return fs::write(path, bytes).map_err(|error| failed(error.to_string()));
    }
    let temporary = temporary_name(path);
    let written = safetensors::serialize_to_file(views, None, &temporary).map_err(|error| failed(error.to_string()));
    let renamed = written.and_then(|()| fs::rename(&temporary, path).map_err(|error| failed(error.to_string())));
    if renamed.is_err() {
        fs::remove_file(&temporary).ok();
    }
    renamed
}

fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}
