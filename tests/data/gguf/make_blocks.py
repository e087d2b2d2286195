#!/usr/bin/env python3
"""Random blocks of every GGUF type that moec reads, and what the gguf package makes of them.

    python3 -m venv v && v/bin/pip install gguf numpy safetensors
    v/bin/python make_blocks.py

Writes blocks.safetensors: for each type NAME.blocks, u8, the stored bytes of 512 elements, and NAME.values, f32 [512]. Bytes are random, but
f16 factors are finite. Made with gguf 0.19."""
import os
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T, dequantize
from safetensors.numpy import save_file

ELEMENTS = 512
# Where the f16 factors of a block are.
FACTORS = {T.F16: [0], T.Q8_0: [0], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2],
           T.Q5_K: [0, 2], T.Q6_K: [208], T.IQ4_NL: [0], T.IQ4_XS: [0], T.MXFP4: [], T.BF16: [], T.F32: []}
random = np.random.default_rng(1)
out = {}
for kind, factors in FACTORS.items():
    elements, size = GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (ELEMENTS // elements, size), dtype=np.uint8)
    for at in factors:
        blocks[:, at + 1] &= 0xBF  # a finite exponent
    if kind in (T.F32, T.BF16):
        blocks[:, -1] &= 0xBF
    values = dequantize(blocks.reshape(1, -1), kind).astype(np.float32).reshape(-1)
    assert values.size == ELEMENTS and np.isfinite(values).all(), kind
    out[f"{kind.name}.blocks"], out[f"{kind.name}.values"] = blocks.reshape(-1), values
save_file(out, os.path.join(os.path.dirname(os.path.abspath(__file__)), "blocks.safetensors"))
