//! `bench --profile`: the time of a step by kinds of stages, and what share of the machine's limits each reaches.
//!
//! Stages of different layers with the same operations are one row. Deliberately absent: measuring (the runtime's), and the limits (`machine`).

use super::work::{Chosen, Limits, gives_logits, stage_bytes};
use moec_runtime::model::StageCost;
use moec_runtime::profile::StageTimes;
use serde_json::{Value, json};

/// What went through the model in the steps that were timed.
pub struct Steps<'a> {
    /// Tokens in all steps together.
    pub tokens: u64,
    /// Rows of logits.
    pub logit_rows: u64,
    /// Steps that made some.
    pub logit_steps: u64,
    /// The experts that were needed.
    pub chosen: &'a Chosen,
}

/// Rows for the kinds of stages, those that took longest first.
pub fn rows(times: &StageTimes, costs: &[StageCost], done: &Steps<'_>, limits: Limits) -> Vec<Value> {
    let total: f64 = times.stages.iter().map(|t| t.as_secs_f64()).sum();
    let mut kinds: Vec<(&str, f64, f64, u64, usize)> = Vec::new();
    for (time, cost) in times.stages.iter().zip(costs) {
        let logits = gives_logits(cost);
        let adds = cost.multiply_adds * if logits { done.logit_rows } else { done.tokens };
        let steps = if logits { done.logit_steps } else { times.steps };
        let bytes = stage_bytes(cost, steps, done.chosen);
        match kinds.iter_mut().find(|kind| kind.0 == cost.title) {
            Some(kind) => {
                kind.1 += time.as_secs_f64();
                kind.2 += bytes;
                kind.3 += adds;
                kind.4 += 1;
            }
            None => kinds.push((cost.title, time.as_secs_f64(), bytes, adds, 1)),
        }
    }
    kinds.sort_by(|a, b| b.1.total_cmp(&a.1));
    let row = |(title, seconds, bytes, adds, stages): (&str, f64, f64, u64, usize)| {
        json!({
            "operations": title,
            "stages": stages,
            "seconds": seconds,
            "share_of_time": seconds / total,
            "bytes_per_s": bytes / seconds,
            "share_of_bandwidth": bytes / seconds / limits.read,
            "multiply_adds_per_s": adds as f64 / seconds,
            "share_of_peak": adds as f64 / seconds / limits.products,
        })
    };
    kinds.into_iter().map(row).collect()
}

/// The rows as a table for people.
pub fn table(what: &str, rows: &[Value]) -> String {
    let mut text = format!(
        "\n{what:<8} {:>7} {:>9} {:>7} {:>8} {:>7}  operations\n",
        "time", "GB/s", "of read", "G mul-add", "of peak"
    );
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        let percent = |key: &str| match number(key) {
            share if share > 0.0 => format!("{:.1} %", 100.0 * share),
            _ => "-".to_string(),
        };
        text += &format!(
            "{:>14.1} % {:>9.1} {:>7} {:>8.1} {:>8}  {} × {}\n",
            100.0 * number("share_of_time"),
            number("bytes_per_s") / 1e9,
            percent("share_of_bandwidth"),
            number("multiply_adds_per_s") / 1e9,
            percent("share_of_peak"),
            row["stages"],
            row["operations"].as_str().unwrap_or_default(),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn stages_of_one_kind_are_one_row() {
        let ms = Duration::from_millis;
        let times = StageTimes { steps: 2, stages: vec![ms(10), ms(30), ms(20)] };
        let cost = |title, weight_bytes| StageCost {
            title,
            weight_bytes,
            common_bytes: weight_bytes,
            multiply_adds: 2 * weight_bytes,
            expert_bytes: &[],
            layer: 0,
        };
        let costs = [cost("gate_up", 100), cost("logits", 50), cost("gate_up", 100)];
        let done = Steps { tokens: 2, logit_rows: 1, logit_steps: 1, chosen: &Chosen::default() };
        let found = rows(&times, &costs, &done, Limits { read: 1e5, products: 1e5, floats: 1e5 });
        assert_eq!(found.len(), 2);
        assert_eq!(found[0]["stages"], 2);
        assert!((found[0]["bytes_per_s"].as_f64().unwrap() - 400.0 / 0.03).abs() < 1e-6);
        assert!((found[1]["share_of_peak"].as_f64().unwrap() - 100.0 / 0.03 / 1e5).abs() < 1e-9);
        assert!((found[1]["share_of_time"].as_f64().unwrap() - 0.5).abs() < 1e-9);
    }
}
