//! What other programs link a model from: an object with its header and weights, alone or with the runtime.
//!
//! ```text
//! object     NAME.o       NAME.h           NAME.weights
//! staticlib  libNAME.a    NAME.h moec.h    NAME.weights  NAME.pc
//! cdylib     libNAME.so   NAME.h moec.h    NAME.weights
//! crate      libNAME.a    NAME.rs          NAME.weights     for a build script; the runtime is a crate
//! ```
//! The files get their final names when all of them are whole. Deliberately absent: packing, which the caller does into the file of the weights.

use super::bindings::rust_bindings;
use super::executable::Placement;
use super::header::c_header;
use super::{EmitError, archive, files, linker};
use crate::plan::Plan;
use crate::target::CpuLevel;
use std::path::{Path, PathBuf};
use target_lexicon::Triple;

/// The runtime with the C API and nothing else visible, built by `build.rs`.
static RUNTIME_OBJECT: &[u8] = include_bytes!(env!("MOEC_RUNTIME_OBJECT"));

/// `moec.h`.
pub const API_HEADER: &str = include_str!("../../../runtime/c/include/moec.h");

/// What a model is built into for other programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Library {
    /// The object alone, which needs nothing.
    Object,
    /// The object and the runtime in an archive.
    Static,
    /// The object and the runtime in a shared library.
    Shared,
    /// The object in an archive, and Rust's side of it.
    Crate,
}

/// What a library is made of, beside its weights.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// What was planned.
    pub plan: &'a Plan,
    /// The levels of code, best first.
    pub levels: &'a [CpuLevel],
    /// Starts the names of symbols and files.
    pub prefix: &'a str,
    /// The payload's key.
    pub key: &'a [u8; 32],
    /// The code.
    pub object: &'a [u8],
    /// What it is for.
    pub target: &'a Triple,
    /// Where the library will lie.
    pub directory: &'a Path,
}

impl Library {
    /// Whether the runtime is in it.
    pub fn has_runtime(self) -> bool {
        match self {
            Library::Object | Library::Crate => false,
            Library::Static | Library::Shared => true,
        }
    }

    /// The files of a library beside its weights.
    ///
    /// # Errors
    /// When a shared library cannot be linked.
    pub fn parts(self, contents: &Contents<'_>) -> Result<Vec<Part>, EmitError> {
        let Contents { plan, levels, prefix, key, object, target, directory } = *contents;
        let part = |name: String, bytes: &[u8]| Part { name, bytes: bytes.to_vec() };
        let header = || part(format!("{prefix}.h"), c_header(plan, levels, prefix, key).as_bytes());
        let api = || part("moec.h".to_string(), API_HEADER.as_bytes());
        let object_name = format!("{prefix}.o");
        let archive_name = format!("lib{prefix}.a");
        Ok(match self {
            Library::Object => vec![header(), part(object_name, object)],
            Library::Static => {
                let members = [(object_name, object), ("moec_runtime.o".to_string(), RUNTIME_OBJECT)];
                let library = part(archive_name, &archive::write(&members, target)?);
                vec![header(), api(), library, part(format!("{prefix}.pc"), pkg_config(prefix).as_bytes())]
            }
            Library::Shared => vec![header(), api(), part(format!("lib{prefix}.so"), &shared(prefix, object)?)],
            Library::Crate => {
                let weights = directory.join(format!("{prefix}.weights"));
                let bindings = part(format!("{prefix}.rs"), rust_bindings(plan, prefix, &weights).as_bytes());
                vec![bindings, part(archive_name, &archive::write(&[(object_name, object)], target)?)]
            }
        })
    }

    /// How a C program is linked with the library in `directory`.
    pub fn link_line(self, prefix: &str, directory: &Path) -> String {
        let directory = directory.display();
        match self {
            Library::Crate => {
                format!("cargo::rustc-link-search=native={directory} cargo::rustc-link-lib=static={prefix}")
            }
            Library::Object => format!("cc main.c -I{directory} {directory}/{prefix}.o"),
            Library::Static => format!("cc main.c -I{directory} -L{directory} -l{prefix} {SYSTEM_LIBRARIES}"),
            Library::Shared => format!("cc main.c -I{directory} -L{directory} -l{prefix} -Wl,-rpath,{directory}"),
        }
    }
}

/// What the runtime needs of the system.
const SYSTEM_LIBRARIES: &str = "-lm -lpthread -ldl";

fn pkg_config(prefix: &str) -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "libdir=${{pcfiledir}}\n\nName: {prefix}\nDescription: a language model compiled by moec, with its runtime\nVersion: {version}\n\
         Cflags: -I${{libdir}}\nLibs: -L${{libdir}} -l{prefix} {SYSTEM_LIBRARIES}\n"
    )
}

/// The shared library. Its calls to itself stay inside, so that several can be loaded into one process.
fn shared(prefix: &str, object: &[u8]) -> Result<Vec<u8>, EmitError> {
    let name = format!("-Wl,-soname,lib{prefix}.so");
    let flags = ["-shared", &name, "-static-libgcc", "-Wl,-Bsymbolic", "-Wl,-z,defs", "-Wl,-z,noexecstack", "-s"];
    let flags = [&flags[..], &["-lm", "-lpthread", "-ldl"]].concat();
    linker::link(&[("model.o", object), ("runtime.o", RUNTIME_OBJECT)], &flags, "the shared library")
}

/// The files of a library in the making.
#[derive(Debug)]
pub struct Unfinished {
    weights: files::Unfinished,
    others: Vec<files::Unfinished>,
    /// Where the payload goes.
    pub payload: Placement,
}

/// One file of a library.
#[derive(Debug)]
pub struct Part {
    /// Its name in the directory.
    pub name: String,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// Begins a library in `directory`, which is made if it does not exist, from its `parts` and the place for its weights.
///
/// # Errors
/// When a file cannot be written, or the disk has no room for the weights.
pub fn begin(
    directory: &Path,
    prefix: &str,
    parts: &[Part],
    payload_bytes: u64,
    key: [u8; 32],
) -> Result<Unfinished, EmitError> {
    std::fs::create_dir_all(directory).map_err(EmitError::io("cannot make the directory", directory))?;
    let others = parts.iter().map(|part| files::Unfinished::with_content(&directory.join(&part.name), &part.bytes));
    let others = others.collect::<Result<Vec<_>, _>>()?;
    let weights = files::Unfinished::create(&directory.join(format!("{prefix}.weights")))?;
    files::check_room(&weights.output, payload_bytes)?;
    Ok(Unfinished { weights, others, payload: Placement { offset: 0, bytes: payload_bytes, key } })
}

impl Unfinished {
    /// The file of the weights, to write the payload into at its beginning.
    pub fn file(&self) -> &std::fs::File {
        self.weights.file()
    }

    /// Gives all files their final names; returns the path of the weights and the size of everything.
    ///
    /// # Errors
    /// When one cannot be flushed or renamed.
    pub fn finish(self) -> Result<(PathBuf, u64), EmitError> {
        let path = self.weights.output.clone();
        let mut bytes = self.weights.finish(0o666)?;
        for other in self.others {
            bytes += other.finish(0o666)?;
        }
        Ok((path, bytes))
    }
}
