//! From a model directory to a checked configuration, a table of stored weights and the tokenizer's files.

pub mod config;
pub mod tensors;

pub use config::{Architecture, Experts, ModelConfig, Rope, RopeScaling};
pub use tensors::{Dtype, TensorInfo};
