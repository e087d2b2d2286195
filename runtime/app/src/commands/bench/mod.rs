//! `bench`: the speed of the model, and how far it is from what the machine can do.
//!
//! The machine's read bandwidth changes with its neighbours, so it is measured before, between and after the runs of the
//! model, and the medians are compared.

mod profile;
mod runs;
mod work;

use super::Context;
use crate::args::Bench;
use crate::failure::{Failure, Result};
use crate::machine::{Peak, ReadSweep};
use crate::progress::Progress;
use crate::{interrupt, output};
use runs::{Kind, Measured, Runs};
use serde_json::{Value, json};
use work::Limits;

pub(super) fn run(context: &Context, args: &Bench) -> Result<()> {
    let interrupt = interrupt::listen();
    let model = context.open(&args.run)?;
    let plan = Plan::new(context, args)?;
    let kinds: &[Kind] = match plan.depth {
        0 => &[Kind::Prefill, Kind::Decode],
        _ => &[Kind::Prefill, Kind::Decode, Kind::Shallow],
    };

    let mut progress = Progress::new("runs", args.repeat as usize + 1);
    let mut runs = Runs::new(&model, &args.run, plan, &interrupt)?;
    // The first run reads the weights from the disk and is not counted.
    kinds.iter().try_for_each(|kind| runs.count(*kind))?;
    let sweep = ReadSweep::new(&model)?;
    let mut reads = vec![sweep.bytes_per_second(&model)];
    for run in 0..args.repeat as usize {
        progress.at(run + 1);
        kinds.iter().try_for_each(|kind| runs.measure(*kind))?;
        reads.push(sweep.bytes_per_second(&model));
    }
    drop(progress);
    let peak = Peak::measure(&model, context.descriptor.arithmetic == 1);
    let floats = Peak::measure(&model, false);
    let limits = Limits {
        read: median(&reads),
        products: peak.multiply_adds_per_second,
        floats: floats.multiply_adds_per_second,
    };
    let mut report = report(context, args, &plan, &runs, limits);
    report["machine"] = json!({
        "read_bytes_per_s": limits.read,
        "peak_multiply_adds_per_s": peak.multiply_adds_per_second,
        "peak_of": peak.what,
        "float_multiply_adds_per_s": floats.multiply_adds_per_second,
        "threads": model.workers(),
    });
    report["level"] = model.level().name().into();
    if args.profile {
        report["profile"] = json!({
            "prefill": runs.profile(Kind::Prefill, limits)?,
            "decode": runs.profile(Kind::Decode, limits)?,
        });
    }
    output::print(&if args.json { format!("{report}\n") } else { table(&report) })
}

/// How many tokens to run.
#[derive(Clone, Copy)]
struct Plan {
    prompt: usize,
    new: usize,
    depth: usize,
    sequences: usize,
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
        let (sequences, most) = (args.sequences as usize, context.descriptor.max_tokens as usize);
        if sequences > most {
            return Err(Failure::Refused(format!(
                "the model takes at most {most} tokens in a step, one of each text; use --sequences {most} or fewer"
            )));
        }
        Ok(Plan { prompt, new, depth, sequences })
    }
}

fn report(context: &Context, args: &Bench, plan: &Plan, runs: &Runs<'_>, limits: Limits) -> Value {
    let rate = |measured: &Measured, tokens: usize| {
        let (seconds, work) = (median(&measured.seconds), measured.tally.work);
        let bound = limits.bound(work);
        json!({
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_s": tokens as f64 / seconds,
            "multiply_adds_per_s": work.products / seconds,
            "share_of_peak": work.products / seconds / limits.products,
            "bytes_per_s": work.bytes() / seconds,
            "share_of_bandwidth": work.bytes() / seconds / limits.read,
            "limited_by": bound.by,
            "share_of_limit": bound.seconds / seconds,
            "experts_per_layer_and_step": measured.tally.experts(),
        })
    };
    let decoded = plan.new * plan.sequences;
    let mut report = json!({
        "model": context.descriptor.name(),
        "depth": plan.depth,
        "sequences": plan.sequences,
        "repeat": args.repeat,
        "prefill": rate(runs.measured(Kind::Prefill), plan.prompt),
        "decode": rate(runs.measured(Kind::Decode), decoded),
    });
    if plan.depth > 0 {
        let (deep, shallow) = (runs.measured(Kind::Decode), runs.measured(Kind::Shallow));
        report["decode_at_depth_0"] = rate(shallow, decoded);
        let bytes = deep.tally.work.kv - shallow.tally.work.kv;
        // Runs in turn are compared with one another: the machine may have been another one a minute ago.
        let pairs = deep.seconds.iter().zip(&shallow.seconds);
        let seconds = median(&pairs.map(|(deep, shallow)| deep - shallow).collect::<Vec<_>>());
        report["depth_cost"] = json!({
            "seconds_per_token": seconds / decoded as f64,
            "bytes_per_token": bytes / decoded as f64,
            "bytes_per_s": bytes / seconds,
            "share_of_bandwidth": bytes / seconds / limits.read,
        });
    }
    report
}

/// The middle value; the mean of the two middle ones.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let n = values.len();
    if n == 0 { f64::NAN } else { (values[(n - 1) / 2] + values[n / 2]) / 2.0 }
}

fn table(report: &Value) -> String {
    let number = |part: &str, key: &str| report[part][key].as_f64().unwrap_or(f64::NAN);
    let giga = |part: &str, key: &str| number(part, key) / 1e9;
    let percent = |part: &str, key: &str| 100.0 * number(part, key);
    let allowed = |part: &str| {
        let by = report[part]["limited_by"].as_str().unwrap_or_default();
        format!("{:>5.1} % of what {by} allows", percent(part, "share_of_limit"))
    };
    let mut text = format!(
        "prefill  {:>6} tokens  {:>9.1} tokens/s  {:>7.1} G multiply-adds/s  {:>5.1} % of peak       {}\n",
        number("prefill", "tokens"),
        number("prefill", "tokens_per_s"),
        giga("prefill", "multiply_adds_per_s"),
        percent("prefill", "share_of_peak"),
        allowed("prefill"),
    );
    let mut decode = |part: &str, what: &str| {
        text += &format!(
            "decode   {:>6} tokens  {:>9.1} tokens/s  {:>7.1} GB/s{:13}  {:>5.1} % of bandwidth  {}{what}\n",
            number(part, "tokens"),
            number(part, "tokens_per_s"),
            giga(part, "bytes_per_s"),
            "",
            percent(part, "share_of_bandwidth"),
            allowed(part),
        );
    };
    let sequences = match report["sequences"].as_u64() {
        Some(1) | None => String::new(),
        Some(n) => format!(", {n} texts together"),
    };
    decode("decode", &sequences);
    if report["depth"].as_u64() > Some(0) {
        decode("decode_at_depth_0", &format!("{sequences}, at depth 0"));
        text += &format!(
            "depth    {:>6} tokens  {:>9.3} ms more for a token  {:>7.1} GB/s of keys and values  {:>5.1} % of bandwidth\n",
            report["depth"],
            1e3 * number("depth_cost", "seconds_per_token"),
            giga("depth_cost", "bytes_per_s"),
            percent("depth_cost", "share_of_bandwidth"),
        );
    }
    text += &format!(
        "machine  {} threads, reads {:.1} GB/s, peak {:.1} G multiply-adds/s ({}); code for {}\n",
        report["machine"]["threads"],
        giga("machine", "read_bytes_per_s"),
        giga("machine", "peak_multiply_adds_per_s"),
        report["machine"]["peak_of"].as_str().unwrap_or_default(),
        report["level"].as_str().unwrap_or_default(),
    );
    for what in ["prefill", "decode"] {
        text += &report["profile"][what].as_array().map_or_else(String::new, |rows| profile::table(what, rows));
    }
    text
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
}
