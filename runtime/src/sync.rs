//! The atomics of the [barrier](crate::barrier): one place, so that a test can put a model's in theirs.

pub use std::hint::spin_loop;
pub use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};

/// How often a worker looks before it asks for the time.
pub const BURST: u32 = 64;
