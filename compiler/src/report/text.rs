//! A report for a terminal.
//!
//! What is known of every build comes first, in lines that begin with a word, as scripts read them; predictions and measurements follow as tables.
//! Deliberately absent: what takes more than a screen (the other forms have it).

use super::experts;
use super::page::{self, Align, Table};
use super::units::{plural, seconds};
use super::{Program, Report};
use indicatif::HumanBytes;
use std::fmt::Write as _;

/// The text, without a newline at its end.
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    for line in &report.repacked {
        let _ = writeln!(text, "{line}");
    }
    let wide = report.weights.iter().map(|w| w.role.len()).fold(10, usize::max);
    let _ = writeln!(
        text,
        "{:<wide$} {:<6} {:>15} {:>12} {:>6}  relative RMS error",
        "weights", "as", "number", "size", "bits"
    );
    for w in &report.weights {
        let (size, bits) = (HumanBytes(w.bytes).to_string(), 8.0 * w.bytes as f64 / w.count as f64);
        let error = match &w.error {
            None => "not known: not packed yet".to_string(),
            Some(loss) if loss.relative_rms == 0.0 => "none".to_string(),
            Some(loss) => format!("{:.2} %", 100.0 * loss.relative_rms),
        };
        let _ = writeln!(text, "{:<wide$} {:<6} {:>15} {size:>12} {bits:>6.2}  {error}", w.role, w.layout, w.count);
    }
    if let Some(choice) = report.experts.as_ref().and_then(|found| Some((found.by_heat.as_ref()?, &found.counts))) {
        let _ = writeln!(text, "by heat    {}", experts::by_heat(choice.0, choice.1));
    }
    let million = |n: u64| format!("{:.1} M", n as f64 / 1e6);
    let (token, memory) = (&report.token, &report.memory);
    let _ = writeln!(
        text,
        "a token    reads {} of weights; {} multiply-adds, and {} for its logits",
        HumanBytes(token.weight_bytes),
        million(token.multiply_adds),
        million(token.multiply_adds_per_logit_row)
    );
    let _ = writeln!(
        text,
        "memory     {} shared and {} for each thread; {} of KV cache for {} tokens",
        HumanBytes(memory.scratch),
        HumanBytes(memory.thread_scratch),
        HumanBytes(memory.page),
        memory.page_tokens
    );
    for level in &report.levels {
        let told = [("one token", &level.decode), ("many", &level.batch)].map(|(what, program)| {
            let Program { stages, barriers, kernels, .. } = program;
            format!("{what} in {stages} stages, {barriers} barriers, {kernels} kernels")
        });
        let _ = writeln!(text, "code       {}: {}", level.name, told.join("; "));
    }
    for line in tuned(report) {
        let _ = writeln!(text, "{line}");
    }
    for level in &report.levels {
        for (what, program) in [("decode", &level.decode), ("prefill", &level.batch)] {
            if let Some(step) = program.step {
                let rate = step.tokens as f64 / step.seconds;
                let tokens = plural(step.tokens, "token");
                let _ = writeln!(
                    text,
                    "expected   {}: {what} of {tokens} in {}, {rate:.1} tokens/s",
                    level.name,
                    seconds(step.seconds)
                );
            }
        }
    }
    if let Some(output) = &report.output {
        let _ = writeln!(text, "written    {}", HumanBytes(output.bytes));
    }
    if let Some(scores) = &report.scores {
        let table = experts::scores_table(scores);
        let _ = write!(text, "\n{}\n{}", table.caption, columns(&table));
    }
    if let Some(comparison) = &report.measured {
        let _ = writeln!(text, "\n{}", page::told(report, comparison));
        for (phase, what) in [(&comparison.decode, "decode"), (&comparison.prefill, "prefill")] {
            let _ = write!(text, "\n{}", columns(&page::compared(phase, what)));
        }
    }
    text.truncate(text.trim_end().len());
    text
}

/// Which levels are written by which tuning records.
fn tuned(report: &Report) -> impl Iterator<Item = String> {
    report.levels.iter().filter_map(|level| Some(format!("tuned      {}: by {}", level.name, level.tuning.as_ref()?)))
}

/// What whoever builds a model wants to know at once: tuning records, the choice of bits by heat, and how well a text is predicted.
pub fn summary(report: &Report) -> Vec<String> {
    let choice =
        report.experts.as_ref().and_then(|found| Some(experts::by_heat(found.by_heat.as_ref()?, &found.counts)));
    let scores = report.scores.as_ref().map(experts::scores_table);
    let scores = scores.map(|table| format!("{}\n{}", table.caption, columns(&table).trim_end()));
    tuned(report).chain(choice).chain(scores).collect()
}

/// A table in columns.
fn columns(table: &Table) -> String {
    let rows =
        || std::iter::once(table.columns.iter().map(|(name, _)| name.to_string()).collect()).chain(table.rows.clone());
    let width = |i: usize| rows().map(|row: Vec<String>| row[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..table.columns.len()).map(width).collect();
    let mut text = String::new();
    for row in rows() {
        let cells = row.iter().zip(&widths).zip(&table.columns).map(|((cell, &width), (_, align))| match align {
            Align::Left => format!("{cell:<width$}"),
            Align::Right => format!("{cell:>width$}"),
        });
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}
