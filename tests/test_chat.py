import json
from datetime import datetime

import pytest

from mini_forge.data import sandbox
from mini_forge.data.batches import encode_rows
from mini_forge.data.chat import FORMATS, choose_template
from mini_forge.data.tasks import Example, Pair, load_examples
from mini_forge.errors import CheckpointError, DataError
from mini_forge.training.rollouts import encode_prompts
from tests import toy_tokenizer

QA = "extractive-question-answering"
BARE = str.maketrans("", "", "⟦⟧")
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HARMONY = ("<|endoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|return|>")


def turns(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return (*([{"role": "system", "content": system}] if system else []), *messages)


def marked(rendered):
    """The text with its trained spans in brackets."""
    text = rendered.text
    for start, end in sorted(rendered.trained, reverse=True):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def template(folder, name=None, task="text-generation", model="some/model", **options):
    return choose_template(name, model, toy_tokenizer.byte_level(folder, **options), task)


def spell(folder, source, messages, special=HARMONY, **options):
    """A checkpoint's own template on one conversation."""
    chosen = template(folder, special=special, chat_template=source, **options)
    example = Example(messages, line=7, file="rows.jsonl")
    rendered = chosen.render(example)
    assert rendered.text.startswith(rendered.prompt) and chosen.render_prompt(example) == rendered.prompt
    if not any("think" in str(m["content"]) for m in messages):
        assert chosen.render_prompt(messages[:-1]) == rendered.prompt  # what generation will see is what was trained on
    return marked(rendered)


# --- the formats of the configuration document -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        (
            "harmony",
            turns("u", "a", system="s"),
            "<|start|>developer<|message|>s<|end|><|start|>user<|message|>u<|end|>"
            "<|start|>assistant<|message|>⟦a<|end|>⟧",
        ),
        (
            "harmony",
            turns("u", "a", "v", "b"),
            "<|start|>user<|message|>u<|end|><|start|>assistant<|message|>⟦a<|end|>⟧"
            "<|start|>user<|message|>v<|end|><|start|>assistant<|message|>⟦b<|end|>⟧",
        ),
        (
            "chatml",
            turns("u\n", " a", "v", "b\n", system="s"),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu\n<|im_end|>\n<|im_start|>assistant\n⟦ a<|im_end|>⟧\n"
            "<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n⟦b\n<|im_end|>⟧",
        ),
        ("chatml", turns("u", "a"), "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧"),
        ("llama", turns("u", "a", system="s"), "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu [/INST]⟦ a </s>⟧"),
        ("llama", turns("u", "a", "v", "b"), "<s>[INST] u [/INST]⟦ a </s>⟧<s>[INST] v [/INST]⟦ b </s>⟧"),
    ],
)
@pytest.mark.parametrize("special", [("<|endoftext|>", "<|im_start|>", "<|im_end|>"), (*HARMONY, "<s>", "</s>")])
def test_formats_are_spelled_as_the_document_says(name, messages, text, special, tmp_path):
    chosen = template(tmp_path, name, special=special)
    rendered = chosen.render(Example(messages))
    assert marked(rendered) == text
    assert rendered.prompt == chosen.render_prompt(messages[:-1]) == text[: text.rindex("⟦")].translate(BARE)


def test_the_llama_format_keeps_every_system_message_or_says_that_it_cannot(tmp_path):
    chosen = template(tmp_path, "llama")
    system, developer = ({"role": role, "content": role[0]} for role in ("system", "developer"))
    text = chosen.render(Example((system, developer, *turns("u", "a")))).text
    assert text == "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\n<<SYS>>\nd\n<</SYS>>\n\nu [/INST] a </s>"
    user, assistant = turns("u", "a")
    with pytest.raises(DataError, match="a system message must stand before a user's"):
        chosen.render(Example((user, system, assistant)))


@pytest.mark.parametrize(
    ("task", "row", "text"),
    [
        ("text-generation", {"input": "u", "output": "a"}, "USER: u\nASSISTANT:⟦ a<|im_end|>⟧"),
        (
            "text-generation",
            {"messages": list(turns("u", "a", "v", "b", system="s"))},
            "s\n\nUSER: u\nASSISTANT:⟦ a<|im_end|>⟧\nUSER: v\nASSISTANT:⟦ b<|im_end|>⟧",
        ),
        ("text-generation", {"text": "once"}, "⟦once<|im_end|>⟧"),
        (
            "summarization",
            {"document": "d", "summary": "a"},
            "Summarize the following document:\nd\n\nSummary:\n⟦a<|im_end|>⟧",
        ),
        (QA, {"context": "a", "question": "q", "answer": "a"}, "Context: a\n\nQuestion: q\n\nAnswer:⟦ a<|im_end|>⟧"),
    ],
)
def test_without_a_template_of_its_own_a_task_has_its_plain_prompt(task, row, text, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (example,) = load_examples(tmp_path / "rows.jsonl", task)
    chosen = template(tmp_path, None, task)
    assert chosen.name == "plain" and marked(chosen.render(example)) == text


def test_under_a_chat_template_a_tasks_prompt_is_the_user_turn_without_the_cue(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"document": "d", "summary": "a"}')
    rendered = template(tmp_path, "chatml", "summarization").render(
        *load_examples(tmp_path / "rows.jsonl", "summarization")
    )
    assert "user\nSummarize the following document:\nd<|im_end|>" in rendered.text


def test_the_configured_system_prompt_yields_to_the_rows_own(tmp_path):
    chosen = template(tmp_path, "chatml")
    assert "system\nmine<|im_end|>" in chosen.render(Example(turns("u", "a")), "mine").text
    assert "mine" not in chosen.render(Example(turns("u", "a", system="own")), "mine").text
    assert "system" not in chosen.render(Example(turns("u", "a")), "").text
    assert chosen.render_prompt(turns("u"), "mine") == chosen.render(Example(turns("u", "a")), "mine").prompt


@pytest.mark.parametrize("name", [*FORMATS, None])
def test_bos_stands_once_before_every_text_of_a_tokenizer_that_adds_one(name, tmp_path):
    tokenizer = toy_tokenizer.pieces(tmp_path)
    chosen = choose_template(name, "m", tokenizer, "text-generation")
    for example in (Example(turns("u", "a")), Example(text="t"), Example(text="<s>t</s>")):
        ids = tokenizer.encode(chosen.render(example).text)
        assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert template(tmp_path / "b", name, bos_token="<|im_start|>").render(Example(text="t")).text == "t<|im_end|>"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("openai/gpt-oss-20b", "harmony"),
        ("openai/another", "harmony"),
        ("unsloth/GPT-OSS-20b", "harmony"),
        ("Qwen/Qwen3-8B", "chatml"),
        ("meta-Llama/x", "llama"),
        ("mistralai/x", "llama"),
        ("tiiuae/falcon", "chatml"),
    ],
)
def test_auto_goes_by_the_models_name_and_says_what_the_tokenizer_lacks(model, name, tmp_path):
    chosen = template(tmp_path, "auto", model=model, special=("<|endoftext|>",))
    assert chosen.name == name and model in chosen.notes[0]
    assert "the tokenizer has no token" in chosen.notes[1]
    assert not any("no token" in note for note in template(tmp_path / "b", "chatml").notes)


def test_of_a_folder_on_this_machine_only_its_own_name_counts(tmp_path):
    folder = tmp_path / "openai" / "my-qwen"
    assert template(folder, "auto", model=str(folder)).name == "chatml"


def test_what_a_tokenizer_cannot_do_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no chat template of its own"):
        template(tmp_path, "model")
    with pytest.raises(CheckpointError, match=r"does not compile: .*line 1"):
        template(tmp_path, chat_template="{% for %}")
    for own in (None, NO_END):
        with pytest.raises(CheckpointError, match="nothing to end a response with"):
            template(tmp_path, eos_token=None, chat_template=own)
    calls = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "", "tool_calls": [{}]})
    with pytest.raises(DataError, match='rows.jsonl:3: the chatml chat template: .*use chat_template "model"'):
        template(tmp_path, "chatml").render(Example(calls, line=3, file="rows.jsonl"))


# --- checkpoints' own templates, in the shapes that published ones have ----------------------------------------------

HEADERS = """{%- for m in messages %}
{{- '<|start|>' + m['role'] + '<|message|>\n\n' + m['content'] | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|message|>\n\n' }}{% endif %}
"""
# thinking: only the turn after the last question keeps it, and that turn always has a block for it
THINKING = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content %}{% set thought = m.reasoning_content or '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if m.role == 'assistant' and loop.index0 > ns.last %}
{%- set content = '<think>\n' + thought + '\n</think>\n\n' + content %}
{%- endif %}
{{- '<|start|>' + m.role + '\n' + content + '<|end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"""
# asks for an answer without thinking
BRIEF = THINKING.removesuffix("'<|start|>assistant\n' }}{% endif %}") + (
    "'<|start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
# a channel the model writes itself, and another end token for the last response
CHANNELS = """{%- for m in messages %}{{ '<|start|>' + m.role }}
{%- if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}{{ '<|message|>' + m.content }}
{{- '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
# prompts for thinking, never keeps it
FORGETFUL = """{% for m in messages %}{% if m.role == 'user' %}{{ '<|start|>' + m.content }}{% else %}
{{- '<|message|>' + m.content.split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|message|><think>\n' }}{% endif %}"""
STRICT = """{{ bos_token }}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if loop.index0 == 0 and messages | length < 2 %}{{ raise_exception('an answer must follow') }}{% endif %}
{{- '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"""
NO_END = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
OPEN = """{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}
{{- '<think></think>' }}{% endif %}{{ m.content }}{% endfor %}{{ '<|start|>assistant\n' if add_generation_prompt }}"""
NO_CUE = "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "messages", "text"),
    [
        (
            HEADERS,
            turns("u", " a\n"),
            "<|start|>user<|message|>\n\nu<|end|><|start|>assistant<|message|>\n\n⟦a<|end|>⟧",
        ),
        (
            "{% for m in messages %}{{ '<|start|>' + m.role + '\n' }}{% generation %}{{ m.content + '<|end|>\n' }}"
            "{% endgeneration %}{% endfor %}{{ '<|start|>assistant\n' if add_generation_prompt }}",
            turns("u", "a"),
            "<|start|>user\nu<|end|>\n<|start|>assistant\n⟦a<|end|>⟧",
        ),
        (
            THINKING,
            turns("u", "a", "v", "b"),
            "<|start|>user\nu<|end|>\n<|start|>assistant\n⟦a<|end|>⟧\n<|start|>user\nv<|end|>\n"
            "<|start|>assistant\n⟦<think>\n\n</think>\n\nb<|end|>⟧",
        ),
        (
            THINKING,
            turns("u", "<think>\nx\n</think>\n\na", "v", "<think>\ny\n</think>\n\nb"),
            "<|start|>user\nu<|end|>\n<|start|>assistant\n⟦a<|end|>⟧\n<|start|>user\nv<|end|>\n"
            "<|start|>assistant\n⟦<think>\ny\n</think>\n\nb<|end|>⟧",
        ),
        (
            THINKING,
            (turns("u")[0], {"role": "assistant", "content": "a", "thinking": "x"}),
            "<|start|>user\nu<|end|>\n<|start|>assistant\n⟦<think>\nx\n</think>\n\na<|end|>⟧",
        ),
        (
            BRIEF,
            turns("u", "a", "v", "b"),
            "<|start|>user\nu<|end|>\n<|start|>assistant\n⟦a<|end|>⟧\n<|start|>user\nv<|end|>\n"
            "<|start|>assistant\n<think>\n\n</think>\n\n⟦b<|end|>⟧",
        ),
        (
            BRIEF,
            turns("u", "<think>\nx\n</think>\n\na"),
            "<|start|>user\nu<|end|>\n<|start|>assistant\n<think>\n⟦x\n</think>\n\na<|end|>⟧",
        ),
        (
            CHANNELS,
            turns("u", "a", "v", "b"),
            "<|start|>user<|message|>u<|end|><|start|>assistant⟦<|channel|>final<|message|>a<|end|>⟧"
            "<|start|>user<|message|>v<|end|><|start|>assistant⟦<|channel|>final<|message|>b<|return|>⟧",
        ),
        (FORGETFUL, turns("u", "<b>", "v", "b"), "<|start|>u<|message|>⟦<b><|end|>⟧<|start|>v<|message|>⟦b<|end|>⟧"),
        (STRICT, turns("u", "a", "v", "b"), "[INST] u [/INST]⟦ a<|return|>⟧[INST] v [/INST]⟦ b<|return|>⟧"),
        (NO_END, turns("u", "a", "v", "b"), "user: u\nassistant:⟦ a⟧\nuser: v\nassistant:⟦ b<|return|>⟧"),
        (
            OPEN,
            turns("u", "a", "v", "b"),
            "<|start|>user\nu<|start|>assistant\n⟦a⟧<|start|>user\nv<|start|>assistant\n⟦<think></think>b<|return|>⟧",
        ),
        (NO_CUE, turns("u", "a"), "<|start|>user\nu<|end|>\n<|start|>assistant\n⟦a<|end|>⟧"),
    ],
)
def test_responses_are_found_in_a_checkpoints_own_template(source, messages, text, tmp_path):
    if source == STRICT:  # its own prompt, which it refuses to spell alone, is not asked for
        chosen = template(tmp_path, special=HARMONY, chat_template=source)
        assert marked(chosen.render(Example(messages))) == text
    else:
        assert spell(tmp_path, source, messages) == text


def test_what_a_template_writes_into_responses_is_said(tmp_path):
    def notes(source):
        return template(tmp_path, special=HARMONY, chat_template=source).notes

    assert notes(HEADERS) == notes(NO_END) == []
    assert notes(THINKING) == [
        "the chat template begins the last response with '<think>\\n\\n</think>\\n\\n', which is trained on; "
        "those before it have none"
    ]
    assert notes(CHANNELS) == [
        "the chat template begins the last response with '<|channel|>final<|message|>', which is trained on; "
        "those before it too"
    ]
    assert not any("begins the last response" in note for note in notes(BRIEF))  # its prompt has the block


def test_a_template_that_hides_or_refuses_a_response_is_an_error_naming_the_row(tmp_path):
    hides = "{% for m in messages %}{{ m.role }}{% endfor %}"
    with pytest.raises(DataError, match="rows.jsonl:7: the model chat template: it leaves out the content"):
        spell(tmp_path, hides, turns("u", "a"))
    with pytest.raises(DataError, match=r"rows.jsonl:7: .*roles must alternate \(line 2 of the template\)"):
        spell(tmp_path, STRICT, turns("u", "a", system="s"))
    with pytest.raises(DataError, match="roles must alternate"):
        template(tmp_path, special=HARMONY, chat_template=STRICT).render_prompt(turns("u", system="s"))


def test_a_template_that_does_not_end_is_asked_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "LIMIT_SECONDS", 0.2)
    with pytest.raises(
        CheckpointError, match=r"chat template: stopped: it ran longer than 0.2 s \(line 1 .*; set chat"
    ):
        template(tmp_path, special=HARMONY, chat_template=ENDLESS)
    on_long_rows = (
        "{% for m in messages %}{% if m.content == 'long' %}"
        + ENDLESS
        + "{% endif %}<|start|>{{ m.content }}<|end|>{% endfor %}"
    )
    chosen = template(tmp_path, special=HARMONY, chat_template=on_long_rows)
    rows, asked = (Example(turns("long", "x"), line=line, file="rows.jsonl") for line in (1, 2)), []

    def render(row):
        asked.append(row.line)
        return [chosen.render(row)]

    with pytest.raises(CheckpointError, match=r"rows.jsonl:1: .* chat template: stopped: it ran longer than 0.2 s"):
        list(encode_rows(rows, render, toy_tokenizer.byte_level(tmp_path)))
    assert asked == [1]


def test_where_a_template_does_not_end_is_told(tmp_path, monkeypatch):
    """After a conversation of more than two turns, and where it is asked what it begins responses with."""
    monkeypatch.setattr(sandbox, "LIMIT_SECONDS", 0.2)
    turn = "<|start|>{% if m.role == 'assistant' %}OPENING{% endif %}{{ m.content }}<|end|>"
    turns_and_cue = "{% for m in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}<|start|>{% endif %}"
    source = turns_and_cue + "{% if messages | length > 2 %}" + ENDLESS + "{% endif %}"
    where = r"the .* chat template: stopped: it ran longer than 0.2 s \(line 1 of the template\); set chat_template"
    with pytest.raises(CheckpointError, match=rf"{tmp_path}.*: {where}"):
        template(tmp_path, special=HARMONY, chat_template=source)
    chosen = template(tmp_path, special=HARMONY, chat_template=source.replace("OPENING", ""))
    with pytest.raises(CheckpointError, match=where):
        chosen.render_prompt(turns("a", "b", "c"))
    tokenizer = toy_tokenizer.byte_level(tmp_path)
    pair = Pair(turns("a", "b", "c"), line=7, file="rows.jsonl")
    with pytest.raises(CheckpointError, match=rf"rows.jsonl:7: .*{where}"):
        encode_prompts([pair], {7: {}}, chosen, tokenizer, 100)


def test_stop_ids_are_the_checkpoints_eos_and_the_templates_end_token(tmp_path):
    for source, end in ((HEADERS, "<|end|>"), (CHANNELS, "<|return|>"), (NO_END, None)):
        chosen = template(tmp_path, special=HARMONY, chat_template=source, eos_token="<|endoftext|>")
        tokenizer = toy_tokenizer.byte_level(tmp_path, special=HARMONY, eos_token="<|endoftext|>")
        assert chosen.stop_ids(tokenizer) == [0, *([tokenizer.token_id(end)] if end else [])]


def test_the_answer_of_a_generation_is_without_what_templates_put_around_it(tmp_path):
    channels = template(tmp_path, special=HARMONY, chat_template=CHANNELS)
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|> a <|return|>"
    assert channels.answer(thought) == channels.answer("<|channel|>final<|message|>a") == "a"
    thinking = template(tmp_path, special=HARMONY, chat_template=THINKING)
    assert thinking.answer("<think>\nx\n</think>\n\na<|end|>\n<|start|>") == "a"
    spelled = template(tmp_path, "llama", special=("<|endoftext|>",))
    assert spelled.answer(" a </s> and more") == "a"


def test_a_date_is_that_of_the_template_not_of_the_moment(tmp_path):
    tokenizer = toy_tokenizer.byte_level(tmp_path, chat_template="{{ strftime_now('%d %b %Y') }}" + NO_CUE)
    chosen = choose_template(None, "m", tokenizer, "text-generation", today=datetime(2024, 7, 26))
    assert chosen.render_prompt(turns("u")).startswith("26 Jul 2024<|start|>user")
