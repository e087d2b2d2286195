//! Opening model directories: what is accepted, what is refused and in which words, and that nothing panics.

mod accepted;
mod damaged;
mod gguf;
mod model;
mod packed;
mod refused;
mod synth;
