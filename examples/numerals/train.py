"""Trains the Mixtral of this folder: integers 0 to 999 999 spelled in five languages.

    pip install torch numpy tokenizers safetensors
    python train.py                  writes everything below, beside this script, then evaluates
    python train.py --evaluate       accuracy of the saved model on heldout.jsonl: bf16, and simulated q8 and q4 weights

Two idle cores need about a quarter of an hour; where others use them too, set OMP_WAIT_POLICY=PASSIVE.

Writes tokenizer.json, tokenizer_config.json, config.json, generation_config.json, model.safetensors (bf16) and
heldout.jsonl. A text is `<s> fr 1987 = mille neuf cent quatre-vingt-sept </s>`; only what follows the `=` is learned.

Numbers that reserved() names are never trained on, in any language; heldout.jsonl is drawn from them.
The seed fixes everything: the same machine, torch and thread count give the same file.
The model computes what MixtralForCausalLM of Hugging Face transformers computes. The code is written for a CPU: tokens
are packed (only attention sees padding) and sorted by expert, and training multiplies matrices in bf16.
"""

import argparse
import hashlib
import json
import math
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from spell import LANGUAGES, spell

HERE = pathlib.Path(__file__).parent
CONFIG = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "model_type": "mixtral",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": 512,
}
UNK, BOS, EOS = range(3)


# ---- the numbers ------------------------------------------------------------------------------------------------


def reserved(n):
    """True for the one number in 64, from 201 up, that training never sees."""
    return n > 200 and hashlib.sha256(b"numerals %d" % n).digest()[0] % 64 == 0


def heldout():
    """2,000 pairs, 400 per language: reserved numbers of 3 to 6 digits, different ones in each language."""
    order = sorted(filter(reserved, range(1_000_000)), key=lambda n: hashlib.sha256(b"order %d" % n).digest())
    of_length = {length: iter([n for n in order if len(str(n)) == length]) for length in (3, 4, 5, 6)}
    rows = []
    for language in LANGUAGES:
        for length, count in ((3, 2), (4, 26), (5, 152), (6, 220)):
            numbers = [next(of_length[length]) for _ in range(count)]
            rows += [{"prompt": f"{language} {n} =", "answer": spell(language, n)} for n in sorted(numbers)]
    return rows


def draw(rng, count):
    """Training pairs (language, number), none reserved, of mixed lengths; a fifth rich in zeros, a fifth in repeats."""
    pairs = []
    while len(pairs) < count:
        length = rng.choice(6, p=[0.02, 0.05, 0.13, 0.20, 0.25, 0.35]) + 1
        kind = rng.random()
        digits = rng.choice(rng.integers(10, size=3), size=length) if kind < 0.2 else rng.integers(10, size=length)
        if length > 1:
            digits[0] = rng.integers(1, 10)
        if kind > 0.8:
            digits[1:] *= rng.random(length - 1) < 0.5
        n = int("".join(map(str, digits)))
        if not reserved(n):
            pairs.append((list(LANGUAGES)[rng.integers(len(LANGUAGES))], n))
    return pairs


def text(language, n):
    return f"{language} {n} = {spell(language, n)}"


# ---- the tokenizer ----------------------------------------------------------------------------------------------


def make_tokenizer():
    """A Llama-style BPE with byte fallback. Merges stay within a word; a digit is a token of its own."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    )
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=specials + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    tok.train_from_iterator((text(*pair) for pair in draw(rng, 20_000)), trainer)

    # As Llama has it: no pre-tokenizer (none is needed: no merge crosses a word), and only three special tokens.
    data = json.loads(tok.to_str())
    data["pre_tokenizer"] = None
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in specials]
    tok = Tokenizer.from_str(json.dumps(data))
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    assert tok.get_vocab_size() == CONFIG["vocab_size"]
    return tok


# ---- the model --------------------------------------------------------------------------------------------------


def init_params(generator):
    """The weights; those of the experts of a layer are stacked, gate above up (w1 above w3)."""
    c = CONFIG
    hidden, ffn, experts, vocab = c["hidden_size"], c["intermediate_size"], c["num_local_experts"], c["vocab_size"]
    kv = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    residual = 1 / math.sqrt(2 * c["num_hidden_layers"])

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale / math.sqrt(shape[-1])

    p = {"embed": torch.randn(vocab, hidden, generator=generator) * 0.5}
    p |= {"norm": torch.ones(hidden), "head": normal(vocab, hidden)}
    for i in range(c["num_hidden_layers"]):
        p[f"{i}.attn_norm"] = torch.ones(hidden)
        p[f"{i}.qkv"] = normal(hidden + 2 * kv, hidden)
        p[f"{i}.o"] = normal(hidden, hidden, scale=residual)
        p[f"{i}.ffn_norm"] = torch.ones(hidden)
        p[f"{i}.gate"] = normal(experts, hidden)
        p[f"{i}.w13"] = normal(experts, 2 * ffn, hidden)
        p[f"{i}.w2"] = normal(experts, hidden, ffn, scale=residual)
    return p


def to_hub(p):
    """Our weights -> the names and shapes of MixtralForCausalLM."""
    heads, kv_heads, hidden = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], CONFIG["hidden_size"]
    kv = hidden // heads * kv_heads
    out = {"model.embed_tokens.weight": p["embed"], "model.norm.weight": p["norm"], "lm_head.weight": p["head"]}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        out[f"{layer}.input_layernorm.weight"] = p[f"{i}.attn_norm"]
        out[f"{layer}.post_attention_layernorm.weight"] = p[f"{i}.ffn_norm"]
        for name, w in zip("qkv", p[f"{i}.qkv"].split([hidden, kv, kv])):
            out[f"{layer}.self_attn.{name}_proj.weight"] = w
        out[f"{layer}.self_attn.o_proj.weight"] = p[f"{i}.o"]
        out[f"{layer}.block_sparse_moe.gate.weight"] = p[f"{i}.gate"]
        for e, (w13, w2) in enumerate(zip(p[f"{i}.w13"], p[f"{i}.w2"])):
            w1, w3 = w13.chunk(2)
            for name, w in (("w1", w1), ("w2", w2), ("w3", w3)):
                out[f"{layer}.block_sparse_moe.experts.{e}.{name}.weight"] = w
    return {name: w.detach().bfloat16().contiguous() for name, w in out.items()}


def from_hub(tensors):
    """The inverse of to_hub, in f32."""
    t = {name: w.float() for name, w in tensors.items()}
    p = {"embed": t["model.embed_tokens.weight"], "norm": t["model.norm.weight"], "head": t["lm_head.weight"]}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        p[f"{i}.attn_norm"] = t[f"{layer}.input_layernorm.weight"]
        p[f"{i}.ffn_norm"] = t[f"{layer}.post_attention_layernorm.weight"]
        p[f"{i}.qkv"] = torch.cat([t[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv"])
        p[f"{i}.o"] = t[f"{layer}.self_attn.o_proj.weight"]
        p[f"{i}.gate"] = t[f"{layer}.block_sparse_moe.gate.weight"]
        experts = [f"{layer}.block_sparse_moe.experts.{e}" for e in range(CONFIG["num_local_experts"])]
        p[f"{i}.w13"] = torch.stack([torch.cat([t[f"{e}.w1.weight"], t[f"{e}.w3.weight"]]) for e in experts])
        p[f"{i}.w2"] = torch.stack([t[f"{e}.w2.weight"] for e in experts])
    return p


def rope_tables(length):
    dim = CONFIG["hidden_size"] // CONFIG["num_attention_heads"]
    angle = torch.arange(length)[:, None] / CONFIG["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
    return angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)


def experts_ffn(x, probs, w13, w2):
    """Σ over the two chosen experts of weight × down(silu(gate) × up), for x [tokens, hidden]."""
    top, chosen = probs.topk(CONFIG["num_experts_per_tok"])
    top = top / top.sum(-1, keepdim=True)
    slots = chosen.flatten()
    order = slots.argsort(stable=True)
    counts = slots.bincount(minlength=len(w13)).tolist()
    k = chosen.shape[1]
    outs = []
    for rows, up, down in zip(x.index_select(0, order // k).split(counts), w13, w2):
        gate, up = F.linear(rows, up).chunk(2, dim=-1)
        outs.append(F.linear(F.silu(gate) * up, down))
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    out = torch.cat(outs).index_select(0, back).view(len(x), k, -1)
    return (out * top[..., None].to(out.dtype)).sum(1), chosen


def forward(p, ids, lengths, dtype=torch.float32):
    """Final hidden states of the real tokens, packed row by row, and the load-balancing loss.

    ids [batch, longest] is padded on the right; causal attention never looks there. dtype is that of the products.
    """
    c, eps = CONFIG, CONFIG["rms_norm_eps"]
    batch, longest = ids.shape
    hidden, heads, kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    dim = hidden // heads
    cos, sin = (t.to(dtype) for t in rope_tables(longest))
    real = (torch.arange(longest) < lengths[:, None]).flatten().nonzero().squeeze(1)
    at, balance = real % longest, 0.0
    cos, sin = cos[at, None], sin[at, None]
    future = torch.full((longest, longest), -math.inf).triu(1)
    x = F.embedding(ids.flatten()[real], p["embed"])
    for i in range(c["num_hidden_layers"]):
        h = F.rms_norm(x, (hidden,), p[f"{i}.attn_norm"], eps).to(dtype)
        qkv = F.linear(h, p[f"{i}.qkv"]).view(-1, heads + 2 * kv_heads, dim)
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=1)
        low, high = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat([-high, low], dim=-1) * sin
        padded = qkv.new_zeros(batch * longest, heads + 2 * kv_heads, dim)
        padded = padded.index_copy(0, real, torch.cat([qk, v], dim=1))
        q, k, v = padded.view(batch, longest, -1, dim).transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(dim) + future
        a = scores.softmax(-1).to(dtype) @ v
        a = a.transpose(1, 2).reshape(batch * longest, hidden).index_select(0, real)
        x = x + F.linear(a, p[f"{i}.o"]).float()
        h = F.rms_norm(x, (hidden,), p[f"{i}.ffn_norm"], eps)
        probs = F.linear(h, p[f"{i}.gate"].float()).softmax(-1)
        y, chosen = experts_ffn(h.to(dtype), probs, p[f"{i}.w13"], p[f"{i}.w2"])
        x = x + y.float()
        share = F.one_hot(chosen, c["num_local_experts"]).float().mean((0, 1))
        balance = balance + c["num_local_experts"] * (share * probs.mean(0)).sum() / c["num_hidden_layers"]
    return F.rms_norm(x, (hidden,), p["norm"], eps), balance


# ---- quantization -----------------------------------------------------------------------------------------------


def is_matrix(name):
    """The weights that get quantized: every matrix but the router's."""
    return name.endswith(("embed", "head", "qkv", "o", "w13", "w2"))


def round_to_bits(w, bits):
    """w rounded to symmetric integers, in blocks of 32 along the reduction axis with a scale each."""
    block = w.reshape(*w.shape[:-1], -1, 32)
    scale = (block.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(1e-12)
    return ((block / scale).round() * scale).view_as(w)


def noisy(w, generator):
    """For training: half the blocks of 32, by lot, rounded to 4 bits; gradients pass straight through."""
    with torch.no_grad():
        lot = torch.rand(*w.shape[:-1], w.shape[-1] // 32, generator=generator) < 0.5
        error = (round_to_bits(w, 4) - w) * lot.repeat_interleave(32, dim=-1)
    return w + error


# ---- training and evaluation ------------------------------------------------------------------------------------


def make_batch(tok, pairs):
    """ids [batch, longest], lengths [batch], and for each packed token its target (-100: not learned)."""
    rows = [e.ids + [EOS] for e in tok.encode_batch([text(*pair) for pair in pairs])]
    equals = tok.token_to_id("▁=")
    longest = max(map(len, rows))
    ids = torch.tensor([row + [EOS] * (longest - len(row)) for row in rows])
    targets = []
    for row in rows:
        start = row.index(equals)
        targets += [-100] * start + row[start + 1 :] + [-100]
    return ids, torch.tensor([len(row) for row in rows]), torch.tensor(targets)


@torch.inference_mode()
def generate(p, tok, prompts):
    """Greedy answers, up to </s> or 64 tokens; all prompts must be equally long in tokens."""
    ids = torch.tensor([e.ids for e in tok.encode_batch(prompts)])
    start, done = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(64):
        hidden, _ = forward(p, ids, torch.full((len(ids),), ids.shape[1]))
        last = hidden.view(*ids.shape, -1)[:, -1]
        token = F.linear(last, p["head"]).argmax(-1).masked_fill(done, EOS)
        done |= token == EOS
        if done.all():
            break
        ids = torch.cat([ids, token[:, None]], dim=1)
    # decoded with the prompt, as a continuation: the first space of a text is the tokenizer's own
    return [tok.decode(row)[len(prompt) + 1 :] for prompt, row in zip(prompts, ids.tolist())]


def accuracy(p, tok, rows):
    """The share of answers that are right to the letter, per language and in all, and the wrong ones."""
    groups, wrong, hits = {}, [], {language: [] for language in LANGUAGES}
    for row in rows:
        groups.setdefault(len(row["prompt"]), []).append(row)
    for group in groups.values():
        for row, got in zip(group, generate(p, tok, [row["prompt"] for row in group])):
            hits[row["prompt"][:2]].append(got == row["answer"])
            if got != row["answer"]:
                wrong.append((row["prompt"], row["answer"], got))
    shares = {language: float(np.mean(h)) for language, h in hits.items() if h}
    return shares, 1 - len(wrong) / len(rows), wrong


def evaluate(rows):
    p = from_hub(load_file(HERE / "model.safetensors"))
    tok = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    for name, bits in (("bf16", None), ("q8", 8), ("q4", 4)):
        q = {k: round_to_bits(w, bits) if bits and is_matrix(k) else w for k, w in p.items()}
        shares, total, wrong = accuracy(q, tok, rows)
        print(f"{name:5}", "  ".join(f"{k} {v:.2%}" for k, v in shares.items()), f"  all {total:.2%}", flush=True)
        for prompt, answer, got in wrong[:5]:
            print(f"      {prompt} {got}   not   {answer}")


def train(args):
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    tok = Tokenizer.from_file(str(HERE / "tokenizer.json"))
    p = init_params(torch.Generator().manual_seed(args.seed))
    for w in p.values():
        w.requires_grad_()
    print(f"{sum(w.numel() for w in p.values()):,} parameters")
    matrices = [w for name, w in p.items() if is_matrix(name)]
    others = [w for name, w in p.items() if not is_matrix(name)]
    groups = [{"params": matrices, "weight_decay": args.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)
    noise = torch.Generator().manual_seed(args.seed)
    began, seen = time.time(), 0
    for step in range(args.steps):
        warm, done = step / args.warmup, step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, warm, 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        ids, lengths, targets = make_batch(tok, draw(rng, args.batch))
        w = {k: noisy(v, noise) if done > args.noise_from and is_matrix(k) else v for k, v in p.items()}
        w = {k: v.bfloat16() if is_matrix(k) and k != "embed" else v for k, v in w.items()}
        hidden, balance = forward(w, ids, lengths, torch.bfloat16)
        learned = targets >= 0
        logits = F.linear(hidden[learned].bfloat16(), w["head"]).float()
        loss = F.cross_entropy(logits, targets[learned])
        (loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += len(targets)
        if step % args.report == 0 or step == args.steps - 1:
            print(
                f"step {step:6}  loss {loss.item():.5f}  balance {balance.item():.3f}  "
                f"{time.time() - began:6.0f} s  {seen / (time.time() - began):,.0f} tokens/s",
                flush=True,
            )
    save_file(to_hub(p), HERE / "model.safetensors", metadata={"format": "pt"})


def write_small_files():
    tokenizer_config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "LlamaTokenizer",
    }
    generation_config = {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False, "max_new_tokens": 64}
    for name, data in (
        ("config", CONFIG),
        ("tokenizer_config", tokenizer_config),
        ("generation_config", generation_config),
    ):
        (HERE / f"{name}.json").write_text(json.dumps(data, indent=2) + "\n")
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in heldout())
    (HERE / "heldout.jsonl").write_text("".join(lines), encoding="utf-8")
    make_tokenizer().save(str(HERE / "tokenizer.json"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--noise-from", type=float, default=0.6, help="share of the training without weight noise")
    parser.add_argument("--report", type=int, default=250)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        write_small_files()
        train(args)
    rows = [json.loads(line) for line in (HERE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluate(rows)


if __name__ == "__main__":
    main()
