//! The compiler.

// pub mod emit;
pub mod import;
pub mod kernels;
pub mod lower;
pub mod passes;
pub mod plan;
pub mod target;
