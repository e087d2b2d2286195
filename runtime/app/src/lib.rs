//! The command line of a compiled model.
