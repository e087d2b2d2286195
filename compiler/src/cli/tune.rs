//! `moec tune`

use super::build::BuildOptions;
use super::failure::Usage;
use super::output::{print_line, say};
use super::tune_plot;
use anyhow::Context as _;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use moec::import;
use moec::kernels::{MatmulTuning, Prefetch};
use moec::pipeline;
use moec::target::{Tuning, machine};
use moec::tune::team_size::{ANSWER, PROMPT, TeamSize};
use moec::tune::trial::WholeSteps;
use moec::tune::{self, Outcome, Progress, Request, Tried};
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;
use target_lexicon::Triple;

/// `moec tune`
#[derive(Debug, Args)]
#[command(
    after_help = "Give the same --quant as to the build: what is tuned are the shapes and formats of the model's products. \
    The record is text; `moec build MODEL --tuning FILE` uses it. Stopped or out of time, it keeps the shapes that are done, and the next run goes on; \
    a run for another model on the same record adds that one's shapes. Choices must beat what the build would do without the record: those that moec carries for \
    this CPU, or with --tuning none the defaults. In the end whole steps of the model's first layers are compared, and what makes them slower is given up. \
    Nothing else should run meanwhile."
)]
pub struct Tune {
    /// The model's directory, or a .gguf file; its weights are not read
    model: PathBuf,
    /// The record to write; one that is there is gone on with
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Stop after this time, e.g. 60s or 5m, and keep what is done
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = time)]
    budget: Duration,
    /// Compare what the record has with the default once more, and give up what is not faster again
    ///
    /// A second look, at another time, or with another model whose products have the same shapes but another number of experts. Shapes that are not in the
    /// record are measured as always.
    #[arg(long)]
    confirm: bool,
    /// Threads that work together; all physical cores without this
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Draw the result as well
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    options: BuildOptions,
}

/// A time such as `90`, `90s` or `2m`.
fn time(text: &str) -> Result<Duration, String> {
    let (number, factor) = match text.strip_suffix('m') {
        Some(minutes) => (minutes, 60.0),
        None => (text.strip_suffix('s').unwrap_or(text), 1.0),
    };
    match number.parse::<f64>() {
        Ok(n) if n > 0.0 && n * factor <= 86400.0 => Ok(Duration::from_secs_f64(n * factor)),
        _ => Err("a time is a number of seconds such as 60s, or of minutes such as 5m, up to a day".to_string()),
    }
}

/// The progress bar.
struct Bar(ProgressBar);

impl Progress for Bar {
    fn at(&self, share: f64, shape: &str, what: &str) {
        self.0.set_position((1000.0 * share) as u64);
        self.0.set_message(format!("{shape}: {what}"));
    }
}

impl Tune {
    pub fn run(self) -> anyhow::Result<u8> {
        let options = self.options.resolve()?;
        if options.target.architecture != Triple::host().architecture {
            return Err(Usage::new("moec tune measures on this machine; leave out --target").into());
        }
        if options.levels.len() != 1 {
            return Err(Usage::new("moec tune measures one CPU level at a time; name one with --target-cpu").into());
        }
        let model = import::open(&self.model)?;
        let compiled = pipeline::compile(&model, &options)?;
        let bar = ProgressBar::new(1000)
            .with_style(ProgressStyle::with_template("{bar:40} {elapsed} {wide_msg}").expect("a valid template"));
        let first_layers = |layers: usize, tunings: &[Tuning]| {
            pipeline::plan_first_layers(&model, &options, &compiled, layers, tunings)
        };
        let request = Request {
            plan: &compiled.plan,
            first_layers: &first_layers,
            level: options.levels[0],
            default: &compiled.tuned.tunings[0],
            threads: self.threads.map_or_else(machine::cores, usize::from),
            budget: self.budget,
            output: &self.output,
            confirm: self.confirm,
        };
        let result = tune::tune(&request, &Bar(bar.clone()));
        bar.finish_and_clear();
        let outcome = result?;
        print_line(table(&outcome).trim_end())?;
        if let Some(path) = &self.plot {
            std::fs::write(path, tune_plot::svg(&outcome))
                .with_context(|| format!("cannot write {}", path.display()))?;
            say(format_args!("drew {}", path.display()));
        }
        if outcome.busy {
            say("moec: warning: other programs use the same cores; measure again when the machine is quiet");
        }
        if self.confirm && outcome.earlier > 0 {
            say(format_args!(
                "{} of {} shapes in the record were not faster again, and gave up at least a part of their choices",
                outcome.given_up, outcome.earlier
            ));
        } else if outcome.earlier > 0 {
            say(format_args!(
                "{} of the shapes were in the record already; delete it to measure them anew, or --confirm them",
                outcome.earlier
            ));
        }
        if outcome.left() > 0 {
            say(format_args!(
                "the time was over before {} of the shapes; the same command goes on with them",
                outcome.left()
            ));
        }
        match outcome.trial {
            Tried::Done { given_up, choices } if given_up > 0 => say(format_args!(
                "{given_up} of {choices} choices were faster alone, but not in whole steps, and were given up"
            )),
            Tried::NoTime => say(
                "the time was over before whole steps were compared; the same command goes on with them, and a longer --budget gives them more time",
            ),
            Tried::Done { .. } | Tried::Nothing => {}
        }
        say(format_args!("wrote {}", self.output.display()));
        Ok(0)
    }
}

/// How a step is named.
pub fn step_name(step: usize) -> String {
    if step == 1 { "decode".to_string() } else { format!("prefill {step}") }
}

/// Default against tuned, for people.
fn table(outcome: &Outcome) -> String {
    let limits = outcome.record.limits;
    let mut text = format!(
        "limits of {} threads: {:.1} G multiply-adds/s of bytes, {:.1} of f32, {:.1} GB/s from memory\n{:<20} {:<12} {:>7} {:>8} {:>7} {:>7}  choices\n",
        outcome.record.threads,
        limits.dots / 1e9,
        limits.fmas / 1e9,
        limits.read / 1e9,
        "product",
        "step",
        "tokens",
        "default",
        "tuned",
        "faster",
    );
    for product in &outcome.products {
        let Some(found) = outcome.record.products.get(&product.shape) else {
            let _ = writeln!(text, "{:<20} not measured yet", product.shape.to_string());
            continue;
        };
        for (i, m) in found.measured.iter().enumerate() {
            let name = if i == 0 { product.shape.to_string() } else { String::new() };
            let kernel = found.tuning.kernel(m.tokens.min(found.tuning.tokens()));
            let choices = match m.step {
                1 => format!("{} rows, unroll {}{}", kernel.tiles, kernel.unroll, prefetch(kernel)),
                _ => format!(
                    "{} rows × {} tokens, unroll {}, block {}{}, chunk {} KiB{}{}",
                    kernel.tiles,
                    m.tokens.min(found.tuning.tokens()),
                    kernel.unroll,
                    found.tuning.block,
                    if found.tuning.ahead { " ahead" } else { "" },
                    found.tuning.activation_bytes >> 10,
                    columns(found.tuning.columns),
                    prefetch(kernel)
                ),
            };
            let _ = writeln!(
                text,
                "{name:<20} {:<12} {:>7} {:>6.1} % {:>5.1} % {:>5.1} %  {choices}",
                step_name(m.step),
                m.tokens,
                100.0 * m.default_share,
                100.0 * m.tuned_share,
                100.0 * (m.tuned_share / m.default_share - 1.0),
            );
        }
    }
    text += "default and tuned are shares of the machine's limit: reading the weights, or the multiply-adds, whichever takes longer\n";
    if let Some(team) = &outcome.record.team {
        text += &team_table(team);
    }
    if let Some(steps) = &outcome.record.steps {
        text += &steps_table(steps);
    }
    text
}

/// Whole steps, default against tuned.
fn steps_table(steps: &WholeSteps) -> String {
    let layers = match steps.layers {
        1 => "layer".to_string(),
        n => format!("{n} layers"),
    };
    let mut text = format!(
        "{:<8} {:>14} {:>17} {:>8}  tokens/s in whole steps of the first {layers}\n",
        "tokens", "default", "tuned", "faster"
    );
    for step in &steps.measured {
        let rate = |seconds: f64| step.tokens as f64 / seconds;
        let faster = 100.0 * (step.default / step.tuned - 1.0);
        let _ = writeln!(
            text,
            "{:<8} {:>14.1} {:>17.1} {faster:>6.1} %",
            step.tokens,
            rate(step.default),
            rate(step.tuned)
        );
    }
    text
}

/// How many columns are gone through at a time, if not all.
fn columns(n: usize) -> String {
    if n > 0 { format!(", columns {n}") } else { String::new() }
}

/// What a kernel prefetches, if anything.
fn prefetch(kernel: MatmulTuning) -> String {
    match kernel.prefetch {
        Prefetch::None => String::new(),
        Prefetch::Ahead(bytes) => format!(", prefetch {bytes}"),
        Prefetch::Next(streams) => format!(", next in {streams} streams"),
    }
}

/// Teams of fewer threads beside that of all.
fn team_table(team: &TeamSize) -> String {
    let mut text = format!("{:<8} {:>14} {:>17}  products alone\n", "threads", "tokens/s", "prompt tokens/s");
    for sized in &team.measured {
        let (decode, prefill) = (1.0 / sized.decode, PROMPT as f64 / sized.prefill);
        let _ = writeln!(text, "{:<8} {decode:>14.1} {prefill:>17.1}", sized.threads);
    }
    let all = team.measured.first().map_or(team.best, |all| all.threads);
    text + &if team.best == all {
        format!("for a prompt of {PROMPT} tokens and {ANSWER} more no fewer threads are faster\n")
    } else {
        format!("for a prompt of {PROMPT} tokens and {ANSWER} more {} threads are fastest: give --threads\n", team.best)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_seconds_or_minutes() {
        assert_eq!(time("90"), Ok(Duration::from_secs(90)));
        assert_eq!(time("1.5m"), Ok(Duration::from_secs(90)));
        for wrong in ["", "s", "-1s", "0", "1h", "nan", "inf", "1e9m"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
