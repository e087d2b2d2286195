//! How text is split before byte-level BPE, by the name that a GGUF file gives it (`tokenizer.ggml.pre`).
//!
//! llama.cpp knows each by code, the `tokenizers` library by what stands in `tokenizer.json`; a row here is the latter for the former, taken
//! from the models' own files. Deliberately absent: `default`, under which old converters put whatever they did not know.

use serde_json::{Value, json};

/// What stands in `tokenizer.json` around the BPE model.
pub(super) struct Splitting {
    pub(super) normalizer: Value,
    pub(super) pre_tokenizer: Value,
    /// Whether a piece that is a token is that token, however merges would make it.
    pub(super) ignore_merges: bool,
    /// Whether texts begin with a bos token when the file does not say.
    pub(super) bos: bool,
}

/// What is split first.
#[derive(Clone, Copy)]
enum Rule {
    /// GPT-2's own expression, which the library has.
    Gpt2,
    /// Digits one by one, then as GPT-2.
    DigitsThenGpt2,
    /// This expression.
    Pattern(&'static str),
}

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Name; rule; whether text is NFC-normalized first; whether merges are ignored for whole tokens; whether a bos token is the default.
type Row = (&'static str, Rule, bool, bool, bool);

const TABLE: &[Row] = &[
    ("llama-bpe", Rule::Pattern(LLAMA3), false, true, true),
    ("llama3", Rule::Pattern(LLAMA3), false, true, true),
    ("llama-v3", Rule::Pattern(LLAMA3), false, true, true),
    ("smaug-bpe", Rule::Pattern(LLAMA3), false, true, false),
    ("dbrx", Rule::Pattern(LLAMA3), false, false, false),
    ("qwen2", Rule::Pattern(QWEN2), true, false, false),
    ("deepseek-r1-qwen", Rule::Pattern(QWEN2), true, false, false),
    ("tekken", Rule::Pattern(TEKKEN), false, true, true),
    ("smollm", Rule::DigitsThenGpt2, false, false, false),
    ("starcoder", Rule::DigitsThenGpt2, false, false, false),
    ("refact", Rule::DigitsThenGpt2, false, false, false),
    ("gpt-2", Rule::Gpt2, false, false, false),
    ("phi-2", Rule::Gpt2, false, false, false),
    ("mpt", Rule::Gpt2, true, false, false),
    ("olmo", Rule::Gpt2, true, false, false),
];

/// The splitting of a name.
pub(super) fn find(name: &str) -> Option<Splitting> {
    let &(_, rule, nfc, ignore_merges, bos) = TABLE.iter().find(|(known, ..)| *known == name)?;
    let bytes =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let pre_tokenizer = match rule {
        Rule::Gpt2 => bytes(true),
        Rule::DigitsThenGpt2 => json!({
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes(true)],
        }),
        Rule::Pattern(pattern) => json!({
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                bytes(false),
            ],
        }),
    };
    let normalizer = if nfc { json!({"type": "NFC"}) } else { Value::Null };
    Some(Splitting { normalizer, pre_tokenizer, ignore_merges, bos })
}

/// All names.
pub(super) fn names() -> Vec<&'static str> {
    TABLE.iter().map(|(name, ..)| *name).collect()
}
