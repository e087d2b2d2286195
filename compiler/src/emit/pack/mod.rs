//! Packing: writes the model's weights into the payload, each in its final format and place.
//!
//! [`Packing::write`] is the way in. The payload's map ([`crate::plan::payload`]) says what goes where; the work is cut
//! into pieces of a few megabytes ([`work`]) that threads take one after another: read rows ([`source`]), lay them out
//! in tiles ([`rows`]), encode ([`tile`]; [`exact`] for codes that are kept), write. Memory does not grow with the model, and the bytes do not depend on
//! the number of threads. [`values`] gives the same numbers to an evaluator.
//!
//! Bytes between items and after padded tensors are not written: the file must be new there, so that they read as
//! zeros. Deliberately absent: the payload's header, metadata and tokenizer, and who makes and renames the file.

mod error;
mod exact;
mod report;
mod rotary;
mod rows;
mod source;
mod tile;
mod values;
mod work;

pub use error::{PackError, Place};
pub use report::{PackReport, Packed};
pub use rotary::{Rotation, rotations};
pub use source::{RowSource, SourceError};
pub use values::{Stored, float_rows, quantized_rows};

use crate::import::Rope;
use crate::plan::payload::PayloadItem;
use std::fs::File;
use std::sync::atomic::AtomicBool;

/// Everything that packing needs to know.
pub struct Packing<'a> {
    /// What to write.
    pub items: &'a [PayloadItem],
    /// Where the weights come from.
    pub source: &'a dyn RowSource,
    /// What the rotary tables are computed from.
    pub rope: Rope,
    /// Elements of a head.
    pub head_dim: usize,
    /// Threads to use, at least 1.
    pub threads: usize,
    /// Called with the bytes done and the bytes of all items, by any thread, in no particular order.
    pub progress: &'a (dyn Fn(u64, u64) + Sync),
    /// Set to stop soon with [`PackError::Cancelled`].
    pub cancel: &'a AtomicBool,
}

impl Packing<'_> {
    /// Writes all items into `file`, in which the payload starts at byte `start`.
    ///
    /// # Errors
    /// Weights that cannot be read or are not finite or too large for their format, a full disk, cancellation. What was
    /// written until then stays in the file.
    pub fn write(&self, file: &File, start: u64) -> Result<PackReport, PackError> {
        work::run(self, file, start)
    }
}
