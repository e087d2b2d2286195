//! From what the planner and the kernel generators wrote to machine code.
//!
//! * [`step`]: a program of the plan → the Cranelift IR of an entry point.
//! * [`cranelift`]: a kernel in tile IR → Cranelift IR, for every CPU.
//! * [`wide`]: a kernel in tile IR → machine code for x86-64 with vectors of 256 or 512 bits.
//! * [`backend`]: which code generator takes a kernel, and kernels as finished bytes.
//! * [`dump`]: both as text for people.
//!
//! Deliberately absent: decisions about the model, and object files ([`crate::emit`]).

pub mod backend;
pub mod cranelift;
pub mod dump;
pub mod step;
pub mod wide;

pub use cranelift::build_function;
