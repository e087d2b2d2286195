//! Where packing takes the model's weights from.

use crate::import::{CodedRows, TensorTable};
use std::ops::Range;

/// Something that has the model's weights, under moec's names, as rows of f32.
///
/// Several threads read at the same time. `expert` is 0 for weights that have no experts. A vector is one row.
pub trait RowSource: Sync {
    /// Reads rows, exactly; `out` has room for just these.
    ///
    /// # Errors
    /// Whatever keeps the rows from being read.
    fn read_rows(&self, weight: &str, expert: usize, rows: Range<usize>, out: &mut [f32]) -> Result<(), SourceError>;

    /// Reads the codes and scales of rows as they are stored; rows `first ..` of `out` take them. Asked only for weights that are to lie in an
    /// exact layout.
    ///
    /// # Errors
    /// Whatever keeps the rows from being read.
    fn read_codes(
        &self,
        weight: &str,
        expert: usize,
        rows: Range<usize>,
        out: &mut CodedRows,
        first: usize,
    ) -> Result<(), SourceError> {
        let _ = (expert, rows, out, first);
        Err(format!("`{weight}` is not stored as codes").into())
    }

    /// Says that rows will be read soon.
    fn prefetch(&self, weight: &str, expert: usize, rows: Range<usize>) {
        let _ = (weight, expert, rows);
    }

    /// Says that rows will not be read again.
    fn release(&self, weight: &str, expert: usize, rows: Range<usize>) {
        let _ = (weight, expert, rows);
    }
}

/// Why rows could not be read.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

impl RowSource for TensorTable {
    fn read_rows(&self, weight: &str, expert: usize, rows: Range<usize>, out: &mut [f32]) -> Result<(), SourceError> {
        TensorTable::read_rows(self, weight, expert, rows, out);
        Ok(())
    }

    fn read_codes(
        &self,
        weight: &str,
        expert: usize,
        rows: Range<usize>,
        out: &mut CodedRows,
        first: usize,
    ) -> Result<(), SourceError> {
        TensorTable::read_codes(self, weight, expert, rows, out, first);
        Ok(())
    }

    fn prefetch(&self, weight: &str, expert: usize, rows: Range<usize>) {
        TensorTable::prefetch(self, weight, expert, rows);
    }

    fn release(&self, weight: &str, expert: usize, rows: Range<usize>) {
        TensorTable::release(self, weight, expert, rows);
    }
}
