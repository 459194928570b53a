"""A checkpoint's own template renders as transformers renders it."""

import json
import shutil

import pytest

from mini_forge.data.chat import choose_template
from mini_forge.data.tasks import load_examples
from mini_forge.data.tokenizer import load_tokenizer
from tests.golden_files import BASE, chat_renderings

GOLDEN = chat_renderings()
CASES = [(record, title) for record in GOLDEN["templates"] for title in GOLDEN["conversations"]]


def template_of(record: dict, folder):
    """The template as it is found in a checkpoint: beside its tokenizer, whose special tokens it may name."""
    shutil.copy(BASE / "tokenizer.json", folder)
    specials = {key: record[key] for key in ("bos_token", "eos_token") if record[key] is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))
    (folder / "chat_template.jinja").write_text(record["template"], encoding="utf-8")
    return choose_template(None, str(folder), load_tokenizer(folder), "text-generation")


@pytest.mark.parametrize(("record", "title"), CASES, ids=[f"{record['name']}: {title}" for record, title in CASES])
def test_prompt_is_what_transformers_renders(record, title, tmp_path):
    messages = GOLDEN["conversations"][title][:-1]
    assert template_of(record, tmp_path).render_prompt(messages) == record["rendered"][title]["prompt"]


@pytest.mark.parametrize(("record", "title"), CASES, ids=[f"{record['name']}: {title}" for record, title in CASES])
def test_conversation_is_what_transformers_renders(record, title, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": GOLDEN["conversations"][title]}) + "\n", encoding="utf-8")
    (example,) = load_examples(str(rows), "text-generation")
    text, full = template_of(record, tmp_path).render(example).text, record["rendered"][title]["full"]
    assert full.startswith(text)
    assert not full[len(text) :].strip()  # what follows the last response's end token is no part of an example
