//! The C API of a compiled model.
#![warn(missing_docs)]
