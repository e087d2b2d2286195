//! Kernels as machine code in executable memory of this process.
//!
//! Deliberately absent: memory for what they work on ([`super::workload`]).

use crate::kernels::{Dot, Kernel};
use crate::lower::backend::{self, CompileError, KernelBackend};
use crate::plan::layout::Format;
use crate::target::{self, CpuLevel, TargetError};
use cranelift_codegen::isa::OwnedTargetIsa;
use memmap2::{Mmap, MmapMut};
use moec_ir::tile::Function;
use target_lexicon::Triple;

/// Most parameters of a kernel.
const PARAMS: usize = 8;

/// Why kernels cannot be run here.
#[derive(Debug, thiserror::Error)]
pub enum CodeError {
    /// The level needs what this CPU has not.
    #[error(
        "this machine cannot run code for {level}: it lacks {missing}; tune for a CPU that it can run (`moec targets`)"
    )]
    CannotRun {
        /// The level's name.
        level: &'static str,
        /// The features that are missing.
        missing: String,
    },
    /// There is no code for the target.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A kernel does not compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The system gives no memory for code.
    #[error("cannot get executable memory: {0}; measuring needs a system that allows it")]
    Memory(std::io::Error),
}

impl CodeError {
    /// Fails when this machine lacks a feature of `level`.
    ///
    /// # Errors
    /// Which features are missing.
    pub fn unless_runnable(level: CpuLevel) -> Result<(), CodeError> {
        let missing = level.features & !target::host();
        if missing == 0 {
            return Ok(());
        }
        let missing = target::feature_names(missing).join(", ");
        Err(CodeError::CannotRun { level: level.name, missing })
    }
}

/// Compiles kernels for one level and runs them here.
pub struct Compiler {
    level: CpuLevel,
    backend: KernelBackend,
    isa: OwnedTargetIsa,
}

impl Compiler {
    /// For `level`, whose features this machine has.
    ///
    /// # Errors
    /// When it has not, or there is no code generator.
    pub fn new(level: CpuLevel) -> Result<Compiler, CodeError> {
        CodeError::unless_runnable(level)?;
        let triple = Triple::host();
        let backend = KernelBackend::choose(level.features, &triple);
        Ok(Compiler { level, backend, isa: target::isa_for(level.features, &triple)? })
    }

    /// The same, but by `backend`.
    pub fn by(self, backend: KernelBackend) -> Compiler {
        Compiler { backend, ..self }
    }

    /// The level.
    pub fn level(&self) -> CpuLevel {
        self.level
    }

    /// The back end that models get for this level.
    pub fn backend(&self) -> KernelBackend {
        self.backend
    }

    /// What the fastest products of codes are made of at this level.
    pub fn fastest_dot(&self) -> Dot {
        self.dot(Format::Q4)
    }

    /// What products of weights in `format` are made of at this level.
    pub fn dot(&self, format: Format) -> Dot {
        backend::tuning(&self.level, &Triple::host()).dot(format)
    }

    /// Compiles a kernel.
    ///
    /// # Errors
    /// A bug of a back end, or no memory for code.
    pub fn kernel(&self, kernel: impl Into<Kernel>) -> Result<Code, CodeError> {
        self.function(&kernel.into().generate())
    }

    /// Bytes of the code of a function; `None` when it does not compile.
    pub fn kernel_bytes(&self, function: &Function) -> Option<usize> {
        Some(self.backend.compile(function, &*self.isa).ok()?.code.len())
    }

    /// Compiles any function of up to eight integers.
    ///
    /// # Errors
    /// As [`Compiler::kernel`].
    pub fn function(&self, function: &Function) -> Result<Code, CodeError> {
        let compiled = self.backend.compile(function, &*self.isa)?;
        let mut code = MmapMut::map_anon(compiled.code.len()).map_err(CodeError::Memory)?;
        code.copy_from_slice(&compiled.code);
        Ok(Code { code: code.make_exec().map_err(CodeError::Memory)? })
    }
}

/// Machine code that can be called.
pub struct Code {
    code: Mmap,
}

impl Code {
    /// Calls it.
    ///
    /// # Panics
    /// With more than eight arguments.
    ///
    /// # Safety
    /// The arguments must be what the function's contract asks for, and nobody else may touch the memory that it writes.
    pub unsafe fn call(&self, args: &[i64]) {
        let mut all = [0; PARAMS];
        all[..args.len()].copy_from_slice(args);
        // SAFETY: the memory holds a function of at most eight integers by the C convention, which ignores surplus ones.
        let f: extern "C" fn(i64, i64, i64, i64, i64, i64, i64, i64) =
            unsafe { std::mem::transmute(self.code.as_ptr()) };
        f(all[0], all[1], all[2], all[3], all[4], all[5], all[6], all[7]);
    }
}
