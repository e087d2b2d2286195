//! Opening model directories: what is accepted, what is refused and in which words, and that nothing panics.

mod accepted;
mod damaged;
mod model;
mod refused;
mod synth;
