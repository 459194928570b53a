"""Rows with tools, calls, results and thinking: to the checkpoint's own template whole, for our formats an error."""

import json

import pytest

from mini_forge.data.chat import FORMATS
from mini_forge.data.labelled import tokenize_labelled
from mini_forge.data.pairs import tokenize_pairs
from mini_forge.data.tasks import Example, load_examples
from mini_forge.errors import DataError
from mini_forge.training.rollouts import encode_prompts
from tests.test_chat import HARMONY, NO_CUE, marked, template, turns


def test_tool_calls_are_spelled_by_the_checkpoint_and_trained_on(tmp_path):
    source = """{{ tools | tojson }}{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}
{%- if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "é<f>"}]}
    messages = (*turns("u"), call, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "a"})
    chosen = template(tmp_path, special=HARMONY, chat_template=source)
    assert marked(chosen.render(Example(messages, tools=({"x": 1},)))) == (
        '[{"x": 1}]<|start|>user\nu<|end|>\n<|start|>assistant\n⟦[{"name": "é<f>"}]<|end|>⟧\n<|start|>tool\n7<|end|>\n'
        "<|start|>assistant\n⟦a<|end|>⟧"
    )


# As other families have it: the calls stand where content is null, arguments are text, results share a turn.
NULLS = """{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.content is none %}
{%- for call in m.tool_calls %}{{ call.function.name + call.function.arguments }}{% endfor %}
{%- else %}{{ m.content }}{% endif %}{{ '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
# What a table makes of a row: every key in every message; keys that are asked for with `in`.
KEYS = """{% for m in messages %}{{ '<|start|>' + m.role }}{% if 'thinking' in m %}{{ '!' + m.thinking }}{% endif %}
{%- if 'content' in m and '<|channel|>' in m.content %}{{ raise_exception('no channels') }}{% endif %}
{%- if 'tool_calls' in m %}{{ '<|message|>' + m.tool_calls[0].function.arguments | tojson }}
{%- else %}{{ '<|message|>' + m.content }}{% endif %}{{ '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""


@pytest.mark.parametrize(
    ("source", "content", "arguments", "text"),
    [
        (NULLS, None, '{"x": 1}', '<|start|>assistant\n⟦f{"x": 1}<|end|>⟧\n<|start|>tool\n7<|end|>\n'),
        (KEYS, None, {"x": 1}, '<|start|>assistant⟦<|message|>{"x": 1}<|end|>⟧<|start|>tool<|message|>7<|end|>'),
        (KEYS, "", '"é"', '<|start|>assistant⟦<|message|>"\\"é\\""<|end|>⟧<|start|>tool<|message|>7<|end|>'),
        (KEYS, "", {}, "<|start|>assistant⟦<|message|>{}<|end|>⟧<|start|>tool<|message|>7<|end|>"),
    ],
)
def test_nulls_of_a_table_are_absent_keys(source, content, arguments, text, tmp_path):
    nulls = {"tool_calls": None, "thinking": None, "reasoning_content": None, "name": None}
    call = {"function": {"name": "f", "arguments": arguments}}
    messages = (
        {**turns("u")[0], **nulls, "tool_calls": []},
        {"role": "assistant", **nulls, "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "7", **nulls},
        {"role": "assistant", "content": "a", **nulls},
    )
    chosen = template(tmp_path, special=HARMONY, chat_template=source)
    assert text in marked(chosen.render(Example(messages))) and messages[1]["content"] is content


# Trims what is said, and forgets the thinking before a call once an answer follows.
TRIMS = """{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.tool_calls %}
{{- m.thinking if messages[-1].role != 'assistant' or loop.last }}{{ m.tool_calls[0].arguments | tojson }}
{%- else %}{{ m.content | trim }}{% endif %}{{ '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""


def test_a_turn_behind_forgotten_thinking_is_trained_on_from_its_generation_prompt(tmp_path):
    call = {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [{"name": "f", "arguments": {}}]}
    messages = (*turns("u"), call, {"role": "tool", "content": " 7 \n"}, {"role": "assistant", "content": "a\n"})
    chosen = template(tmp_path, special=HARMONY, chat_template=TRIMS)
    assert marked(chosen.render(Example(messages))) == (
        "<|start|>user\nu<|end|>\n<|start|>assistant\n⟦{}<|end|>⟧\n<|start|>tool\n7<|end|>\n"
        "<|start|>assistant\n⟦a<|end|>⟧"
    )
    assert "⟦hm{}<|end|>⟧" in marked(chosen.render(Example(messages[:2])))


# Another end token behind the last turn.
ENDS = """{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' }}{% if m.tool_calls %}
{{- '[' + m.tool_calls[0].arguments | tojson + ']' }}{% else %}{{ m.content }}{% endif %}
{{- '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% endif %}"""


def test_a_call_ends_in_the_end_token_that_its_place_gives_it(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    messages = (*turns("u"), call, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "a"})
    chosen = template(tmp_path, special=HARMONY, chat_template=ENDS)
    assert marked(chosen.render(Example(messages))).partition("assistant")[2] == (
        '<|message|>⟦[{"x": 1}]<|end|>⟧<|start|>tool<|message|>7<|end|><|start|>assistant<|message|>⟦a<|return|>⟧'
    )
    assert marked(chosen.render(Example(messages[:2]))).endswith('⟦[{"x": 1}]<|return|>⟧')


def test_a_call_that_is_closed_otherwise_in_the_past_is_an_error_of_the_row(tmp_path):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    messages = (*turns("u"), call, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "a"})
    source = ENDS.replace("']'", "(')' if loop.last else ']')")
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*cannot tell where the response messages\[1\]"):
        template(tmp_path, special=HARMONY, chat_template=source).render(Example(messages, line=3, file="rows.jsonl"))


@pytest.mark.parametrize("calls", [["f"], {"function": "f"}, [{"function": {"name": "f", "arguments": 3}}]])
def test_malformed_tool_calls_are_an_error_of_the_row(calls, tmp_path):
    messages = (*turns("u"), {"role": "assistant", "content": "a", "tool_calls": calls})
    chosen = template(tmp_path, special=HARMONY, chat_template=NO_CUE)
    with pytest.raises(DataError, match="rows.jsonl:3: .*tool_calls must be a list of"):
        chosen.render(Example(messages, line=3, file="rows.jsonl"))


# Repeats the call before its result.
ECHOES = """{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% for call in m.tool_calls or [] %}
{{- call.arguments | tojson }}{% endfor %}{% if m.role == 'tool' %}
{{- messages[loop.index0 - 1].tool_calls[-1].arguments | tojson + '<|end|>\n' }}{% endif %}
{{- m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""


@pytest.mark.parametrize("source", [NO_CUE, ECHOES])
def test_a_tool_call_that_cannot_be_found_is_an_error_of_the_row(source, tmp_path):
    call = {"name": "f", "arguments": {"x": 1}}
    messages = (*turns("u"), {"role": "assistant", "content": "", "tool_calls": [call]})
    messages = (*messages, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "a"})
    with pytest.raises(DataError, match=r"rows.jsonl:3: .*it leaves out a tool call of messages\[1\]"):
        template(tmp_path, special=HARMONY, chat_template=source).render(Example(messages, line=3, file="rows.jsonl"))


@pytest.mark.parametrize("name", [*FORMATS, None])
@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"tools": [{"function": {"name": "f"}}]}, "the row has tools"),
        ({"tool_calls": [{"function": {"name": "f"}}]}, "tool_calls"),
        ({"role": "tool"}, "role tool"),
        ({"thinking": "hm"}, "thinking in a key of its own"),
        ({"reasoning_content": "hm"}, "thinking in a key of its own"),
    ],
)
def test_our_own_formats_refuse_what_they_have_no_place_for(name, row, what, tmp_path):
    messages = [dict(message) for message in turns("u", "a", "v", "b")]
    messages[1] |= {key: value for key, value in row.items() if key != "tools"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "tools": row.get("tools")}) + "\n")
    (example,) = load_examples(tmp_path / "rows.jsonl", "text-generation")
    with pytest.raises(DataError, match=f'rows.jsonl:1: .*{what}.* use chat_template "model"'):
        template(tmp_path, name).render(example)


# What asks for thinking, and what asks for none; the last response may have some of its own.
THINKS = """{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}
{%- if m.reasoning_content and loop.last %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}
{%- if m.tool_calls %}{{ '<tool>' + m.tool_calls[0].arguments | tojson }}{% else %}{{ m.content }}{% endif %}
{{- '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' + CUE }}{% endif %}"""
CUES = {"thinking": "'<think>\n'", "none": "'<think>\n\n</think>\n\n'"}


@pytest.mark.parametrize("cue", CUES)
@pytest.mark.parametrize(("said", "text"), [
    ({"content": "", "tool_calls": [{"name": "f", "arguments": {}}]}, "assistant\n⟦<tool>{}<|end|>⟧"),
    ({"content": "a", "reasoning_content": "hm"}, "assistant\n⟦<think>\nhm\n</think>\n\na<|end|>⟧"),
    ({"content": "<th", "reasoning_content": ""}, "assistant\n⟦<th<|end|>⟧"),
], ids=["call", "thought", "neither"])  # fmt: skip
def test_what_follows_the_part_of_the_cue_that_is_there_is_trained_on(tmp_path, cue, said, text):
    chosen = template(tmp_path, special=HARMONY, chat_template=THINKS.replace("CUE", CUES[cue]))
    spelled = marked(chosen.render(Example((*turns("u"), {"role": "assistant", **said}))))
    if cue == "thinking" and "reasoning_content" in said and said["reasoning_content"]:
        text = text.replace("⟦<think>\n", "<think>\n⟦")  # all of the cue is there
    assert spelled == "<|start|>user\nu<|end|>\n<|start|>" + text


@pytest.mark.parametrize("header", ["[|assistant|]", "### assistant:", "<|assistant|>", "assistant\n", "ASSISTANT: "])
@pytest.mark.parametrize("cue", ["<thought>\n", "<think>\n\n</think>\n\n", "Thinking: "])
@pytest.mark.parametrize("said", ["<tool>", "<th", "Then", "I"])
def test_no_header_is_cut_in_two(tmp_path, header, cue, said):
    """Whatever a cue and a tool call begin with alike."""
    source = """{% for m in messages %}{% if m.role == 'assistant' %}{{ HEADER }}{% else %}{{ '[|user|]' }}{% endif %}
{%- if m.tool_calls %}{{ m.tool_calls[0].name + m.tool_calls[0].arguments | tojson }}{% endif %}
{{- m.content + '[|end|]\n' }}{% endfor %}{% if add_generation_prompt %}{{ HEADER + CUE }}{% endif %}"""
    source = source.replace("HEADER", repr(header)).replace("CUE", repr(cue))
    chosen = template(tmp_path, special=("<|endoftext|>", "[|end|]"), chat_template=source)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": said, "arguments": {}}]}
    spelled = marked(chosen.render(Example((*turns("u"), call))))
    assert spelled == f"[|user|]u[|end|]\n{header}⟦{said}{{}}[|end|]⟧"


def test_a_first_turn_of_the_assistant_has_its_header_before_it(tmp_path):
    """Also where the generation prompt is spelled behind a message alone."""
    source = """{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}{% endfor %}"""
    chosen = template(tmp_path, special=HARMONY, chat_template=source)
    said = [{"role": "assistant", "content": "hello"}, *turns("u", "a")]
    assert marked(chosen.render(Example(tuple(said)))) == (
        "<|start|>assistant\n⟦hello<|end|>⟧\n<|start|>user\nu<|end|>\n<|start|>assistant\n⟦a<|end|>⟧"
    )


def test_the_tools_of_a_pair_and_of_a_labelled_row_are_spelled(tmp_path):
    source = """{{ tools | tojson }}{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
    chosen = template(tmp_path, special=HARMONY, chat_template=source)
    tokenizer = chosen._tokenizer
    row = {"prompt": "p", "chosen": "c", "rejected": "r", "completion": "c", "label": True, "tools": [{"x": 1}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")

    def rows(**options):
        return load_examples(tmp_path / "rows.jsonl", "text-generation", **options)

    pairs, _ = tokenize_pairs(rows(strategy="dpo"), chosen, tokenizer)
    [labelled], _ = tokenize_labelled(rows(strategy="dpo", is_labelled=True), chosen, tokenizer)
    prompts, _ = encode_prompts(rows(strategy="rlhf", needs_pairs=False), {1: row}, chosen, tokenizer, 99)
    for ids in (*(side.ids for side in pairs[0].sides), labelled.ids, prompts[0].ids):
        assert tokenizer.decode(list(ids), skip_special=False).startswith('[{"x": 1}]<|start|>user')
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "tools": "f"}) + "\n")
    with pytest.raises(DataError, match="rows.jsonl:1: tools must be a list of objects, is a string"):
        rows(strategy="dpo")
