//! Kernels as text for people: Cranelift IR with the tile IR beside it, and machine code.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use cranelift_codegen::Context;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::entity::{EntityRef, SecondaryMap};
use cranelift_codegen::ir::{Block, Function, Inst, UserFuncName, Value};
use cranelift_codegen::isa::TargetIsa;
use cranelift_codegen::write::{FuncWriter, PlainWriter, decorate_function};
use cranelift_frontend::FunctionBuilderContext;
use moec_ir::tile::{self, text};

use super::backend::{CompileError, KernelBackend};
use super::cranelift::build_traced;
use super::wide;

/// The Cranelift IR of `function` before optimization, with each instruction of the tile IR as a comment before those it
/// became.
pub fn clif_with_comments(function: &tile::Function, isa: &dyn TargetIsa) -> String {
    let (built, trace) = build_traced(function, UserFuncName::default(), isa, &mut FunctionBuilderContext::new());
    let mut starts: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for (start, line) in trace.into_iter().zip(text::instruction_lines(function)) {
        starts.entry(start).or_default().push(line);
    }
    let mut text = format!("; {}\n", text::header(function));
    decorate_function(&mut Commented { starts }, &mut text, &built).expect("a String takes all text");
    text
}

/// The machine code of `function` as text, by the back end that compiles it.
///
/// # Errors
/// When it cannot be compiled, which is a bug in moec.
pub fn disassemble(
    function: &tile::Function,
    backend: KernelBackend,
    isa: &dyn TargetIsa,
) -> Result<String, CompileError> {
    match backend {
        KernelBackend::Cranelift => cranelift_listing(function, isa),
        KernelBackend::Wide(cpu) => {
            let compiled = wide::compile(function, cpu).map_err(|reason| CompileError::wide(function, cpu, reason))?;
            Ok(wide::listing::listing(function, &compiled))
        }
    }
}

fn cranelift_listing(function: &tile::Function, isa: &dyn TargetIsa) -> Result<String, CompileError> {
    let (built, _) = build_traced(function, UserFuncName::default(), isa, &mut FunctionBuilderContext::new());
    let mut compilation = Context::for_function(built);
    compilation.set_disasm(true);
    let compiled = compilation.compile(isa, &mut ControlPlane::default()).map_err(|e| CompileError {
        kernel: function.name.clone(),
        target: isa.triple().to_string(),
        reason: format!("{:?}", e.inner),
    })?;
    Ok(compiled.vcode.clone().expect("the listing was asked for"))
}

/// Writes instructions plainly, and before some of them comments: those of all instruction numbers up to theirs that have
/// not been written yet. Instructions are numbered in the order in which they were built, which is that of the text.
struct Commented {
    starts: BTreeMap<usize, Vec<String>>,
}

impl FuncWriter for Commented {
    fn write_block_header(&mut self, w: &mut dyn Write, func: &Function, block: Block, indent: usize) -> fmt::Result {
        PlainWriter.write_block_header(w, func, block, indent)
    }

    fn write_instruction(
        &mut self,
        w: &mut dyn Write,
        func: &Function,
        aliases: &SecondaryMap<Value, Vec<Value>>,
        inst: Inst,
        indent: usize,
    ) -> fmt::Result {
        while let Some(entry) = self.starts.first_entry() {
            if *entry.key() > inst.index() {
                break;
            }
            for line in entry.remove() {
                writeln!(w, "{:indent$}; {line}", "")?;
            }
        }
        PlainWriter.write_instruction(w, func, aliases, inst, indent)
    }
}
