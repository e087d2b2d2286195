#!/usr/bin/env bash
# Runs check.py, the clients of OpenAI and Mistral, against a model that is compiled for it. Takes no arguments. Needs a built moec (cargo build --release)
# and Python with venv and pip; without those it says so and does nothing.
set -euo pipefail
cd "$(dirname "$0")/../.."
skip() { echo "clients: skipped, $1"; exit 0; }
command -v python3 >/dev/null || skip "there is no python3"
work=target/clients
mkdir -p "$work"
if [ ! -x "$work/venv/bin/pip" ]; then
    rm -rf "$work/venv"
    python3 -m venv "$work/venv" >/dev/null 2>&1 || { rm -rf "$work/venv"; skip "python3 has no venv with pip"; }
fi
"$work/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/clients/requirements.txt ||
    skip "pip cannot install tests/clients/requirements.txt"

# numerals with a chat template: the last message is the question.
model=$work/numerals-chat
rm -rf "$model" && mkdir "$model"
cp examples/numerals/{config.json,generation_config.json,model.safetensors,tokenizer.json,tokenizer_config.json} "$model"
echo "{{ bos_token }}{{ messages[-1]['content'].strip() }}" > "$model/chat_template.jinja"
cargo run --release --quiet -- build "$model" -o "$work/chat" 2> "$work/build.log" || { cat "$work/build.log"; exit 1; }

"$work/chat" serve --port 0 2> "$work/serve.log" &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
for _ in $(seq 100); do
    url=$(sed -n 's/^serving .* on //p' "$work/serve.log")
    [ -n "$url" ] && break
    kill -0 "$server" || { cat "$work/serve.log"; exit 1; }
    sleep 0.1
done
"$work/venv/bin/python" tests/clients/check.py "$url"
kill -TERM "$server"
wait "$server"
