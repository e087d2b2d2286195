//! The floors of the house: which crate may depend on which.
//!
//! Lowest first: `moec-abi` and `moec-ir`; then `moec-runtime`; then `moec-app` and `moec-c`. The compiler stands on `moec-ir` and `moec-abi` and
//! never imports the runtime: it carries the built library.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// What each crate of ours may depend on, among ours.
const ALLOWED: &[(&str, &[&str])] = &[
    ("moec-abi", &[]),
    ("moec-ir", &[]),
    ("moec-runtime", &["moec-abi"]),
    ("moec-app", &["moec-abi", "moec-runtime"]),
    ("moec-c", &["moec-abi", "moec-runtime"]),
    ("moec", &["moec-abi", "moec-ir"]),
    ("link_from_rust", &["moec", "moec-runtime"]),
    ("moec-tests", &["moec", "moec-abi", "moec-ir"]),
];

#[test]
fn arrows_point_down() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).expect("cargo prints JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    let ours: BTreeSet<&str> = packages.iter().map(|p| p["name"].as_str().expect("a name")).collect();
    let allowed: BTreeMap<&str, &[&str]> = ALLOWED.iter().copied().collect();
    assert_eq!(ours, allowed.keys().copied().collect(), "a crate is missing from the table of floors");
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        for dependency in package["dependencies"].as_array().expect("a list of dependencies") {
            let on = dependency["name"].as_str().expect("a name");
            if ours.contains(on) {
                assert!(allowed[name].contains(&on), "{name} must not depend on {on}");
            }
        }
    }
}
