//! What the targets that open models share: where hostile files lie, reading all of a model that opens, and planning it.

use moec::import::{CodedRows, Model};
use moec::pipeline::{Options, compile};
use std::path::Path;
use tempfile::TempDir;

/// A directory in memory where the system has such a place (`/dev/shm`).
pub fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let directory = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    directory.expect("a temporary directory")
}

/// Reads all weights, numbers and codes.
pub fn read_all(model: &Model) {
    for name in model.tensors.names() {
        let info = model.tensors.info(name);
        let (cols, rows) = info.shape.split_last().expect("a weight has a dimension");
        let experts = if let [experts, _] = rows { *experts } else { 1 };
        let rows = rows.last().copied().unwrap_or(1);
        let mut values = vec![0.0; rows * cols];
        let mut codes = CodedRows::default();
        for expert in 0..experts {
            model.tensors.read_rows(name, expert, 0..rows, &mut values);
            if info.exact.is_some() {
                codes.reset(rows, *cols);
                model.tensors.read_codes(name, expert, 0..rows, &mut codes, 0);
            }
        }
    }
}

/// Plans the model for each `--quant`. A model may have sizes that nothing can be planned for.
pub fn plan(model: &Model, quants: &[&str]) {
    for quant in quants {
        let quant = quant.parse().expect("a --quant option");
        let _plan = compile(model, &Options { quant, ..Options::default() });
    }
}
