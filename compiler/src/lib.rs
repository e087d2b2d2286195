//! The compiler.

pub mod import;
pub mod kernels;
pub mod lower;
pub mod passes;
pub mod plan;
pub mod synth;
