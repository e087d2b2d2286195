#!/usr/bin/env python3
"""Tiny random models of the architectures beyond Mixtral, with golden outputs of transformers.

    python3 -m venv v && v/bin/pip install torch transformers safetensors
    v/bin/python make_models.py [NAME …]

Writes models/NAME for each: config.json, model.safetensors (bf16), tokenizer files (those of models/llama-c), golden.safetensors. Made with
transformers 5.24 and torch 2.15. Weights are drawn from a seed; the seed is the first for which no choice of an expert or of a greedy
token is close to a tie, so that rounding cannot change it. A new architecture needs a line in MODELS.

golden.safetensors: input_ids i64 [1, T]; greedy_ids i64 [G]; full_ids i64 [1, T+G]; full_logits f32 [T+G, V]; hidden_states.{0..L} f32 [T+G, H], the
last after the final norm; for models with experts selected_experts.{l} i64 and routing_weights.{l} f32 [T+G, k]. Computed in f32
from the stored bf16 weights, eager attention."""
import json, os, shutil, sys
import torch, transformers
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
COMMON = dict(vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=256, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
MODELS = {
    # biases on q, k, v; a window in the second layer only; tied
    "qwen2-a": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1, tie_word_embeddings=True, rope_theta=1e6)),
    # norms of heads of an odd size, YaRN
    "qwen3-a": ("Qwen3", dict(head_dim=24, rope_scaling=YARN, rope_theta=10000.0)),
    # shared expert, scores that do not sum up to 1, hub names
    "qwen2-moe-a": ("Qwen2Moe", dict(moe_intermediate_size=40, shared_expert_intermediate_size=48, num_experts=6, num_experts_per_tok=3,
                                     norm_topk_prob=False)),
    # norms of heads, all four biases of attention, scores that do, the names of transformers 5
    "qwen3-moe-a": ("Qwen3Moe", dict(head_dim=16, moe_intermediate_size=32, num_experts=20, num_experts_per_tok=4, norm_topk_prob=True,
                                     attention_bias=True)),
    # norms across heads
    "olmoe-a": ("Olmoe", dict(num_experts=8, num_experts_per_tok=2, norm_topk_prob=False, rms_norm_eps=1e-5)),
    # fused projections, a window
    "phi3-a": ("Phi3", dict(sliding_window=6, original_max_position_embeddings=256, pad_token_id=0)),
    # LongRoPE in a sequence that is long from the prompt on
    "phi3-long": ("Phi3", dict(original_max_position_embeddings=16, pad_token_id=0, rope_scaling=dict(
        rope_type="longrope", rope_theta=10000.0, short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],
        long_factor=[1.05, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0]))),
    # 12 of the 16 elements of a head are rotated; LongRoPE in a short sequence, with an amplitude of its own
    "phi3-partial": ("Phi3", dict(original_max_position_embeddings=256, pad_token_id=0, partial_rotary_factor=0.75, rope_scaling=dict(
        rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=0.75, attention_factor=1.2, factor=2.0,
        short_factor=[1.0, 1.2, 1.5, 1.9, 2.4, 3.0], long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0]))),
    # norms behind the blocks, soft-capping, windows in every other layer, GELU, large embeddings; heads that are not hidden / heads
    "gemma2-a": ("Gemma2", dict(head_dim=24, num_hidden_layers=3, sliding_window=6, query_pre_attn_scalar=20, attn_logit_softcapping=2.0,
                                final_logit_softcapping=1.0, tie_word_embeddings=True)),
    # the same without most of it; not among the models of every test, as it shows nothing that the one before does not
    "gemma-a": ("Gemma", dict(head_dim=16, tie_word_embeddings=True)),
    # every bias that Llama can have; dynamic rope
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=20,
                                   rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})),
}
FUSED = {"qwen3-moe-a"}  # stored as transformers 5 keeps them; the others with a matrix for each expert, as on the hub
VARIED = {"gemma2-a": 6}  # how many different tokens the continuation must have: tied outputs like to repeat
PROMPT, NEW, MARGIN = 24, 12, 2e-3


def draw(model, seed):
    """Normal weights that keep activations near 1, rounded to bf16."""
    generator = torch.Generator().manual_seed(seed)
    gemma = "Gemma" in type(model).__name__  # norms less 1, embeddings before they are made larger
    for name, p in sorted(model.named_parameters()):
        if name.endswith("bias"): mean, deviation = 0.0, 0.3
        elif p.dim() == 1: mean, deviation = (0.0 if gemma else 1.0), 0.2
        elif "embed_tokens" in name: mean, deviation = 0.0, (0.4 * p.shape[-1] ** -0.5 if gemma else 1.0)
        else: mean, deviation = 0.0, 1.6 / p.shape[-1] ** 0.5
        with torch.no_grad():
            p.copy_((torch.randn(p.shape, generator=generator) * deviation + mean).bfloat16().float())


def run(model, ids):
    routes = []
    def seen(_, __, out): routes.append(out)
    hooks = [m.register_forward_hook(seen) for n, m in model.named_modules() if n.endswith("mlp.gate")]
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    for h in hooks: h.remove()
    return out, routes


def margin(values, k):
    """By how much the k-th largest of each row beats the next, at least; and the order among the first k."""
    top = values.topk(min(k + 1, values.shape[-1]), dim=-1).values
    return (top[..., :-1] - top[..., 1:]).min().item()


def golden(model, k):
    ids = torch.tensor([[1] + [(7 * i * i + 11 * i + 5) % 157 + 3 for i in range(PROMPT - 1)]])
    full = ids
    for _ in range(NEW):
        out, _ = run(model, full)
        full = torch.cat([full, out.logits[:, -1:].argmax(-1)], dim=1)
    out, routes = run(model, full)
    least = margin(out.logits[0, PROMPT - 1:], 1)
    g = {"input_ids": ids, "greedy_ids": full[0, PROMPT:].clone(), "full_ids": full, "full_logits": out.logits[0].clone()}
    for i, h in enumerate(out.hidden_states): g[f"hidden_states.{i}"] = h[0].clone()
    for l, (logits, scores, experts) in enumerate(routes):
        least = min(least, margin(logits.reshape(-1, logits.shape[-1]), k))
        g[f"selected_experts.{l}"], g[f"routing_weights.{l}"] = experts.reshape(-1, k).clone(), scores.reshape(-1, k).float().clone()
    return g, least, 2 in full[0, PROMPT:].tolist()


def hub_names(state):
    """A matrix for each expert."""
    out = {}
    for name, w in state.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            for e, both in enumerate(w):
                gate, up = both.chunk(2)
                path = name.removesuffix("gate_up_proj") + str(e)
                out[f"{path}.gate_proj.weight"], out[f"{path}.up_proj.weight"] = gate, up
        elif name.endswith("mlp.experts.down_proj"):
            for e, one in enumerate(w): out[name.removesuffix("down_proj") + f"{e}.down_proj.weight"] = one
        else: out[name] = w
    return out


for name, (kind, keys) in MODELS.items():
    if sys.argv[1:] and name not in sys.argv[1:]: continue
    given = {**COMMON, **keys}
    config = getattr(transformers, kind + "Config")(**json.loads(json.dumps(given)), attn_implementation="eager")
    model = getattr(transformers, kind + "ForCausalLM")(config).float().eval()
    for seed in range(1000):
        draw(model, seed)
        g, least, ends = golden(model, keys.get("num_experts_per_tok", 1))
        if least > MARGIN and not ends and len(set(g["greedy_ids"].tolist())) >= VARIED.get(name, 1): break
    else: sys.exit(f"{name}: no seed without ties")
    out = os.path.join(HERE, "models", name)
    os.makedirs(out, exist_ok=True)
    state = {n: w.bfloat16() for n, w in model.state_dict().items() if not (given["tie_word_embeddings"] and n == "lm_head.weight")}
    if name not in FUSED: state = hub_names(state)
    save_file({n: w.contiguous() for n, w in state.items()}, os.path.join(out, "model.safetensors"), {"format": "pt"})
    save_file({n: w.contiguous() for n, w in g.items()}, os.path.join(out, "golden.safetensors"))
    written = {"architectures": [kind + "ForCausalLM"], "model_type": config.model_type, **given, "torch_dtype": "bfloat16"}
    with open(os.path.join(out, "config.json"), "w") as f: f.write(json.dumps(written, indent=1, sort_keys=True) + "\n")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(HERE, "models", "llama-c", file), os.path.join(out, file))
    print(f"{name}: seed {seed}, margin {least:.4f}, {sum(w.numel() for w in state.values())} parameters")
