"""Real clients against a running server: OpenAI's and Mistral's own libraries.

usage: check.py URL    (of `serve`, for a chat model made of examples/numerals; see run.sh)

Every check compares with what the model is known to say; the first that fails ends the program with a traceback.
"""
import base64
import json
import math
import struct
import sys

import openai
from mistralai.client import Mistral

URL = sys.argv[1].rstrip("/")
RIGHT = "mille neuf cent quatre-vingt-sept"
ASK = [{"role": "user", "content": "fr 1987 ="}]
client = openai.OpenAI(base_url=URL + "/v1", api_key="unused", max_retries=0)
model = client.models.list().data[0].id


def check(what, found, expected):
    assert found == expected, f"{what}: found {found!r}, expected {expected!r}"


# OpenAI: models, chats whole and streamed, completions, probabilities.
check("model", client.models.retrieve(model).id, model)
answer = client.chat.completions.create(model=model, messages=ASK, temperature=0, max_completion_tokens=50)
check("chat", answer.choices[0].message.content, RIGHT)
check("finish", answer.choices[0].finish_reason, "stop")
check("usage", answer.usage.total_tokens, answer.usage.prompt_tokens + answer.usage.completion_tokens)
stream = client.chat.completions.create(
    model=model, messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
check("streamed", "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), RIGHT)
check("streamed usage", chunks[-1].usage.total_tokens, answer.usage.total_tokens)
# A conversation goes on with the library's own objects.
more = [*ASK, answer.choices[0].message, {"role": "user", "content": "it 42 ="}]
again = client.chat.completions.create(model=model, messages=more, temperature=0)
check("second turn", again.choices[0].message.content, "quarantadue")
text = client.completions.create(model=model, prompt=["fr 1987 =", "it 42 ="], temperature=0, max_tokens=50, logprobs=1)
check("completions", [c.text.strip() for c in text.choices], [RIGHT, "quarantadue"])
check("probabilities", len(text.choices[0].logprobs.tokens), len(text.choices[0].logprobs.token_logprobs))
both = client.chat.completions.create(model=model, messages=ASK, temperature=0, n=2, logprobs=True, top_logprobs=3)
check("two answers", [c.message.content for c in both.choices], [RIGHT] * 2)
check("alternatives", len(both.choices[0].logprobs.content[0].top_logprobs), 3)

# An answer of a given form.
schema = {
    "type": "object",
    "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 999}, "even": {"type": "boolean"}},
    "required": ["number", "even"],
    "additionalProperties": False,
}
for seed in range(20):
    formed = client.chat.completions.create(
        model=model,
        messages=ASK,
        temperature=1,
        seed=seed,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
    )
    value = json.loads(formed.choices[0].message.content)
    assert set(value) == {"number", "even"} and 0 <= value["number"] <= 999 and isinstance(value["even"], bool), value

# Vectors: the library asks for base64 unless told otherwise.
vectors = client.embeddings.create(model=model, input=["fr 1987 =", "it 42 ="])
plain = client.embeddings.create(model=model, input="fr 1987 =", encoding_format="float")
check("vectors", len(vectors.data), 2)
check("the same vector", vectors.data[0].embedding, plain.data[0].embedding)
assert math.isclose(sum(x * x for x in plain.data[0].embedding), 1, rel_tol=1e-5)
raw = client.embeddings.create(model=model, input="fr 1987 =", encoding_format="base64").data[0].embedding
raw = base64.b64decode(raw) if isinstance(raw, str) else struct.pack(f"<{len(raw)}f", *raw)
check("base64", len(raw), 4 * len(plain.data[0].embedding))

# Errors arrive as the library's own exceptions.
for kind, wrong in [
    (openai.NotFoundError, dict(model="gpt-9", messages=ASK)),
    (openai.BadRequestError, dict(model=model, messages=[])),
    (openai.BadRequestError, dict(model=model, messages=ASK, store=True)),
    (openai.BadRequestError, dict(model=model, messages=[{"role": "user", "content": "1" * 500}])),
]:
    try:
        client.chat.completions.create(**wrong)
    except kind as error:
        assert error.body["message"] and error.body["type"], error
    else:
        raise AssertionError(f"no error for {wrong}")

# Mistral.
with Mistral(api_key="unused", server_url=URL) as mistral:
    answer = mistral.chat.complete(model=model, messages=ASK, temperature=0, random_seed=1)
    check("mistral", answer.choices[0].message.content, RIGHT)
    pieces = [event.data.choices[0].delta.content or "" for event in mistral.chat.stream(model=model, messages=ASK, temperature=0)]
    check("mistral streamed", "".join(pieces), RIGHT)
    vector = mistral.embeddings.create(model=model, inputs=["fr 1987 ="]).data[0].embedding
    check("mistral vector", vector, plain.data[0].embedding)
    check("mistral models", mistral.models.list().data[0].id, model)

print("ok: the clients of OpenAI and Mistral get what the model says")
