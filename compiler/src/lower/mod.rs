//! lower.
pub mod step;
