//! `selftest`: computes again what was recorded when the executable was built, and compares every bit.

use super::{Context, session};
use crate::args::Selftest;
use crate::failure::{Failure, Result};
use crate::{interrupt, output};
use moec_abi::metadata::Golden;
use moec_runtime::math::Fnv1a;
use moec_runtime::{Model, Payload, cpus};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

pub(super) fn run(context: &Context, args: &Selftest) -> Result<()> {
    let interrupt = interrupt::listen();
    if args.record {
        let model = context.open(&args.run)?;
        let golden = compute(&model, args, &interrupt, &tokens(&model), usize::MAX)?;
        return output::print_line(&serde_json::json!(golden).to_string());
    }
    let payload = Payload::open(&context.payload, context.descriptor.payload())?;
    let Some(golden) = payload.golden()? else {
        return Err(Failure::Refused(
            "nothing was recorded when this file was built (it was built for another CPU than the builder's); build it on \
             a machine that can run it to get a selftest"
                .into(),
        ));
    };
    // All code that this CPU can run, unless one level was asked for; with none at all this is an error.
    context.descriptor.choose_level(args.run.level.as_deref(), cpus::detected_features())?;
    let present = cpus::detected_features();
    let usable = |features: u64| features & !present == 0;
    let mut levels = context.descriptor.levels();
    levels.retain(|level| usable(level.features()) && args.run.level.as_ref().is_none_or(|name| name == level.name()));
    for level in levels {
        let mut run = args.run.clone();
        run.level = Some(level.name().to_owned());
        let model = context.open(&run)?;
        for (how, chunk) in [("at once", usize::MAX), ("one by one", 1)] {
            let found = compute(&model, args, &interrupt, &golden.tokens, chunk)?;
            compare(&golden, &found, level.name(), how)?;
        }
        let tokens = golden.tokens.len();
        let line =
            format!("ok: {} gives the recorded logits for {tokens} tokens, at once and one by one", level.name());
        output::print_line(&line)?;
    }
    Ok(())
}

/// The tokens to record: the one that starts a text, then some from all over the vocabulary.
fn tokens(model: &Model) -> Vec<u32> {
    let descriptor = model.descriptor();
    let first = model.metadata().bos_token_id.unwrap_or(1).min(descriptor.vocab - 1);
    let count = (descriptor.context as usize).min(12);
    let rest = (1..count as u64).map(|i| (i * 2_654_435_761 % u64::from(descriptor.vocab)) as u32);
    std::iter::once(first).chain(rest).collect()
}

fn compute(
    model: &Arc<Model>,
    args: &Selftest,
    interrupt: &Arc<AtomicBool>,
    tokens: &[u32],
    chunk: usize,
) -> Result<Golden> {
    let mut session = session(model, &args.run, interrupt);
    session.set_chunk(chunk);
    let mut hash = Fnv1a::default();
    let mut first_logits = Vec::new();
    session.feed_each(tokens, |_, row| {
        hash.update_f32(row);
        first_logits = row[..row.len().min(8)].to_vec();
    })?;
    Ok(Golden { tokens: tokens.to_vec(), logits_fnv1a: hash.finish(), first_logits })
}

fn compare(golden: &Golden, found: &Golden, level: &str, how: &str) -> Result<()> {
    if golden.logits_fnv1a == found.logits_fnv1a {
        return Ok(());
    }
    Err(Failure::Refused(format!(
        "the logits of {} tokens fed {how} by the code for {level} are not those recorded: the file or the machine is \
         damaged, or moec has a bug (last token: found {:?}, recorded {:?})",
        golden.tokens.len(),
        found.first_logits,
        golden.first_logits
    )))
}
