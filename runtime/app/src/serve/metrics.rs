//! Figures for Prometheus: `/metrics`.

use moec_runtime::scheduler::StepReport;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};
use std::sync::Arc;

/// All figures, registered.
pub struct Metrics {
    registry: Registry,
    pub requests: IntCounterVec,
    pub time_to_first_token: Histogram,
    pub time_per_token: Histogram,
    step_seconds: Histogram,
    batch_requests: Histogram,
    batch_tokens: Histogram,
    prompt_tokens: IntCounter,
    generated_tokens: IntCounter,
    prefix_hit_tokens: IntCounter,
    preemptions: IntCounter,
    running: IntGauge,
    waiting: IntGauge,
    pages_in_use: IntGauge,
    pages_cached: IntGauge,
}

/// Seconds, from a fast token of a small model to a long wait.
const SECONDS: &[f64] = &[0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0];
const SIZES: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0];

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    let histogram = Histogram::with_opts(options).expect("a sound definition");
    registry.register(Box::new(histogram.clone())).expect("a new name");
    histogram
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    let counter = IntCounter::new(name, help).expect("a sound definition");
    registry.register(Box::new(counter.clone())).expect("a new name");
    counter
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    let gauge = IntGauge::new(name, help).expect("a sound definition");
    registry.register(Box::new(gauge.clone())).expect("a new name");
    gauge
}

impl Metrics {
    /// All zero.
    pub fn new() -> Arc<Metrics> {
        let r = &Registry::new();
        let labels = ["endpoint", "status"];
        let requests = IntCounterVec::new(Opts::new("moec_requests_total", "Requests answered"), &labels);
        let requests = requests.expect("a sound definition");
        r.register(Box::new(requests.clone())).expect("a new name");
        Arc::new(Metrics {
            requests,
            time_to_first_token: histogram(
                r,
                "moec_time_to_first_token_seconds",
                "From the arrival of a request to the first token of its answer",
                SECONDS,
            ),
            time_per_token: histogram(r, "moec_time_per_token_seconds", "Between two tokens of an answer", SECONDS),
            step_seconds: histogram(
                r,
                "moec_step_seconds",
                "One step of the model, drawing the tokens included",
                SECONDS,
            ),
            batch_requests: histogram(r, "moec_batch_requests", "Requests in a step", SIZES),
            batch_tokens: histogram(r, "moec_batch_tokens", "Tokens in a step", SIZES),
            prompt_tokens: counter(r, "moec_prompt_tokens_total", "Tokens of prompts that went through the model"),
            generated_tokens: counter(r, "moec_generated_tokens_total", "Tokens of answers"),
            prefix_hit_tokens: counter(
                r,
                "moec_prefix_hit_tokens_total",
                "Tokens of prompts found in the prefix cache",
            ),
            preemptions: counter(
                r,
                "moec_preemptions_total",
                "Requests that gave their KV pages back and were computed again",
            ),
            running: gauge(r, "moec_requests_running", "Requests that run"),
            waiting: gauge(r, "moec_requests_waiting", "Requests that wait for their turn"),
            pages_in_use: gauge(r, "moec_kv_pages_in_use", "KV pages held by requests or the prefix cache"),
            pages_cached: gauge(r, "moec_kv_pages_cached", "KV pages held by the prefix cache"),
            registry: r.clone(),
        })
    }

    /// Takes in what happened in a step.
    pub fn observe(&self, report: &StepReport) {
        if report.tokens > 0 {
            self.step_seconds.observe(report.time.as_secs_f64());
            self.batch_requests.observe(report.requests as f64);
            self.batch_tokens.observe(report.tokens as f64);
        }
        self.prompt_tokens.inc_by(report.prompt_tokens as u64);
        self.generated_tokens.inc_by(report.generated as u64);
        self.prefix_hit_tokens.inc_by(report.cached_tokens as u64);
        self.preemptions.inc_by(report.preempted as u64);
        self.running.set(report.running as i64);
        self.waiting.set(report.waiting as i64);
        self.pages_in_use.set(report.pages_in_use as i64);
        self.pages_cached.set(report.pages_cached as i64);
    }

    /// All figures in Prometheus' text format.
    pub fn text(&self) -> String {
        TextEncoder::new().encode_to_string(&self.registry.gather()).expect("figures of sound definitions have a text")
    }
}
