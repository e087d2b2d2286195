//! `bench`: the speed of the model, and how far it is from what the machine can do.
//!
//! The machine's read bandwidth changes with its neighbours, so it is measured before, between and after the runs of the
//! model, and the medians are compared.

use super::{Context, profile, session};
use crate::args::Bench;
use crate::failure::{Failure, Result};
use crate::machine::{Peak, ReadSweep};
use crate::progress::Progress;
use crate::{interrupt, output};
use moec_runtime::{Logits, Model, Session};
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

pub(super) fn run(context: &Context, args: &Bench) -> Result<()> {
    let interrupt = interrupt::listen();
    let model = context.open(&args.run)?;
    let plan = Plan::new(context, args)?;
    let mut bench = Runs::new(&model, args, &interrupt, plan);

    let mut progress = Progress::new("runs", args.repeat as usize + 1);
    // The first run reads the weights from the disk and is not counted.
    bench.prefill()?;
    progress.at(0);
    bench.decode()?;
    bench.clear();

    let sweep = ReadSweep::new(&model)?;
    let mut reads = vec![sweep.bytes_per_second(&model)];
    for run in 0..args.repeat as usize {
        progress.at(run + 1);
        bench.prefill()?;
        bench.decode()?;
        reads.push(sweep.bytes_per_second(&model));
    }
    drop(progress);
    let peak = Peak::measure(&model, context.descriptor.arithmetic == 1);
    let mut report = bench.report(context, median(&reads), &peak);
    if args.profile {
        report["profile"] = bench.profile(context, median(&reads), &peak)?;
    }
    output::print(&if args.json { format!("{report}\n") } else { table(&report) })
}

/// How many tokens to run.
#[derive(Clone, Copy)]
struct Plan {
    prompt: usize,
    new: usize,
    depth: usize,
}

impl Plan {
    fn new(context: &Context, args: &Bench) -> Result<Plan> {
        let limit = context.descriptor.context as usize;
        let depth = args.depth as usize;
        let room = limit.saturating_sub(depth);
        // What was not asked for adapts to the context; what was asked for must fit.
        let fit = |asked: Option<u32>, usual: usize, flag: &str| match asked {
            None if room > 0 => Ok(usual.min(room)),
            Some(tokens) if tokens as usize <= room => Ok(tokens as usize),
            None | Some(_) => Err(Failure::Refused(format!(
                "{} tokens do not fit into the model's context of {limit} at --depth {depth}; use a smaller {flag}",
                asked.map_or(usual, |tokens| tokens as usize)
            ))),
        };
        let prompt = fit(args.prompt_tokens, 512, "--prompt-tokens or --depth")?;
        let new = fit(args.new_tokens, 64, "--new-tokens or --depth")?;
        Ok(Plan { prompt, new, depth })
    }
}

/// Runs of the model and the seconds they took.
struct Runs<'a> {
    model: &'a Arc<Model>,
    args: &'a Bench,
    interrupt: &'a Arc<AtomicBool>,
    plan: Plan,
    /// A session with the tokens of `--depth`, made when first needed.
    base: Option<Session>,
    prompt: Vec<u32>,
    prefill: Vec<f64>,
    decode: Vec<f64>,
}

impl<'a> Runs<'a> {
    fn new(model: &'a Arc<Model>, args: &'a Bench, interrupt: &'a Arc<AtomicBool>, plan: Plan) -> Runs<'a> {
        let vocab = u64::from(model.descriptor().vocab);
        let most = plan.prompt.max(plan.new).max(plan.depth);
        let prompt = random_numbers().map(|random| (random % vocab) as u32).take(most).collect();
        Runs { model, args, interrupt, plan, base: None, prompt, prefill: Vec::new(), decode: Vec::new() }
    }

    fn base(&mut self) -> Result<Session> {
        if self.base.is_none() {
            let mut base = session(self.model, &self.args.run, self.interrupt);
            if self.plan.depth > 0 {
                base.feed(&self.prompt[..self.plan.depth], Logits::None)?;
            }
            self.base = Some(base);
        }
        Ok(self.base.as_ref().expect("just made").fork())
    }

    fn prefill(&mut self) -> Result<()> {
        let mut session = self.base()?;
        let started = Instant::now();
        session.feed(&self.prompt[..self.plan.prompt], Logits::Last)?;
        self.prefill.push(started.elapsed().as_secs_f64());
        Ok(())
    }

    fn decode(&mut self) -> Result<()> {
        let mut session = self.base()?;
        let started = Instant::now();
        for id in &self.prompt[..self.plan.new] {
            session.feed(&[*id], Logits::Last)?;
        }
        self.decode.push(started.elapsed().as_secs_f64());
        Ok(())
    }

    /// One more run of each, timed stage by stage.
    fn profile(&mut self, context: &Context, read: f64, peak: &Peak) -> Result<Value> {
        self.model.start_profile();
        self.prefill()?;
        self.decode()?;
        let times = self.model.end_profile();
        let [decode, batch] = context.descriptor.stages();
        let limits = profile::Limits { read, peak: peak.multiply_adds_per_second };
        // A prompt may end with a step of one token.
        let single = times.decode.steps;
        let several = (self.plan.prompt + self.plan.new) as u64 - single;
        Ok(json!({
            "prefill": profile::rows(&times.batch, &batch, several, 1, limits),
            "decode": profile::rows(&times.decode, &decode, single, single, limits),
        }))
    }

    fn clear(&mut self) {
        self.prefill.clear();
        self.decode.clear();
    }

    fn report(&self, context: &Context, read: f64, peak: &Peak) -> Value {
        let d = context.descriptor;
        let (prompt, new) = (self.plan.prompt as f64, self.plan.new as f64);
        let (prefill, decode) = (median(&self.prefill), median(&self.decode));
        let token = d.multiply_adds_per_token as f64;
        let row = d.multiply_adds_per_logit_row as f64;
        let prefill_work = (prompt * token + row) / prefill;
        let decode_bytes = d.decode_weight_bytes as f64 * new / decode;
        json!({
            "model": d.name(),
            "level": self.model.level().name(),
            "depth": self.plan.depth,
            "repeat": self.args.repeat,
            "prefill": {
                "tokens": self.plan.prompt,
                "seconds": prefill,
                "tokens_per_s": prompt / prefill,
                "multiply_adds_per_s": prefill_work,
                "share_of_peak": prefill_work / peak.multiply_adds_per_second,
            },
            "decode": {
                "tokens": self.plan.new,
                "seconds": decode,
                "tokens_per_s": new / decode,
                "bytes_per_s": decode_bytes,
                "share_of_bandwidth": decode_bytes / read,
                "multiply_adds_per_s": (token + row) * new / decode,
            },
            "machine": {
                "read_bytes_per_s": read,
                "peak_multiply_adds_per_s": peak.multiply_adds_per_second,
                "peak_of": peak.what,
                "threads": self.model.workers(),
            },
        })
    }
}

/// The middle value; the mean of the two middle ones.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 { f64::NAN } else { (values[(n - 1) / 2] + values[n / 2]) / 2.0 }
}

/// Numbers without a pattern that a router could like, the same in every run (splitmix64, Steele et al. 2014).
fn random_numbers() -> impl Iterator<Item = u64> {
    (1u64..).map(|i| {
        let mut z = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> 16
    })
}

fn table(report: &Value) -> String {
    let number = |part: &str, key: &str| report[part][key].as_f64().unwrap_or(f64::NAN);
    let giga = |part: &str, key: &str| number(part, key) / 1e9;
    format!(
        "prefill  {:>6} tokens  {:>9.1} tokens/s  {:>7.1} G multiply-adds/s  {:>5.1} % of peak\n\
         decode   {:>6} tokens  {:>9.1} tokens/s  {:>7.1} GB/s of weights     {:>5.1} % of bandwidth\n\
         machine  {} threads, reads {:.1} GB/s, peak {:.1} G multiply-adds/s ({}); code for {}\n",
        number("prefill", "tokens"),
        number("prefill", "tokens_per_s"),
        giga("prefill", "multiply_adds_per_s"),
        100.0 * number("prefill", "share_of_peak"),
        number("decode", "tokens"),
        number("decode", "tokens_per_s"),
        giga("decode", "bytes_per_s"),
        100.0 * number("decode", "share_of_bandwidth"),
        report["machine"]["threads"],
        giga("machine", "read_bytes_per_s"),
        giga("machine", "peak_multiply_adds_per_s"),
        report["machine"]["peak_of"].as_str().unwrap_or_default(),
        report["level"].as_str().unwrap_or_default(),
    ) + &["prefill", "decode"]
        .iter()
        .filter_map(|what| Some(profile::table(what, report["profile"][what].as_array()?)))
        .collect::<String>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn random_ids_are_spread() {
        let ids: Vec<u64> = random_numbers().map(|random| random % 8).take(800).collect();
        assert!((0..8).all(|id| (70..130).contains(&ids.iter().filter(|i| **i == id).count())));
    }
}
