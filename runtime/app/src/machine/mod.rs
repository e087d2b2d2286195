//! What the machine can do: bytes read from memory and multiply-adds in registers, by all of a model's threads.
//!
//! Deliberately absent: caches, latencies, writes. A decoded token is bound by reading, a prefilled one by arithmetic.

mod peak;
mod reading;

pub use peak::Peak;
pub use reading::ReadSweep;
