//! Builds the runtime as a static library, which the compiler carries and links into executables.
//!
//! The library is built by the same cargo, with the profile `carried`, in a target directory of its own (the outer build holds the lock of the other one).
//! Its path goes to the crate in `MOEC_RUNTIME_LIBRARY`.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let manifest = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let workspace = manifest.parent().expect("the compiler lies in the workspace");
    let out = PathBuf::from(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"));
    // OUT_DIR is <target>/<profile>/build/<package>/out.
    let target = out.ancestors().nth(4).expect("OUT_DIR lies in the target directory").join("carried");
    for watched in ["runtime/src", "runtime/app/src", "runtime/abi/src", "Cargo.lock", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(watched).display());
    }
    for manifest in ["runtime/Cargo.toml", "runtime/app/Cargo.toml", "runtime/abi/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(manifest).display());
    }
    let library = build(workspace, &target);
    println!("cargo::rustc-env=MOEC_RUNTIME_LIBRARY={}", library.display());
}

/// Runs cargo for the application's static library; returns its path.
fn build(workspace: &Path, target: &Path) -> PathBuf {
    let cargo = std::env::var("CARGO").expect("cargo sets CARGO");
    let mut command = Command::new(cargo);
    command
        .current_dir(workspace)
        .args(["rustc", "--package", "moec-app", "--lib", "--profile", "carried", "--crate-type", "staticlib"])
        .arg("--target-dir")
        .arg(target);
    // What the outer build was told about its own compiler (clippy's wrapper, coverage flags) is not for this library.
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
    assert!(status.success(), "the runtime library does not build (see above)");
    let library = target.join("carried").join("libmoec_app.a");
    assert!(library.is_file(), "cargo left no {}", library.display());
    library
}
