//! How the elements of stored tensors are kept: the types that moec reads, and the sizes of their blocks.
//!
//! Deliberately absent: turning blocks into numbers ([`super::dequantize`]).

/// How the elements of a stored weight are kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Dtype {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// GGUF: 8-bit integers, an f16 scale for 32.
    Q8_0,
    /// GGUF: 4-bit integers, an f16 scale for 32.
    Q4_0,
    /// GGUF: 4-bit integers, an f16 scale and an f16 offset for 32.
    Q4_1,
    /// GGUF: 5-bit integers, an f16 scale for 32.
    Q5_0,
    /// GGUF: 5-bit integers, an f16 scale and an f16 offset for 32.
    Q5_1,
    /// GGUF: 2-bit integers, 4-bit scales and offsets for 16, two f16 factors for 256.
    Q2K,
    /// GGUF: 3-bit integers, 6-bit scales for 16, an f16 factor for 256.
    Q3K,
    /// GGUF: 4-bit integers, 6-bit scales and offsets for 32, two f16 factors for 256.
    Q4K,
    /// GGUF: 5-bit integers, 6-bit scales and offsets for 32, two f16 factors for 256.
    Q5K,
    /// GGUF: 6-bit integers, 8-bit scales for 16, an f16 factor for 256.
    Q6K,
    /// GGUF: 4-bit codes into a fixed code book, an f16 scale for 32.
    Iq4Nl,
    /// GGUF: 4-bit codes into a fixed code book, 6-bit scales for 32, an f16 factor for 256.
    Iq4Xs,
    /// GGUF: 4-bit floats (E2M1), a power of two for 32.
    Mxfp4,
    /// 8-bit floats (E4M3, no infinities), scales in a tensor beside them.
    Fp8,
    /// 4-bit integers packed along columns, scales and zero points for groups of columns in tensors beside them.
    Gptq,
    /// 4-bit integers packed along rows, scales and zero points for groups of columns in tensors beside them.
    Awq,
}

impl Dtype {
    /// All of them.
    pub const ALL: [Dtype; 19] = [
        Dtype::F32,
        Dtype::Bf16,
        Dtype::F16,
        Dtype::Q8_0,
        Dtype::Q4_0,
        Dtype::Q4_1,
        Dtype::Q5_0,
        Dtype::Q5_1,
        Dtype::Q2K,
        Dtype::Q3K,
        Dtype::Q4K,
        Dtype::Q5K,
        Dtype::Q6K,
        Dtype::Iq4Nl,
        Dtype::Iq4Xs,
        Dtype::Mxfp4,
        Dtype::Fp8,
        Dtype::Gptq,
        Dtype::Awq,
    ];

    /// The name used in reports and messages.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
            Dtype::F16 => "f16",
            Dtype::Q8_0 => "Q8_0",
            Dtype::Q4_0 => "Q4_0",
            Dtype::Q4_1 => "Q4_1",
            Dtype::Q5_0 => "Q5_0",
            Dtype::Q5_1 => "Q5_1",
            Dtype::Q2K => "Q2_K",
            Dtype::Q3K => "Q3_K",
            Dtype::Q4K => "Q4_K",
            Dtype::Q5K => "Q5_K",
            Dtype::Q6K => "Q6_K",
            Dtype::Iq4Nl => "IQ4_NL",
            Dtype::Iq4Xs => "IQ4_XS",
            Dtype::Mxfp4 => "MXFP4",
            Dtype::Fp8 => "fp8",
            Dtype::Gptq => "gptq",
            Dtype::Awq => "awq",
        }
    }

    /// Whether every element is a number by itself.
    pub const fn is_float(self) -> bool {
        matches!(self, Dtype::F32 | Dtype::Bf16 | Dtype::F16)
    }

    /// Elements of a block and its bytes, for types whose rows are runs of blocks; those whose scales are in other tensors have none.
    pub const fn block(self) -> Option<(usize, usize)> {
        Some(match self {
            Dtype::F32 => (1, 4),
            Dtype::Bf16 | Dtype::F16 => (1, 2),
            Dtype::Q8_0 => (32, 34),
            Dtype::Q4_0 | Dtype::Iq4Nl => (32, 18),
            Dtype::Q4_1 => (32, 20),
            Dtype::Q5_0 => (32, 22),
            Dtype::Q5_1 => (32, 24),
            Dtype::Q2K => (256, 84),
            Dtype::Q3K => (256, 110),
            Dtype::Q4K => (256, 144),
            Dtype::Q5K => (256, 176),
            Dtype::Q6K => (256, 210),
            Dtype::Iq4Xs => (256, 136),
            Dtype::Mxfp4 => (32, 17),
            Dtype::Fp8 | Dtype::Gptq | Dtype::Awq => return None,
        })
    }

    /// Bytes of `elements` elements, a whole number of blocks; `None` when they are none, or too many.
    pub fn bytes(self, elements: usize) -> Option<usize> {
        let (block, bytes) = self.block()?;
        if elements.is_multiple_of(block) { (elements / block).checked_mul(bytes) } else { None }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
