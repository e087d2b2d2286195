//! The C headers are what the Rust sources say: `include/moec_abi.h` is made of the crate `moec-abi`, `include/moec.h` of this one.
//!
//! `BLESS=1 cargo test --release -p moec-c --test headers` writes them again.

use cbindgen::{Builder, Config, DocumentationStyle, EnumConfig, Language, RenameRule, Style};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

fn here() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Names in Rust and in C, longest first so that none is replaced inside another.
const ABI_NAMES: &[(&str, &str)] = &[
    ("ModelDescriptor", "moec_model_descriptor"),
    ("PayloadHeader", "moec_payload_header"),
    ("BarrierFn", "moec_barrier_fn"),
    ("StepFn", "moec_step_fn"),
    ("KvType", "moec_kv_type"),
    ("Level", "moec_level"),
    ("Stage", "moec_stage"),
    ("Step", "moec_step"),
    ("DESCRIPTOR_MAGIC", "MOEC_DESCRIPTOR_MAGIC"),
    ("PAYLOAD_ALIGN", "MOEC_PAYLOAD_ALIGN"),
    ("MEMORY_ALIGN", "MOEC_MEMORY_ALIGN"),
    ("ABI_VERSION", "MOEC_ABI_VERSION"),
    ("PAGE_TOKENS", "MOEC_PAGE_TOKENS"),
    ("ROW_ALIGN", "MOEC_ROW_ALIGN"),
    ("LANES", "MOEC_LANES"),
    ("X86_64_V2", "MOEC_FEATURE_X86_64_V2"),
    ("AVX2", "MOEC_FEATURE_AVX2"),
    ("FMA", "MOEC_FEATURE_FMA"),
    ("F16C", "MOEC_FEATURE_F16C"),
    ("AVX512_VNNI", "MOEC_FEATURE_AVX512_VNNI"),
    ("AVX512_BF16", "MOEC_FEATURE_AVX512_BF16"),
    ("AVX512_VBMI", "MOEC_FEATURE_AVX512_VBMI"),
    ("AVX512", "MOEC_FEATURE_AVX512"),
    ("AVX_VNNI", "MOEC_FEATURE_AVX_VNNI"),
    ("NEON", "MOEC_FEATURE_NEON"),
    ("DOTPROD", "MOEC_FEATURE_DOTPROD"),
    ("I8MM", "MOEC_FEATURE_I8MM"),
];

fn config(names: &[(&str, &str)]) -> Config {
    let mut config = Config {
        language: Language::C,
        cpp_compat: true,
        style: Style::Both,
        no_includes: true,
        documentation_style: DocumentationStyle::C99,
        line_length: 120,
        tab_width: 4,
        usize_is_size_t: true,
        enumeration: EnumConfig { prefix_with_name: true, ..EnumConfig::default() },
        sys_includes: vec!["stdbool.h".into(), "stddef.h".into(), "stdint.h".into()],
        ..Config::default()
    };
    config.enumeration.rename_variants = RenameRule::ScreamingSnakeCase;
    config.export.rename =
        names.iter().map(|(rust, c)| ((*rust).to_owned(), (*c).to_owned())).collect::<HashMap<_, _>>();
    config
}

/// Links between items of Rust documentation as a C programmer reads them: `[`Step::workers`]` is `moec_step.workers`.
fn plain(header: &str, names: &[(&str, &str)]) -> String {
    let mut text = String::with_capacity(header.len());
    for line in header.lines() {
        let mut rest = line;
        if line.trim_start().starts_with("//") {
            while let Some(start) = rest.find("[`") {
                let Some(length) = rest[start..].find("`]") else { break };
                let link = &rest[start + 2..start + length];
                text.push_str(&rest[..start]);
                let mut parts = link.split("::").filter(|part| !matches!(*part, "crate" | "metadata"));
                let first = parts.next().unwrap_or_default();
                let known = names.iter().find(|(rust, _)| *rust == first);
                text.push_str(known.map_or(first, |(_, c)| c));
                parts.for_each(|part| {
                    text.push('.');
                    text.push_str(part);
                });
                rest = &rest[start + length + 2..];
                // `[name](target)`: the target is for rustdoc.
                if let Some(end) = rest.strip_prefix('(').and_then(|target| target.find(')')) {
                    rest = &rest[end + 2..];
                }
            }
        }
        text.push_str(rest);
        text.push('\n');
    }
    // What Rust's callers of unsafe functions must know is what the C API says anyway.
    let mut safety = false;
    let lines = text.lines().filter(|line| {
        safety = line.starts_with("//") && (safety || *line == "// # Safety");
        !safety
    });
    text = lines.collect::<Vec<_>>().join("\n").replace("\n//\nenum ", "\nenum ") + "\n";
    // Forms of JSON files are no part of the border.
    text = text.replace("// The version of this form.\n#define ExpertStats_VERSION 1\n\n", "");
    text = text.replace("MOEC_STATUS_", "MOEC_");
    // Feature bits are 64 bits wide.
    text = text.replace("(1 << ", "(UINT64_C(1) << ");
    for (rust, c) in names.iter().filter(|(_, c)| c.starts_with("MOEC_") && !c.starts_with("MOEC_FEATURE_")) {
        text = text.replace(&format!(" {rust} "), &format!(" {c} ")).replace(&format!(" {rust}`"), &format!(" {c}`"));
    }
    text
}

fn check(name: &str, generated: &str) {
    let macros = generated.lines().filter_map(|line| line.strip_prefix("#define "));
    let stray: Vec<&str> = macros.filter(|name| !name.starts_with("MOEC_")).collect();
    assert!(stray.is_empty(), "{name}: names without our prefix, to be listed in this test: {stray:?}");
    let path = here().join("include").join(name);
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, generated).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    let differ = committed.lines().zip(generated.lines()).position(|(a, b)| a != b);
    assert!(
        committed == generated,
        "{} is stale from line {}: BLESS=1 cargo test --release -p moec-c --test headers",
        path.display(),
        differ.unwrap_or_else(|| committed.lines().count().min(generated.lines().count())) + 1
    );
}

fn generate(source: &Path, config: Config, names: &[(&str, &str)]) -> String {
    let bindings = Builder::new().with_src(source).with_config(config).generate().expect("cbindgen reads the sources");
    let mut text = Vec::new();
    bindings.write(&mut text);
    plain(&String::from_utf8(text).unwrap(), names)
}

/// Assertions of the C compiler that it lays out the structs as Rust does.
fn layout_assertions() -> String {
    let mut text = String::from(
        "/* Layouts are those of the generated code, or nothing works. */\n#ifdef __cplusplus\n#define MOEC_STATIC_ASSERT \
         static_assert\n#else\n#define MOEC_STATIC_ASSERT _Static_assert\n#endif\n",
    );
    let mut assert = |what: String, value: usize| {
        text.push_str(&format!(
            "MOEC_STATIC_ASSERT({what} == {value}, \"moec lays out this struct in another way\");\n"
        ));
    };
    macro_rules! layout {
        ($rust:ident as $c:literal { $($field:ident),* }) => {
            assert(format!("sizeof(struct {})", $c), size_of::<moec_abi::$rust>());
            $(assert(
                format!("offsetof(struct {}, {})", $c, stringify!($field)),
                std::mem::offset_of!(moec_abi::$rust, $field),
            );)*
        };
    }
    layout!(Level as "moec_level" { name, features, decode, batch });
    layout!(Step as "moec_step" {
        payload, scratch, token_ids, positions, page_tables, logit_rows, logits, barrier, barrier_context, tokens, logit_count, workers
    });
    layout!(ModelDescriptor as "moec_model_descriptor" {
        magic, abi_version, descriptor_bytes, name, levels, level_count, logits_stride, page_bytes, scratch_bytes,
        final_hidden_offset, payload_bytes, payload_key, arithmetic
    });
    layout!(PayloadHeader as "moec_payload_header" { key, payload_bytes, tokenizer_bytes });
    text
}

#[test]
fn the_border_is_as_in_rust() {
    let mut config = config(ABI_NAMES);
    config.include_guard = Some("MOEC_ABI_H".into());
    config.header = Some(
        "/* The border between code that moec generates and the program that runs it.\n * Made from the crate moec-abi; do not \
         edit. C11, or C++. */"
            .into(),
    );
    config.export.include = ["ModelDescriptor", "PayloadHeader", "Step", "Level", "KvType"].map(str::to_owned).to_vec();
    config.export.exclude = vec!["Trailer".into()];
    config.trailer = Some(layout_assertions());
    check("moec_abi.h", &generate(&here().join("../abi/src/lib.rs"), config, ABI_NAMES));
}

const API_NAMES: &[(&str, &str)] = &[
    ("ModelDescriptor", "moec_model_descriptor"),
    ("ModelHandle", "moec_model"),
    ("SessionHandle", "moec_session"),
    ("GenerateFn", "moec_generate_fn"),
    ("Sampling", "moec_sampling"),
    ("Options", "moec_options"),
    ("Pooling", "moec_pooling"),
    ("Message", "moec_message"),
    ("Status", "moec_status"),
    ("Memory", "moec_memory_use"),
    ("Info", "moec_model_info"),
    ("API_VERSION", "MOEC_API_VERSION"),
    ("NO_TOKEN", "MOEC_NO_TOKEN"),
];

const PREAMBLE: &str = "/* moec.h: run models that moec compiled. C11, or C++.
 *
 * A program includes this header and that of each of its models, and links the model's library:
 *
 *     moec_model *model;
 *     moec_session *session;
 *     if (moec_open(&mixtral_model, \"mixtral.weights\", NULL, &model) != MOEC_OK) puts(moec_error_text());
 *     moec_session_new(model, &session);
 *     moec_feed(session, tokens, count);
 *     moec_generate(session, 100, callback, NULL, NULL);
 *     moec_session_free(session);
 *     moec_close(model);
 *
 * Ownership: what a function writes to a `**` place is the caller's, to be freed with the function that is named there. Nothing else is to be
 * freed. Pointers that are given to a function are used during the call only, unless it says otherwise.
 * Threads: every function may be called by any thread. Calls on one session must not overlap: the later one gets MOEC_BUSY. A model computes
 * on its own threads and the calling one; sessions of one model take turns, models do not wait for each other.
 * Errors: a function that can fail returns a moec_status and leaves a sentence for moec_error_text. Nothing prints, exits or aborts. A handle
 * that was freed gets MOEC_INVALID_HANDLE. Where a pointer is not said to be allowed to be null, null gets MOEC_INVALID_ARGUMENT.
 * Units: sizes are in elements of the array that they belong to; bytes where it is text or untyped memory.
 * Bits: logits depend on the model and the tokens, on nothing else: not on threads, chunks, forks, files or the CPU.
 *
 * Made from the crate moec-c; do not edit. */";

#[test]
fn the_api_is_as_in_rust() {
    let mut config = config(API_NAMES);
    config.include_guard = Some("MOEC_H".into());
    config.header = Some(PREAMBLE.into());
    config.after_includes = Some("\ntypedef struct moec_model_descriptor moec_model_descriptor;".into());
    config.export.include = ["Pooling"].map(str::to_owned).to_vec();
    let mut builder = Builder::new().with_config(config);
    for file in ["status", "handles", "model", "session", "generate", "text"] {
        builder = builder.with_src(here().join(format!("src/{file}.rs")));
    }
    let mut text = Vec::new();
    builder.generate().expect("cbindgen reads the sources").write(&mut text);
    check("moec.h", &plain(&String::from_utf8(text).unwrap(), API_NAMES));
}
