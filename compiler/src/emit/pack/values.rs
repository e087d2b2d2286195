//! The numbers that the payload holds, for whoever computes with them outside of the kernels.
//!
//! They come from the model's rows by the same conversions that packing uses, so an evaluator and the compiled code
//! agree.

use super::error::{PackError, Place, unfit};
use super::exact::scales_of;
use super::rows::column_runs;
use super::source::RowSource;
use super::tile::encode_floats;
use crate::import::CodedRows;
use crate::plan::layout::{Codes, Format};
use crate::plan::quant::{QuantizedMatrix, quantize_matrix, quantize_spread, real_columns};
use moec_abi::padded_head_dim;
use std::ops::Range;

/// Some rows of a stored tensor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stored<'a> {
    /// Its name.
    pub tensor: &'a str,
    /// Of which expert; `None` when it has none.
    pub expert: Option<usize>,
    /// Which rows.
    pub rows: Range<usize>,
    /// Its columns.
    pub columns: usize,
}

/// Reads rows, rounded to a float format, row-major.
///
/// # Errors
/// Rows that cannot be read; weights that do not fit.
///
/// # Panics
/// When `format` is quantized.
pub fn float_rows(source: &dyn RowSource, stored: &Stored, format: Format) -> Result<Vec<f32>, PackError> {
    let rows = read(source, stored)?;
    let width = format.element_bytes().expect("a float format");
    let mut bytes = vec![0; rows.len() * width];
    encode_floats(format, &rows, &mut bytes).map_err(|_| refuse(stored, format, &rows))?;
    let half = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
    Ok(match format {
        Format::Bf16 => bytes.chunks_exact(2).map(|bytes| half::bf16::from_bits(half(bytes)).to_f32()).collect(),
        Format::F16 => bytes.chunks_exact(2).map(|bytes| half::f16::from_bits(half(bytes)).to_f32()).collect(),
        _ => rows,
    })
}

/// Quantizes rows, or takes the codes of an exact format as they are. When the columns are divided into heads of `column_heads`, the columns of the result are those of
/// padded heads.
///
/// # Errors
/// Rows that cannot be read; weights that are not finite.
///
/// # Panics
/// When `format` is not quantized.
pub fn quantized_rows(
    source: &dyn RowSource,
    stored: &Stored,
    column_heads: Option<usize>,
    format: Format,
) -> Result<QuantizedMatrix, PackError> {
    if format.is_exact() {
        return kept_rows(source, stored, format);
    }
    let rows = read(source, stored)?;
    let Some(head_dim) = column_heads else {
        return quantize_matrix(format, stored.columns, &rows).map_err(|_| refuse(stored, format, &rows));
    };
    let padded = stored.columns / head_dim * padded_head_dim(head_dim);
    let runs = column_runs(stored.columns, column_heads);
    let mut spread = vec![0.0; stored.rows.len() * padded];
    for (row, spread) in rows.chunks_exact(stored.columns).zip(spread.chunks_exact_mut(padded)) {
        for run in &runs {
            spread[run.to..][..run.length].copy_from_slice(&row[run.from..][..run.length]);
        }
    }
    let real = real_columns(padded, runs.iter().map(|run| (run.to, run.length)));
    quantize_spread(format, padded, &real, &spread).map_err(|_| refuse(stored, format, &rows))
}

/// Rows whose codes and scales are kept as they are stored.
fn kept_rows(source: &dyn RowSource, stored: &Stored, format: Format) -> Result<QuantizedMatrix, PackError> {
    let mut rows = CodedRows::default();
    rows.reset(stored.rows.len(), stored.columns);
    source
        .read_codes(stored.tensor, stored.expert.unwrap_or(0), stored.rows.clone(), &mut rows, 0)
        .map_err(|source| PackError::Source { tensor: stored.tensor.to_string(), source })?;
    if let Some(Codes::Book(book)) = format.codes() {
        rows.codes.iter_mut().for_each(|code| *code = book[usize::from(*code)]);
    }
    let (scales, offsets): (Vec<f32>, Vec<f32>) =
        rows.scales.iter().flat_map(|scale| scales_of(format, *scale)).unzip();
    if !scales.iter().chain(&offsets).all(|scale| scale.is_finite()) {
        return Err(refuse(stored, format, &read(source, stored)?));
    }
    Ok(QuantizedMatrix {
        rows: stored.rows.len(),
        columns: stored.columns,
        scale_columns: format.scale_columns(),
        codes: rows.codes,
        scales,
        offsets: if format.has_offsets() { offsets } else { Vec::new() },
    })
}

fn read(source: &dyn RowSource, stored: &Stored) -> Result<Vec<f32>, PackError> {
    let mut rows = vec![0.0; stored.rows.len() * stored.columns];
    source
        .read_rows(stored.tensor, stored.expert.unwrap_or(0), stored.rows.clone(), &mut rows)
        .map_err(|source| PackError::Source { tensor: stored.tensor.to_string(), source })?;
    Ok(rows)
}

fn refuse(stored: &Stored, format: Format, rows: &[f32]) -> PackError {
    let name = |row, column| Place {
        tensor: stored.tensor.to_string(),
        expert: stored.expert,
        row: stored.rows.start + row,
        column,
    };
    unfit(format, stored.columns, rows, name).expect("encoding found a weight that does not fit")
}
