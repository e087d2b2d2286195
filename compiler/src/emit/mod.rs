//! What the compiler writes: the payload, the object, the executable.

pub mod pack;
