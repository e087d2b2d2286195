//! Models as they occur, in all their variants, and what is read from them.

use crate::model::{EXPERTS, FFN, HIDDEN, Model, Tensor, VOCAB};
use moec::import::{self, Activation, Architecture, Dtype, Experts, HeadNorm, ModelConfig, RopeScaling, TensorTable};
use serde_json::{Value, json};
use std::path::Path;

/// All values of one matrix of a weight.
fn read(table: &TensorTable, name: &str, expert: usize) -> Vec<f32> {
    let shape = &table.info(name).shape;
    let (rows, cols) =
        if let [cols] = shape[..] { (1, cols) } else { (shape[shape.len() - 2], shape[shape.len() - 1]) };
    let mut values = vec![f32::NAN; rows * cols];
    table.read_rows(name, expert, 0..rows, &mut values);
    values
}

/// Reads every weight of a Mixtral and compares it with the tensors it came from.
fn assert_reads(model: &Model, table: &TensorTable) {
    let stored = |name: &str| &model.tensors.iter().find(|tensor| tensor.name == name).unwrap().values;
    for name in table.names() {
        let (layer, weight) = match name.split('.').collect::<Vec<_>>()[..] {
            ["layers", layer, ..] => (layer, name.splitn(3, '.').last().unwrap()),
            _ => ("", name),
        };
        if let Some(matrix) = weight.strip_prefix("experts.") {
            let matrix = match matrix {
                "gate" => "w1",
                "down" => "w2",
                "up" => "w3",
                other => panic!("{other}"),
            };
            for expert in 0..EXPERTS {
                let from = format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight");
                assert_eq!(&read(table, name, expert), stored(&from), "{name} {expert}");
            }
            continue;
        }
        let from = match weight {
            "embed" => "model.embed_tokens.weight".into(),
            "norm" => "model.norm.weight".into(),
            "output" => "lm_head.weight".into(),
            "attention_norm" => format!("model.layers.{layer}.input_layernorm.weight"),
            "ffn_norm" => format!("model.layers.{layer}.post_attention_layernorm.weight"),
            "router" => format!("model.layers.{layer}.block_sparse_moe.gate.weight"),
            projection => format!("model.layers.{layer}.self_attn.{projection}_proj.weight"),
        };
        assert_eq!(&read(table, name, 0), stored(&from), "{name}");
    }
}

#[test]
fn mixed_types_unaligned_headers_any_order_and_shards() {
    for (padding, shards) in [(0, 1), (1, 1), (3, 1), (6, 2), (7, 5)] {
        let mut model = Model::mixtral();
        (model.padding, model.shards) = (padding, shards);
        for (number, tensor) in model.tensors.iter_mut().enumerate() {
            tensor.dtype = ["F32", "BF16", "F16"][(number + padding) % 3];
        }
        model.tensors.reverse();
        let opened = import::open(model.write().path()).unwrap();
        assert_eq!(opened.tensors.names().count(), 2 * 10 + 3);
        assert_reads(&model, &opened.tensors);
        let numbers: usize = model.tensors.iter().map(|tensor| tensor.values.len()).sum();
        assert_eq!(opened.tensors.parameters(), numbers as u64);
        assert_eq!(opened.tensors.identities().count(), shards);
    }
}

#[test]
fn types_come_from_the_headers() {
    let mut model = Model::mixtral();
    model.tensor("model.norm.weight").dtype = "F16";
    for expert in 0..EXPERTS {
        model.tensor(&format!("model.layers.0.block_sparse_moe.experts.{expert}.w1.weight")).dtype = "BF16";
    }
    model.tensor("model.layers.0.block_sparse_moe.experts.0.w2.weight").dtype = "BF16";
    let opened = import::open(model.write().path()).unwrap();
    let dtype = |name: &str| opened.tensors.info(name).dtype;
    assert_eq!(dtype("norm"), Dtype::F16);
    assert_eq!(dtype("layers.0.experts.gate"), Dtype::Bf16);
    assert_eq!(dtype("layers.0.experts.down"), Dtype::F32, "bf16 and f32 mixed");
    assert_eq!(opened.tensors.raw("layers.0.experts.down", 0, 0..1).dtype, Dtype::Bf16);
    assert_eq!(opened.tensors.raw("layers.0.experts.down", 1, 0..1).dtype, Dtype::F32);
    assert_eq!(opened.tensors.info("layers.0.experts.down").shape, [EXPERTS, HIDDEN, FFN]);
    assert_eq!(opened.tensors.info("layers.1.router").shape, [EXPERTS, HIDDEN]);
}

#[test]
fn fused_experts_read_as_those_on_the_hub() {
    let model = Model::mixtral();
    let mut fused = model.clone();
    for layer in 0..2 {
        let expert = |number: usize, matrix: &str| {
            let name = format!("model.layers.{layer}.block_sparse_moe.experts.{number}.{matrix}.weight");
            model.tensors.iter().find(|tensor| tensor.name == name).unwrap().values.clone()
        };
        fused.tensors.retain(|tensor| !tensor.name.starts_with(&format!("model.layers.{layer}.block_sparse_moe.e")));
        let gate = format!("model.layers.{layer}.block_sparse_moe.gate.weight");
        fused.tensor(&gate).name = format!("model.layers.{layer}.mlp.gate.weight");
        let gate_up = (0..EXPERTS).flat_map(|number| [expert(number, "w1"), expert(number, "w3")].concat()).collect();
        let down = (0..EXPERTS).flat_map(|number| expert(number, "w2")).collect();
        for (name, shape, values) in
            [("gate_up_proj", vec![EXPERTS, 2 * FFN, HIDDEN], gate_up), ("down_proj", vec![EXPERTS, HIDDEN, FFN], down)]
        {
            let name = format!("model.layers.{layer}.mlp.experts.{name}");
            fused.tensors.push(Tensor { name, dtype: "F32", shape, values });
        }
    }
    let opened = import::open(fused.write().path()).unwrap();
    assert_reads(&model, &opened.tensors);
}

#[test]
fn rows_are_read_in_parts_by_many_threads_and_after_release() {
    let mut model = Model::mixtral();
    model.padding = 5;
    model.tensor("lm_head.weight").dtype = "F16";
    let opened = import::open(model.write().path()).unwrap();
    let (table, values) = (&opened.tensors, model.tensor("lm_head.weight").values.clone());
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let values = &values;
            scope.spawn(move || {
                for first in (worker..VOCAB - 3).step_by(4) {
                    let mut rows = vec![0.0; 3 * HIDDEN];
                    table.prefetch("output", 0, first..first + 3);
                    table.read_rows("output", 0, first..first + 3, &mut rows);
                    table.release("output", 0, first..first + 3);
                    assert_eq!(rows, values[first * HIDDEN..][..3 * HIDDEN]);
                }
            });
        }
    });
    table.release("output", 0, 0..VOCAB);
    assert_eq!(read(table, "output", 0), values);
    assert_eq!(table.raw("output", 0, 7..7).bytes, [0u8; 0]);
}

#[test]
fn tied_outputs_are_the_embedding_unless_one_is_stored() {
    let untied = Model::mixtral();
    let tied = Model::mixtral().set("tie_word_embeddings", json!(true));
    let mut missing = tied.clone();
    missing.drop_tensor("lm_head.weight");
    for (model, is_tied, same_as) in [
        (untied, false, "lm_head.weight"),
        (tied, false, "lm_head.weight"),
        (missing, true, "model.embed_tokens.weight"),
    ] {
        let mut model = model;
        let opened = import::open(model.write().path()).unwrap();
        assert_eq!(opened.config.tied, is_tied);
        assert_eq!(read(&opened.tensors, "output", 0), model.tensor(same_as).values);
    }
}

#[test]
fn dense_models_with_stray_frequencies() {
    for (architecture, model_type) in [("MistralForCausalLM", "mistral"), ("LlamaForCausalLM", "llama")] {
        let mut model = Model::dense(architecture, model_type);
        model.tensors.insert(0, Tensor::new("model.layers.0.self_attn.rotary_emb.inv_freq", &[3]));
        let opened = import::open(model.write().path()).unwrap();
        assert_eq!(opened.config.architecture.name(), architecture);
        assert_eq!(opened.config.experts, None);
        let down = &model.tensor("model.layers.1.mlp.down_proj.weight").values;
        assert_eq!(&read(&opened.tensors, "layers.1.down", 0), down);
        assert_eq!(opened.tensors.info("layers.0.up").shape, [FFN, HIDDEN]);
    }
}

#[test]
fn identities_tell_files_apart() {
    let model = Model::mixtral();
    let directory = model.write();
    let identity = || import::open(directory.path()).unwrap().tensors.identities().next().unwrap().clone();
    let first = identity();
    assert_eq!(first, identity());
    assert_eq!(first.file, "model.safetensors");
    assert_eq!(first.bytes, model.weights().len() as u64);
    let mut renamed = model.clone();
    renamed.tensors.swap(0, 2);
    std::fs::write(directory.join("model.safetensors"), renamed.weights()).unwrap();
    assert_ne!(first.header_hash, identity().header_hash);
    let file = std::fs::File::options().write(true).open(directory.join("model.safetensors")).unwrap();
    file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_nanos(1_234_567_890_123_456_789)).unwrap();
    assert_eq!(identity().modified_ns, 1_234_567_890_123_456_789);
}

fn config(value: Value) -> ModelConfig {
    ModelConfig::parse(value.to_string().as_bytes(), Path::new("config.json")).unwrap()
}

#[test]
fn absent_keys_mean_what_transformers_means() {
    for (name, architecture, theta, eps, kv_heads, window, ffn, context) in [
        ("mixtral", Architecture::Mixtral, 1e6, 1e-5, 8, None, 14336, 131072),
        ("mistral", Architecture::Mistral, 1e4, 1e-6, 8, Some(4096), 14336, 131072),
        ("llama", Architecture::Llama, 1e4, 1e-6, 32, None, 11008, 2048),
    ] {
        let config = config(json!({"model_type": name}));
        assert_eq!(config.architecture, architecture);
        assert_eq!((config.rope.theta, config.norm_eps, config.kv_heads), (theta, eps, kv_heads), "{name}");
        assert_eq!((config.sliding_window, config.ffn, config.context), (window, ffn, context), "{name}");
        assert_eq!((config.vocab, config.hidden, config.layers, config.head_dim), (32000, 4096, 32, 128));
        assert_eq!((config.bos_token_id, config.eos_token_ids, config.tied), (Some(1), vec![2], false));
        assert_eq!(
            config.experts.map(|experts| (experts.count, experts.per_token)),
            match architecture {
                Architecture::Mixtral => Some((8, 2)),
                _ => None,
            }
        );
    }
}

#[test]
fn each_architecture_has_its_parts() {
    let qwen2 = config(json!({"model_type": "qwen2"}));
    assert_eq!((qwen2.vocab, qwen2.ffn, qwen2.bos_token_id, qwen2.eos_token_ids.len()), (151_936, 22016, None, 0));
    assert_eq!((qwen2.qkv_bias, qwen2.output_bias, qwen2.head_norm), (true, false, None));
    let qwen3 = config(json!({"model_type": "qwen3", "attention_bias": true, "hidden_size": 1024}));
    assert_eq!((qwen3.qkv_bias, qwen3.output_bias, qwen3.head_norm), (true, true, Some(HeadNorm::Each)));
    assert_eq!(qwen3.head_dim, 128, "not 1024 / 32");
    assert_eq!(config(json!({"model_type": "qwen3", "head_dim": null})).head_dim, 128);
    let experts = |keys: Value| config(keys).experts.unwrap();
    let shared = |shared| Experts { count: 60, per_token: 4, normalized: false, shared };
    assert_eq!(experts(json!({"model_type": "qwen2_moe"})), shared(Some(5632)));
    assert_eq!(config(json!({"model_type": "qwen2_moe"})).ffn, 1408, "an expert's");
    assert!(!config(json!({"model_type": "qwen2_moe", "qkv_bias": false})).qkv_bias);
    let many = json!({"model_type": "qwen3_moe", "norm_topk_prob": true, "num_local_experts": 16});
    assert_eq!(experts(many), Experts { count: 16, per_token: 8, normalized: true, shared: None });
    let olmoe = config(json!({"model_type": "olmoe"}));
    assert_eq!((olmoe.head_norm, olmoe.kv_heads, olmoe.eos_token_ids), (Some(HeadNorm::Across), 16, vec![50279]));
    let llama = config(json!({"model_type": "llama", "attention_bias": true, "mlp_bias": true}));
    assert!(llama.qkv_bias && llama.output_bias && llama.ffn_bias);
    assert_eq!(config(json!({"model_type": "phi3", "sliding_window": 2047})).sliding_window, Some(2047));
}

#[test]
fn gemma() {
    // As on the hub: of the first, "gelu" means its approximation.
    let first = config(
        json!({"model_type": "gemma", "hidden_act": "gelu", "hidden_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 1}),
    );
    assert_eq!((first.activation, first.tied, first.post_norms, first.head_dim), (Activation::Gelu, true, false, 256));
    assert_eq!((first.embedding_scale, first.query_scale), (Some(2048f32.sqrt()), 0.0625));
    assert_eq!((first.score_cap, first.logit_cap, first.sliding_window), (None, None, None));
    assert_eq!((first.vocab, first.bos_token_id, first.eos_token_ids), (256_000, Some(2), vec![1]));

    let second = config(json!({"model_type": "gemma2", "num_hidden_layers": 3}));
    assert_eq!((second.activation, second.tied, second.post_norms), (Activation::Gelu, true, true));
    assert_eq!((second.embedding_scale, second.query_scale), (Some(48.0), 0.0625));
    assert_eq!((second.score_cap, second.logit_cap), (Some(50.0), Some(30.0)));
    assert_eq!((0..3).map(|layer| second.window(layer)).collect::<Vec<_>>(), [Some(4096), None, Some(4096)]);
    let large = config(json!({
        "model_type": "gemma2", "hidden_size": 4608, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144,
        "attn_logit_softcapping": null, "final_logit_softcapping": 10, "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 7,
    }));
    assert_eq!((large.query_scale, large.score_cap, large.logit_cap), (1.0 / 12.0, None, Some(10.0)));
    assert_eq!((large.window(0), large.window(1)), (None, Some(7)));

    let refused = |keys: Value, words: &[&str]| {
        let error = ModelConfig::parse(keys.to_string().as_bytes(), Path::new("config.json")).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
    };
    refused(json!({"model_type": "gemma2", "hidden_activation": "gelu"}), &["hidden_activation", "gelu_pytorch_tanh"]);
    refused(json!({"model_type": "gemma", "hidden_act": "silu"}), &["hidden_act", "\"silu\"", "gelu_pytorch_tanh"]);
    refused(json!({"model_type": "gemma2", "sliding_window": null}), &["sliding_window", "null", "some layers"]);
    refused(json!({"model_type": "gemma2", "attn_logit_softcapping": 0}), &["attn_logit_softcapping", "above 0"]);
    refused(json!({"model_type": "gemma2", "final_logit_softcapping": 1e-9}), &["final_logit_softcapping", "at least"]);
    refused(json!({"model_type": "gemma2", "layer_types": ["full_attention"]}), &["layer_types", "26 layers", "1"]);
}

#[test]
fn windows_of_some_layers() {
    let layers = |model: &str, more: Value| {
        let mut keys = json!({"model_type": model, "num_hidden_layers": 4, "sliding_window": 8});
        keys.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config = config(keys);
        (0..4).map(|layer| config.window(layer).is_some()).collect::<Vec<bool>>()
    };
    let on = |limit: usize| json!({"use_sliding_window": true, "max_window_layers": limit});
    assert_eq!(layers("qwen2", json!({})), [false; 4], "it must be switched on");
    assert_eq!(layers("qwen2", on(1)), [false, true, true, true]);
    assert_eq!(layers("qwen2", on(28)), [false; 4]);
    assert_eq!(layers("qwen3_moe", on(28)), [true; 4]);
    assert_eq!(layers("qwen2_moe", on(3)), [true, false, true, false]);
    let kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"];
    let listed = json!({"use_sliding_window": true, "layer_types": kinds});
    assert_eq!(layers("qwen3", listed), [false, true, false, true]);
    assert_eq!(
        config(json!({"model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 0})).sliding_window,
        Some(4096)
    );
}

#[test]
fn yarn_and_dynamic() {
    let rope =
        |keys: Value| config(json!({"model_type": "qwen3", "max_position_embeddings": 64, "rope_scaling": keys}));
    assert_eq!(rope(json!({"rope_type": "dynamic", "factor": 2})).rope.scaling, RopeScaling::None);
    let plain = rope(json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32}));
    assert_eq!(plain.context, 128, "what the scaling was made for");
    let RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor, truncate } =
        plain.rope.scaling
    else {
        panic!("yarn")
    };
    assert_eq!((factor, beta_fast, beta_slow, original_context, truncate), (4.0, 32.0, 1.0, 32, true));
    assert!((attention_factor - 1.138_629_436_111_989).abs() < 1e-15);
    let both =
        json!({"type": "yarn", "factor": 4, "mscale": 2, "mscale_all_dim": 1, "beta_fast": 0, "truncate": false});
    let both = rope(both);
    assert!((both.rope.amplitude() - 1.277_258_872 / 1.138_629_436).abs() < 1e-9);
    let RopeScaling::Yarn { beta_fast, original_context, truncate, .. } = both.rope.scaling else { panic!("yarn") };
    assert_eq!((beta_fast, original_context, truncate), (32.0, 64, false));
    let implied = rope(
        json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 16, "attention_factor": 1.5}),
    );
    assert!(matches!(implied.rope.scaling, RopeScaling::Yarn { factor: 4.0, attention_factor: 1.5, .. }));
}

#[test]
fn long_rope_and_heads_rotated_in_part() {
    let phi = |keys: Value| {
        let mut all = json!({
            "model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64,
            "original_max_position_embeddings": 16, "partial_rotary_factor": 0.75,
        });
        let map = all.as_object_mut().expect("an object");
        map.insert("rope_scaling".into(), keys);
        config(all).rope
    };
    let factors = json!([1, 2, 3, 4, 5, 6]);
    let long = phi(json!({"type": "su", "short_factor": factors, "long_factor": factors}));
    assert_eq!(long.rotated, Some(12));
    let RopeScaling::Long { short, original_context, attention_factor, .. } = long.scaling else { panic!("LongRoPE") };
    assert_eq!((short, original_context), (vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 16));
    assert!((attention_factor - 1.5f64.sqrt()).abs() < 1e-15, "sqrt(1 + ln 4 / ln 16)");
    let given = json!({"type": "longrope", "short_factor": factors, "long_factor": factors, "factor": 1});
    assert_eq!(phi(given).amplitude(), 1.0);
    // A quotient that is a little less than the whole number which is meant.
    let third = config(json!({"model_type": "phi3", "head_dim": 66, "partial_rotary_factor": 22.0 / 66.0}));
    assert_eq!(third.rope.rotated, Some(22));
}

#[test]
fn nulls_and_explicit_values() {
    let config = config(json!({
        "architectures": null, "model_type": "mistral", "num_key_value_heads": null, "sliding_window": null,
        "head_dim": null, "rope_scaling": null, "rope_theta": null, "eos_token_id": [5, 2], "bos_token_id": null,
        "tie_word_embeddings": null, "attention_bias": null, "quantization_config": null, "max_position_embeddings": null,
    }));
    assert_eq!((config.kv_heads, config.sliding_window, config.head_dim), (32, None, 128));
    assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2, 5]));
    assert_eq!((config.rope.theta, config.rope.scaling), (1e4, RopeScaling::None));
}

#[test]
fn llama_ignores_sliding_windows() {
    assert_eq!(config(json!({"model_type": "llama", "sliding_window": 4096})).sliding_window, None);
    assert_eq!(config(json!({"model_type": "mixtral", "sliding_window": 4096})).sliding_window, Some(4096));
}

#[test]
fn theta_and_scaling_are_found_wherever_they_are() {
    let linear = |factor| RopeScaling::Linear { factor };
    let llama3 = |original_context| RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context,
    };
    let three = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4});
    let mut original = three.clone();
    original["original_max_position_embeddings"] = json!(64);
    for (keys, theta, scaling) in [
        (json!({}), 1e4, RopeScaling::None),
        (json!({"rope_theta": 500000}), 5e5, RopeScaling::None),
        (json!({"rope_parameters": {"rope_theta": 3e5, "rope_type": "default"}}), 3e5, RopeScaling::None),
        (json!({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e5}), 7e5, RopeScaling::None),
        (json!({"rope_parameters": {"rope_theta": 3e5}, "rope_theta": 7e5}), 3e5, RopeScaling::None),
        (json!({"rope_parameters": null, "rope_scaling": {}}), 1e4, RopeScaling::None),
        (json!({"rope_parameters": {"rope_theta": 3e5}, "rope_scaling": {}}), 3e5, RopeScaling::None),
        (json!({"rope_scaling": {"type": "linear", "factor": 4.0}}), 1e4, linear(4.0)),
        (json!({"rope_scaling": {"rope_type": "linear", "factor": 4}, "rope_theta": 2e4}), 2e4, linear(4.0)),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 9e4}, "rope_theta": 2e4}),
            9e4,
            linear(2.0),
        ),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 3e5}}),
            1e4,
            linear(2.0),
        ),
        (json!({"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 2}}), 1e4, linear(2.0)),
        (json!({"rope_scaling": three, "max_position_embeddings": 777}), 1e4, llama3(777)),
        (json!({"rope_parameters": original, "max_position_embeddings": 777}), 1e4, llama3(64)),
        (json!({"rope_parameters": original, "original_max_position_embeddings": 128}), 1e4, llama3(128)),
    ] {
        let mut whole = json!({"model_type": "llama"});
        whole.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        let config = config(whole);
        assert_eq!((config.rope.theta, config.rope.scaling), (theta, scaling), "{keys}");
    }
}

#[test]
fn chat_templates_and_special_tokens_come_from_many_places() {
    let open = |model: Model| import::open(model.write().path()).unwrap();
    let plain = open(Model::mixtral());
    assert_eq!(plain.tokenizer.chat_template, None);
    assert_eq!(plain.tokenizer.bos_token.as_deref(), Some("<s>"), "by its id");
    let with = |value: Value| Model::mixtral().file("tokenizer_config.json", value.to_string());
    let template = |model: Model| open(model).tokenizer.chat_template;
    assert_eq!(template(with(json!({"chat_template": "A"}))).as_deref(), Some("A"));
    let named = |name: &str, text: &str| json!({"name": name, "template": text});
    let list = json!({"chat_template": [named("rag", "R"), named("default", "D")]});
    assert_eq!(template(with(list.clone())).as_deref(), Some("D"));
    assert_eq!(template(with(json!({"chat_template": [named("x", "X")]}))).as_deref(), Some("X"));
    assert_eq!(template(with(json!({"chat_template": [named("x", "X"), named("y", "Y")]}))), None);
    assert_eq!(template(with(list).file("chat_template.jinja", "J")).as_deref(), Some("J"));
    let tokens = open(
        with(json!({"bos_token": {"content": "<b>", "lstrip": false}, "eos_token": null, "model_max_length": 1e30}))
            .file("special_tokens_map.json", json!({"eos_token": "<e>", "bos_token": "<other>"}).to_string()),
    );
    assert_eq!(tokens.tokenizer.bos_token.as_deref(), Some("<b>"));
    assert_eq!(tokens.tokenizer.eos_token.as_deref(), Some("<e>"));
    assert_eq!(tokens.tokenizer.json, Model::mixtral().tokenizer.to_string().into_bytes());
}

#[test]
fn generation_config_has_the_last_word_on_ids() {
    let open = |text: Value| {
        let model = Model::mixtral().set("eos_token_id", json!(7)).file("generation_config.json", text.to_string());
        import::open(model.write().path()).unwrap().config
    };
    assert_eq!(open(json!({"eos_token_id": [9, 8], "bos_token_id": 3})).eos_token_ids, [8, 9]);
    assert_eq!(open(json!({"eos_token_id": [9, 8], "bos_token_id": 3})).bos_token_id, Some(3));
    assert_eq!(open(json!({"eos_token_id": null})).eos_token_ids, [7]);
    assert_eq!(open(json!({})).bos_token_id, Some(1));
}

#[test]
fn shards_may_be_links_as_in_the_hub_cache() {
    let directory = Model::mixtral().write();
    let blobs = tempfile::tempdir().unwrap();
    std::fs::rename(directory.join("model.safetensors"), blobs.path().join("0123abc")).unwrap();
    std::os::unix::fs::symlink(blobs.path().join("0123abc"), directory.join("model.safetensors")).unwrap();
    import::open(directory.path()).unwrap();
}

#[test]
fn names_come_from_the_directory() {
    let directory = Model::mixtral().write();
    let inner = directory.join("My-Model");
    std::fs::create_dir(&inner).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        std::fs::rename(directory.join(name), inner.join(name)).unwrap();
    }
    assert_eq!(import::open(&inner.join(".")).unwrap().name, "My-Model");
}
