//! The weight table's entries: what a matrix is for, how it is stored in the model, and how it will lie in the payload.
//!
//! A graph knows weights by name, shape and type only. Deliberately absent: their numbers (the importer's tensor table and the
//! evaluator's [`WeightSource`](super::eval::WeightSource) have them) and where they lie in the payload.

use std::fmt;

use super::rows::{RowContent, RowSums};
use super::types::WeightId;

/// The type of a tensor in the model file.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum DType {
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// Small integers with scales, which this layout holds exactly; one of [`Layout::EXACT`].
    Codes(Layout),
    /// Small integers with scales, of a format that no layout but f32 holds exactly.
    Packed,
}

impl DType {
    /// All of them.
    pub fn all() -> impl Iterator<Item = DType> {
        let exact = Layout::EXACT.into_iter().map(DType::Codes);
        [DType::F32, DType::Bf16, DType::F16, DType::Packed].into_iter().chain(exact)
    }

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::Codes(layout) => layout.name(),
            DType::Packed => "packed",
        }
    }

    /// The type named `name` in text form.
    pub fn from_name(name: &str) -> Option<DType> {
        DType::all().find(|d| d.name() == name)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a weight is to lie in the payload.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Layout {
    /// In the type it is stored in; resolved to one of the others before the plan.
    Stored,
    /// IEEE single.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// 8-bit codes with a scale for 32.
    Q8,
    /// 4-bit codes with a scale for 32.
    Q4,
    /// What GGUF's Q8_0 and Q5_0 hold: integers in 8 bits, an f16 scale for 32.
    Q8_0,
    /// What GGUF's Q5_1 holds: integers in 8 bits, an f16 scale and an f16 offset for 32.
    Q5_1,
    /// What GGUF's Q5_K holds: integers in 8 bits; for 32 a small integer times an f16 factor is the scale, another the offset.
    Q5K,
    /// What GGUF's Q4_0 holds: integers in 4 bits, an f16 scale for 32.
    Q4_0,
    /// What GGUF's Q4_1 holds: integers in 4 bits, an f16 scale and an f16 offset for 32.
    Q4_1,
    /// What GGUF's Q4_K, GPTQ and AWQ hold: integers in 4 bits; for 32 a small integer times an f16 factor is the scale, another the offset.
    Q4K,
    /// What GGUF's IQ4_NL holds: 4 bits that number the values of a code book, an f16 scale for 32.
    Iq4Nl,
    /// What GGUF's MXFP4 holds: 4-bit floats, a power of two for 32.
    Mxfp4,
    /// What GGUF's Q6_K holds: integers in 8 bits; for 16 a small integer times an f16 factor is the scale.
    Q6K,
    /// What GGUF's Q3_K holds: integers in 4 bits; for 16 a small integer times an f16 factor is the scale.
    Q3K,
    /// What GGUF's Q2_K holds: integers in 4 bits; for 16 a small integer times an f16 factor is the scale, another the offset.
    Q2K,
    /// What GGUF's IQ4_XS holds: 4 bits that number the values of a code book; for 32 a small integer times an f16 factor is the scale.
    Iq4Xs,
}

impl Layout {
    /// All of them.
    pub const ALL: [Layout; 18] = [
        Layout::Stored,
        Layout::F32,
        Layout::Bf16,
        Layout::F16,
        Layout::Q8,
        Layout::Q4,
        Layout::Q8_0,
        Layout::Q5_1,
        Layout::Q5K,
        Layout::Q4_0,
        Layout::Q4_1,
        Layout::Q4K,
        Layout::Iq4Nl,
        Layout::Mxfp4,
        Layout::Q6K,
        Layout::Q3K,
        Layout::Q2K,
        Layout::Iq4Xs,
    ];

    /// Those that keep the codes and scales of a stored format as they are. Only a weight of that format can have them.
    pub const EXACT: [Layout; 12] = [
        Layout::Q8_0,
        Layout::Q5_1,
        Layout::Q5K,
        Layout::Q4_0,
        Layout::Q4_1,
        Layout::Q4K,
        Layout::Iq4Nl,
        Layout::Mxfp4,
        Layout::Q6K,
        Layout::Q3K,
        Layout::Q2K,
        Layout::Iq4Xs,
    ];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Layout::Stored => "stored",
            Layout::F32 => "f32",
            Layout::Bf16 => "bf16",
            Layout::F16 => "f16",
            Layout::Q8 => "q8",
            Layout::Q4 => "q4",
            Layout::Q8_0 => "q8_0",
            Layout::Q5_1 => "q5_1",
            Layout::Q5K => "q5_k",
            Layout::Q4_0 => "q4_0",
            Layout::Q4_1 => "q4_1",
            Layout::Q4K => "q4_k",
            Layout::Iq4Nl => "iq4_nl",
            Layout::Mxfp4 => "mxfp4",
            Layout::Q6K => "q6_k",
            Layout::Q3K => "q3_k",
            Layout::Q2K => "q2_k",
            Layout::Iq4Xs => "iq4_xs",
        }
    }

    /// The layout named `name` in text form.
    pub fn from_name(name: &str) -> Option<Layout> {
        Layout::ALL.into_iter().find(|l| l.name() == name)
    }

    /// Whether it meets quantized activation rows.
    pub const fn is_quantized(self) -> bool {
        !matches!(self, Layout::Stored | Layout::F32 | Layout::Bf16 | Layout::F16)
    }

    /// Whether it is one of [`Layout::EXACT`].
    pub const fn is_exact(self) -> bool {
        self.is_quantized() && !matches!(self, Layout::Q8 | Layout::Q4)
    }

    /// Whether a weight is `scale × code + offset`, with codes from 0 on, and not `scale × value`.
    pub const fn has_offsets(self) -> bool {
        matches!(self, Layout::Q5_1 | Layout::Q5K | Layout::Q4_1 | Layout::Q4K | Layout::Q2K)
    }

    /// Columns of a row that share a scale, and an offset where there are any; of the float layouts, columns that need not be kept together.
    pub const fn scale_columns(self) -> usize {
        if matches!(self, Layout::Q6K | Layout::Q3K | Layout::Q2K) { 16 } else { 32 }
    }

    /// What an activation row holds when it meets this layout alone. Stored codes meet rows whose scales are as fine as those that llama.cpp lets them
    /// meet: with a scale for 64, rounding adds 0.0060 to the mean NLL of SmolLM2 at Q8_0, with one for 32 it adds 0.0037, and there 0.0036. What moec
    /// quantizes meets rows with a scale for 64, which cost fewer multiply-adds.
    pub const fn row(self) -> RowContent {
        if !self.is_quantized() {
            return RowContent::NO_SUMS;
        }
        RowContent::new(if self.is_exact() { 32 } else { 64 }, self.row_sums())
    }

    /// The sums of an activation row's codes that a product with it needs, if it is quantized.
    pub const fn row_sums(self) -> RowSums {
        match (self.has_offsets(), self.scale_columns()) {
            (false, 16) => RowSums::Corrections16,
            (false, _) => RowSums::Corrections32,
            (true, 16) => RowSums::Scaled16,
            (true, _) => RowSums::Scaled32,
        }
    }

    /// What it is for a weight stored as `stored`: never [`Layout::Stored`].
    pub const fn resolve(self, stored: DType) -> Layout {
        match (self, stored) {
            (Layout::Stored, DType::F32 | DType::Packed) => Layout::F32,
            (Layout::Stored, DType::Bf16) => Layout::Bf16,
            (Layout::Stored, DType::F16) => Layout::F16,
            (Layout::Stored, DType::Codes(layout)) => layout,
            (layout, _) => layout,
        }
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a weight is for: the unit in which users choose quantization.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Role {
    /// Rows looked up by token.
    Embedding,
    /// Vectors of RMS norms.
    Norm,
    /// Vectors that are added to products.
    Bias,
    /// Projections to q, k, v and from the heads.
    Attention,
    /// Scores of the experts.
    Router,
    /// Matrices of the experts.
    Experts,
    /// Matrices of a dense FFN.
    Ffn,
    /// Projection to logits.
    Output,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 8] = [
        Role::Embedding,
        Role::Norm,
        Role::Bias,
        Role::Attention,
        Role::Router,
        Role::Experts,
        Role::Ffn,
        Role::Output,
    ];

    /// The name in text form.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Embedding => "embedding",
            Role::Norm => "norm",
            Role::Bias => "bias",
            Role::Attention => "attention",
            Role::Router => "router",
            Role::Experts => "experts",
            Role::Ffn => "ffn",
            Role::Output => "output",
        }
    }

    /// The role named `name` in text form.
    pub fn from_name(name: &str) -> Option<Role> {
        Role::ALL.into_iter().find(|r| r.name() == name)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where a weight's rows come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// From the model, under the weight's name.
    Stored,
    /// The rows of these weights, one weight after another; a weight `[E, rows, columns]` counts as `E × rows` rows.
    Rows(Vec<WeightId>),
    /// The rows of a gate and of an up projection of one shape, to be read together: packing lays down a tile of 16 rows of each in turn.
    GateUp(WeightId, WeightId),
}

impl Source {
    /// The weights it is composed of.
    pub fn parts(&self) -> Vec<WeightId> {
        match self {
            Source::Stored => Vec::new(),
            Source::Rows(parts) => parts.clone(),
            Source::GateUp(gate, up) => vec![*gate, *up],
        }
    }

    /// Calls `visit` on each weight it is composed of, to change which it is.
    pub(super) fn visit_parts(&mut self, visit: &mut dyn FnMut(&mut WeightId)) {
        match self {
            Source::Stored => {}
            Source::Rows(parts) => parts.iter_mut().for_each(visit),
            Source::GateUp(gate, up) => {
                visit(gate);
                visit(up);
            }
        }
    }
}

/// Some experts of a weight, whose matrices lie in another layout than those of the others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Exception {
    /// Their layout: quantized like that of the others, or not like it, so that all meet the same rows.
    pub layout: Layout,
    /// Which, rising: some, not all.
    pub experts: Vec<usize>,
}

/// An entry of the weight table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Weight {
    /// Unique in its graph; the key to the model's tensors when the source is [`Source::Stored`].
    pub name: String,
    /// What it is for.
    pub role: Role,
    /// The type of its elements in the model. Of a composed weight: the common type of its parts, or f32 when they differ.
    pub stored: DType,
    /// How it will lie in the payload.
    pub layout: Layout,
    /// The experts for which `layout` does not hold.
    pub exception: Option<Exception>,
    /// `[length]` (norms and biases), `[rows, columns]`, or `[experts, rows, columns]`.
    pub shape: Vec<usize>,
    /// Where its rows come from.
    pub source: Source,
}

impl Weight {
    /// The layout with [`Layout::Stored`] resolved.
    pub fn format(&self) -> Layout {
        self.layout.resolve(self.stored)
    }

    /// The layout of the matrix of one expert, resolved.
    pub fn format_of(&self, expert: usize) -> Layout {
        match &self.exception {
            Some(Exception { layout, experts }) if experts.contains(&expert) => *layout,
            Some(_) | None => self.format(),
        }
    }

    /// The layouts that its matrices have, resolved: that of the exception last.
    pub fn formats(&self) -> Vec<Layout> {
        std::iter::once(self.format()).chain(self.exception.as_ref().map(|exception| exception.layout)).collect()
    }

    /// Elements of a row: what it is multiplied with.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Rows of one matrix; 1 for a vector.
    pub fn rows(&self) -> usize {
        if self.shape.len() < 2 { 1 } else { self.shape[self.shape.len() - 2] }
    }

    /// Matrices: 1 unless it has an axis of experts.
    pub fn experts(&self) -> usize {
        if self.shape.len() < 3 { 1 } else { self.shape[0] }
    }

    /// Elements of all.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}
