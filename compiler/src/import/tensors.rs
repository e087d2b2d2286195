//! The stored weights under moec's names.

/// How the elements of a stored weight are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }
}

/// What is known of a weight without reading it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TensorInfo {
    /// The type all elements fit in exactly: the stored one, or f32 where the pieces (experts) differ.
    pub dtype: Dtype,
    /// `[n]` for norms, `[rows, cols]` for matrices, `[experts, rows, cols]` for experts.
    pub shape: Vec<usize>,
}
