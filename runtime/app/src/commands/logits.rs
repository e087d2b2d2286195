//! `logits`: the logits of every token, and on request its routes, as a safetensors file.

use super::{Context, id_argument, session};
use crate::args::LogitsArgs;
use crate::failure::{Failure, Result};
use crate::interrupt;
use crate::progress::Progress;
use moec_runtime::Routes;
use safetensors::tensor::{Dtype, TensorView};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub(super) fn run(context: &Context, args: &LogitsArgs) -> Result<()> {
    let interrupt = interrupt::listen();
    let model = context.open(&args.run)?;
    let tokens = id_argument(&args.tokens, "the list")?;
    let output = Output::create(&args.output)?;
    let mut session = session(&model, &args.run, &interrupt);
    if args.routes {
        session.record_routes(true)?;
    }
    let vocab = context.descriptor.vocab as usize;
    let bytes = tokens.len() as u64 * vocab as u64 * 4;
    moec_runtime::memory::check("the logits of all tokens", bytes, "give fewer tokens")?;
    let mut logits: Vec<u8> = Vec::with_capacity(bytes as usize);
    let mut progress = Progress::new("tokens", tokens.len());
    session.feed_each(&tokens, |i, row| {
        logits.extend(row.iter().flat_map(|value| value.to_le_bytes()));
        progress.at(i + 1);
    })?;
    drop(progress);

    let mut tensors =
        vec![Tensor { name: "logits".into(), dtype: Dtype::F32, shape: vec![tokens.len(), vocab], bytes: logits }];
    if let Some(routes) = session.routes() {
        tensors.extend(route_tensors(routes));
    }
    output.write(&tensors)
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

/// The file to write, opened before anything is computed.
///
/// A regular file is written under a temporary name beside its own and renamed, so that it is either whole or not there. Devices and
/// pipes cannot be renamed over.
struct Output<'a> {
    path: &'a Path,
    temporary: Option<PathBuf>,
}

impl<'a> Output<'a> {
    fn create(path: &'a Path) -> Result<Output<'a>> {
        let failed = |error: io::Error| Failure::Write { path: path.to_owned(), what: error.to_string() };
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Err(failed(io::Error::from_raw_os_error(libc::EISDIR))),
            Ok(metadata) if !metadata.is_file() => Ok(Output { path, temporary: None }),
            Ok(_) | Err(_) => {
                let temporary = temporary_name(path);
                fs::File::create(&temporary).map_err(failed)?;
                Ok(Output { path, temporary: Some(temporary) })
            }
        }
    }

    fn write(mut self, tensors: &[Tensor]) -> Result<()> {
        let failed = |what: String| Failure::Write { path: self.path.to_owned(), what };
        let views: std::result::Result<Vec<_>, _> = tensors
            .iter()
            .map(|t| {
                Ok::<_, safetensors::SafeTensorError>((&t.name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes)?))
            })
            .collect();
        let views = views.map_err(|error| failed(error.to_string()))?;
        let Some(temporary) = &self.temporary else {
            let bytes = safetensors::serialize(views, None).map_err(|error| failed(error.to_string()))?;
            return fs::write(self.path, bytes).map_err(|error| failed(error.to_string()));
        };
        // The library writes a file of its own, which only the user may read, and renames it.
        let usual = fs::metadata(temporary).map_err(|error| failed(error.to_string()))?.permissions();
        safetensors::serialize_to_file(views, None, temporary).map_err(|error| failed(error.to_string()))?;
        let renamed = fs::set_permissions(temporary, usual).and_then(|()| fs::rename(temporary, self.path));
        renamed.map_err(|error| failed(error.to_string()))?;
        self.temporary = None;
        Ok(())
    }
}

impl Drop for Output<'_> {
    /// Leaves nothing half-written.
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            fs::remove_file(temporary).ok();
        }
    }
}

fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}
