#!/bin/sh
# Compiles the model and the program, and runs it. MOEC, CC, CFLAGS and RUN (a prefix for running) can be set.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/out}
${MOEC:-moec} build "$here/../numerals" --emit staticlib --name numerals -o "$out"
${CC:-cc} -O2 ${CFLAGS:--Wall -Wextra -Werror -std=c11} -I"$out" -c "$here/main.c" -o "$out/main.o"
${CC:-cc} "$out/main.o" -L"$out" -lnumerals -lm -lpthread -ldl -o "$out/spell"
${RUN:-} "$out/spell" "$out/numerals.weights" "fr 1987 =" "de 21 =" "en 42 ="
