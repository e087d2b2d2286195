//! The C compiler as the linker's driver: `$CC`, else `cc`.
//!
//! Deliberately absent: finding linkers and system libraries, which is what the C compiler is for.

use super::EmitError;
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// Links `objects`, each under its file name, with `flags`: what the linker makes of them, which is `what`.
pub(super) fn link(objects: &[(&str, &[u8])], flags: &[&str], what: &str) -> Result<Vec<u8>, EmitError> {
    let build =
        TempDir::with_prefix("moec-").map_err(EmitError::io("cannot create a directory in", std::env::temp_dir()))?;
    let mut inputs = Vec::new();
    for (name, bytes) in objects {
        let path = build.path().join(name);
        std::fs::write(&path, bytes).map_err(EmitError::io("cannot write", &path))?;
        inputs.push(path);
    }
    let output = build.path().join("linked");
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".to_string());
    let result = Command::new(&cc).args(inputs).arg("-o").arg(&output).args(flags).stdin(Stdio::null()).output();
    match result {
        Ok(done) if done.status.success() => std::fs::read(&output).map_err(EmitError::io("cannot read", &output)),
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
