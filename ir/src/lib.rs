//! The two intermediate representations of moec.
//!
//! * [`graph`]: *what* a model computes — tensors and operations, read, rewritten by passes, and planned.
//! * [`tile`]: *how* one kernel computes it — straight-line code and counted loops on logical vectors of 16 lanes.
//!
//! Both print as text, parse back, are verified, and are run by evaluators that define the bits every lowering must give.
//! [`math`] holds the elementary functions both share. Deliberately absent: anything about files, CPUs or memory plans.

pub mod graph;
pub mod math;
pub mod tile;
