//! The arguments of `moec`, and one file for each command.
//!
//! Deliberately absent: the work, which is the library's ([`moec::pipeline`]).

mod build;
pub mod failure;
mod inspect;
mod output;
mod report;
mod score;
mod synth;
mod targets;
mod tune;
mod tune_plot;

use clap::{Parser, Subcommand};

/// Compiles a mixture-of-experts language model into native code for your CPU.
#[derive(Debug, Parser)]
#[command(
    name = "moec",
    version,
    after_help = "Examples:\n  \
        moec run ./Mixtral-8x7B-Instruct-v0.1 --quant q4 -- generate \"The wind that blows over Provence is called\"\n  \
        moec build ./Mixtral-8x7B-Instruct-v0.1 -o mixtral --quant q4    then: ./mixtral generate …\n  \
        moec build ./Mixtral-8x7B-Instruct-v0.1 --emit staticlib --name mixtral -o out    to link into a C program\n  \
        moec inspect ./Mixtral-8x7B-Instruct-v0.1 --after specialize_dispatch\n\n\
        A MODEL is a directory as downloaded from the Hugging Face hub (config.json, *.safetensors, tokenizer.json) or a .gguf file\n\
        (of a split one, any part)."
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build a standalone executable: code and weights in one file, nothing to install
    Build(build::Build),
    /// Build into a cache, then run the executable
    Run(build::Run),
    /// Show what the compiler makes of a model: graphs, plan, kernels, machine code
    Inspect(inspect::Inspect),
    /// Tell what a model would be built to and what to expect, and set what was measured beside it
    Report(report::ReportCommand),
    /// Measure on this machine how a model's kernels are best written, for --tuning
    Tune(tune::Tune),
    /// Write a model of full shape with random weights, for measurements
    Synth(synth::Synth),
    /// List the CPUs that code can be made for, what each needs, and what this machine has
    Targets(targets::Targets),
}

impl Cli {
    /// Does what was asked; returns the exit status.
    ///
    /// # Errors
    /// What went wrong, in words for the user.
    pub fn run(self) -> anyhow::Result<u8> {
        match self.command {
            Command::Build(build) => build.run(),
            Command::Run(run) => run.run(),
            Command::Inspect(inspect) => inspect.run(),
            Command::Report(report) => report.run(),
            Command::Synth(synth) => synth.run(),
            Command::Tune(tune) => tune.run(),
            Command::Targets(targets) => targets.run(),
        }
    }
}
