//! Numbers for people: four figures at most, with units.
//!
//! Deliberately absent: tables and pages.

use indicatif::HumanBytes;

/// Bytes, in powers of 1024.
pub fn bytes(n: f64) -> String {
    HumanBytes(n.max(0.0).round() as u64).to_string()
}

/// A number with the prefix of a thousand, a million, …
pub fn count(n: f64) -> String {
    let (mut n, mut prefix) = (n, "");
    for next in [" k", " M", " G", " T"] {
        if n.abs() < 999.5 {
            break;
        }
        (n, prefix) = (n / 1e3, next);
    }
    if prefix.is_empty() { format!("{n:.0}") } else { format!("{}{prefix}", three(n)) }
}

/// A number with three figures.
fn three(n: f64) -> String {
    let digits = match n.abs() {
        n if n >= 99.95 => 0,
        n if n >= 9.995 => 1,
        _ => 2,
    };
    format!("{n:.digits$}")
}

/// A time.
pub fn seconds(s: f64) -> String {
    match s.abs() {
        0.0 => "0".to_string(),
        a if a >= 0.9995 => format!("{} s", three(s)),
        a if a >= 0.9995e-3 => format!("{} ms", three(1e3 * s)),
        a if a >= 0.9995e-6 => format!("{} µs", three(1e6 * s)),
        _ => format!("{} ns", three(1e9 * s)),
    }
}

/// A share as a percentage.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// How many of something.
pub fn plural(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_figures_and_a_unit() {
        assert_eq!(
            [0.0, 12.0, 999.0, 1000.0, 12_345.0, 1_577_200_000.0].map(count),
            ["0", "12", "999", "1.00 k", "12.3 k", "1.58 G"]
        );
        assert_eq!(
            [0.0, 1.2e-9, 3.4567e-6, 0.0123, 2.353, 999.96e-6].map(seconds),
            ["0", "1.20 ns", "3.46 µs", "12.3 ms", "2.35 s", "1.00 ms"]
        );
        assert_eq!(percent(0.0729), "7.3 %");
        assert_eq!(bytes(4096.0), "4.00 KiB");
        assert_eq!((plural(1, "stage"), plural(0, "stage")), ("1 stage".to_string(), "0 stages".to_string()));
    }
}
