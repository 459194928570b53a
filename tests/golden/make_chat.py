"""Golden renderings: what transformers' `apply_chat_template` makes of conversations, into chat.json.

The families' templates mark what the model writes with generation tags: transformers tells where that is, and the
record has the template without the tags, as checkpoints have it. `FEATURES` are single expressions, with what
transformers' environment makes of them.
"""

import json
import re
from datetime import datetime
from pathlib import Path

from chat_templates import GPT_OSS, LLAMA4, QWEN3_CODER, QWEN3_TOOLS, TEMPLATES
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|end|>", "<|return|>")
CHATML = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|header_start|>", "<|header_end|>", "<|python_start|>", "<|python_end|>", "<|begin_of_text|>", "<|eot|>")
FAMILIES = {  # name -> (template, bos, special tokens, of which eos is the last)
    "gpt-oss": (GPT_OSS, None, HARMONY),
    "qwen3": (QWEN3_TOOLS, None, CHATML),
    "qwen3-coder": (QWEN3_CODER, None, CHATML),
    "llama4": (LLAMA4, "<|begin_of_text|>", HEADERS),
}


def turns(*contents: str, system: str | None = None) -> list[dict]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system is not None else []) + messages


CONVERSATIONS = {
    "one turn": turns("What is 2 + 2?", "4"),
    "system, spaces and lines": turns("  Name two\ncolours. ", "red\n\nblue  ", system=" Be brief.\n"),
    "two turns with thinking": turns(
        "Is 7 prime?", "<think>\nno divisor\n</think>\n\nYes.", "And 8?", "<think>\n2·4\n</think>\n\nNo."
    ),
    "markup, quotes and other scripts": turns('<b>"it\'s" & {{ x }}</b>', "日本語 – {% raw %} ü 🙂", system="s"),
}


def call(**arguments) -> dict:
    return {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": arguments}}


def asked(*calls: dict, **others) -> dict:
    return {"role": "assistant", "content": "", "tool_calls": list(calls), **others}


def told(content: str) -> dict:
    return {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": content}


QUESTION, ANSWER = turns("Is it warm in Zürich?", "Yes, 21 °C.")
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": 'a city, as "Zürich"'},
        "days": {"type": "integer", "default": 1},
        "units": {"type": "string", "enum": ["°C", "°F"]},
        "tags": {"type": "array", "items": {"type": ["string", "null"]}},
    },
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "The weather <now>", "parameters": WEATHER}}
]
TALKS = {  # title -> (messages, tools)
    "question": (turns("What is 2 + 2?", "4"), None),
    "system and three turns": (turns(" Red? ", "Yes.\n", "Blue?", "No\n\nno.", "Sure?", "Yes", system="Brief."), None),
    "thinking": (
        [QUESTION, ANSWER | {"thinking": "It is <noon>."}, turns("And Bern?")[0],
         {"role": "assistant", "content": "No.", "reasoning_content": "It is\nnight."}],
        None,
    ),
    "a call, its result and the answer": (
        [QUESTION, asked(call(city="Zürich", tags=["a"]), thinking="I must look."), told('{"°C": 21}'), ANSWER],
        TOOLS,
    ),
    "thinking about a result": (
        [*turns("Be quick", "Yes?", system="Brief."), QUESTION, asked(call(city="Zürich"), thinking="look"), told("21"),
         ANSWER | {"thinking": "21 is warm"}],
        TOOLS,
    ),
    "call after call, without thinking": (
        [QUESTION, asked(call(city="<|z|>")), told("?"), asked(call(city="Zürich", days=2)), told("21"), ANSWER],
        TOOLS,
    ),
    "ends in a call": (
        [*turns("Hi", "Hello"), QUESTION, asked(call(city="Zürich", units="°C"), thinking="look")],
        TOOLS,
    ),
    "calls beside each other": (
        [QUESTION, asked(call(city="Zürich"), call(city='"Bern"')), told("21"), told("19"), ANSWER],
        TOOLS,
    ),
}  # fmt: skip
ONE_CALL_A_TURN = ("gpt-oss",)
NOW = datetime(2025, 8, 5, 12, 30)

FEATURES = [
    "{% for k, v in data | items %}{{ k }}={{ v }};{% endfor %}{{ data is mapping }}{{ data.list is mapping }}",
    "{{ data | tojson }}|{{ data | tojson(indent=2) }}|{{ data | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{{ '<é>' | tojson }}{{ '<é>' | tojson(ensure_ascii=true) }}{{ '<b>' | e }}{{ '<b>' + ('<i>' | safe) }}",
    "{{ '<' ~ ('<i>' | safe) ~ [1] }}{{ ['<', '<i>' | safe] | join }}",
    "{% macro f(x, y='d') %}[{{ x }}{{ y }}{{ varargs }}{{ kwargs }}]{% endmacro %}{{ f(1) }}{{ f(1, 2, 3, z=4) }}",
    "{% macro f(n) -%} {{ n }}{{ f(n - 1) if n }} {%- endmacro %}{{ f(3) | trim }}{{ f(1) | length }}",
    "{% macro f() %}<{{ caller('x') }}>{% endmacro %}{% call(v) f() %}{{ v }}{{ text }}{% endcall %}",
    "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}{{ ns.s }}",
    "{% set n = 0 %}{% for i in range(5) %}{% set n = n + i %}{% endfor %}{{ n }}",
    "{% set ns = namespace() %}{% set ns._hidden = 1 %}{{ ns._hidden }}",
    "{{ namespace(__class__='x') }}",
    "{{ namespace({'a': 1}, b=2).a }}{{ namespace(self=3).self }}",
    "{{ dict(a=1, b='c') }}{{ dict.fromkeys('ab', 0) }}{{ dict([('k', 2)]).k }}",
    "{% for i in range(9) if i != 1 %}{% if i is odd %}{% continue %}{% endif %}{{ i }}{% if i > 5 %}{% break %}"
    "{% endif %}{% endfor %}",
    "{% for i in data.list recursive %}{{ loop(i) if i is sequence and i is not string else i }}{% endfor %}",
    "{% for i in data.list[1:2] recursive %}{{ loop(i) if i is sequence and i is not string else i }}{% endfor %}",
    "{% for i in [1, 2, 3] %}{{ loop.previtem }}{{ i }}{{ loop.nextitem }}{{ loop.cycle('a', 'b') }},{% endfor %}",
    "{% for i in [1, 1, 2] %}{{ loop.changed(i) }}{{ loop.depth }}{{ loop.length }}{{ loop.revindex0 }}{% endfor %}",
    "{% for i in [] %}a{% else %}none{% endfor %}",
    "{% generation %}{% set x = 1 %}{{ x }}{{ text }}{% endgeneration %}{{ x is defined }}",
    "{% for i in [1, 2] %}{% generation %}{{ loop.last }}{% if loop.first %}\nyes{% endif %}{% endgeneration %}"
    "{% endfor %}",
    "{% set ns = namespace(n=0) %}{% generation %}{% set ns.n = 4 %}{% endgeneration %}{{ ns.n }}",
    "{{ strftime_now('%d %B %Y %H:%M') }}",
    "{{ raise_exception('no: ' + text) }}",
    "{{ text.startswith('  a') }}{{ text.strip().endswith(('c', 'd')) }}{{ text.split() }}{{ text.split('b', 1) }}",
    "{{ text.rstrip() }}|{{ text.lstrip('\n ') }}|{{ text.strip('\n') }}|{{ text | trim }}|{{ text.replace('a', '') }}",
    "{{ text.strip().title() }}{{ text.upper() | trim }}{{ text.find('b') }}{{ text.count('a') }}{{ text[::-1] }}",
    "{{ text.splitlines() }}{{ text.partition('b') }}{{ 'ab'.removeprefix('a') }}{{ '-'.join(['a', 'b']) }}",
    "{{ '%s-%02d' | format('a', 3) }}{{ '%s' % text.strip() }}{{ '{}:{x}'.format(1, x=2) }}{{ 'a' ~ 1 ~ none ~ 1.5 }}",
    "{{ data.list[::-1] }}{{ data.list[1:] }}{{ data['n'] }}{{ data.get('m', 'd') }}{{ data.keys() | list }}",
    "{{ data.items() | list }}{{ data.list | map('string') | join(', ') }}{{ data.list | select('string') | list }}",
    "{{ rows | selectattr('role', 'equalto', 'user') | map(attribute='n') | list }}{{ (rows | last).n }}",
    "{{ rows | rejectattr('n') | list | length }}{{ rows | groupby('role') | map('first') | list }}",
    "{{ absent is defined }}{{ absent }}{{ data.absent is defined }}{{ data.absent }}",
    "{{ 'a' if absent }}{{ absent or 'b' }}{{ absent | default('c') }}{{ none | default('d', true) }}{{ x is none }}",
    "{{ absent + 'x' }}",
    "{{ absent.x.y }}",
    "{{ text is string }}{{ data is iterable }}{{ data.list is sequence }}{{ 1 is number }}{{ 'n' in data }}",
    "{{ true is boolean }}{{ true is true }}{{ none is none }}{{ 1 is eq(1) }}{{ 2 is in([1, 2]) }}{{ 4 is ge(2) }}",
    "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}{{ 1 == 1.0 }}{{ not 1 }}{{ [1, 2] + [3] }}{{ '-' * 3 }}{{ '7' | int }}",
    "{%- set block -%}\n  a {{ text | trim }}\n{%- endset -%}{{ block | upper }}{{ block | indent(2) }}",
    "  {% if true %}\n  a\n  {% endif %}\nb\n{# c #}\nd {#- e -#} f\n",
    "{% filter upper %}a{{ text }}{% endfilter %}{% with x = 2 %}{{ x }}{% endwith %}{% raw %}{{ x }}{% endraw %}",
    "{{ [3, 1, 2] | sort | first }}{{ [1, 2, 2] | unique | list }}{{ {'b': 1, 'a': 2} | dictsort }}",
    "{{ data.list.append(1) }}",
    "{{ data.update(x=1) }}",
    "{{ ''.__class__ }}",
    "{% do data.pop('n') %}",
]
VARIABLES = {
    "data": {"é": "<&>", "n": 12345678901, "list": ["a", [1, "b"], None, True, 0.5]},
    "text": "  a b\nc\n ",
    "rows": [{"role": "user", "n": 1}, {"role": "tool", "n": 0}, {"role": "user", "n": 3}],
}


def main(golden: Path):
    chat_template_utils.datetime = type("Clock", (), {"now": staticmethod(lambda: NOW)})
    records = {
        "conversations": CONVERSATIONS,
        "templates": [render_all(name, *rest) for name, rest in TEMPLATES.items()],
        "now": NOW.isoformat(),
        "talks": {title: {"messages": messages, "tools": tools} for title, (messages, tools) in TALKS.items()},
        "families": [render_family(name, *rest) for name, rest in FAMILIES.items()],
        "variables": VARIABLES,
        "features": [{"source": source, "text": evaluate(source)} for source in FEATURES],
    }
    text = json.dumps(records, indent=1, ensure_ascii=False)
    (golden / "chat.json").write_text(text + "\n", encoding="utf-8")
    print(", ".join(f"{len(value)} {key}" for key, value in records.items() if key not in ("now", "variables")))


def evaluate(source: str) -> str | None:
    """What the source spells, None if it fails."""
    try:
        return chat_template_utils._compile_jinja_template(source).render(**VARIABLES)
    except Exception as error:  # any failure at all; ours must be one too
        print(f"fails: {source}: {error}")
        return None


def render_family(name: str, template: str, bos: str | None, special: tuple[str, ...]) -> dict:
    """Per talk `full` and `prompt` as below, and `spans`: what is inside the generation tags, in characters of `full`;
    None for a talk whose second call beside the first the template leaves out."""
    specials = {"eos_token": special[-1]} | ({"bos_token": bos} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **specials)
    untagged = re.sub(r"\s*\{%- (end)?generation -%\}", "", template)
    rendered = {}
    for title, (messages, tools) in TALKS.items():
        if name in ONE_CALL_A_TURN and any(len(message.get("tool_calls", ())) > 1 for message in messages):
            rendered[title] = None
            continue
        options = {"chat_template": untagged, "tokenize": False, "tools": tools}
        full = tokenizer.apply_chat_template(messages, **options)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
        (tagged,), (spans,) = chat_template_utils.render_jinja_template(
            [messages], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **specials
        )
        assert tagged == full, (name, title)
        rendered[title] = {"full": full, "prompt": prompt, "spans": spans}
    return {"name": name, "bos_token": bos, "special": special, "template": untagged, "rendered": rendered}


def render_all(name: str, template: str, bos: str | None, eos: str) -> dict:
    """`full`: the conversation. `prompt`: without its last message, with the generation prompt."""
    specials = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **specials)

    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    rendered = {
        title: {"full": render(messages), "prompt": render(messages[:-1], add_generation_prompt=True)}
        for title, messages in CONVERSATIONS.items()
    }
    return {"name": name, "bos_token": bos, "eos_token": eos, "template": template, "rendered": rendered}
