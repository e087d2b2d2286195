//! Values while a graph is evaluated.

use super::super::types::Type;
use crate::math;

/// Elements of K that share a weight scale.
pub(super) const BLOCK: usize = 32;

/// A value.
#[derive(Clone, PartialEq, Debug)]
pub enum Tensor {
    /// Row after row.
    F32(Vec<f32>),
    /// Row after row.
    I32(Vec<i32>),
    /// Quantized rows.
    Q8(QuantizedRows),
    /// The cache has it.
    Kv,
}

impl Tensor {
    /// The numbers of an f32 value.
    ///
    /// # Panics
    /// If it is of another kind.
    pub fn f32s(&self) -> &[f32] {
        match self {
            Tensor::F32(numbers) => numbers,
            Tensor::I32(_) | Tensor::Q8(_) | Tensor::Kv => panic!("expected f32 values"),
        }
    }

    /// The numbers of an i32 value.
    ///
    /// # Panics
    /// If it is of another kind.
    pub fn i32s(&self) -> &[i32] {
        match self {
            Tensor::I32(numbers) => numbers,
            Tensor::F32(_) | Tensor::Q8(_) | Tensor::Kv => panic!("expected i32 values"),
        }
    }
}

/// Elements that a head of `head_dim` takes in memory: each half padded to a multiple of 16.
pub fn padded_head_dim(head_dim: usize) -> usize {
    2 * head_dim.div_ceil(2).next_multiple_of(16)
}

/// A row with its heads padded.
pub(super) fn pad_heads(row: &[f32], head_dim: usize) -> Vec<f32> {
    let (padded, half) = (padded_head_dim(head_dim), head_dim.div_ceil(2));
    let mut spread = vec![0.0; row.len() / head_dim * padded];
    for (head, spread) in row.chunks(head_dim).zip(spread.chunks_mut(padded)) {
        spread[..half].copy_from_slice(&head[..half]);
        spread[padded / 2..padded / 2 + head_dim - half].copy_from_slice(&head[half..]);
    }
    spread
}

/// Rows of signed bytes with a scale for each span of elements. Their sums are not kept: they follow from these.
#[derive(Clone, PartialEq, Debug)]
pub struct QuantizedRows {
    /// Elements of a row, padding of heads included.
    pub columns: usize,
    /// Elements that share a scale.
    pub span: usize,
    /// Bytes, each row padded with zeros to a multiple of 32.
    pub codes: Vec<i8>,
    /// For each row and each span of its columns.
    pub scales: Vec<f32>,
}

impl QuantizedRows {
    /// Quantizes rows of `columns` elements, a scale for each `span`. Heads of `heads` elements are padded first.
    pub fn new(x: &[f32], columns: usize, heads: Option<usize>, span: usize) -> QuantizedRows {
        let padded = heads.map_or(columns, |dim| columns / dim * padded_head_dim(dim));
        let mut rows = QuantizedRows { columns: padded, span, codes: Vec::new(), scales: Vec::new() };
        for row in x.chunks(columns) {
            match heads {
                Some(head_dim) => rows.push(&pad_heads(row, head_dim)),
                None => rows.push(row),
            }
        }
        rows
    }

    fn push(&mut self, row: &[f32]) {
        let start = self.codes.len();
        for group in row.chunks(self.span) {
            let amax = group.iter().fold(0.0, |amax, x| math::max(amax, x.abs()));
            let (scale, inverse) = math::quantize_scale(amax);
            self.scales.push(scale);
            // The low byte, as kernels store it: 0 for what is no number.
            self.codes.extend(group.iter().map(|x| math::float_to_int(x * inverse) as i8));
        }
        self.codes.resize(start + row.len().next_multiple_of(BLOCK), 0);
    }

    /// Bytes of a row.
    fn padded(&self) -> usize {
        self.columns.next_multiple_of(BLOCK)
    }

    /// The codes and scales of a row.
    pub(super) fn row(&self, row: usize) -> (&[i8], &[f32]) {
        let part = |count: usize| row * count..(row + 1) * count;
        let (padded, groups) = (self.padded(), self.columns.div_ceil(self.span));
        (&self.codes[part(padded)], &self.scales[part(groups)])
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.codes.len() / self.padded()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }
}

/// What a matrix multiplies.
pub(super) enum Rows<'a> {
    /// As they are, with the elements of a row and of its heads.
    F32(&'a [f32], usize, Option<usize>),
    /// Quantized.
    Q8(&'a QuantizedRows),
}

impl Rows<'_> {
    pub(super) fn count(&self) -> usize {
        match self {
            Rows::F32(numbers, columns, _) => numbers.len() / columns,
            Rows::Q8(rows) => rows.len(),
        }
    }
}

/// The elements of a row of a type.
pub(super) fn columns_of(ty: &Type) -> usize {
    ty.columns().expect("a verified graph has rows of known length")
}

/// A value as rows.
pub(super) fn rows_of<'a>(ty: &Type, value: &'a Tensor, heads: Option<usize>) -> Rows<'a> {
    match value {
        Tensor::F32(numbers) => Rows::F32(numbers, columns_of(ty), heads),
        Tensor::Q8(rows) => Rows::Q8(rows),
        Tensor::I32(_) | Tensor::Kv => panic!("expected rows to multiply"),
    }
}
