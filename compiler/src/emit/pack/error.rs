//! What can go wrong while packing.

use super::source::SourceError;
use crate::plan::layout::Format;
use std::fmt;
use std::io;

/// Why packing stopped.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// A weight is infinite or not a number.
    #[error("the model is damaged: {place} is {value}, and a weight must be a finite number; download it again")]
    NotFinite {
        /// Which weight.
        place: Place,
        /// Its value.
        value: f32,
    },
    /// A weight does not fit its format.
    #[error("{place} is {value:e}, too large for {format}; store it as bf16 or f32 (see --quant)")]
    TooLarge {
        /// Which weight.
        place: Place,
        /// Its value.
        value: f32,
        /// The format.
        format: Format,
    },
    /// The model's files cannot be read.
    #[error("cannot read weight `{tensor}`: {source}")]
    Source {
        /// The tensor.
        tensor: String,
        /// What its source said.
        source: SourceError,
    },
    /// The payload cannot be written.
    #[error("cannot write the weights ({done} of {total} bytes are written): {source}{}", remedy(source))]
    Write {
        /// Bytes written until then.
        done: u64,
        /// Bytes of all weights.
        total: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The caller asked to stop.
    #[error("interrupted")]
    Cancelled,
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; make room, or choose another place for the output"
        }
        io::ErrorKind::FileTooLarge => "; choose a place whose file system or limits allow files of that size",
        _ => "",
    }
}

/// One stored weight.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// The tensor, by moec's name.
    pub tensor: String,
    /// Of which expert; `None` when the tensor has none.
    pub expert: Option<usize>,
    /// Its row.
    pub row: usize,
    /// Its column.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { tensor, expert, row, column } = self;
        write!(f, "weight `{tensor}`")?;
        if let Some(expert) = expert {
            write!(f, ", expert {expert}")?;
        }
        write!(f, ", row {row}, column {column}")
    }
}

/// Finds the first of `weights`, rows of `columns`, that `format` cannot hold. `name` turns a row and a column into a
/// place.
pub(crate) fn unfit(
    format: Format,
    columns: usize,
    weights: &[f32],
    name: impl Fn(usize, usize) -> Place,
) -> Option<PackError> {
    let fits = |weight: f32| match format {
        Format::Bf16 => half::bf16::from_f32(weight).is_finite(),
        Format::F16 => half::f16::from_f32(weight).is_finite(),
        _ => weight.is_finite(),
    };
    let index = weights.iter().position(|&weight| !fits(weight))?;
    let (place, value) = (name(index / columns, index % columns), weights[index]);
    Some(if value.is_finite() {
        PackError::TooLarge { place, value, format }
    } else {
        PackError::NotFinite { place, value }
    })
}
