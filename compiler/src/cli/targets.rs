//! `moec targets`

use super::output::print_line;
use clap::Args;
use moec::target;
use target_lexicon::Triple;

/// `moec targets`
#[derive(Debug, Args)]
pub struct Targets {}

impl Targets {
    pub fn run(self) -> anyhow::Result<u8> {
        let (triple, host) = (Triple::host(), target::host());
        print_line(format_args!("{:<16} {:<5} {:<44} features", "--target-cpu", "runs", "which CPUs"))?;
        print_line(format_args!(
            "{:<16} {:<5} {:<44} {}",
            "native",
            "yes",
            "this machine",
            target::feature_names(host).join(" ")
        ))?;
        for level in target::levels(&triple) {
            let runs = if level.features & !host == 0 { "yes" } else { "no" };
            let features = target::feature_names(level.features).join(" ");
            print_line(format_args!("{:<16} {runs:<5} {:<44} {features}", level.name, level.description))?;
        }
        Ok(0)
    }
}
