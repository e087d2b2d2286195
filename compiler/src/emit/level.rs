//! The code of one CPU level — kernels, and the entry points that call them — defined in a module: that of an object file, or one in memory.
//!
//! Deliberately absent: what is in the code ([`crate::plan`], [`crate::lower`]), and what is around it ([`super::object`]).

use super::EmitError;
use crate::kernels::Kernel;
use crate::lower::backend::KernelBackend;
use crate::lower::step::{ScratchSizes, build_step, entry_signature, kernel_signature};
use crate::plan::program::Program;
use crate::plan::{Plan, Programs};
use crate::target::CpuLevel;
use cranelift_codegen::Context;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::{Function, UserFuncName};
use cranelift_codegen::isa::OwnedTargetIsa;
use cranelift_frontend::FunctionBuilderContext;
use cranelift_module::{FuncId, Linkage, Module, ModuleReloc};
use std::collections::HashMap;

/// A CPU level and the code generator set up for it.
pub struct LevelTarget {
    /// The level.
    pub level: CpuLevel,
    /// Cranelift, with the level's features.
    pub isa: OwnedTargetIsa,
}

/// The entry points of one level.
#[derive(Clone, Copy, Debug)]
pub struct Entries {
    /// For one token.
    pub decode: FuncId,
    /// For many.
    pub batch: FuncId,
}

/// Defines `programs` of `plan` for `target` in `module`, in functions whose names begin with `prefix`. The module's own features do not matter.
///
/// # Errors
/// When a function cannot be compiled, which is a bug in moec: the error carries its name.
pub fn define_level(
    module: &mut impl Module,
    plan: &Plan,
    programs: &Programs,
    target: &LevelTarget,
    prefix: &str,
) -> Result<Entries, EmitError> {
    let mut level = Level { module, context: FunctionBuilderContext::new(), plan, target, prefix };
    let mut kernels = HashMap::new();
    for kernel in programs.kernels() {
        let id = level.kernel(&kernel)?;
        kernels.insert(kernel, id);
    }
    let decode = level.entry(&programs.decode, &kernels, "decode")?;
    let batch = level.entry(&programs.batch, &kernels, "batch")?;
    Ok(Entries { decode, batch })
}

struct Level<'a, M> {
    module: &'a mut M,
    context: FunctionBuilderContext,
    plan: &'a Plan,
    target: &'a LevelTarget,
    prefix: &'a str,
}

impl<M: Module> Level<'_, M> {
    fn kernel(&mut self, kernel: &Kernel) -> Result<FuncId, EmitError> {
        let isa = &*self.target.isa;
        let tile = kernel.generate();
        let name = format!("{}_{}", self.prefix, tile.name);
        let signature = kernel_signature(isa.default_call_conv(), tile.params.len());
        let id = self.module.declare_function(&name, Linkage::Local, &signature).map_err(EmitError::module)?;
        let backend = KernelBackend::choose(self.target.level.features, isa.triple());
        let compiled = backend
            .compile(&tile, isa)
            .map_err(|error| EmitError::Compile { function: name.clone(), error: error.to_string() })?;
        let alignment = u64::from(compiled.alignment);
        self.module.define_function_bytes(id, alignment, &compiled.code, &[]).map_err(EmitError::module)?;
        Ok(id)
    }

    fn entry(&mut self, program: &Program, kernels: &HashMap<Kernel, FuncId>, name: &str) -> Result<FuncId, EmitError> {
        let isa = &*self.target.isa;
        let name = format!("{}_{name}", self.prefix);
        let signature = entry_signature(isa.default_call_conv());
        let id = self.module.declare_function(&name, Linkage::Local, &signature).map_err(EmitError::module)?;
        let sizes = ScratchSizes { shared: self.plan.scratch_bytes, worker: self.plan.worker_scratch_bytes };
        let module = &mut *self.module;
        let function = build_step(
            UserFuncName::user(0, id.as_u32()),
            program,
            sizes,
            isa.frontend_config(),
            &mut self.context,
            |kernel, function| module.declare_func_in_func(kernels[kernel], function),
        );
        self.define(id, &name, function)?;
        Ok(id)
    }

    /// Compiles for the level, which may have other features than the module's own.
    fn define(&mut self, id: FuncId, name: &str, function: Function) -> Result<(), EmitError> {
        let mut context = Context::for_function(function);
        let compiled = context
            .compile(&*self.target.isa, &mut ControlPlane::default())
            .map_err(|e| EmitError::Compile { function: name.to_string(), error: format!("{:?}", e.inner) })?;
        let alignment = u64::from(compiled.buffer.alignment).max(64);
        let bytes = compiled.buffer.data().to_vec();
        let relocs = compiled.buffer.relocs().to_vec();
        let relocs: Vec<ModuleReloc> =
            relocs.iter().map(|r| ModuleReloc::from_mach_reloc(r, &context.func, id)).collect();
        self.module.define_function_bytes(id, alignment, &bytes, &relocs).map_err(EmitError::module)
    }
}
