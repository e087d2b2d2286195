//! The text form of the tile IR: whatever parses prints to a text that parses to the same, and can be verified.

#![no_main]

use libfuzzer_sys::fuzz_target;
use moec_ir::tile::{parse, verify};

fuzz_target!(|text: &str| {
    let Ok(parsed) = parse::parse(text) else { return };
    let printed = parsed.to_string();
    let again = parse::parse(&printed).unwrap_or_else(|error| panic!("{error} in what was printed:\n{printed}"));
    assert_eq!(again.to_string(), printed);
    let _verdict = verify::verify(&parsed);
});
