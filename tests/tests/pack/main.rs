//! Packing: every arrangement and format is read back by a reader that shares no code with the writer.

mod failures;
mod layouts;
mod losses;
mod model;
mod reader;
mod speed;
