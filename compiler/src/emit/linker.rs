//! The C compiler as the linker's driver: `$CC`, else `cc`.
//!
//! Deliberately absent: finding linkers and system libraries, which is what the C compiler is for.

use super::EmitError;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Links `inputs` with `flags` into `output`, which is `what`.
pub(super) fn run(inputs: &[&PathBuf], output: &Path, flags: &[&str], what: &str) -> Result<(), EmitError> {
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".to_string());
    let result = Command::new(&cc).args(inputs).arg("-o").arg(output).args(flags).stdin(Stdio::null()).output();
    match result {
        Ok(done) if done.status.success() => Ok(()),
        Ok(done) => Err(EmitError::Link(format!(
            "the C compiler `{cc}` could not link {what} ({}):\n{}",
            done.status,
            String::from_utf8_lossy(&done.stderr)
        ))),
        Err(e) => Err(EmitError::Link(format!(
            "cannot run the C compiler `{cc}`, which links {what}: {e}; install one (Debian: apt-get install gcc) or name it in CC"
        ))),
    }
}
