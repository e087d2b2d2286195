#!/usr/bin/env python3
"""Seeds for the fuzz targets beyond the first ones: sound models, as small as they can be, of the formats and architectures with ways of their own.

    python3 -m venv v && v/bin/pip install numpy safetensors gguf
    v/bin/python make.py

gguf/types.gguf: a Llama of K-quants and IQ4_XS with a byte-level tokenizer; gguf/gemma2.gguf; gguf/phi3.gguf: LongRoPE, fused tensors, heads rotated in
part, SentencePiece tokens. import/NAME-config and NAME-weights: Llamas of GPTQ and AWQ, a Phi-3 with LongRoPE, a Gemma 2; their first byte is
their place in the list of fuzz_targets/import.rs, and the vocabulary is that of import/tokenizer.json."""
import json, os
import gguf, numpy as np
from gguf import GGMLQuantizationType as Q
from safetensors.numpy import save

HERE = os.path.dirname(os.path.abspath(__file__))
random = np.random.default_rng(1)


def gguf_file(name, arch, numbers, tokens, tensors):
    """`tensors`: name, shape (outermost first), type."""
    w = gguf.GGUFWriter(os.path.join(HERE, "gguf", name), arch)
    for key, value in numbers.items():
        key = f"{arch}.{key}"
        w.add_float32(key, value) if isinstance(value, float) else w.add_string(key, value) if isinstance(value, str) else w.add_uint32(key, value)
    tokens(w)
    for tensor, shape, kind in tensors:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = random.integers(0, 64, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
        if kind == Q.F32: data = (random.random(shape, dtype=np.float32) + 0.5).view(np.uint8).reshape(data.shape)
        w.add_tensor(tensor, data, raw_dtype=kind)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()


def byte_level(w):
    w.add_tokenizer_model("gpt2"); w.add_tokenizer_pre("llama-bpe")
    w.add_token_list(["a", "b", "ab", "Ġ", "Ġab", "<|end|>"]); w.add_token_types([1, 1, 1, 1, 1, 3])
    w.add_token_merges(["a b", "Ġ ab"]); w.add_eos_token_id(5); w.add_bos_token_id(5)


def pieces(w):
    w.add_tokenizer_model("llama")
    w.add_token_list(["<unk>", "<s>", "</s>", "▁", "a", "▁a"]); w.add_token_types([2, 3, 3, 1, 4, 1]); w.add_token_scores([0, 0, 0, -1, -2, -3])
    w.add_eos_token_id(2); w.add_add_space_prefix(False)


def layer(names, prefix="blk.0."): return [(f"{prefix}{n}.weight", shape, kind) for n, shape, kind in names]


def common(hidden, ffn, heads, head_dim):
    return {"block_count": 1, "context_length": 16, "embedding_length": hidden, "feed_forward_length": ffn, "attention.head_count": heads,
            "attention.key_length": head_dim, "attention.layer_norm_rms_epsilon": 1e-5}


gguf_file("types.gguf", "llama", common(256, 2, 1, 2), byte_level,
          [("token_embd.weight", (6, 256), Q.Q5_K), ("output_norm.weight", (256,), Q.F32), ("output.weight", (6, 256), Q.Q6_K)] + layer([
              ("attn_q", (2, 256), Q.Q6_K), ("attn_k", (2, 256), Q.Q3_K), ("attn_v", (2, 256), Q.Q2_K), ("attn_output", (256, 2), Q.F32),
              ("ffn_gate", (2, 256), Q.IQ4_XS), ("ffn_up", (2, 256), Q.Q4_K), ("ffn_down", (256, 2), Q.F32), ("attn_norm", (256,), Q.F32),
              ("ffn_norm", (256,), Q.F32)]))
gguf_file("gemma2.gguf", "gemma2", common(32, 32, 2, 32) | {"attention.head_count_kv": 1, "attention.sliding_window": 4,
          "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, pieces,
          [("token_embd.weight", (6, 32), Q.Q8_0), ("output_norm.weight", (32,), Q.F32)] + layer([
              ("attn_q", (64, 32), Q.Q4_0), ("attn_k", (32, 32), Q.Q4_1), ("attn_v", (32, 32), Q.Q5_0), ("attn_output", (32, 64), Q.Q5_1),
              ("ffn_gate", (32, 32), Q.IQ4_NL), ("ffn_up", (32, 32), Q.MXFP4), ("ffn_down", (32, 32), Q.F16)] +
              [(n, (32,), Q.F32) for n in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")]))
gguf_file("phi3.gguf", "phi3", common(8, 4, 1, 8) | {"rope.dimension_count": 6, "rope.scaling.original_context_length": 8,
          "rope.scaling.type": "longrope", "attention.sliding_window": 4}, pieces,
          [("token_embd.weight", (6, 8), Q.F32), ("output_norm.weight", (8,), Q.F32), ("output.weight", (6, 8), Q.F32),
           ("rope_factors_short.weight", (3,), Q.F32), ("rope_factors_long.weight", (3,), Q.F32)] + layer([
              ("attn_qkv", (24, 8), Q.F32), ("attn_output", (8, 8), Q.F32), ("ffn_up", (8, 8), Q.F32), ("ffn_down", (8, 4), Q.F32),
              ("attn_norm", (8,), Q.F32), ("ffn_norm", (8,), Q.F32)]))


def put(number, name, data):
    with open(os.path.join(HERE, "import", name), "wb") as f: f.write(bytes([ord("0") + number]) + data)


def floats(*shape): return random.random(shape, dtype=np.float32).astype(np.float16)


def matrices(hidden, q, kv, ffn):
    path = "model.layers.0."
    return {path + "self_attn.q_proj": (q, hidden), path + "self_attn.k_proj": (kv, hidden), path + "self_attn.v_proj": (kv, hidden),
            path + "self_attn.o_proj": (hidden, q), path + "mlp.gate_proj": (ffn, hidden), path + "mlp.up_proj": (ffn, hidden),
            path + "mlp.down_proj": (hidden, ffn)}


def norms(hidden, *names): return {f"model.layers.0.{n}.weight": floats(hidden) for n in names} | {"model.norm.weight": floats(hidden)}


def directory(number, name, config, tensors):
    config = dict(vocab_size=3, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=16, bos_token_id=1,
                  eos_token_id=2) | config
    put(number, f"{name}-config", json.dumps(config).encode())
    put(number + 1, f"{name}-weights", save(tensors))


def packed(method, group=32):
    tensors = {"model.embed_tokens.weight": floats(3, 32)} | norms(32, "input_layernorm", "post_attention_layernorm")
    for name, (rows, columns) in matrices(32, 32, 32, 32).items():
        words = lambda *shape: random.integers(0, 2**31, shape, dtype=np.int32)
        tensors[f"{name}.qweight"] = words(columns // 8, rows) if method == "gptq" else words(columns, rows // 8)
        tensors[f"{name}.qzeros"], tensors[f"{name}.scales"] = words(columns // group, rows // 8), floats(columns // group, rows)
        if method == "gptq": tensors[f"{name}.g_idx"] = np.arange(columns, dtype=np.int32) // group
    return dict(model_type="llama", hidden_size=32, intermediate_size=32, tie_word_embeddings=True,
                quantization_config=dict(quant_method=method, bits=4, group_size=group, desc_act=False)), tensors


for number, method in ((5, "gptq"), (7, "awq")): directory(number, method, *packed(method))
phi = {"model.embed_tokens.weight": floats(3, 8), "lm_head.weight": floats(3, 8), "model.layers.0.self_attn.qkv_proj.weight": floats(24, 8),
       "model.layers.0.self_attn.o_proj.weight": floats(8, 8), "model.layers.0.mlp.gate_up_proj.weight": floats(8, 8),
       "model.layers.0.mlp.down_proj.weight": floats(8, 4)} | norms(8, "input_layernorm", "post_attention_layernorm")
directory(9, "phi3", dict(model_type="phi3", hidden_size=8, intermediate_size=4, original_max_position_embeddings=8, partial_rotary_factor=0.75, rope_scaling=dict(
    type="longrope", short_factor=[1.0, 1.5, 2.0], long_factor=[2.0, 3.0, 4.0])), phi)
gemma = {"model.embed_tokens.weight": floats(3, 4)} | {f"{n}.weight": floats(*s) for n, s in matrices(4, 4, 4, 2).items()} | norms(
    4, "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
directory(11, "gemma2", dict(model_type="gemma2", hidden_size=4, intermediate_size=2, head_dim=4, sliding_window=4, query_pre_attn_scalar=4,
                             layer_types=["sliding_attention"], attn_logit_softcapping=50.0, final_logit_softcapping=None), gemma)
