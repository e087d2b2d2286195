//! `moec synth`

use super::output::say;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use moec::synth::{self, Preset};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// `moec synth`
#[derive(Debug, Args)]
pub struct Synth {
    /// mixtral-8x7b, mistral-7b, llama-2-7b, or tiny
    #[arg(value_parser = preset)]
    preset: Preset,
    /// The directory to write; it must not exist
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// Layers, if not as many as the real model has
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Make the weight files holes: zeros that take no room on the disk, whatever the size of the model
    #[arg(long, conflicts_with = "seed")]
    sparse: bool,
    /// Same seed, same weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn preset(name: &str) -> Result<Preset, String> {
    let names: Vec<&str> = Preset::ALL.iter().map(|p| p.name()).collect();
    Preset::ALL
        .into_iter()
        .find(|p| p.name() == name)
        .ok_or_else(|| format!("there is no preset `{name}`; there are {}", names.join(", ")))
}

impl Synth {
    pub fn run(self) -> anyhow::Result<u8> {
        let style = "{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        let bar = ProgressBar::new(0).with_style(ProgressStyle::with_template(style).expect("a valid template"));
        let cancelled = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&cancelled);
        let handled = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed));
        drop(handled);
        let result = synth::write(self.preset, self.layers, self.seed, self.sparse, &self.output, &|done, all| {
            bar.set_length(all);
            bar.set_position(done);
            if cancelled.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        bar.finish_and_clear();
        result?;
        say(format_args!("wrote {}", self.output.display()));
        Ok(0)
    }
}
