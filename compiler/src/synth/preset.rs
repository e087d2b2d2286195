//! The shapes that can be made, and the small files that go with the weights.
//!
//! Deliberately absent: the weights.

use serde_json::{Map, Value, json};

/// A model of known shape.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Preset {
    /// Mixtral 8x7B: 46.7 B parameters, 93 GB.
    Mixtral8x7b,
    /// Mistral 7B v0.2: 14 GB.
    Mistral7b,
    /// Llama 2 7B: 13 GB.
    Llama2_7b,
    /// A Mixtral of about one million parameters, for trying things.
    Tiny,
}

impl Preset {
    /// Every preset.
    pub const ALL: [Preset; 4] = [Preset::Mixtral8x7b, Preset::Mistral7b, Preset::Llama2_7b, Preset::Tiny];

    /// The name used on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Preset::Mixtral8x7b => "mixtral-8x7b",
            Preset::Mistral7b => "mistral-7b",
            Preset::Llama2_7b => "llama-2-7b",
            Preset::Tiny => "tiny",
        }
    }

    /// Layers of the whole model.
    pub const fn layers(self) -> usize {
        match self {
            Preset::Mixtral8x7b | Preset::Mistral7b | Preset::Llama2_7b => 32,
            Preset::Tiny => 2,
        }
    }

    /// `config.json`.
    pub(super) fn config(self, layers: usize) -> Value {
        let mut config = json!({
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": layers,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "tie_word_embeddings": false,
            "torch_dtype": "bfloat16",
            "vocab_size": 32000,
        });
        let changes = match self {
            Preset::Mixtral8x7b => json!({
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "num_experts_per_tok": 2,
                "num_local_experts": 8,
                "sliding_window": null,
            }),
            Preset::Mistral7b => json!({
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "sliding_window": null,
            }),
            Preset::Llama2_7b => json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "attention_bias": false,
                "intermediate_size": 11008,
                "max_position_embeddings": 4096,
                "num_key_value_heads": 32,
                "rope_scaling": null,
                "rope_theta": 10000.0,
            }),
            Preset::Tiny => json!({
                "architectures": ["MixtralForCausalLM"],
                "model_type": "mixtral",
                "hidden_size": 128,
                "intermediate_size": 256,
                "max_position_embeddings": 2048,
                "num_attention_heads": 8,
                "num_experts_per_tok": 2,
                "num_key_value_heads": 2,
                "num_local_experts": 8,
                "sliding_window": null,
                "vocab_size": 512,
            }),
        };
        if let (Value::Object(config), Value::Object(changes)) = (&mut config, changes) {
            config.extend(changes);
        }
        config
    }
}

impl std::fmt::Display for Preset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Preset {
    type Err = String;

    fn from_str(name: &str) -> Result<Preset, String> {
        Preset::ALL
            .into_iter()
            .find(|preset| preset.name() == name)
            .ok_or_else(|| format!("unknown preset {name:?}; there are {}", Preset::ALL.map(Preset::name).join(", ")))
    }
}

/// `tokenizer.json`: single characters, bytes for all others, and made-up words so that random ids print as text.
pub(super) fn tokenizer(vocab: usize) -> Value {
    const SPACE: &str = "▁";
    let special = ["<unk>", "<s>", "</s>"].map(String::from);
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let characters = std::iter::once(SPACE.into()).chain(('!'..='~').map(String::from));
    let all = special.into_iter().chain(bytes).chain(characters).chain((0..).map(word)).take(vocab);
    let ids: Map<String, Value> = all.enumerate().map(|(id, token)| (token, id.into())).collect();
    let added = ["<unk>", "<s>", "</s>"].iter().enumerate().map(|(id, token)| {
        json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added.collect::<Vec<Value>>(),
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": ids, "merges": [],
        },
    })
}

/// `tokenizer_config.json`.
pub(super) fn tokenizer_config() -> Value {
    let template = "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
        [INST] {{ message['content'] }} [/INST]{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}";
    json!({
        "add_bos_token": true,
        "add_eos_token": false,
        "bos_token": "<s>",
        "chat_template": template,
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
    })
}

/// The made-up word of a number: two or more syllables, each number another.
fn word(number: usize) -> String {
    const CONSONANTS: &[u8; 16] = b"bdfghjklmnprstvz";
    const VOWELS: &[u8; 4] = b"aeio";
    let mut word = String::from("▁");
    let mut rest = number;
    loop {
        word.push(CONSONANTS[rest % 16].into());
        word.push(VOWELS[rest / 16 % 4].into());
        rest /= 64;
        if rest == 0 && word.len() > 5 {
            return word;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokenizer_speaks() {
        for vocab in [512, 32000] {
            let json = tokenizer(vocab).to_string();
            let tokenizer = tokenizers::Tokenizer::from_bytes(json).unwrap();
            assert_eq!(tokenizer.get_vocab_size(true), vocab);
            let ids = tokenizer.encode("Hello, wörld 日本", true).unwrap();
            assert_eq!(ids.get_ids()[0], 1);
            assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), "Hello, wörld 日本");
            let all: Vec<u32> = (259..vocab as u32).collect();
            assert!(tokenizer.decode(&all, true).unwrap().contains(" "));
        }
    }

    #[test]
    fn names_parse_back() {
        for preset in Preset::ALL {
            assert_eq!(preset.name().parse(), Ok(preset));
        }
        assert!("mixtral".parse::<Preset>().unwrap_err().contains("mixtral-8x7b"));
    }
}
