//! moec: an ahead-of-time compiler for mixture-of-experts language models.
//!
//! Read [`pipeline`] first: it is the table of contents.
#![warn(missing_docs)]

pub mod build_script;
mod disk;
pub mod emit;
pub mod expert_bits;
pub mod expert_profile;
pub mod import;
pub mod kernels;
pub mod lower;
pub mod passes;
pub mod pipeline;
pub mod plan;
pub mod predict;
pub mod report;
pub mod score;
pub mod synth;
pub mod target;
pub mod tune;

pub use build_script::build;
