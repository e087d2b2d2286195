//! `--expert-stats FILE`: counts how often each expert is chosen while a command runs, and writes it at the end.
//!
//! Deliberately absent: counting (the runtime's), and what a build does with it.

use crate::failure::{Failure, Result};
use moec_runtime::Model;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A file that can be written, for counts that have not begun.
pub struct Checked {
    path: PathBuf,
    file: File,
}

/// A file for the counts of a model.
pub struct StatsFile {
    checked: Checked,
    model: Arc<Model>,
}

impl StatsFile {
    /// Opens the file, so that an hour of counting does not end with a name that cannot be written; what it held stays until then.
    pub fn check(path: &Path) -> Result<Checked> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path);
        let file = file.map_err(|source| Failure::Write { path: path.to_path_buf(), what: source.to_string() })?;
        Ok(Checked { path: path.to_path_buf(), file })
    }

    /// Writes the counts.
    pub fn write(self) -> Result<()> {
        let StatsFile { checked: Checked { path, mut file }, model } = self;
        let Some(stats) = model.expert_stats() else { return Ok(()) };
        let text = serde_json::to_string(&stats).expect("counts are plain data") + "\n";
        let written = file.set_len(0).and_then(|()| file.write_all(text.as_bytes())).and_then(|()| file.flush());
        written.map_err(|source| Failure::Write { path, what: source.to_string() })
    }
}

impl Checked {
    /// Begins to count.
    pub fn start(self, model: &Arc<Model>) -> Result<StatsFile> {
        model.start_expert_counts()?;
        Ok(StatsFile { checked: self, model: model.clone() })
    }
}
