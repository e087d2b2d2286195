#!/bin/sh
# Compiles the model at each quantization and counts the held-out numbers that it spells to the letter.
set -e
cd "$(dirname "$0")/../.."
for quant in none q8 q4; do
    printf '%-5s' "$quant"
    cargo run --quiet --release -- run examples/numerals --quant "$quant" -- score --answers examples/numerals/heldout.jsonl
done
