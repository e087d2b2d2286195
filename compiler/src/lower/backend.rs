//! Which code generator takes a kernel; and kernels as finished bytes.
//!
//! Every back end gives the same bits for the same tile IR, so the choice is about speed only. Cranelift takes every kernel
//! for every CPU; on x86-64 with vectors wider than 128 bits, [`super::wide`] does.

use cranelift_codegen::Context;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::UserFuncName;
use cranelift_codegen::isa::{CallConv, TargetIsa};
use cranelift_frontend::FunctionBuilderContext;
use moec_ir::tile;
use target_lexicon::{Architecture, Triple};

use super::build_function;
use super::wide::{self, Cpu};
use crate::target::{Core, CpuLevel, Tuning, cpu_name};

/// A code generator for kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KernelBackend {
    /// Cranelift, a logical vector in four 128-bit registers.
    Cranelift,
    /// The wide x86 back end, a logical vector in one or two registers.
    Wide(Cpu),
}

/// Machine code of one kernel, to be placed at any multiple of `alignment`: it refers to nothing outside itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CompiledKernel {
    /// The code, with the constants that it reads; entered at its first byte.
    pub code: Vec<u8>,
    /// In bytes, a power of two.
    pub alignment: u32,
}

/// A kernel that could not be compiled: a bug in moec.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("bug in moec: kernel `{kernel}` cannot be compiled for {target}: {reason}")]
pub struct CompileError {
    /// Its name.
    pub kernel: String,
    /// For what.
    pub target: String,
    /// What the code generator says.
    pub reason: String,
}

impl CompileError {
    /// Of the wide back end.
    pub(super) fn wide(function: &tile::Function, cpu: Cpu, reason: String) -> CompileError {
        CompileError { kernel: function.name.clone(), target: cpu.to_string(), reason }
    }
}

/// How kernels are best written for CPUs of `level`.
pub fn tuning(level: &CpuLevel, target: &Triple) -> Tuning {
    match KernelBackend::choose(level.features, target) {
        KernelBackend::Cranelift => Tuning::NARROW,
        KernelBackend::Wide(cpu) => Tuning::wide(cpu, Core::of(cpu_name(level, target), level.features)),
    }
}

impl KernelBackend {
    /// The best one for CPUs of a target with these [`moec_abi::features`].
    pub fn choose(features: u64, target: &Triple) -> KernelBackend {
        let wide = match (target.architecture, CallConv::triple_default(target)) {
            (Architecture::X86_64, CallConv::SystemV) => Cpu::new(features),
            _ => None,
        };
        wide.map_or(KernelBackend::Cranelift, KernelBackend::Wide)
    }

    /// Compiles `function`; `isa` is set up for the CPU ([`crate::target::isa_for`]).
    pub fn compile(self, function: &tile::Function, isa: &dyn TargetIsa) -> Result<CompiledKernel, CompileError> {
        match self {
            KernelBackend::Cranelift => compile_by_cranelift(function, isa),
            KernelBackend::Wide(cpu) => {
                wide::compile_kernel(function, cpu).map_err(|reason| CompileError::wide(function, cpu, reason))
            }
        }
    }
}

fn compile_by_cranelift(function: &tile::Function, isa: &dyn TargetIsa) -> Result<CompiledKernel, CompileError> {
    let failed = |reason: String| {
        let (kernel, target) = (function.name.clone(), isa.triple().to_string());
        CompileError { kernel, target, reason }
    };
    let built = build_function(function, UserFuncName::default(), isa, &mut FunctionBuilderContext::new());
    let mut compilation = Context::for_function(built);
    let compiled =
        compilation.compile(isa, &mut ControlPlane::default()).map_err(|e| failed(format!("{:?}", e.inner)))?;
    if let Some(reloc) = compiled.buffer.relocs().first() {
        return Err(failed(format!("it refers to something outside itself: {reloc:?}")));
    }
    Ok(CompiledKernel { code: compiled.buffer.data().to_vec(), alignment: compiled.buffer.alignment.max(64) })
}
