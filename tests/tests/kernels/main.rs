//! Every kernel of the table against a scalar reference, bit for bit.
#![allow(missing_docs)]

mod bench;
mod cases;
mod exact;
mod harness;
mod machine;
mod reference;

use std::collections::BTreeMap;
use std::num::NonZero;
use std::thread::{available_parallelism, scope};

use crate::harness::Case;
use moec::kernels::Kernel;

/// CPUs whose code differs, as far as this machine can run it.
const CPUS: [&str; 3] = ["x86-64-v3", "x86-64-v4", "native"];

/// Runs the cases of a family on the evaluator and as machine code, on all cores.
fn run(family: &str) {
    let cases = cases::of(family);
    assert!(!cases.is_empty(), "{family} has no cases");
    let cores = available_parallelism().map_or(1, NonZero::get);
    let mut parts = vec![Vec::new(); cores];
    cases.into_iter().enumerate().for_each(|(i, case)| parts[i % cores].push(case));
    let run = |cases: &[Case]| {
        for case in cases {
            assert_eq!(case.kernel.family(), family);
            case.evaluate();
        }
        for cpu in CPUS.into_iter().filter(|cpu| machine::can_run(cpu)) {
            machine::run(cases, cpu);
        }
    };
    scope(|threads| {
        for part in &parts {
            threads.spawn(|| run(part));
        }
    });
}

#[test]
fn matmul() {
    run("Matmul");
}

#[test]
fn interleave() {
    run("Interleave");
}

#[test]
fn norm() {
    run("Norm");
}

#[test]
fn quantize() {
    run("Quantize");
}

#[test]
fn rope() {
    run("Rope");
}

#[test]
fn store_key() {
    run("StoreKey");
}

#[test]
fn store_value() {
    run("StoreValue");
}

#[test]
fn attention() {
    run("Attention");
}

#[test]
fn soft_cap() {
    run("SoftCap");
}

#[test]
fn embed() {
    run("Embed");
}

#[test]
fn top_k() {
    run("TopK");
}

#[test]
fn sort_by_expert() {
    run("SortByExpert");
}

#[test]
fn combine() {
    run("Combine");
}

#[test]
fn elementwise() {
    run("Elementwise");
}

#[test]
fn gate_row() {
    run("GateRow");
}

#[test]
fn every_family_has_cases() {
    for family in Kernel::FAMILIES {
        assert!(!cases::of(family).is_empty(), "{family}");
    }
}

#[test]
fn names_are_unique_identifiers() {
    let mut seen: BTreeMap<String, Kernel> = BTreeMap::new();
    for case in cases::all() {
        let name = case.kernel.name();
        assert!(name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'), "{name}");
        let same = match (seen.entry(name.clone()).or_insert_with(|| case.kernel.clone()), &case.kernel) {
            // A single row's strides are not looked at.
            (Kernel::Matmul(a), Kernel::Matmul(b)) => {
                let mut a = a.clone();
                if a.tokens == 1 {
                    a.y_stride = b.y_stride;
                }
                a == *b
            }
            (a, b) => a == b,
        };
        assert!(same, "two kernels are named {name}");
    }
}
