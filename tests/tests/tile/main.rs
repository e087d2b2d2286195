//! The tile IR: its text, its verifier, its evaluator, and machine code that gives the evaluator's bits.

mod bits;
mod random;
mod text;
