//! `score --choices`: multiple choice, by the log-likelihood of each choice after the question.
//!
//! Two counts, as lm-evaluation-harness has them (`acc` and `acc_norm` of `multiple_choice` tasks): the choice with the largest
//! log-likelihood, and the one with the largest log-likelihood per byte of its text. Of equals the first counts.

use super::{Context, session};
use crate::args::Score;
use crate::failure::{Failure, Result};
use crate::{interrupt, output};
use moec_runtime::math::log_sum_exp;
use moec_runtime::{Logits, Session, Tokenizer};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;

/// Wrong choices that are told in full.
const TOLD: usize = 10;

/// A line of the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Question {
    /// What goes before the question, on lines of its own.
    context: Option<String>,
    question: String,
    choices: Vec<String>,
    /// The number of the right choice, from 0, or its text.
    answer: Value,
    /// For people: passed over.
    #[allow(dead_code)]
    category: Option<Value>,
    #[allow(dead_code)]
    id: Option<Value>,
}

impl Question {
    fn prompt(&self) -> String {
        self.context.as_ref().map_or_else(|| self.question.clone(), |context| format!("{context}\n{}", self.question))
    }

    /// The number of the right choice.
    fn right(&self) -> std::result::Result<usize, String> {
        if self.choices.len() < 2 || self.choices.iter().any(String::is_empty) {
            return Err("`choices` must have at least two, none of them empty".into());
        }
        let found = match &self.answer {
            Value::Number(number) => number.as_u64().map(|n| n as usize).filter(|n| *n < self.choices.len()),
            Value::String(text) => self.choices.iter().position(|choice| choice == text),
            _ => None,
        };
        found.ok_or_else(|| {
            format!(
                "`answer` must be a number from 0 to {} or one of the choices, not {}",
                self.choices.len() - 1,
                self.answer
            )
        })
    }
}

pub(super) fn run(context: &Context, args: &Score, file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).map_err(|source| Failure::Read { path: file.to_path_buf(), source })?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let mut questions = Vec::new();
    for (number, line) in lines.take(args.limit.unwrap_or(usize::MAX)) {
        let wrong = |what: String| Failure::Refused(format!("{}, line {}: {what}", file.display(), number + 1));
        let question: Question = serde_json::from_str(line).map_err(|error| {
            wrong(format!(r#"expected {{"question": "…", "choices": ["…", "…"], "answer": 0}}: {error}"#))
        })?;
        let right = question.right().map_err(wrong)?;
        questions.push((question, right));
    }
    if questions.is_empty() {
        return Err(Failure::Refused(format!("{}: no questions", file.display())));
    }
    let interrupt = interrupt::listen();
    let model = context.open(&args.run)?;
    let tokenizer = model.tokenizer()?;
    let mut session = session(&model, &args.run, &interrupt);
    let (mut plain, mut normalized, mut wrong) = (0, 0, Vec::new());
    for (question, right) in &questions {
        let prompt = question.prompt();
        let sums: Vec<f64> = question
            .choices
            .iter()
            .map(|choice| log_likelihood(&mut session, tokenizer, &prompt, choice, !args.no_bos))
            .collect::<Result<_>>()?;
        let by_length: Vec<f64> =
            sums.iter().zip(&question.choices).map(|(sum, choice)| sum / choice.len() as f64).collect();
        let chosen = best(&sums);
        plain += usize::from(chosen == *right);
        normalized += usize::from(best(&by_length) == *right);
        if chosen != *right {
            wrong.push(json!({
                "question": question.question, "answer": question.choices[*right], "chosen": question.choices[chosen],
                "log_likelihoods": sums,
            }));
        }
    }
    wrong.truncate(TOLD);
    let share = |right: usize| right as f64 / questions.len() as f64;
    let report = json!({
        "questions": questions.len(),
        "right": plain,
        "accuracy": share(plain),
        "right_normalized": normalized,
        "accuracy_normalized": share(normalized),
        "wrong": wrong,
    });
    output::print_line(&report.to_string())
}

fn best(values: &[f64]) -> usize {
    (0..values.len()).rev().max_by(|a, b| values[*a].total_cmp(&values[*b])).unwrap_or(0)
}

/// The log-likelihood of `choice` after `prompt` and a space, if that does not end with one. What the session holds of the
/// prompt is kept for the next choice.
fn log_likelihood(session: &mut Session, tokenizer: &Tokenizer, prompt: &str, choice: &str, bos: bool) -> Result<f64> {
    let space = if prompt.is_empty() || prompt.ends_with(char::is_whitespace) { "" } else { " " };
    let before = tokenizer.encode(prompt, bos)?;
    let whole = tokenizer.encode(&format!("{prompt}{space}{choice}"), bos)?;
    // A token may cross the border between the two: it counts as the choice's.
    let start = before.iter().zip(&whole).take_while(|(a, b)| a == b).count().min(whole.len().saturating_sub(1));
    if start == 0 {
        return Err(Failure::Refused("a question has no tokens; the model needs at least one to start from".into()));
    }
    let held = session.tokens().iter().zip(&whole).take_while(|(a, b)| a == b).count().min(start - 1);
    if session.rewind(held).is_err() {
        // The sliding window has moved on: everything is read again.
        session.rewind(0)?;
    }
    let held = session.tokens().len();
    session.check_room(whole.len() - held)?;
    session.feed(&whole[held..start - 1], Logits::None)?;
    let mut sum = 0.0;
    session.feed_each(&whole[start - 1..whole.len() - 1], |i, logits| {
        sum += f64::from(logits[whole[start + i] as usize]) - log_sum_exp(logits);
    })?;
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_numbers_or_texts() {
        let question = |line: Value| serde_json::from_value::<Question>(line).unwrap();
        let with =
            |answer: Value| question(json!({ "question": "q", "choices": ["a", "b"], "answer": answer })).right();
        assert_eq!((with(json!(1)), with(json!("a"))), (Ok(1), Ok(0)));
        assert!([json!(2), json!("c"), json!(null), json!(-1)].into_iter().all(|answer| with(answer).is_err()));
        assert!(question(json!({ "question": "q", "choices": ["a"], "answer": 0 })).right().is_err());
        assert_eq!(question(json!({ "context": "c", "question": "q", "choices": [], "answer": 0 })).prompt(), "c\nq");
        assert_eq!((best(&[1.0, 3.0, 3.0]), best(&[2.0])), (1, 0));
    }
}
