//! `moec inspect`

use super::build::BuildOptions;
use super::output::{print_line, say};
use anyhow::bail;
use clap::Args;
use moec::import;
use moec::lower::backend::KernelBackend;
use moec::lower::dump;
use moec::passes::PassId;
use moec::pipeline;
use moec::target;
use moec_ir::graph::Mode;
use std::path::PathBuf;

/// When to look at the graphs.
#[derive(Clone, Copy, Debug)]
enum After {
    /// Before all passes.
    Import,
    /// After this one.
    Pass(PassId),
}

impl std::str::FromStr for After {
    type Err = <PassId as std::str::FromStr>::Err;
    fn from_str(text: &str) -> Result<After, Self::Err> {
        if text == "import" { Ok(After::Import) } else { text.parse().map(After::Pass) }
    }
}

/// `moec inspect`
#[derive(Debug, Args)]
pub struct Inspect {
    /// The model's directory, or a .gguf file
    model: PathBuf,
    #[command(flatten)]
    options: BuildOptions,
    /// Show the graphs after this pass; `import` for the graphs before all passes
    #[arg(long, value_name = "PASS")]
    after: Option<After>,
    /// Show the rewrites that the passes did, numbered for --stop-after-rewrites
    #[arg(long)]
    rewrites: bool,
    /// Show the plan: payload, buffers, stages, barriers
    #[arg(long)]
    plan: bool,
    /// Show a kernel in tile IR; `all` lists the kernels' names
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// Show a kernel as Cranelift IR, with our IR as comments
    #[arg(long, value_name = "NAME")]
    clif: Option<String>,
    /// Show a kernel's machine code, with our IR as comments where the wide x86 back end made it
    #[arg(long, value_name = "NAME")]
    asm: Option<String>,
}

impl Inspect {
    pub fn run(self) -> anyhow::Result<u8> {
        let mut options = self.options.resolve()?;
        let model = import::open(&self.model)?;
        if let Some(pass) = &self.after {
            for mode in Mode::ALL {
                match *pass {
                    After::Import => print_line(import::build::build_graph(&model.config, &model.tensors, mode))?,
                    After::Pass(pass) => {
                        options.stop_after = Some(pass);
                        print_line(pipeline::rewrite(&model, &options, mode)?.0)?;
                    }
                }
            }
            return Ok(0);
        }
        let compiled = pipeline::compile(&model, &options)?;
        for note in &compiled.tuned.notes {
            say(format_args!("moec: warning: {note}"));
        }
        if self.rewrites {
            for (graph, trace) in [&compiled.decode, &compiled.batch].into_iter().zip(&compiled.traces) {
                print_line(format_args!("{}:\n{trace}", graph.mode()))?;
            }
        }
        if self.plan {
            print_line(&compiled.plan)?;
        }
        let kernels = compiled.plan.levels[0].kernels();
        let find = |name: &str| match kernels.iter().find(|k| k.name() == name) {
            Some(kernel) => Ok(kernel.generate()),
            None => bail!("there is no kernel `{name}`; `--kernel all` lists the kernels of this model"),
        };
        let isa = target::isa_for(options.levels[0].features, &options.target)?;
        let backend = KernelBackend::choose(options.levels[0].features, &options.target);
        match self.kernel.as_deref() {
            Some("all") => kernels.iter().try_for_each(|k| print_line(k.name()))?,
            Some(name) => print_line(find(name)?)?,
            None => {}
        }
        if let Some(name) = &self.clif {
            print_line(dump::clif_with_comments(&find(name)?, &*isa))?;
        }
        if let Some(name) = &self.asm {
            print_line(dump::disassemble(&find(name)?, backend, &*isa)?)?;
        }
        if !self.rewrites && !self.plan && self.kernel.is_none() && self.clif.is_none() && self.asm.is_none() {
            print_line(format_args!("{}\n{}", compiled.decode, compiled.batch))?;
        }
        Ok(0)
    }
}
