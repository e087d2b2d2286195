//! The graph IR: what a model computes.
//!
//! A [`Graph`] is a schedule of [`Node`]s, each an [`Op`] that reads values and at most one weight and defines values. The importer builds
//! one graph for each [`Mode`]; passes rewrite it by [`Patch`]es; the plan reads it. It prints as text ([`Graph`]'s `Display`), the
//! text parses back, [`verify`] checks it by [`Stage`], and the evaluator runs it.
//!
//! ```text
//! graph decode imported {
//!   @embed : bf16[384, 128] embedding
//!   @norm : bf16[128] norm
//!   @output : bf16[384, 128] output
//!
//!   %0 = embed @embed : f32[T, 128]
//!   %1 = select_rows %0 : f32[L, 128]
//!   %2 = rms_norm %1, @norm {eps=1e-5} : f32[L, 128]
//!   %3 = matmul %2, @output : f32[L, 384]
//!   output %3
//! }
//! ```
//!
//! Deliberately absent: memory, workers, kernels' inner workings, and the weights' numbers.

mod attribute;
pub mod eval;
mod infer;
mod kernel;
mod op;
mod parse;
mod patch;
mod print;
mod rows;
mod store;
mod types;
mod verify;
mod weight;

pub use attribute::{Activation, Dispatch, Operand, Scores, Selection};
pub use kernel::{Kernel, Rows};
pub use op::{Op, Origin};
pub use parse::{Lines, ParseError, parse, parse_with_lines};
pub use patch::{Patch, PatchError};
pub use rows::{RowContent, RowSums};
pub use store::{BuildError, Graph, Node};
pub use types::{Dim, Kind, Mode, NodeId, Stage, Type, ValueId, WeightId};
pub use verify::{Place, VerifyError, verify};
pub use weight::{DType, Exception, Layout, Role, Source, Weight};
