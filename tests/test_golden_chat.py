"""A checkpoint's own template renders as transformers renders it, and what is trained on is what its tags say."""

import json
import shutil
from datetime import datetime

import pytest

from mini_forge.data.batches import show_example, tokenize
from mini_forge.data.chat import choose_template
from mini_forge.data.sandbox import TemplateFailure, compile_template
from mini_forge.data.tasks import load_examples
from mini_forge.data.tokenizer import load_tokenizer
from mini_forge.errors import DataError
from tests import toy_tokenizer
from tests.golden_files import BASE, chat_renderings

GOLDEN = chat_renderings()
CASES = [(record, title) for record in GOLDEN["templates"] for title in GOLDEN["conversations"]]
TALKS = [(record, title) for record in GOLDEN["families"] for title, golden in record["rendered"].items() if golden]
NOW = datetime.fromisoformat(GOLDEN["now"])
each_family = pytest.mark.parametrize("record", GOLDEN["families"], ids=lambda record: record["name"])
each_case = pytest.mark.parametrize(("record", "title"), CASES, ids=[f"{r['name']}: {title}" for r, title in CASES])
each_talk = pytest.mark.parametrize(("record", "title"), TALKS, ids=[f"{r['name']}: {title}" for r, title in TALKS])


def template_of(record: dict, folder):
    """The template as it is found in a checkpoint: beside its tokenizer, whose special tokens it may name."""
    shutil.copy(BASE / "tokenizer.json", folder)
    specials = {key: record[key] for key in ("bos_token", "eos_token") if record[key] is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))
    (folder / "chat_template.jinja").write_text(record["template"], encoding="utf-8")
    return choose_template(None, str(folder), load_tokenizer(folder), "text-generation")


def family(record: dict, folder):
    """The tokenizer, with the family's special tokens, and the template of one of the families."""
    tokenizer = toy_tokenizer.byte_level(
        folder, tuple(record["special"]), chat_template=record["template"], bos_token=record["bos_token"]
    )
    return tokenizer, choose_template("model", "any", tokenizer, "text-generation", today=NOW)


def examples_of(rows: list[dict], folder, task="text-generation"):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_examples(str(file), task)


@each_case
def test_prompt_is_what_transformers_renders(record, title, tmp_path):
    messages = GOLDEN["conversations"][title][:-1]
    assert template_of(record, tmp_path).render_prompt(messages) == record["rendered"][title]["prompt"]


@each_case
def test_conversation_is_what_transformers_renders(record, title, tmp_path):
    (example,) = examples_of([{"messages": GOLDEN["conversations"][title]}], tmp_path)
    text, full = template_of(record, tmp_path).render(example).text, record["rendered"][title]["full"]
    assert full.startswith(text)
    assert not full[len(text) :].strip()  # what follows the last response's end token is no part of an example


@each_talk
def test_rows_with_tools_and_thinking_are_spelled_and_trained_on_as_transformers_says(record, title, tmp_path):
    golden = record["rendered"][title]
    (example,) = examples_of([GOLDEN["talks"][title]], tmp_path)
    tokenizer, template = family(record, tmp_path)
    rendered = template.render(example)
    assert golden["full"].startswith(rendered.text) and not golden["full"][len(rendered.text) :].strip()
    assert [list(span) for span in rendered.trained] == golden["spans"]
    assert rendered.prompt == template.render_prompt(example) == golden["full"][: golden["spans"][-1][0]]
    (document,), _ = tokenize([example], template, tokenizer)
    bracketed = golden["full"]
    for start, end in reversed(golden["spans"]):
        bracketed = f"{bracketed[:start]}⟦{bracketed[start:end]}⟧{bracketed[end:]}"
    assert show_example(document, tokenizer) == bracketed.rstrip()
    assert int(document.ids[-1]) in template.stop_ids(tokenizer) or example.messages[-1].get("tool_calls")


@each_family
@pytest.mark.parametrize("title", [title for title, talk in GOLDEN["talks"].items() if not talk["tools"]])
def test_what_a_chat_sees_is_the_generation_prompt_of_transformers(record, title, tmp_path):
    _, template = family(record, tmp_path)
    messages = GOLDEN["talks"][title]["messages"][:-1]
    assert template.render_prompt(messages) == record["rendered"][title]["prompt"]


@each_family
@pytest.mark.parametrize(
    ("task", "row", "question"),
    [
        ("text-generation", {"instruction": "Do", "input": "it", "output": "ä b"}, "Do\n\nit"),
        ("summarization", {"document": "d", "summary": "ä b"}, "Summarize the following document:\nd"),
        (
            "extractive-question-answering",
            {"context": "x ä b", "question": "q", "answers": {"text": ["ä b"], "answer_start": [2]}},
            "Context: x ä b\n\nQuestion: q",
        ),
    ],
)
def test_every_task_is_trained_and_asked_in_the_family_s_own_words(record, task, row, question, tmp_path):
    asked, answered = GOLDEN["talks"]["question"]["messages"]
    golden = record["rendered"]["question"]
    full = golden["full"].replace(asked["content"], question)
    before, end = full.rsplit(answered["content"], 1)
    start = len(golden["prompt"]) - len(asked["content"]) + len(question)
    (example,) = examples_of([row], tmp_path, task)
    tokenizer, template = family(record, tmp_path)
    (document,), _ = tokenize([example], template, tokenizer)
    assert show_example(document, tokenizer) == f"{before[:start]}⟦{before[start:]}ä b{end.rstrip()}⟧"
    assert template.render_prompt(example) + template.opening == before  # what a span of a context is written behind
    assert template.answer(before[start:] + "ä b" + end) == "ä b"
    assert int(document.ids[-1]) in template.stop_ids(tokenizer)


def test_a_call_the_template_leaves_out_is_an_error_not_dropped(tmp_path):
    (example,) = examples_of([GOLDEN["talks"]["calls beside each other"]], tmp_path)
    (record,) = (record for record in GOLDEN["families"] if record["name"] == "gpt-oss")
    with pytest.raises(DataError, match=r"rows.jsonl:1: .* leaves out a tool call of messages\[1\]"):
        family(record, tmp_path)[1].render(example)


@pytest.mark.parametrize("case", GOLDEN["features"], ids=lambda case: case["source"])
def test_the_sandbox_has_what_transformers_environment_has(case):
    def run() -> str:
        return compile_template(case["source"], NOW)(**GOLDEN["variables"])

    if case["text"] is None:
        with pytest.raises(TemplateFailure):
            run()
    else:
        assert run() == case["text"]
