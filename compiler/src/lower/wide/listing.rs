//! Machine code as text for people: Intel syntax, with the tile IR beside it.
//!
//! Deliberately absent: constants, which follow the code.

use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};
use moec_ir::tile::{self, text};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::Compiled;

/// The code of `compiled`, each instruction of the tile IR as a comment before those it became. A loop's step and test stand
/// under what comes last in its body.
pub fn listing(function: &tile::Function, compiled: &Compiled) -> String {
    let mut comments: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for (&start, line) in compiled.selected.trace.iter().zip(text::instruction_lines(function)) {
        comments.entry(start).or_default().push(line);
    }
    let encoded = &compiled.encoded;
    let code = &encoded.bytes[..encoded.code_bytes];
    let all: Vec<Instruction> = Decoder::with_ip(64, code, 0, DecoderOptions::NONE).into_iter().collect();
    let targets: BTreeSet<u64> = all.iter().map(Instruction::near_branch_target).filter(|&t| t > 0).collect();
    let label = |at: u64| targets.iter().position(|&t| t == at);
    let mut formatter = IntelFormatter::new();
    formatter.options_mut().set_space_after_operand_separator(true);
    formatter.options_mut().set_rip_relative_addresses(true);
    let mut text = format!("; {}\n", text::header(function));
    for (instruction, (_, origin)) in all.iter().zip(&encoded.origins) {
        while let Some(entry) = comments.first_entry() {
            if *entry.key() > *origin {
                break;
            }
            for line in entry.remove() {
                let _ = writeln!(text, "  ; {line}");
            }
        }
        if let Some(n) = label(instruction.ip()) {
            let _ = writeln!(text, "L{n}:");
        }
        let mut line = String::new();
        match label(instruction.near_branch_target()) {
            Some(n) if instruction.near_branch_target() > 0 => {
                let mnemonic = format!("{:?}", instruction.mnemonic()).to_lowercase();
                let _ = write!(line, "{mnemonic} L{n}");
            }
            _ => formatter.format(instruction, &mut line),
        }
        let _ = writeln!(text, "    {line}");
    }
    text
}
