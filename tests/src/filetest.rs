//! Filetests: an input and the output it must give, in one text file.
//!
//! ```text
//! input, any number of lines
//! ---- expect
//! output
//! ```
//!
//! A test names a directory, an extension, and what turns input into output; an `Err` is expected as `error: ` and its text.
//! `BLESS=1 cargo test` rewrites the expectations in place, for `git diff` to be read. A file without a marker is one whose
//! expectation has not been blessed yet, and fails.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

const MARKER: &str = "---- expect\n";

/// Runs all files of `directory` (below `tests/filetests`) with this extension through `run`.
///
/// # Panics
/// When an output differs from the expected one, with all differences; when there is no such file.
pub fn check(directory: &str, extension: &str, run: impl Fn(&str) -> Result<String, String>) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("filetests").join(directory);
    let files = files(&directory, extension);
    assert!(!files.is_empty(), "no .{extension} files in {}", directory.display());
    check_files(files, run);
}

/// Runs one file of `directory` (below `tests/filetests`) through `run`.
///
/// # Panics
/// When the output differs from the expected one; when there is no such file.
pub fn check_file(directory: &str, name: &str, run: impl Fn(&str) -> Result<String, String>) {
    check_files(vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("filetests").join(directory).join(name)], run);
}

fn check_files(files: Vec<PathBuf>, run: impl Fn(&str) -> Result<String, String>) {
    let bless = std::env::var_os("BLESS").is_some_and(|v| v != "0");
    let mut failures = String::new();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (input, expected) = split(&text);
        let mut output = match run(input) {
            Ok(output) => output,
            Err(error) => format!("error: {error}"),
        };
        if !output.is_empty() && !output.ends_with('\n') {
            output.push('\n');
        }
        if expected == Some(output.as_str()) {
            continue;
        }
        if bless {
            let text = format!("{input}{MARKER}{output}");
            std::fs::write(&path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        } else {
            write!(failures, "\n{}\n{}", path.display(), difference(expected.unwrap_or(""), &output))
                .expect("a String takes all text");
        }
    }
    assert!(failures.is_empty(), "outputs differ; if they are right, BLESS=1 accepts them\n{failures}");
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap_or_else(|e| panic!("{}: {e}", directory.display())).path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files
}

/// The input, and the expected output if there is a marker.
fn split(text: &str) -> (&str, Option<&str>) {
    match text.find(MARKER) {
        Some(at) if at == 0 || text.as_bytes()[at - 1] == b'\n' => (&text[..at], Some(&text[at + MARKER.len()..])),
        _ => (text, None),
    }
}

/// The lines from the first to the last that differ, expected ones with `-`, those that came out with `+`.
fn difference(expected: &str, output: &str) -> String {
    let (a, b): (Vec<&str>, Vec<&str>) = (expected.lines().collect(), output.lines().collect());
    let start = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let rest = a.len().min(b.len()) - start;
    let same = a.iter().rev().zip(b.iter().rev()).take(rest).take_while(|(a, b)| a == b).count();
    let mut text = format!("  from line {} of the expectation:\n", start + 1);
    let removed = a[start..a.len() - same].iter().map(|l| ('-', l));
    for (sign, l) in removed.chain(b[start..b.len() - same].iter().map(|l| ('+', l))) {
        writeln!(text, "  {sign} {l}").expect("a String takes all text");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_splits_input_from_expectation() {
        assert_eq!(split("a\n---- expect\nb\n"), ("a\n", Some("b\n")));
        assert_eq!(split("---- expect\n"), ("", Some("")));
        assert_eq!(split("a ---- expect\n"), ("a ---- expect\n", None));
    }

    #[test]
    fn a_difference_shows_only_the_lines_that_differ() {
        let text = difference("a\nb\nc\n", "a\nx\ny\nc\n");
        assert_eq!(text, "  from line 2 of the expectation:\n  - b\n  + x\n  + y\n");
        assert_eq!(difference("a\n", "a\na\n"), "  from line 2 of the expectation:\n  + a\n");
    }
}
