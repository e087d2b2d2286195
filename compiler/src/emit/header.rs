//! The C header of a model: its descriptor, its dimensions and memory as macros, and the border's structs, whose layouts it checks.
//!
//! The structs are those of `runtime/c/include/moec_abi.h`, which is made from the crate `moec-abi` and lies here as a whole under a guard of its
//! own, so that one header is enough and the headers of two models can be included together. Deliberately absent: the API of the
//! runtime, which is `moec.h`.

use crate::plan::Plan;
use crate::target::{CpuLevel, feature_names};
use moec_abi::{ABI_VERSION, LANES, ROW_ALIGN, round_up};
use std::fmt::Write;

/// `moec_abi.h`.
pub const ABI_HEADER: &str = include_str!("../../../runtime/c/include/moec_abi.h");

/// The header of `plan`, compiled for `levels` (best first) with symbols that begin with `prefix`.
pub fn c_header(plan: &Plan, levels: &[CpuLevel], prefix: &str, key: &[u8; 32]) -> String {
    let upper = prefix.to_ascii_uppercase();
    let model = &plan.model;
    let mut text = String::new();
    let mut line = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    line(&format!("/* {}, compiled by moec {}. */", comment(&model.name), env!("CARGO_PKG_VERSION")));
    line(&format!("#ifndef MOEC_MODEL_{upper}_H\n#define MOEC_MODEL_{upper}_H\n"));
    line(ABI_HEADER);
    line(&format!(
        "#if MOEC_ABI_VERSION != {ABI_VERSION}\n#error \"{prefix}.h needs version {ABI_VERSION} of the interface: compile all \
         models of a program with one version of moec\"\n#endif\n"
    ));

    let mut define = |name: &str, value: String, what: &str| {
        line(&format!("/* {what} */\n#define {upper}_{name} {value}"));
    };
    define("LAYERS", model.layers.to_string(), "Transformer blocks.");
    define("HIDDEN", model.hidden.to_string(), "Elements of the residual stream.");
    define("HEADS", model.heads.to_string(), "Query heads.");
    define("KV_HEADS", model.kv_heads.to_string(), "Heads of keys and values.");
    define("HEAD_DIM", model.head_dim.to_string(), "Elements of a head.");
    define("FFN", model.ffn.to_string(), "Width of an expert, or of the dense FFN.");
    define("EXPERTS", model.experts.to_string(), "Experts of a layer; 0 for a dense model.");
    define("EXPERTS_PER_TOKEN", model.experts_per_token.to_string(), "Experts of a token.");
    define("VOCAB", model.vocab.to_string(), "Token ids are below this.");
    define(
        "LOGITS_STRIDE",
        round_up(model.vocab, LANES).to_string(),
        "Floats from one row of logits to the next; the first _VOCAB of them are logits.",
    );
    define("CONTEXT", model.context.to_string(), "Positions are below this.");
    define(
        "SLIDING_WINDOW",
        model.sliding_window.unwrap_or(0).to_string(),
        "Positions that a token sees, its own included; 0 for all.",
    );
    define("MAX_TOKENS", model.max_tokens.to_string(), "Most tokens of one step.");
    define(
        "FINAL_HIDDEN_STRIDE",
        round_up(model.hidden, ROW_ALIGN).to_string(),
        "Floats from one row at final_hidden_offset to the next; the first _HIDDEN of them count.",
    );
    let wide = |n: usize| format!("UINT64_C({n})");
    define("PAYLOAD_BYTES", wide(plan.payload.bytes), "Bytes of the weights, aligned to MOEC_PAYLOAD_ALIGN.");
    define(
        "PAGE_BYTES",
        wide(plan.page_bytes()),
        "Bytes of keys and values of MOEC_PAGE_TOKENS tokens: one page, zeroed once.",
    );
    define(
        "PAGES",
        "((MOEC_PAGE_TOKENS - 1 + (size_t)(tokens)) / MOEC_PAGE_TOKENS)".to_string(),
        "Entries of the page table of a sequence of so many tokens.",
    );
    define("SHARED_SCRATCH_BYTES", wide(plan.scratch_bytes), "Scratch that the workers of a step share.");
    define("WORKER_SCRATCH_BYTES", wide(plan.worker_scratch_bytes), "Scratch of each worker.");
    define(
        "SCRATCH_BYTES",
        format!("({upper}_SHARED_SCRATCH_BYTES + (uint64_t)(workers) * {upper}_WORKER_SCRATCH_BYTES)"),
        "Bytes of moec_step.scratch for so many workers, aligned to MOEC_MEMORY_ALIGN.",
    );
    define("LEVELS", levels.len().to_string(), "Levels of code, best first:");
    for level in levels {
        line(&format!("/*   {}: {} */", level.name, feature_names(level.features).join(" ")));
    }

    line("\n#ifdef __cplusplus\nextern \"C\" {\n#endif\n");
    line(&format!(
        "/* The model. Constant, and the object's only symbol. Its weights are {prefix}.weights (key {}…).",
        key[..6].iter().map(|b| format!("{b:02x}")).collect::<String>()
    ));
    line(
        " *\n * A step: choose the first level whose `features` the CPU has; fill a moec_step; call the level's `decode` (one token) or \
         `batch`\n * (any number up to MAX_TOKENS) once from each of moec_step.workers threads, each with its own index; when all have \
         returned,\n * the logits are there. */",
    );
    line(&format!("extern const moec_model_descriptor {prefix}_model;"));
    line("\n#ifdef __cplusplus\n}\n#endif\n\n#endif");
    // Macros with arguments.
    for (name, argument) in [("PAGES", "tokens"), ("SCRATCH_BYTES", "workers")] {
        text = text.replace(&format!("#define {upper}_{name} "), &format!("#define {upper}_{name}({argument}) "));
    }
    text
}

/// Text that cannot end a comment, in one line.
fn comment(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        write!(safe, "{}", if c.is_control() || matches!(c, '*' | '/' | '\\' | '?') { '_' } else { c })
            .expect("a string");
    }
    safe
}
