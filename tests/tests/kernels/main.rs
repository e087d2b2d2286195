//! Every kernel of the table against a scalar reference, bit for bit.
#![allow(missing_docs)]

mod cases;
mod harness;
mod reference;

use std::collections::BTreeMap;

use moec::kernels::Kernel;

/// Runs the cases of a family on the evaluator.
fn evaluate(family: &str) {
    let cases = cases::of(family);
    assert!(!cases.is_empty(), "{family} has no cases");
    for case in cases {
        assert_eq!(case.kernel.family(), family);
        case.evaluate();
    }
}

#[test]
fn matmul() {
    evaluate("Matmul");
}

#[test]
fn norm() {
    evaluate("Norm");
}

#[test]
fn quantize() {
    evaluate("Quantize");
}

#[test]
fn rope() {
    evaluate("Rope");
}

#[test]
fn store_key() {
    evaluate("StoreKey");
}

#[test]
fn store_value() {
    evaluate("StoreValue");
}

#[test]
fn attention() {
    evaluate("Attention");
}

#[test]
fn embed() {
    evaluate("Embed");
}

#[test]
fn top_k() {
    evaluate("TopK");
}

#[test]
fn sort_by_expert() {
    evaluate("SortByExpert");
}

#[test]
fn combine() {
    evaluate("Combine");
}

#[test]
fn elementwise() {
    evaluate("Elementwise");
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
            // The code book is the whole model's, and a single row's strides are not looked at.
            (Kernel::Matmul(a), Kernel::Matmul(b)) => {
                let mut a = a.clone();
                a.codebook = b.codebook;
                if a.tokens == 1 && !a.gather {
                    (a.x_stride, a.y_stride) = (b.x_stride, b.y_stride);
                }
                a == *b
            }
            (a, b) => a == b,
        };
        assert!(same, "two kernels are named {name}");
    }
}
