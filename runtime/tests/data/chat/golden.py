"""Renders the templates of this folder with Jinja2, set up as transformers does (utils/chat_template_utils.py), and writes golden.json.

python3 golden.py      needs jinja2
"""

import json
import pathlib

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """`{% generation %}`: the body as it is."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def refuse(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
environment.filters["tojson"] = tojson
environment.globals["raise_exception"] = refuse


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "It's <hot> & \"dry\" in Séville", "parameters": {"z": [], "a": {}, "m": [1.5, None, True]}},
}
CONVERSATIONS = [
    [user("Hello, how are you?")],
    [user("Hi"), assistant("Hello!"), user("2+2?"), assistant("4"), user("Thanks")],
    [user("Tell me a joke."), assistant(" leading space\nand newline\n"), user("Größer & <s> 'x' \"y\".")],
    [system("  You are a helpful assistant.\n"), user("Who are you?")],
    [user("one"), user("two")],
    [assistant("first")],
    [{"role": "tool", "content": "42"}],
    [user("a"), {"role": "comment", "content": "unseen"}, assistant("<think>\nhm</think>b"), {"role": "stop", "content": ""}, user("c")],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "ada lovelace"}],
]

cases = []
here = pathlib.Path(__file__).parent
for path in sorted(here.glob("*.jinja")):
    template = environment.from_string(path.read_text())
    for messages in CONVERSATIONS:
        for prompt, tools in [(False, None), (True, [TOOL])]:
            case = {"template": path.name, "messages": messages, "add_generation_prompt": prompt, "tools": tools}
            try:
                case["text"] = template.render(
                    messages=messages, add_generation_prompt=prompt, tools=tools, documents=None, bos_token="<s>", eos_token="</s>"
                )
            except jinja2.exceptions.TemplateError as error:
                case["refused"] = str(error)
            except TypeError:
                continue  # a template that cannot take this form of message
            cases.append(case)
(here / "golden.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
print(len(cases), "cases")
