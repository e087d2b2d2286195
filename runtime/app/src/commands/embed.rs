//! `embed`: vectors of texts.

use super::{Context, not_empty, text_argument};
use crate::args::service::{Embed, PoolingArg};
use crate::embedding::normalize;
use crate::failure::{Failure, Result};
use crate::{interrupt, output};
use moec_runtime::kv::Sequence;
use moec_runtime::{Error, LogitRows, Logits, Model, Part};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub(super) fn run(context: &Context, args: &Embed) -> Result<()> {
    let interrupt = interrupt::listen();
    let model = context.open(&args.run)?;
    let tokenizer = model.tokenizer()?;
    let texts: Vec<String> = match &args.file {
        Some(path) => {
            let read = std::fs::read_to_string(path);
            let text = read.map_err(|source| Failure::Read { path: path.clone(), source })?;
            text.lines().map(str::to_owned).collect()
        }
        None => args.texts.iter().map(|text| text_argument(text)).collect::<Result<_>>()?,
    };
    for text in &texts {
        let tokens = not_empty(tokenizer.encode(text, !args.no_bos)?, "the text")?;
        let mut vector = embed(&model, &tokens, args, &interrupt)?;
        if !args.no_normalize {
            normalize(&mut vector);
        }
        output::print_line(&serde_json::json!(vector).to_string())?;
    }
    Ok(())
}

/// The pooled final hidden states of a text, `[hidden]`.
fn embed(model: &Arc<Model>, tokens: &[u32], args: &Embed, interrupt: &AtomicBool) -> Result<Vec<f32>> {
    let descriptor = model.descriptor();
    let context = descriptor.context as usize;
    if tokens.len() > context {
        return Err(Error::ContextFull { tokens: tokens.len(), context }.into());
    }
    let most = descriptor.max_tokens as usize;
    let chunk = args.run.chunk.map_or(most, |chunk| (chunk as usize).min(most));
    let mut sequence = Sequence::new(model.pages(), descriptor.window());
    let mut rows = LogitRows::with_hidden();
    let mut sum = vec![0f32; descriptor.hidden as usize];
    let mean = args.pooling == PoolingArg::Mean;
    for chunk in tokens.chunks(chunk) {
        if interrupt.load(Ordering::Relaxed) {
            return Err(Error::Interrupted.into());
        }
        let logits = if mean { Logits::All } else { Logits::Last };
        let part = Part { sequence: &mut sequence, tokens: chunk, logits };
        model.step(&mut [part], &mut rows, None)?;
        for row in 0..rows.len() {
            if mean {
                sum.iter_mut().zip(rows.hidden(row)).for_each(|(sum, value)| *sum += value);
            } else {
                sum.copy_from_slice(rows.hidden(row));
            }
        }
    }
    let scale = if mean { 1.0 / tokens.len() as f32 } else { 1.0 };
    sum.iter_mut().for_each(|value| *value *= scale);
    Ok(sum)
}
