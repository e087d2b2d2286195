//! A tiny valid model directory, to be changed by the tests before it is written.
//!
//! Every element of every tensor has a value that f32, bf16 and f16 hold exactly and that tells where it belongs.

use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A stored tensor.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

impl Tensor {
    pub fn new(name: &str, shape: &[usize]) -> Tensor {
        let seed: usize = name.bytes().map(usize::from).sum();
        let values = (0..shape.iter().product()).map(|i| value(seed, i)).collect();
        Tensor { name: name.into(), dtype: "F32", shape: shape.into(), values }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let bytes = |value: &f32| match self.dtype {
            "F32" => value.to_le_bytes().to_vec(),
            "BF16" => half::bf16::from_f32(*value).to_le_bytes().to_vec(),
            "F16" => half::f16::from_f32(*value).to_le_bytes().to_vec(),
            // Words and codes, as the bits and the value of a number.
            "I32" => value.to_bits().to_le_bytes().to_vec(),
            "F8_E4M3" => vec![*value as u8],
            "F64" | "I64" => f64::from(*value).to_le_bytes().to_vec(),
            other => panic!("no bytes for {other}"),
        };
        self.values.iter().flat_map(bytes).collect()
    }
}

/// One of 251 values, all multiples of 1/16 below 8.
fn value(seed: usize, index: usize) -> f32 {
    ((seed * 31 + index * 7) % 251) as f32 / 16.0 - 7.75
}

/// A model directory before it is written.
#[derive(Clone)]
pub struct Model {
    pub config: Map<String, Value>,
    pub tensors: Vec<Tensor>,
    /// Spaces at the end of headers.
    pub padding: usize,
    /// Number of weight files.
    pub shards: usize,
    pub tokenizer: Value,
    /// Further files; they replace those of the same name.
    pub files: Vec<(&'static str, Vec<u8>)>,
    pub without: Vec<&'static str>,
}

pub const HIDDEN: usize = 16;
pub const FFN: usize = 20;
pub const VOCAB: usize = 270;
pub const EXPERTS: usize = 3;

impl Model {
    /// A Mixtral: two layers, three experts, two heads of 6 over one kv head.
    pub fn mixtral() -> Model {
        let config = json!({
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": HIDDEN,
            "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 6, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": null, "tie_word_embeddings": false,
            "hidden_act": "silu", "torch_dtype": "bfloat16",
        });
        let mut model = Model::empty(config);
        for layer in 0..2 {
            let name = |name: &str| format!("model.layers.{layer}.block_sparse_moe.{name}.weight");
            model.tensors.push(Tensor::new(&name("gate"), &[EXPERTS, HIDDEN]));
            for expert in 0..EXPERTS {
                for (matrix, shape) in [("w1", [FFN, HIDDEN]), ("w2", [HIDDEN, FFN]), ("w3", [FFN, HIDDEN])] {
                    model.tensors.push(Tensor::new(&name(&format!("experts.{expert}.{matrix}")), &shape));
                }
            }
        }
        model
    }

    /// A dense model.
    pub fn dense(architecture: &str, model_type: &str) -> Model {
        let config = json!({
            "architectures": [architecture], "model_type": model_type, "vocab_size": VOCAB, "hidden_size": HIDDEN,
            "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 6, "max_position_embeddings": 512,
        });
        let mut model = Model::empty(config);
        for layer in 0..2 {
            for (matrix, shape) in [("gate", [FFN, HIDDEN]), ("up", [FFN, HIDDEN]), ("down", [HIDDEN, FFN])] {
                model.tensors.push(Tensor::new(&format!("model.layers.{layer}.mlp.{matrix}_proj.weight"), &shape));
            }
        }
        model
    }

    fn empty(config: Value) -> Model {
        let mut tensors = vec![
            Tensor::new("model.embed_tokens.weight", &[VOCAB, HIDDEN]),
            Tensor::new("model.norm.weight", &[HIDDEN]),
            Tensor::new("lm_head.weight", &[VOCAB, HIDDEN]),
        ];
        for layer in 0..2 {
            for (name, shape) in [
                ("input_layernorm", &[HIDDEN][..]),
                ("post_attention_layernorm", &[HIDDEN]),
                ("self_attn.q_proj", &[12, HIDDEN]),
                ("self_attn.k_proj", &[6, HIDDEN]),
                ("self_attn.v_proj", &[6, HIDDEN]),
                ("self_attn.o_proj", &[HIDDEN, 12]),
            ] {
                tensors.push(Tensor::new(&format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        let Value::Object(config) = config else { panic!("a configuration is an object") };
        let (files, without) = (Vec::new(), Vec::new());
        Model { config, tensors, padding: 0, shards: 1, tokenizer: tokenizer(VOCAB), files, without }
    }

    pub fn set(mut self, key: &str, value: Value) -> Model {
        self.config.insert(key.into(), value);
        self
    }

    pub fn remove(mut self, key: &str) -> Model {
        self.config.shift_remove(key);
        self
    }

    pub fn file(mut self, name: &'static str, content: impl Into<Vec<u8>>) -> Model {
        self.files.push((name, content.into()));
        self
    }

    pub fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    pub fn drop_tensor(&mut self, name: &str) {
        let before = self.tensors.len();
        self.tensors.retain(|tensor| tensor.name != name);
        assert_eq!(self.tensors.len() + 1, before, "no tensor {name}");
    }

    /// The only weight file.
    pub fn weights(&self) -> Vec<u8> {
        file(&self.tensors, self.padding, |_| {})
    }

    /// The only weight file, with a header changed by `change` and the data as they were.
    pub fn weights_with(&self, change: impl FnOnce(&mut Map<String, Value>)) -> Vec<u8> {
        file(&self.tensors, self.padding, change)
    }

    /// Puts the model into a new directory.
    pub fn write(&self) -> Directory {
        let directory = Directory(tempfile::tempdir().unwrap());
        let put = |name: &str, bytes: &[u8]| std::fs::write(directory.join(name), bytes).unwrap();
        put("config.json", Value::Object(self.config.clone()).to_string().as_bytes());
        put("tokenizer.json", self.tokenizer.to_string().as_bytes());
        if self.shards == 1 {
            put("model.safetensors", &self.weights());
        } else {
            let mut places = Map::new();
            for shard in 0..self.shards {
                let name = format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.shards);
                let tensors: Vec<Tensor> = self.tensors.iter().skip(shard).step_by(self.shards).cloned().collect();
                places.extend(tensors.iter().map(|tensor| (tensor.name.clone(), Value::from(name.clone()))));
                put(&name, &file(&tensors, self.padding, |_| {}));
            }
            put("model.safetensors.index.json", json!({"weight_map": places}).to_string().as_bytes());
        }
        for (name, content) in &self.files {
            put(name, content);
        }
        for name in &self.without {
            std::fs::remove_file(directory.join(name)).unwrap();
        }
        directory
    }
}

/// A directory that goes when it is dropped.
pub struct Directory(TempDir);

impl Directory {
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// A safetensors file of tensors in the order given.
pub fn file(tensors: &[Tensor], padding: usize, change: impl FnOnce(&mut Map<String, Value>)) -> Vec<u8> {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for tensor in tensors {
        let start = data.len();
        data.extend(tensor.bytes());
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    change(&mut header);
    framed(&format!("{}{}", Value::Object(header), " ".repeat(padding)), &data)
}

/// A safetensors file of a header's text and data.
pub fn framed(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A tokenizer of bytes and of further tokens `t0`, `t1`, ….
pub fn tokenizer(vocab: usize) -> Value {
    let special = ["<unk>", "<s>", "</s>"].map(String::from);
    let bytes = (0..=255u8).map(|byte| format!("<0x{byte:02X}>"));
    let tokens = special.into_iter().chain(bytes).chain((0..).map(|number| format!("t{number}"))).take(vocab);
    let ids: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": ids, "merges": []},
    })
}
