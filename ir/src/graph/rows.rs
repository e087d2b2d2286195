//! What a quantized activation row holds beside its codes: it depends on the layouts of the weights that it meets.
//!
//! Deliberately absent: the order of these in memory.

use std::fmt;

/// Sums of a row's codes, which products need.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum RowSums {
    /// −128 × the sum of each 32 codes: what a product begins with whose codes stand for values less 128.
    Corrections32,
    /// −128 × the sum of each 16 codes.
    Corrections16,
    /// The sum of each 32 codes times their scale: what an offset is multiplied by.
    Scaled32,
    /// The sum of each 16 codes times their scale.
    Scaled16,
}

impl RowSums {
    /// All of them.
    pub const ALL: [RowSums; 4] =
        [RowSums::Corrections32, RowSums::Corrections16, RowSums::Scaled32, RowSums::Scaled16];

    /// The name in kernels' names.
    pub const fn name(self) -> &'static str {
        match self {
            RowSums::Corrections32 => "corrections32",
            RowSums::Corrections16 => "corrections16",
            RowSums::Scaled32 => "scaled32",
            RowSums::Scaled16 => "scaled16",
        }
    }

    /// Codes that are added up.
    pub const fn columns(self) -> usize {
        match self {
            RowSums::Corrections32 | RowSums::Scaled32 => 32,
            RowSums::Corrections16 | RowSums::Scaled16 => 16,
        }
    }

    /// Whether they are f32, times a scale; else they are 32-bit integers, times −128.
    pub const fn is_scaled(self) -> bool {
        matches!(self, RowSums::Scaled32 | RowSums::Scaled16)
    }
}

/// What a quantized activation row holds beside its codes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RowContent {
    /// Codes that share a scale. Longer spans cost fewer multiply-adds and more precision.
    pub span: usize,
    /// Which of [`RowSums::ALL`] it has.
    sums: [bool; RowSums::ALL.len()],
}

impl RowContent {
    /// No sums, and the longest span that any layout asks for.
    pub const NO_SUMS: RowContent = RowContent { span: 64, sums: [false; RowSums::ALL.len()] };

    /// A scale for each `span` codes, and these sums.
    pub const fn new(span: usize, sums: RowSums) -> RowContent {
        let mut content = RowContent { span, ..RowContent::NO_SUMS };
        content.sums[sums as usize] = true;
        content
    }

    /// What serves both: the finer span, the sums of either.
    pub fn and(self, other: RowContent) -> RowContent {
        let sums = std::array::from_fn(|i| self.sums[i] || other.sums[i]);
        RowContent { span: self.span.min(other.span), sums }
    }

    /// Whether it has these sums.
    pub const fn has(self, sums: RowSums) -> bool {
        self.sums[sums as usize]
    }

    /// The sums that it has, in order.
    pub fn sums(self) -> impl Iterator<Item = RowSums> {
        RowSums::ALL.into_iter().filter(move |&sums| self.has(sums))
    }
}

/// As in kernels' names, which do not mention the most common sums.
impl fmt::Display for RowContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s{}", self.span)?;
        if *self == RowContent::new(self.span, RowSums::Corrections32) {
            return Ok(());
        }
        self.sums().try_for_each(|sums| write!(f, "_{}", sums.name()))
    }
}
