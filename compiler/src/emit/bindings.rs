//! The Rust side of a model: what a crate includes to use an object that its build script made.
//!
//! The bindings hold the runtime that the crate is compiled with to the layouts that the object was compiled with. Deliberately absent: the model's
//! own functions, which are the runtime's ([`Model`](https://docs.rs/moec-runtime), `Session`).

use crate::plan::Plan;
use moec_abi::{ABI_VERSION, Level, ModelDescriptor, Step};
use std::fmt::Write;
use std::mem::{offset_of, size_of};
use std::path::Path;

/// The text that `moec_runtime::include_model!` includes. `weights` is where the weights lie.
pub fn rust_bindings(plan: &Plan, prefix: &str, weights: &Path) -> String {
    let model = &plan.model;
    let mut text = format!("// Made by moec {} for {:?}; do not edit.\n\n", env!("CARGO_PKG_VERSION"), model.name);
    let mut line = |line: String| writeln!(text, "{line}").expect("a string can be written to");
    line(format!(
        "const _: () = assert!(::moec_runtime::abi::ABI_VERSION == {ABI_VERSION}, \"the build script's moec and moec-runtime are of \
         different versions\");"
    ));
    let mut same = |what: String, expected: usize| {
        line(format!(
            "const _: () = assert!({what} == {expected}, \"moec and moec-runtime lay out a struct in different ways\");"
        ));
    };
    macro_rules! check {
        ($name:ident { $($field:ident),* }) => {
            let path = concat!("::moec_runtime::abi::", stringify!($name));
            same(format!("::core::mem::size_of::<{path}>()"), size_of::<$name>());
            $(same(format!("::core::mem::offset_of!({path}, {})", stringify!($field)), offset_of!($name, $field));)*
        };
    }
    check!(Level { name, features, decode, batch });
    check!(Step {
        payload,
        scratch,
        token_ids,
        positions,
        page_tables,
        logit_rows,
        logits,
        barrier,
        barrier_context,
        tokens,
        logit_count,
        workers
    });
    check!(ModelDescriptor {
        magic,
        abi_version,
        descriptor_bytes,
        name,
        levels,
        level_count,
        hidden,
        layers,
        heads,
        kv_heads,
        head_dim,
        ffn,
        experts,
        experts_per_token,
        vocab,
        logits_stride,
        context,
        sliding_window,
        kv_type,
        max_tokens,
        page_tokens,
        page_bytes,
        scratch_bytes,
        worker_scratch_bytes,
        routes_offset,
        route_weights_offset,
        final_hidden_offset,
        payload_bytes,
        payload_key,
        decode_weight_bytes,
        multiply_adds_per_token,
        multiply_adds_per_logit_row,
        arithmetic,
        decode_stages,
        batch_stages,
        stages
    });
    line(format!(
        "\n/// The weights, where they were built.\n#[allow(dead_code)]\npub const WEIGHTS: &str = {:?};",
        weights.display().to_string()
    ));
    for (name, value, what) in [
        ("VOCAB", model.vocab, "Token ids are below this."),
        ("CONTEXT", model.context, "Most tokens of a session."),
        ("HIDDEN", model.hidden, "Elements of an embedding."),
    ] {
        line(format!("/// {what}\n#[allow(dead_code)]\npub const {name}: usize = {value};"));
    }
    line(format!(
        "\nunsafe extern \"C\" {{\n    static {prefix}_model: ::moec_runtime::abi::ModelDescriptor;\n}}\n\n\
         /// The model, checked.\n\
         pub fn descriptor() -> ::moec_runtime::Result<::moec_runtime::Descriptor> {{\n    \
         // SAFETY: the object exports a constant descriptor under this name.\n    \
         unsafe {{ ::moec_runtime::Descriptor::new(&raw const {prefix}_model) }}\n}}"
    ));
    text
}
