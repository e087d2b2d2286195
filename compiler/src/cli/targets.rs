//! `moec targets`

use super::output::print_line;
use clap::Args;
use moec::kernels::Prefetch;
use moec::lower::backend::{self, KernelBackend};
use moec::target::machine::{self, Machine};
use moec::target::{self, CpuLevel, Tuning};
use moec::tune::shipped;
use moec_abi::LANES;
use target_lexicon::Triple;

/// `moec targets`
#[derive(Debug, Args)]
pub struct Targets {
    /// Show also how kernels are written for each CPU, which tuning record moec carries for it, and what this machine is
    #[arg(long, short)]
    verbose: bool,
}

/// How kernels of matrix products are written when nothing was measured.
fn defaults(level: &CpuLevel, triple: &Triple) -> String {
    let code = match KernelBackend::choose(level.features, triple) {
        KernelBackend::Cranelift => "128-bit vectors by Cranelift".to_string(),
        KernelBackend::Wide(cpu) => cpu.to_string(),
    };
    let Tuning {
        quantized, float, single_rows, activation_bytes, columns, ahead, many, small, small_single_rows, ..
    } = backend::tuning(level, triple);
    let rows = |tiles: usize| tiles * LANES;
    let small = match small && small_single_rows != single_rows {
        true => format!(" ({} of small values)", rows(small_single_rows)),
        false => String::new(),
    };
    format!(
        "{code}: {} rows × {} tokens for quantized weights, {} × {} for floats, {} rows{small} for one token; {} KiB of activations at a time{}{}{}",
        rows(quantized.rows),
        quantized.tokens,
        rows(float.rows),
        float.tokens,
        rows(single_rows),
        activation_bytes >> 10,
        if columns > 0 { format!(" and {columns} columns of long rows") } else { String::new() },
        if ahead { ", the next rows prefetched" } else { "" },
        if many == Prefetch::None { String::new() } else { format!(", {many}") }
    )
}

/// The record that moec carries for a level, and what it is from.
fn carried(level: &CpuLevel, triple: &Triple) -> Option<String> {
    let record = shipped::record(level, triple)?;
    let default = backend::tuning(level, triple);
    let other = record.products.iter().filter(|(shape, found)| default.product(**shape) != found.tuning).count();
    let shapes: Vec<String> = record.products.keys().map(ToString::to_string).collect();
    Some(format!(
        "measured on {} with {} threads for {} shapes of products, {other} of which are written otherwise: {}",
        record.machine.cpu,
        record.threads,
        shapes.len(),
        shapes.join(", ")
    ))
}

impl Targets {
    pub fn run(self) -> anyhow::Result<u8> {
        let (triple, host) = (Triple::host(), target::host());
        print_line(format_args!("{:<16} {:<5} {:<44} features", "--target-cpu", "runs", "which CPUs"))?;
        for level in std::iter::once(&target::native()).chain(target::levels(&triple)) {
            let runs = if level.features & !host == 0 { "yes" } else { "no" };
            let features = target::feature_names(level.features).join(" ");
            print_line(format_args!("{:<16} {runs:<5} {:<44} {features}", level.name, level.description))?;
            if self.verbose {
                print_line(format_args!("{:<22} {}", "", defaults(level, &triple)))?;
                if let Some(record) = carried(level, &triple) {
                    print_line(format_args!("{:<22} {record}", ""))?;
                }
            }
        }
        if self.verbose {
            let machine = Machine::this();
            let caches: Vec<String> =
                machine.caches.iter().map(|&bytes| indicatif::HumanBytes(bytes as u64).to_string()).collect();
            print_line(format_args!(
                "\nthis machine     {}{}, {} cores for this process, caches of {}",
                machine.cpu,
                target::named(&machine, host, &triple).map_or(String::new(), |level| format!(" ({})", level.name)),
                machine::cores(),
                caches.join(", ")
            ))?;
            print_line(
                "The choices above are moec's for each kind of CPU, and what was measured goes before them where it knows a shape; \
                 `moec tune MODEL -o FILE` measures others for a machine and a model.",
            )?;
        }
        Ok(0)
    }
}
