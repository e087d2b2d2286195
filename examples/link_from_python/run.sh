#!/bin/sh
# Compiles the model and runs the program. MOEC and PYTHON can be set.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/out}
${MOEC:-moec} build "$here/../numerals" --emit cdylib --name numerals -o "$out"
${PYTHON:-python3} "$here/spell.py" "$out" "fr 1987 =" "de 21 =" "en 42 ="
