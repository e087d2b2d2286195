#!/usr/bin/env bash
# Runs against a model that is compiled for it: the clients of OpenAI and Mistral (check.py), lm-eval (the tasks of lm_eval/), and the web page in Chromium
# where that is installed (page.py). Takes no arguments.
# Needs a built moec (cargo build --release) and Python with venv and pip; without those it says so and does nothing.
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

# lm-eval asks the server for token ids and needs no network; requests are texts, so that the server adds the bos token.
rm -rf "$work/lm-eval"
HF_HUB_OFFLINE=1 HF_HOME=$PWD/$work/huggingface "$work/venv/bin/lm-eval" run --model local-completions \
    --model_args "base_url=$url/v1/completions,model=numerals-chat,tokenizer_backend=remote,tokenized_requests=False,num_concurrent=8,max_length=128" \
    --include_path tests/clients/lm_eval --tasks numerals_choice,numerals_words --output_path "$work/lm-eval" \
    > "$work/lm-eval.log" 2>&1 || { cat "$work/lm-eval.log"; exit 1; }
"$work/venv/bin/python" - "$work"/lm-eval/*/results_*.json << 'EOF'
import json, sys

results = json.load(open(sys.argv[1]))["results"]
found = {
    "choice": results["numerals_choice"]["acc,none"],
    "length-normalised": results["numerals_choice"]["acc_norm,none"],
    "words": results["numerals_words"]["exact_match,words"],
}
assert set(found.values()) == {1.0}, f"the model knows all answers, but lm-eval finds {found}"
print("ok: lm-eval finds all answers right")
EOF

# The web page, where there is a browser.
if chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome); then
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check -r tests/clients/requirements-page.txt
    "$work/venv/bin/python" tests/clients/page.py "$url" "$chromium" "$work/page.png"
else
    echo "page: skipped, there is no chromium"
fi
kill -TERM "$server"
wait "$server"
