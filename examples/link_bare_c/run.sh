#!/bin/sh
# Compiles the model and the program, and runs it. MOEC, CC, CFLAGS, MOEC_FLAGS and RUN (a prefix for running, e.g. an emulator) can be set.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here/out}
${MOEC:-moec} build "$here/../numerals" --emit object --name numerals -o "$out" ${MOEC_FLAGS:-}
${CC:-cc} -O2 ${CFLAGS:--Wall -Wextra -Werror -std=c11} -I"$out" -c "$here/main.c" -o "$out/main.o"
${CC:-cc} "$out/main.o" "$out/numerals.o" -o "$out/bare" -lpthread
# "fr 1987 =" in the model's token ids.
${RUN:-} "$out/bare" "$out/numerals.weights" 2 7 $(cat "$here/prompt.ids")
