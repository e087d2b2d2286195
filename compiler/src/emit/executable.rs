//! The standalone executable: code and runtime linked by `cc`, the payload at the end of the file, and a trailer that says where.
//!
//! ```text
//! [ linked ELF file, its loader's path last | zeros up to a page | payload | golden values (JSON) | trailer ]
//! ```
//! Everything is written to a temporary file beside the output and renamed at the very end, so that an interrupted build leaves
//! nothing under the final name. Deliberately absent: packing itself (the caller writes the payload), and cross linking.

use super::{EmitError, files, linker, loader_path};
use moec_abi::{PAYLOAD_ALIGN, Plain, TRAILER_MAGIC, Trailer, round_up};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The runtime with its command line, built by `build.rs`.
static APP_OBJECT: &[u8] = include_bytes!(env!("MOEC_APP_OBJECT"));

/// How long the kernel may need to let go of a file that ran.
const LONGEST_BUSY: Duration = Duration::from_secs(10);

/// What an executable is linked from.
#[derive(Debug)]
pub struct Objects {
    /// The model's object.
    pub model: Vec<u8>,
    /// The object with `main`.
    pub main: Vec<u8>,
}

/// The payload's place and identity in an executable.
#[derive(Clone, Copy, Debug)]
pub struct Placement {
    /// Offset of the payload in the file.
    pub offset: u64,
    /// Its size.
    pub bytes: u64,
    /// Its key.
    pub key: [u8; 32],
}

/// An executable in the making, under a temporary name beside its final one.
#[derive(Debug)]
pub struct Unfinished {
    unfinished: files::Unfinished,
    /// Where the payload goes.
    pub payload: Placement,
}

/// Links the objects with the runtime. The payload, `payload_bytes` long, is written next.
///
/// # Errors
/// When the C compiler is missing or fails, or a file cannot be written.
pub fn link(objects: &Objects, output: &Path, payload_bytes: u64, key: [u8; 32]) -> Result<Unfinished, EmitError> {
    let objects = [("main.o", &objects.main[..]), ("model.o", &objects.model), ("app.o", APP_OBJECT)];
    let flags = ["-pie", "-static-libgcc", "-Wl,--gc-sections", "-Wl,-z,noexecstack", "-s", "-lpthread", "-ldl", "-lm"];
    let mut code = linker::link(&objects, &flags, "the executable")?;

    let unfinished = files::Unfinished::create(output)?;
    loader_path::move_to_end(&mut code);
    unfinished.file().write_all_at(&code, 0).map_err(EmitError::io("cannot write", output))?;
    let offset = round_up(code.len(), PAYLOAD_ALIGN) as u64;
    files::check_room(output, offset + payload_bytes)?;
    let payload = Placement { offset, bytes: payload_bytes, key };
    Ok(Unfinished { unfinished, payload })
}

/// Runs a command whose executable was written a moment ago. While another thread of this process starts a program, its child holds
/// copies of our handles for an instant, and the kernel refuses to execute a file that is open for writing.
pub fn output_when_closed(command: &mut Command) -> std::io::Result<Output> {
    while_busy(|| command.output())
}

/// Does what the kernel refuses while it still holds a file to be executed or written, again until it no longer does: some seconds at most.
fn while_busy<T>(mut what: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    let start = Instant::now();
    loop {
        match what() {
            Err(e) if e.kind() == ErrorKind::ExecutableFileBusy && start.elapsed() < LONGEST_BUSY => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

impl Unfinished {
    /// The file, to write the payload into at [`Placement::offset`].
    pub fn file(&self) -> &File {
        self.unfinished.file()
    }

    /// Writes the trailer, so that the file runs where it is.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn seal(&self, golden: &[u8]) -> Result<(), EmitError> {
        let Placement { offset, bytes, key } = self.payload;
        let golden_offset = offset + bytes;
        let golden_bytes = golden.len() as u64;
        let file_bytes = golden_offset + golden_bytes + size_of::<Trailer>() as u64;
        let trailer = Trailer {
            payload_offset: offset,
            payload_bytes: bytes,
            key,
            golden_offset,
            golden_bytes,
            file_bytes,
            magic: TRAILER_MAGIC,
        };
        let file = self.file();
        let error = || EmitError::io("cannot write", &self.unfinished.output);
        file.set_len(golden_offset).map_err(error())?;
        file.write_all_at(golden, golden_offset).map_err(error())?;
        file.write_all_at(trailer.as_bytes(), golden_offset + golden_bytes).map_err(error())
    }

    /// Runs the sealed file once (`selftest --record`) and returns what it prints: the golden values.
    ///
    /// It runs a dozen tokens in one step, so it reads each weight at most once, which is less than packing has read; and it may read them from
    /// the disk, as the machine that builds a model need not have the memory to use it.
    ///
    /// # Errors
    /// When it cannot run or fails, with what it said.
    pub fn record(&mut self) -> Result<Vec<u8>, EmitError> {
        // A file that is open for writing cannot be executed, so it runs under its name after the handle is closed.
        let file = &mut self.unfinished.file;
        let path = file.path().to_path_buf();
        let reopened = File::open(&path).map_err(EmitError::io("cannot open", &path))?;
        let handle = std::mem::replace(file.as_file_mut(), reopened);
        drop(handle);
        let mut command = Command::new(&path);
        command.args(["selftest", "--record", "--low-memory"]).stdin(Stdio::null());
        let run = output_when_closed(&mut command);
        // A process that has ended may hold its file a little longer, until the kernel has taken down its memory.
        let writable = while_busy(|| OpenOptions::new().read(true).write(true).open(&path));
        *file.as_file_mut() = writable.map_err(EmitError::io("cannot open", &path))?;
        let done = run.map_err(EmitError::io("cannot run", &path))?;
        if done.status.success() {
            return Ok(done.stdout);
        }
        Err(EmitError::Link(format!(
            "the new executable fails its first run ({}): {}",
            done.status,
            String::from_utf8_lossy(&done.stderr).trim()
        )))
    }

    /// Gives the finished file its final name; returns its size.
    ///
    /// # Errors
    /// When it cannot be flushed or renamed.
    pub fn finish(self) -> Result<u64, EmitError> {
        self.unfinished.finish(0o777)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_busy_is_tried_again_and_nothing_else() {
        let mut left = 3;
        let mut busy = || {
            left -= 1;
            if left > 0 { Err(ErrorKind::ExecutableFileBusy.into()) } else { Ok(left) }
        };
        assert_eq!(while_busy(&mut busy).unwrap(), 0);
        let mut tried = 0;
        let missing = while_busy(|| -> std::io::Result<()> {
            tried += 1;
            Err(ErrorKind::NotFound.into())
        });
        assert_eq!((missing.unwrap_err().kind(), tried), (ErrorKind::NotFound, 1));
    }
}
