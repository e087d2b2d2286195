//! Builds the runtime as two objects, which the compiler carries: with the command line for executables, with the C API for libraries.
//!
//! They are built as static libraries by the same cargo, with the profile `carried`, in a target directory of its own (the outer build holds the lock of
//! the other one). Each is then linked into a single object, in which only the functions that others call are visible, so that it can be linked with any
//! other program, another library of Rust's included, and links in a fraction of the time that the tens of thousands of sections of an archive take.
//! Their paths are in `MOEC_APP_OBJECT` and `MOEC_RUNTIME_OBJECT`.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let manifest = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let workspace = manifest.parent().expect("the compiler lies in the workspace");
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    // OUT_DIR is <target>/<profile>/build/<package>/out.
    let target = out.ancestors().nth(4).expect("OUT_DIR lies in the target directory").join("carried");
    for watched in [
        "runtime/src",
        "runtime/app/src",
        "runtime/abi/src",
        "runtime/c/src",
        "runtime/c/include",
        "compiler/runtime.ld",
        "Cargo.lock",
        "Cargo.toml",
    ] {
        println!("cargo::rerun-if-changed={}", workspace.join(watched).display());
    }
    for manifest in ["runtime/Cargo.toml", "runtime/app/Cargo.toml", "runtime/abi/Cargo.toml", "runtime/c/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(manifest).display());
    }
    build(workspace, &target);
    let built = |name: &str| {
        let library = target.join("carried").join(name);
        assert!(library.is_file(), "cargo left no {}", library.display());
        library
    };
    let header = std::fs::read_to_string(workspace.join("runtime/c/include/moec.h")).expect("the header is there");
    let functions: Vec<&str> = header.lines().filter_map(declared).collect();
    assert!(functions.len() > 20, "functions are found in the header: {functions:?}");
    for (library, visible, variable) in [
        ("libmoec_app.a", &["moec_app_main"][..], "MOEC_APP_OBJECT"),
        ("libmoec_c.a", &functions, "MOEC_RUNTIME_OBJECT"),
    ] {
        let object = out.join(library).with_extension("o");
        link(&built(library), &manifest.join("runtime.ld"), visible, &object);
        println!("cargo::rustc-env={variable}={}", object.display());
    }
}

/// Runs cargo for the static libraries.
fn build(workspace: &Path, target: &Path) {
    let cargo = std::env::var("CARGO").expect("cargo sets CARGO");
    let mut command = Command::new(cargo);
    command
        .current_dir(workspace)
        .args(["build", "--package", "moec-app", "--package", "moec-c", "--lib", "--profile", "carried"])
        .arg("--target-dir")
        .arg(target);
    // What the outer build was told about its own compiler (clippy's wrapper, coverage flags) is not for these libraries.
    for name in [
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTC",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
        "CLIPPY_ARGS",
        "CARGO_MAKEFLAGS",
        "MAKEFLAGS",
    ] {
        command.env_remove(name);
    }
    let status = command.status().expect("cargo starts");
    assert!(status.success(), "the runtime libraries do not build (see above)");
}

/// Links a static library into one object with nothing visible but these functions.
fn link(library: &Path, script: &Path, functions: &[&str], object: &Path) {
    let whole = object.with_extension("whole.o");
    let mut cc = Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".to_string()));
    cc.args(["-r", "-nostdlib", "-Wl,--gc-sections", "-Wl,--force-group-allocation", "-Wl,--strip-debug", "-o"])
        .arg(&whole);
    cc.args(functions.iter().map(|name| format!("-Wl,--undefined={name}")));
    cc.arg(format!("-Wl,--script={}", script.display())).arg(library);
    run(cc, "the C compiler (cc, or the one in CC, with GNU ld)");
    let mut objcopy = Command::new(std::env::var("OBJCOPY").unwrap_or_else(|_| "objcopy".to_string()));
    objcopy.arg("--strip-unneeded").args(functions.iter().map(|name| format!("--keep-global-symbol={name}")));
    objcopy.arg(&whole).arg(object);
    run(objcopy, "objcopy (or the one in OBJCOPY; Debian: apt-get install binutils)");
    std::fs::remove_file(whole).expect("the file was just written");
}

/// The function that a line of a header begins to declare.
fn declared(line: &str) -> Option<&str> {
    let outside = !line.starts_with([' ', '/', '#', '}']) && !line.starts_with("typedef");
    let name = line.split('(').next().filter(|_| outside && line.contains('('))?.rsplit([' ', '*']).next()?;
    name.starts_with("moec_").then_some(name)
}

fn run(mut command: Command, what: &str) {
    let output = command.output().unwrap_or_else(|error| panic!("cannot run {what}: {error}"));
    assert!(output.status.success(), "{what} failed: {}", String::from_utf8_lossy(&output.stderr));
}
