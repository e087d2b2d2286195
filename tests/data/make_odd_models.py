#!/usr/bin/env python3
"""Writes tiny Mixtrals of odd shapes, with what transformers computes for them.

    python3 make_odd_models.py DIRECTORY [NAME…]

Needs torch, transformers 5, numpy. Every model is seeded: the same versions write the same bytes. The names that ship with the tests
are those of `models/odd-*`; all the others are here to be run by hand (`MOEC_TEST_MODELS=DIRECTORY cargo test --release -p moec-tests
--test parity`).

Each directory has config.json, safetensors (written here byte by byte, so that headers are unaligned, tensors lie in any order and
types are mixed), a word-level tokenizer.json and golden.safetensors:
input_ids i64 [1,T], greedy_ids i64 [G], full_ids i64 [1,T+G], full_logits f32 [T+G,V], hidden_states.L f32 [T+G,H] (the last, after
the final norm), and for each layer selected_experts.N i64 [T+G,k] by falling weight and routing_weights.N f32 [T+G,k].
"""

import json
import math
import struct
import sys
from pathlib import Path

import numpy
import torch
from transformers import MixtralConfig, MixtralForCausalLM

# A seed is passed over when some choice of experts or of a token is this near to a tie (in the logarithm of a
# probability; as a share of the largest logit): f32 arithmetic in another order could turn it.
ROUTER_MARGIN = 3e-5
GREEDY_GAP = 1e-3


def case(name, hidden, heads, kv_heads, head_dim, ffn, experts, top, vocab, **more):
    return dict(name=name, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn, experts=experts, top=top,
                vocab=vocab, **more)


# `dtypes` are dealt to the tensors in turn; `config` is merged over the usual keys, and a key of `drop` is left out.
CASES = [
    # Every size is odd in some way: nothing is a multiple of 16, and all experts are chosen.
    case("odd-all", 20, 2, 1, 6, 17, 3, 3, 33, dtypes=["f32"]),
    case("odd-window", 36, 6, 2, 22, 37, 5, 3, 101, dtypes=["bf16"], config={"sliding_window": 5}),
    case("odd-fused", 52, 5, 1, 20, 19, 16, 1, 257, dtypes=["f16"], fused=True, config={"tie_word_embeddings": True}),
    case("odd-mixed", 100, 5, 5, None, 61, 16, 16, 67, dtypes=["bf16", "f16", "f32"], shards=4),
    case("odd-one", 6, 1, 1, 2, 1, 1, 1, 3, dtypes=["f32"], prompt=3, generate=3),
    # transformers rounds hidden / heads down.
    case("odd-floor", 52, 5, 5, None, 23, 7, 2, 65, dtypes=["bf16"], drop=["head_dim"]),
    case("odd-wide", 260, 13, 13, 20, 300, 7, 2, 1031, dtypes=["bf16", "f32"]),
    case("odd-long", 36, 3, 1, 14, 40, 5, 2, 97, dtypes=["f16"], config={"sliding_window": 70}, prompt=580, generate=8),
    case("odd-long-full", 34, 4, 2, 10, 21, 6, 2, 90, dtypes=["bf16"], prompt=700, generate=8),
    case("odd-defaults", 48, 8, 8, None, 31, 8, 2, 129, dtypes=["bf16"], drop=[
        "num_key_value_heads", "num_local_experts", "num_experts_per_tok", "rope_theta", "rms_norm_eps", "sliding_window",
        "max_position_embeddings", "tie_word_embeddings", "head_dim", "hidden_act", "bos_token_id", "eos_token_id", "torch_dtype"]),
    case("odd-nulls", 60, 6, 6, 10, 25, 4, 2, 77, dtypes=["f16"], config={
        "num_key_value_heads": None, "rope_scaling": None, "head_dim": None, "sliding_window": None, "eos_token_id": [2, 5],
        "pad_token_id": None, "torch_dtype": "float32", "rope_theta": 10000}),
    case("odd-narrow", 17, 3, 3, 2, 3, 2, 2, 5, dtypes=["bf16", "f32"], prompt=5),
    case("odd-head", 48, 2, 1, 130, 33, 3, 1, 51, dtypes=["f32"]),
    case("odd-experts", 40, 4, 2, 12, 9, 64, 8, 111, dtypes=["bf16", "f16"]),
    case("odd-stored", 44, 4, 4, 18, 29, 3, 2, 85, dtypes=["f32", "f16"], config={"tie_word_embeddings": True}, keep_output=True),
    case("odd-window-1", 24, 2, 2, 8, 15, 4, 2, 50, dtypes=["f32"], config={"sliding_window": 1}),
    case("odd-window-wide", 24, 3, 1, 26, 50, 4, 1, 50, dtypes=["bf16"], config={"sliding_window": 17}, prompt=200),
    case("odd-linear", 76, 4, 2, 38, 70, 5, 4, 88, dtypes=["f16"], config={"rope_scaling": {"type": "linear", "factor": 2.5}}),
    case("odd-v5", 84, 7, 7, None, 45, 9, 5, 143, dtypes=["bf16"], fused=True, shards=2, drop=["rope_theta", "torch_dtype"], config={
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}, "dtype": "bfloat16", "head_dim": None,
        "router_jitter_noise": 0.0}),
    case("odd-fused-mixed", 28, 2, 1, 16, 27, 5, 2, 40, dtypes=["f32", "bf16", "f16"], fused=True, shards=3),
    case("odd-vocab-1", 16, 1, 1, 16, 16, 2, 1, 1, dtypes=["f32"], prompt=4, generate=3, config={
        "bos_token_id": None, "eos_token_id": None}),
    case("odd-gqa-5", 30, 10, 2, 4, 18, 3, 2, 60, dtypes=["bf16"], prompt=90),
    case("odd-eps", 68, 4, 1, 24, 51, 6, 3, 59, dtypes=["f16"], config={"rms_norm_eps": 0.01}),
]


def config_of(c):
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": c["vocab"], "hidden_size": c["hidden"],
        "intermediate_size": c["ffn"], "num_hidden_layers": 2, "num_attention_heads": c["heads"],
        "num_key_value_heads": c["kv_heads"], "num_local_experts": c["experts"], "num_experts_per_tok": c["top"],
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": min(1, c["vocab"] - 1),
        "eos_token_id": min(2, c["vocab"] - 1),
    }
    if c["head_dim"] is not None:
        config["head_dim"] = c["head_dim"]
    config.update(c.get("config", {}))
    for key in c.get("drop", []):
        config.pop(key, None)
    return config


def tensors_of(c, config, generator):
    """Values before rounding, in the order of a walk over the model."""
    head_dim = c["head_dim"] or c["hidden"] // c["heads"]
    hidden, ffn, experts = c["hidden"], c["ffn"], c["experts"]

    def matrix(rows, cols, gain=1.0):
        return torch.randn(rows, cols, generator=generator) * (gain / math.sqrt(cols))

    def norm():
        return 1 + 0.2 * torch.randn(hidden, generator=generator)

    yield "model.embed_tokens.weight", torch.randn(c["vocab"], hidden, generator=generator)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        yield name + "input_layernorm.weight", norm()
        yield name + "self_attn.q_proj.weight", matrix(c["heads"] * head_dim, hidden, 1.5)
        yield name + "self_attn.k_proj.weight", matrix(c["kv_heads"] * head_dim, hidden, 1.5)
        yield name + "self_attn.v_proj.weight", matrix(c["kv_heads"] * head_dim, hidden)
        yield name + "self_attn.o_proj.weight", matrix(hidden, c["heads"] * head_dim)
        yield name + "post_attention_layernorm.weight", norm()
        router = matrix(experts, hidden, 2.0)
        w1 = [matrix(ffn, hidden, 1.5) for _ in range(experts)]
        w2 = [matrix(hidden, ffn, 1.5) for _ in range(experts)]
        w3 = [matrix(ffn, hidden, 1.5) for _ in range(experts)]
        if c.get("fused"):
            yield name + "mlp.gate.weight", router
            yield name + "mlp.experts.gate_up_proj", torch.stack([torch.cat(pair) for pair in zip(w1, w3)])
            yield name + "mlp.experts.down_proj", torch.stack(w2)
        else:
            yield name + "block_sparse_moe.gate.weight", router
            for expert in range(experts):
                for part, all_of in (("w1", w1), ("w2", w2), ("w3", w3)):
                    yield f"{name}block_sparse_moe.experts.{expert}.{part}.weight", all_of[expert]
    yield "model.norm.weight", norm()
    if not config.get("tie_word_embeddings") or c.get("keep_output"):
        yield "lm_head.weight", matrix(c["vocab"], hidden, 2.5)


def stored(values, dtype):
    """The bytes of a tensor and their name in a header."""
    if dtype == "f32":
        return values.numpy().astype("<f4").tobytes(), "F32"
    if dtype == "f16":
        return values.to(torch.float16).numpy().astype("<f2").tobytes(), "F16"
    return values.to(torch.bfloat16).view(torch.int16).numpy().astype("<i2").tobytes(), "BF16"


def write_safetensors(path, tensors):
    """`tensors`: (name, bytes, dtype, shape). The header's length is made odd, so nothing behind it is aligned."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, data, dtype, shape in tensors:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    if len(text) % 2 == 0:
        text += b" "
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, data, _, _ in tensors:
            file.write(data)


def write_model(c, config, seed, directory):
    generator = torch.Generator().manual_seed(seed)
    order = numpy.random.default_rng(seed)
    tensors = []
    for number, (name, values) in enumerate(tensors_of(c, config, generator)):
        data, dtype = stored(values.contiguous(), c["dtypes"][number % len(c["dtypes"])])
        tensors.append((name, data, dtype, values.shape))
    order.shuffle(tensors)
    shards = c.get("shards", 1)
    for old in directory.glob("*.safetensors*"):
        old.unlink()
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return
    places = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = tensors[shard::shards]
        write_safetensors(directory / file, part)
        places.update({name: file for name, _, _, _ in part})
    index = {"metadata": {"total_size": sum(len(data) for _, data, _, _ in tensors)}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_tokenizer(c, directory):
    words = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, c["vocab"])]
    words = words[: c["vocab"]]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


def run(model, ids):
    """Logits [T, V], final hidden states [T, H] and router logits of each layer [T, E]."""
    routers = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda _module, _input, output: routers.append(
        output[0] if isinstance(output, tuple) else output)) for layer in model.model.layers]
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    for hook in hooks:
        hook.remove()
    return logits[0], hidden[0], [router.reshape(ids.shape[1], -1) for router in routers]


def golden(c, config, directory, seed):
    """What transformers computes, or None when some choice is near to a tie."""
    read = json.loads((directory / "config.json").read_text())
    if read.get("num_key_value_heads", 0) is None:
        # transformers 4 took null for as many as there are query heads; 5 refuses it.
        read["num_key_value_heads"] = c["heads"]
    model = MixtralForCausalLM.from_pretrained(directory, config=MixtralConfig.from_dict(read), dtype=torch.float32, attn_implementation="eager",
                                               experts_implementation="eager")
    model.eval()
    prompt, generate = c.get("prompt", 21), c.get("generate", 12)
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(0, c["vocab"], (1, prompt), generator=generator)
    ends = model.config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    start, greedy = ids, []
    for _ in range(generate):
        logits, _, _ = run(model, ids)
        best = torch.topk(logits[-1], min(2, c["vocab"])).values
        if len(best) == 2 and best[0] - best[1] < GREEDY_GAP * logits.abs().max():
            return None
        greedy.append(int(logits[-1].argmax()))
        ids = torch.cat([ids, torch.tensor([[greedy[-1]]])], dim=1)
        # A compiled model ends there, and so does the golden text.
        if greedy[-1] in ends:
            break
    logits, hidden, routers = run(model, ids)
    f32 = lambda x: (x.contiguous().numpy().astype("<f4").tobytes(), "F32", x.shape)
    i64 = lambda x: (x.contiguous().numpy().astype("<i8").tobytes(), "I64", x.shape)
    out = {
        "input_ids": i64(start), "greedy_ids": i64(torch.tensor(greedy)), "full_ids": i64(ids), "full_logits": f32(logits),
        f"hidden_states.{config['num_hidden_layers']}": f32(hidden),
    }
    for layer, router in enumerate(routers):
        ranked = torch.sort(torch.softmax(router, dim=-1), dim=-1, descending=True)
        top = c["top"]
        used = ranked.values[:, : min(top + 1, c["experts"])].log()
        if used.shape[1] > 1 and (used[:, :-1] - used[:, 1:]).min() < ROUTER_MARGIN:
            return None
        weights = ranked.values[:, :top]
        out[f"selected_experts.{layer}"] = i64(ranked.indices[:, :top])
        out[f"routing_weights.{layer}"] = f32(weights / weights.sum(dim=-1, keepdim=True))
    return out


def main():
    torch.set_num_threads(1)
    root, wanted = Path(sys.argv[1]), sys.argv[2:]
    for number, c in enumerate(CASES):
        if wanted and c["name"] not in wanted:
            continue
        directory = root / c["name"]
        directory.mkdir(parents=True, exist_ok=True)
        config = config_of(c)
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        write_tokenizer(c, directory)
        for attempt in range(1000):
            seed = 1000 * (number + 1) + attempt
            write_model(c, config, seed, directory)
            found = golden(c, config, directory, seed)
            if found:
                break
        else:
            raise SystemExit(f"{c['name']}: no seed without near-ties")
        write_safetensors(directory / "golden.safetensors", [(name, *rest) for name, rest in found.items()])
        print(f"{c['name']}: seed {seed}", flush=True)


if __name__ == "__main__":
    main()
