//! What is refused, and in which words: each message names the culprit.

use crate::model::{EXPERTS, FFN, HIDDEN, Model, Tensor, VOCAB, framed, tokenizer};
use moec::import;
use serde_json::{Value, json};
use std::path::Path;

/// What keeps a directory from opening; it must say all of `words`.
#[track_caller]
fn refused(path: &Path, words: &[&str]) {
    let Err(error) = import::open(path) else { panic!("opened, though it should say {words:?}") };
    let text = error.to_string();
    for word in words {
        assert!(text.contains(word), "{word:?} is not in: {text}");
    }
    assert!(!text.contains('\n') && text.len() < 600, "an error is one sentence: {text}");
}

#[test]
fn configurations() {
    let long = "x".repeat(5000);
    for (key, value, words) in [
        ("vocab_size", json!("270"), &["vocab_size", "whole number", "\"270\""][..]),
        ("vocab_size", json!(-1), &["vocab_size", "-1"]),
        ("vocab_size", json!(0), &["vocab_size", "found 0"]),
        ("vocab_size", json!(1u64 << 60), &["vocab_size", "1152921504606846976"]),
        ("vocab_size", json!(270.5), &["vocab_size", "270.5"]),
        ("vocab_size", json!(null), &["vocab_size", "null"]),
        ("hidden_size", json!([16]), &["hidden_size", "a list of 1"]),
        ("hidden_size", json!(1e30), &["hidden_size", "1e+30"]),
        ("intermediate_size", json!({}), &["intermediate_size", "an object"]),
        ("num_hidden_layers", json!(0), &["num_hidden_layers", "found 0"]),
        ("num_hidden_layers", json!(100_000), &["num_hidden_layers", "100000"]),
        ("num_attention_heads", json!(true), &["num_attention_heads", "true"]),
        ("num_key_value_heads", json!(0), &["num_key_value_heads", "found 0"]),
        ("num_key_value_heads", json!(3), &["num_key_value_heads", "divisor", "(2)", "found 3"]),
        ("head_dim", json!(7), &["head_dim", "even", "7"]),
        ("head_dim", json!(0), &["head_dim", "found 0"]),
        ("num_local_experts", json!(0), &["num_local_experts", "found 0"]),
        ("num_experts_per_tok", json!(0), &["num_experts_per_tok", "found 0"]),
        ("num_experts_per_tok", json!(4), &["num_experts_per_tok", "at most", "(3)", "found 4"]),
        ("num_local_experts", json!(1_000_000), &["num_local_experts", "1000000"]),
        ("max_position_embeddings", json!(0), &["max_position_embeddings", "found 0"]),
        ("rms_norm_eps", json!(-1e-5), &["rms_norm_eps", "above 0"]),
        ("rms_norm_eps", json!("1e-5"), &["rms_norm_eps", "\"1e-5\""]),
        ("sliding_window", json!(0), &["sliding_window", "found 0"]),
        ("sliding_window", json!("all"), &["sliding_window", "\"all\""]),
        ("rope_theta", json!(0), &["rope_theta", "above 0"]),
        ("rope_theta", json!("1e6"), &["rope_theta", "\"1e6\""]),
        ("rope_scaling", json!("linear"), &["rope_scaling", "an object", "\"linear\""]),
        ("rope_scaling", json!({"type": "dynamic"}), &["rope_scaling.factor", "none"]),
        ("rope_scaling", json!({"type": "ntk", "factor": 2}), &["rope_scaling.type", "\"ntk\"", "llama3", "longrope"]),
        ("rope_scaling", json!({"type": "longrope"}), &["original_max_position_embeddings", "LongRoPE", "none"]),
        (
            "rope_scaling",
            json!({"type": "su", "original_max_position_embeddings": 8, "short_factor": [1.0]}),
            &["rope_scaling.short_factor", "one for each rotated pair", "a list of 1"],
        ),
        ("rope_scaling", json!({"rope_type": "yarn"}), &["rope_scaling.factor", "none"]),
        ("rope_scaling", json!({"rope_type": "yarn", "factor": 2, "beta_fast": -1}), &["rope_scaling.beta_fast", "-1"]),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 2, "rope_theta": 0.5}),
            &["rope_scaling.rope_theta", "0.5"],
        ),
        ("rope_scaling", json!({"type": "linear"}), &["rope_scaling.factor", "none"]),
        ("rope_scaling", json!({"type": "linear", "factor": 0}), &["rope_scaling.factor", "found 0"]),
        ("rope_scaling", json!({"type": 3}), &["rope_scaling.type", "a string", "3"]),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
            &["rope_parameters.low_freq_factor", "less than"],
        ),
        ("rope_parameters", json!({"full_attention": {"rope_type": "default"}}), &["rope_parameters.full_attention"]),
        ("rope_parameters", json!({"rope_theta": []}), &["rope_parameters.rope_theta", "a list of 0"]),
        ("partial_rotary_factor", json!(0.5), &["partial_rotary_factor", "0.5", "Mixtral"]),
        ("tie_word_embeddings", json!("yes"), &["tie_word_embeddings", "true or false"]),
        ("attention_bias", json!(true), &["attention_bias", "does not support"]),
        ("mlp_bias", json!(true), &["mlp_bias", "does not support"]),
        ("hidden_act", json!("gelu"), &["hidden_act", "\"gelu\"", "silu"]),
        ("hidden_act", json!(long), &["hidden_act", "xxx…"]),
        (
            "quantization_config",
            json!({"quant_method": "bitsandbytes"}),
            &["quantization_config", "\"bitsandbytes\"", "awq"],
        ),
        ("quantization_config", json!({"quant_method": "gptq", "bits": 8}), &["quantization_config.bits", "8"]),
        ("quantization_config", json!({"quant_method": "gptq", "group_size": 0}), &["quantization_config.group_size"]),
        (
            "quantization_config",
            json!({"quant_method": "awq", "version": "gemv"}),
            &["quantization_config.version", "gemv"],
        ),
        (
            "compression_config",
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            &["compression_config.format", "pack-quantized"],
        ),
        ("layer_types", json!(["full_attention", "sliding_attention"]), &["layer_types", "a mix"]),
        ("architectures", json!(["Gemma3ForCausalLM"]), &["architectures", "Gemma3ForCausalLM", "Gemma2ForCausalLM"]),
        ("use_bidirectional_attention", json!(true), &["use_bidirectional_attention", "true", "false"]),
        ("architectures", json!("MixtralForCausalLM"), &["architectures", "a list"]),
        ("architectures", json!([1]), &["architectures", "strings"]),
        ("architectures", json!(["LlamaForCausalLM"]), &["model_type", "llama", "mixtral"]),
        ("bos_token_id", json!(270), &["bos_token_id", "269", "270"]),
        ("eos_token_id", json!([2, 300]), &["eos_token_id", "300"]),
        ("eos_token_id", json!("</s>"), &["eos_token_id", "</s>"]),
    ] {
        let directory = Model::mixtral().set(key, value).write();
        refused(directory.path(), &[&["config.json"], words].concat());
    }
    let nameless = Model::mixtral().remove("architectures").remove("model_type");
    refused(nameless.write().path(), &["config.json", "architectures", "LlamaForCausalLM"]);
    let other = Model::mixtral().remove("architectures").set("model_type", json!("gpt2"));
    refused(other.write().path(), &["model_type", "gpt2", "mixtral, mistral, llama, qwen2"]);
    // Mixtral rounds down, as long as something is left.
    let odd = Model::dense("LlamaForCausalLM", "llama").remove("head_dim").set("hidden_size", json!(17));
    refused(odd.write().path(), &["head_dim", "17 / 2"]);
    let narrow = Model::mixtral().remove("head_dim").set("hidden_size", json!(1));
    refused(narrow.write().path(), &["head_dim", "1 / 2"]);
}

#[test]
fn files_that_are_no_json() {
    for name in ["config.json", "tokenizer_config.json", "generation_config.json"] {
        for (content, words) in [
            ("", &["not valid JSON"][..]),
            ("{\"vocab_size\": ", &["not valid JSON", "line 1"]),
            ("[]", &["a JSON object", "a list of 0"]),
            ("\u{0}\u{1}", &["not valid JSON"]),
        ] {
            refused(Model::mixtral().file(name, content).write().path(), &[&[name], words].concat());
        }
        let deep = "[".repeat(100_000);
        refused(Model::mixtral().file(name, deep).write().path(), &[name, "recursion"]);
    }
}

#[test]
fn paths_that_are_no_model() {
    let directory = Model::mixtral().write();
    refused(&directory.join("nothing"), &["nothing", "no such", "config.json"]);
    refused(&directory.join("model.safetensors"), &["model.safetensors", "one file of a model"]);
    refused(&directory.join("m.gguf"), &["m.gguf", "no such file", "or a .gguf file"]);
    std::fs::write(directory.join("m.bin"), "").unwrap();
    refused(&directory.join("m.bin"), &["m.bin", "this is a file"]);
    for (name, words) in [
        ("config.json", &["config.json", "missing"][..]),
        ("tokenizer.json", &["tokenizer.json", "missing"]),
        ("model.safetensors", &["neither `model.safetensors` nor `model.safetensors.index.json`"]),
    ] {
        let mut model = Model::mixtral();
        model.without.push(name);
        let directory = model.write();
        refused(directory.path(), words);
        std::fs::create_dir(directory.join(name)).unwrap();
        refused(directory.path(), &[name, "regular file"]);
    }
    for (other, words) in [
        ("pytorch_model.bin", &["pickles", "save_pretrained"][..]),
        ("model-00001-of-00002.safetensors", &["model.safetensors.index.json", "which says"]),
    ] {
        let mut model = Model::mixtral().file(other, "");
        model.without.push("model.safetensors");
        refused(model.write().path(), words);
    }
    let mut legacy = Model::mixtral().file("tokenizer.model", "");
    legacy.without.push("tokenizer.json");
    refused(legacy.write().path(), &["tokenizer.json", "tokenizer.model", "save_pretrained"]);
}

#[test]
fn tokenizers() {
    refused(Model::mixtral().file("tokenizer.json", "").write().path(), &["tokenizer.json", "not valid JSON", "EOF"]);
    let other = Model::mixtral().file("tokenizer.json", "{\"model\": {\"type\": \"Unheard\"}}");
    refused(other.write().path(), &["tokenizer.json", "not a tokenizer"]);
    let large = Model::mixtral().file("tokenizer.json", tokenizer(VOCAB + 2).to_string());
    refused(large.write().path(), &["tokenizer.json", "\"t11\"", "270", "vocab_size"]);
    for (config, words) in [
        (json!({"chat_template": 3}), &["chat_template", "found 3"]),
        (json!({"chat_template": ["x"]}), &["chat_template", "found \"x\""]),
        (json!({"bos_token": 1}), &["bos_token", "found 1"]),
        (json!({"eos_token": {"text": "x"}}), &["eos_token", "an object"]),
    ] {
        let model = Model::mixtral().file("tokenizer_config.json", config.to_string());
        refused(model.write().path(), &[&["tokenizer_config.json"], &words[..]].concat());
    }
    refused(Model::mixtral().file("chat_template.jinja", [255]).write().path(), &["chat_template.jinja", "UTF-8"]);
    let ids = Model::mixtral().file("generation_config.json", "{\"eos_token_id\": 270}");
    refused(ids.write().path(), &["generation_config.json", "eos_token_id", "270"]);
}

/// Every tensor that is needed is missed, by its own name.
#[test]
fn missing_tensors() {
    for model in [Model::mixtral(), Model::dense("LlamaForCausalLM", "llama")] {
        for tensor in &model.tensors {
            let mut model = model.clone();
            model.drop_tensor(&tensor.name);
            let (name, shape) = (format!("`{}` is missing", tensor.name), format!("{:?}", tensor.shape));
            let directory = model.write();
            refused(directory.path(), &["model.safetensors", &name, &shape]);
        }
    }
    let mut model = Model::mixtral();
    model.drop_tensor("lm_head.weight");
    refused(model.write().path(), &["lm_head.weight", "tie_word_embeddings"]);
    model.drop_tensor("model.norm.weight");
    model.shards = 2;
    let directory = model.write();
    refused(directory.path(), &["model.norm.weight", "and 1 more missing"]);
    let more = Model::mixtral().set("num_hidden_layers", json!(1000)).set("num_local_experts", json!(3));
    refused(more.write().path(), &["model.layers.2.input_layernorm.weight", "more missing"]);
    let router = Model::mixtral().set("num_local_experts", json!(4));
    refused(router.write().path(), &["model.layers.0.block_sparse_moe.gate.weight", "[4, 16]", "[3, 16]"]);
}

#[test]
fn tensors_that_do_not_belong() {
    for name in [
        "model.layers.2.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "",
        "\u{1F600}",
    ] {
        let mut model = Model::mixtral();
        model.tensors.insert(3, Tensor::new(name, &[HIDDEN]));
        refused(model.write().path(), &[&format!("tensor `{name}` is not part"), "2 layers and 3 experts"]);
        model.tensors.push(Tensor::new("another", &[]));
        refused(model.write().path(), &["and 1 more"]);
    }
    let fewer = Model::mixtral().set("num_hidden_layers", json!(1));
    refused(fewer.write().path(), &["model.layers.1.", "1 layers"]);
}

#[test]
fn tensors_of_other_shapes_and_types() {
    let names: Vec<String> = Model::mixtral().tensors.iter().map(|tensor| tensor.name.clone()).collect();
    for name in &names {
        let mut model = Model::mixtral();
        let tensor = model.tensor(name);
        let expected = format!("{:?}", tensor.shape);
        tensor.shape = vec![tensor.values.len(), 1];
        refused(model.write().path(), &[name, &expected, "model.safetensors"]);
        let mut model = Model::mixtral();
        model.tensor(name).dtype = "I64";
        refused(model.write().path(), &[name, "F32, BF16 or F16", "I64"]);
    }
    let mut fused = Model::mixtral();
    for layer in 0..2 {
        let prefix = format!("model.layers.{layer}.");
        fused.tensors.retain(|tensor| !tensor.name.starts_with(&format!("{prefix}block_sparse_moe")));
        fused.tensors.push(Tensor::new(&format!("{prefix}mlp.gate.weight"), &[EXPERTS, HIDDEN]));
        fused.tensors.push(Tensor::new(&format!("{prefix}mlp.experts.gate_up_proj"), &[EXPERTS, HIDDEN, 2 * FFN]));
        fused.tensors.push(Tensor::new(&format!("{prefix}mlp.experts.down_proj"), &[EXPERTS, HIDDEN, FFN]));
    }
    refused(fused.write().path(), &["model.layers.0.mlp.experts.gate_up_proj", "[3, 40, 16]", "[3, 16, 40]"]);
}

/// Opens the model with other bytes as its weights.
#[track_caller]
fn weights(bytes: Vec<u8>, words: &[&str]) {
    let model = Model::mixtral().file("model.safetensors", bytes);
    refused(model.write().path(), &[&["model.safetensors"], words].concat());
}

#[test]
fn hostile_headers() {
    const NORM: &str = "model.norm.weight";
    let model = Model::mixtral();
    let whole = model.weights();
    weights(vec![], &["0 bytes"]);
    weights(whole[..7].to_vec(), &["7 bytes"]);
    weights(whole[..100].to_vec(), &["truncated", "92"]);
    weights(whole[..whole.len() - 1].to_vec(), &["truncated", "w3.weight"]);
    weights([&whole[..], &[0]].concat(), &["damaged", "end at byte"]);
    weights([&u64::MAX.to_le_bytes()[..], &whole[8..]].concat(), &["18446744073709551615", "not a safetensors"]);
    weights([&99_000_000u64.to_le_bytes()[..], &whole[8..]].concat(), &["99000000", "truncated"]);
    weights(framed("", &[]), &["header is unsound"]);
    weights(framed("[]", &[]), &["header is unsound", "tensors"]);
    weights(framed("{}", &[]), &["model.embed_tokens.weight", "missing"]);
    weights(framed("{} x", &[]), &["header is unsound", "trailing"]);
    weights(framed("{\"__metadata__\": 3}", &[]), &["__metadata__"]);
    let entry = "{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}";
    weights(framed(&format!("{{\"a\":{entry},\"a\":{entry}}}"), &[0; 4]), &["`a` is there twice"]);
    weights(framed(&format!("{{\"a\":{entry},\"b\":{entry}}}"), &[0; 4]), &["`b`", "overlapping"]);
    let long = "\n".repeat(1_000_000);
    let long = json!({long: {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}).to_string();
    weights(framed(&long, &[0; 3]), &["\\n\\n", "4 bytes", "3 bytes"]);
    let long = json!({"a": {"dtype": "F".repeat(1_000_000)}}).to_string();
    weights(framed(&long, &[]), &["tensor `a`", "FFF"]);
    weights(framed(&format!("{{\"a\":{entry}, \"deep\":{}", "[".repeat(100_000)), &[0; 4]), &["`deep`"]);
    for (key, value, words) in [
        ("dtype", json!("F33"), &["F33", "unknown variant"][..]),
        ("dtype", json!(3), &["expected value"]),
        ("dtype", json!("BF16"), &["32 bytes", "64 bytes"]),
        ("shape", json!([17]), &["68 bytes", "64 bytes"]),
        ("shape", json!([-16]), &["-16"]),
        ("shape", json!([1u64 << 40, 1u64 << 40]), &["not a number"]),
        ("shape", json!([u64::MAX, 2, 0]), &["not a number"]),
        ("shape", json!("16"), &["invalid type"]),
        ("data_offsets", json!([0, u64::MAX]), &["truncated"]),
        ("data_offsets", json!([u64::MAX - 64, u64::MAX]), &["truncated"]),
        ("data_offsets", json!([64, 0]), &["before its start"]),
        ("data_offsets", json!([0, 64]), &["overlapping"]),
        ("data_offsets", json!([0.5, 64]), &["0.5"]),
        ("data_offsets", json!([0]), &["length 1"]),
        ("data_offsets", Value::Null, &["null"]),
    ] {
        let bytes = model.weights_with(|header| header[NORM][key] = value);
        let by_name = if words == ["overlapping"] { "tensor" } else { NORM };
        weights(bytes, &[&[by_name], words].concat());
    }
    let bytes = model.weights_with(|header| {
        header[NORM].as_object_mut().unwrap().remove("shape");
    });
    weights(bytes, &[NORM, "missing field `shape`"]);
    let gap = model.weights_with(|header| {
        header.shift_remove(NORM);
    });
    weights(gap, &["lm_head.weight", "gap"]);
}

#[test]
fn indices() {
    let sharded = || {
        let mut model = Model::mixtral();
        model.shards = 2;
        model
    };
    const INDEX: &str = "model.safetensors.index.json";
    for (content, words) in [
        ("{}".into(), &["weight_map", "none"][..]),
        ("{\"weight_map\": {}}".into(), &["weight_map", "at least one"]),
        ("{\"weight_map\": []}".into(), &["weight_map", "a list"]),
        ("{\"weight_map\": {\"a\": 1}}".into(), &["weight_map.a", "found 1"]),
        ("{".into(), &["not valid JSON"]),
    ]
    .into_iter()
    .chain(
        ["../x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a/", "./a"]
            .map(|name| (json!({"weight_map": {"t": name}}).to_string(), &["weight_map.t", "plain name"][..])),
    ) {
        refused(sharded().file(INDEX, content).write().path(), &[&[INDEX], words].concat());
    }
    let absent = sharded().file(INDEX, json!({"weight_map": {"t": "gone.safetensors"}}).to_string());
    refused(absent.write().path(), &["gone.safetensors", "missing", INDEX]);
    let directory = sharded().write();
    let mut index: Value = serde_json::from_slice(&std::fs::read(directory.join(INDEX)).unwrap()).unwrap();
    index["weight_map"]["ghost"] = json!("model-00001-of-00002.safetensors");
    std::fs::write(directory.join(INDEX), index.to_string()).unwrap();
    refused(directory.path(), &["`ghost`", "model-00001-of-00002.safetensors", "no such tensor"]);
    index["weight_map"].as_object_mut().unwrap().shift_remove("ghost");
    index["weight_map"]["model.norm.weight"] = json!("model-00001-of-00002.safetensors");
    std::fs::write(directory.join(INDEX), index.to_string()).unwrap();
    refused(directory.path(), &["model.norm.weight", "model-00002-of-00002.safetensors", "model-00001-of-00002"]);
    let directory = sharded().write();
    let twice = "model-00001-of-00002.safetensors";
    std::fs::copy(directory.join(twice), directory.join("model-00002-of-00002.safetensors")).unwrap();
    refused(directory.path(), &["model.embed_tokens.weight", twice, "one tensor of this name"]);
}

/// A name that cannot be opened as a regular file must not hang or be read without end.
#[test]
fn devices_and_pipes() {
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let mut model = Model::mixtral();
        model.without.push(name);
        let directory = model.write();
        std::os::unix::fs::symlink("/dev/zero", directory.join(name)).unwrap();
        refused(directory.path(), &[name, "regular file"]);
    }
}
