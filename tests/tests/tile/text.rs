//! Filetests of the tile IR, and the round trip through its text.

use moec::{lower, target};
use moec_ir::tile::parse::parse;
use moec_ir::tile::verify::verify;
use moec_tests::filetest;
use moec_tests::native::{Arg, evaluate};
use proptest::prelude::*;

use crate::random;

#[test]
fn print() {
    filetest::check("tile/print", "tile", |input| {
        let function = parse(input).map_err(|e| e.to_string())?;
        verify(&function).map_err(|e| e.to_string())?;
        Ok(function.to_string())
    });
}

#[test]
fn parse_errors() {
    filetest::check("tile/parse_errors", "tile", |input| match parse(input) {
        Ok(_) => Ok("it parses".to_string()),
        Err(error) => {
            let mut marked = String::new();
            for (i, line) in input.lines().enumerate() {
                marked += line;
                marked += "\n";
                if i + 1 == error.line {
                    marked += &format!("^^^ {error}\n");
                }
            }
            Ok(marked)
        }
    });
}

#[test]
fn verify_errors() {
    filetest::check("tile/verify_errors", "tile", |input| {
        let function = parse(input).map_err(|e| e.to_string())?;
        match verify(&function) {
            Ok(()) => Ok("it verifies".to_string()),
            Err(error) => Ok(error.annotate(&function)),
        }
    });
}

/// Arguments stand in comments: `; arg int 5`, `; arg zeros 64` (bytes of memory), `; arg f32 1.5 2 ..`, `; arg bytes 1 2 ..`. The
/// output is what the arguments' memory holds afterwards, as asked for by `; show 1 f32` (or `i32`, `bytes`).
#[test]
fn evaluate_files() {
    filetest::check("tile/eval", "tile", |input| {
        let function = parse(input).map_err(|e| e.to_string())?;
        verify(&function).map_err(|e| e.to_string())?;
        let directives: Vec<Vec<&str>> = input
            .lines()
            .filter_map(|line| line.strip_prefix("; "))
            .map(|line| line.split_whitespace().collect())
            .collect();
        let args: Vec<Arg> = directives.iter().filter(|d| d[0] == "arg").map(|d| argument(&d[1..])).collect();
        let after = evaluate(&function, &args).map_err(|e| e.to_string())?;
        let shown = directives.iter().filter(|d| d[0] == "show").map(|d| show(&after, &d[1..]));
        Ok(shown.collect())
    });
}

fn argument(words: &[&str]) -> Arg {
    let numbers = &words[1..];
    match words[0] {
        "int" => Arg::Int(numbers[0].parse().expect("a number")),
        "zeros" => Arg::Memory(vec![0; numbers[0].parse().expect("a number")]),
        "f32" => Arg::f32s(&numbers.iter().map(|n| n.parse().expect("an f32")).collect::<Vec<f32>>()),
        "bytes" => Arg::Memory(numbers.iter().map(|n| n.parse().expect("a byte")).collect()),
        other => panic!("no argument is {other}"),
    }
}

fn show(after: &[Vec<u8>], words: &[&str]) -> String {
    let bytes = &after[words[0].parse::<usize>().expect("the number of an argument")];
    let words4 = bytes.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
    let items: Vec<String> = match words[1] {
        "f32" => words4.map(|b| format!("{:?}", f32::from_le_bytes(b))).collect(),
        "i32" => words4.map(|b| i32::from_le_bytes(b).to_string()).collect(),
        "bytes" => bytes.iter().map(|b| b.to_string()).collect(),
        other => panic!("no memory is shown as {other}"),
    };
    items.chunks(16).map(|row| row.join(" ") + "\n").collect()
}

/// Which CPU stands in a comment: `; cpu znver5`, or `; cpu neoverse-v2 aarch64-unknown-linux-gnu`.
fn lowered(input: &str, asm: bool) -> Result<String, String> {
    let function = parse(input).map_err(|e| e.to_string())?;
    verify(&function).map_err(|e| e.to_string())?;
    let cpu = input.lines().find_map(|line| line.strip_prefix("; cpu ")).expect("a line `; cpu NAME [TRIPLE]`");
    let mut words = cpu.split_whitespace();
    let name = words.next().expect("a CPU");
    let triple = words.next().unwrap_or("x86_64-unknown-linux-gnu").parse().expect("a triple");
    let level = target::find_level(name, &triple).map_err(|e| e.to_string())?;
    let isa = target::isa_for(level.features, &triple).map_err(|e| e.to_string())?;
    if asm {
        let backend = lower::backend::KernelBackend::choose(level.features, &triple);
        lower::dump::disassemble(&function, backend, &*isa).map_err(|e| e.to_string())
    } else {
        Ok(lower::dump::clif_with_comments(&function, &*isa))
    }
}

#[test]
fn clif() {
    filetest::check("tile/clif", "tile", |input| lowered(input, false));
}

#[test]
fn asm() {
    filetest::check("tile/asm", "tile", |input| lowered(input, true));
}

proptest! {
    #[test]
    fn random_functions_survive_their_text(steps in prop::collection::vec(any::<random::Step>(), 0..60)) {
        let function = random::function(&steps);
        let text = function.to_string();
        prop_assert_eq!(verify(&function), Ok(()));
        prop_assert_eq!(parse(&text), Ok(function), "{}", text);
    }

    /// Whatever the text, the parser and the verifier end without a panic.
    #[test]
    fn damaged_text_is_refused_or_understood(
        steps in prop::collection::vec(any::<random::Step>(), 0..30),
        at in any::<prop::sample::Index>(),
        cut in 0usize..8,
        insert in "[v0-9a-z{}=,.:; +-]{0,4}",
    ) {
        let text = random::function(&steps).to_string();
        let start = at.index(text.len());
        let end = (start + cut).min(text.len());
        let damaged = format!("{}{insert}{}", &text[..start], &text[end..]);
        if let Ok(function) = parse(&damaged)
            && let Err(error) = verify(&function)
        {
            prop_assert!(error.annotate(&function).contains("error: "), "{}", damaged);
        }
    }
}
