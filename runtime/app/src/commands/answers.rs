//! `score --answers`: how many questions the model answers to the letter.

use super::{Context, not_empty, session};
use crate::args::Score;
use crate::failure::{Failure, Result};
use crate::progress::Progress;
use crate::{interrupt, output};
use moec_runtime::{Logits, Sampler, Sampling, Session, Tokenizer};
use serde_json::{Value, json};
use std::path::Path;

/// Wrong answers that are told in full.
const TOLD: usize = 10;

pub(super) fn run(context: &Context, args: &Score, file: &Path) -> Result<()> {
    let read = |source| Failure::Read { path: file.to_path_buf(), source };
    let text = std::fs::read_to_string(file).map_err(read)?;
    let interrupt = interrupt::listen();
    let model = context.open(&args.run)?;
    let tokenizer = model.tokenizer()?;
    let mut session = session(&model, &args.run, &interrupt);
    let (mut questions, mut wrong) = (0usize, Vec::new());
    let limit = args.limit.unwrap_or(usize::MAX);
    let mut progress = Progress::new("questions", text.lines().count().min(limit));
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    for (number, line) in lines.take(limit) {
        let (prompt, answer) = question(line).ok_or_else(|| {
            let wanted = r#"{"prompt": "…", "answer": "…"}"#;
            Failure::Refused(format!("{}, line {}: expected {wanted}", file.display(), number + 1))
        })?;
        let ids = not_empty(tokenizer.encode(&prompt, !args.no_bos)?, "a prompt")?;
        session.rewind(0)?;
        let found = continuation(&mut session, tokenizer, &ids, &answer)?;
        questions += 1;
        progress.at(questions);
        if found.trim() != answer.trim() {
            wrong.push(json!({ "prompt": prompt, "answer": answer, "found": found.trim() }));
        }
    }
    drop(progress);
    if questions == 0 {
        return Err(Failure::Refused(format!("{}: no questions", file.display())));
    }
    let right = questions - wrong.len();
    let accuracy = right as f64 / questions as f64;
    wrong.truncate(TOLD);
    let report = json!({ "questions": questions, "right": right, "accuracy": accuracy, "wrong": wrong });
    output::print_line(&report.to_string())
}

fn question(line: &str) -> Option<(String, String)> {
    let value: Value = serde_json::from_str(line).ok()?;
    Some((value["prompt"].as_str()?.to_string(), value["answer"].as_str()?.to_string()))
}

/// The greedy continuation, until the model ends it or it is longer than the answer.
fn continuation(session: &mut Session, tokenizer: &Tokenizer, prompt: &[u32], answer: &str) -> Result<String> {
    let sampler = Sampling { temperature: 0.0, ..Sampling::default() };
    let mut sampler = Sampler::new(sampler);
    session.check_room(prompt.len() + 1)?;
    session.feed(prompt, Logits::Last)?;
    let mut stream = tokenizer.stream();
    let mut text = String::new();
    loop {
        let id = sampler.sample(session.last_logits(), session.tokens());
        if session.model().is_end(id) {
            break;
        }
        text += &stream.push(id)?;
        if text.trim_start().len() > answer.trim().len() || session.room() == 0 {
            break;
        }
        session.feed(&[id], Logits::Last)?;
    }
    text += &stream.finish()?;
    Ok(text)
}
