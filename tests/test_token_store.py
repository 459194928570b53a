import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mini_forge.data import token_store
from mini_forge.data.batches import Document, collate, encode, held_out, split, tokenize
from mini_forge.data.chat import choose_template
from mini_forge.data.pairs import data_fingerprint
from mini_forge.data.rows import scan
from mini_forge.data.tasks import load_examples, read_examples
from mini_forge.data.token_store import TokenCache, highest_token, inputs_of, is_large, recipe
from mini_forge.errors import DataError
from mini_forge.training.windows import Windows
from tests import toy_tokenizer

MAX_LENGTH = 24  # cuts some of the rows


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """The folder of all stores."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mini_forge" / "tokens"


@pytest.fixture
def tokenizer(tmp_path):
    return toy_tokenizer.byte_level(tmp_path / "tokenizer", eos_token=None)


@pytest.fixture
def template(tokenizer):
    return choose_template("chatml", "m", tokenizer, "text-generation")


@pytest.fixture
def dataset(tmp_path) -> Path:
    """40 rows of unequal lengths, some too long; six are a text of one token, which nothing precedes."""
    rows = [
        {"text": "a"} if i % 7 == 3 else {"input": f"{i} and {i}" + " please" * (i % 5), "output": f"{i + i}"}
        for i in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def made(dataset, template, tokenizer):
    """The way to the dataset's cache, made if it is not there."""

    def open_or_make(path=dataset, **changes) -> TokenCache:
        facts = recipe(template, tokenizer, MAX_LENGTH, False, None, "text-generation") | changes
        cache = TokenCache(path, facts)
        if cache.stored is None:
            cache.make(encode(read_examples(path, "text-generation"), template, tokenizer, MAX_LENGTH))
        return cache

    return open_or_make


def in_memory(dataset, template, tokenizer, chosen=None):
    """What the store must equal: (documents, stats) of the rows at these indices."""
    examples = load_examples(dataset, "text-generation")
    examples = examples if chosen is None else [examples[i] for i in chosen]
    return tokenize(examples, template, tokenizer, MAX_LENGTH)


def as_values(documents):
    return [(d.ids.tolist(), d.is_trained.tolist(), d.line, d.inputs) for d in documents]


def test_stored_documents_are_those_in_memory(dataset, template, tokenizer, made):
    documents, stats = in_memory(dataset, template, tokenizer)
    store, stored_stats = made().stored.documents()
    assert stats.dropped == 6 and stats.truncated > 0
    assert as_values(store) == as_values(documents) and stored_stats == stats
    assert len(store) == len(documents) and as_values([store[-1]]) == as_values([documents[-1]])
    assert as_values(store[2:9:3]) == as_values(documents[2:9:3])
    assert store[0].ids.dtype == np.int32 and store[0].is_trained.dtype == bool
    assert data_fingerprint(store) == data_fingerprint(documents)
    assert highest_token(store) == highest_token(documents) == max(int(d.ids.max()) for d in documents)
    assert inputs_of(store).tolist() == inputs_of(documents).tolist() == [len(d.ids) - 1 for d in documents]
    with pytest.raises(IndexError):
        store[len(documents)]


def test_parts_are_the_split_of_the_rows_before_any_is_dropped(dataset, template, tokenizer, made):
    stored = made().stored
    is_held_out = held_out(len(stored), 0.3, 5)
    for indices, chosen in zip(split(40, 0.3, 5), (~is_held_out, is_held_out), strict=True):
        documents, stats = in_memory(dataset, template, tokenizer, indices)
        store, stored_stats = stored.part(chosen).documents()
        assert as_values(store) == as_values(documents) and stored_stats == stats


@pytest.mark.parametrize("options", [(False, False, 0), (True, False, 0), (False, True, 64)])
def test_batches_are_the_same_from_the_disk(options, dataset, template, tokenizer, made):
    documents, _ = in_memory(dataset, template, tokenizer)
    store, _ = made().stored.documents()
    ours, theirs = (Windows(each, 3, 2, *options, 11) for each in (store, documents))
    assert ours.steps_per_epoch == theirs.steps_per_epoch
    for step in range(2 * ours.steps_per_epoch):
        for one, other in zip(ours(step), theirs(step), strict=True):
            assert one.input_ids.equal(other.input_ids) and one.targets.equal(other.targets)
            assert one.lines == other.lines


def test_a_second_start_reads_no_row(dataset, made, monkeypatch):
    first = made()
    monkeypatch.setattr(TokenCache, "make", lambda *_: pytest.fail("the tokens were made again"))
    second = made()
    assert second.folder == first.folder and second.notes == []
    assert as_values(second.stored.documents()[0]) == as_values(first.stored.documents()[0])
    shutil.copy(dataset, dataset.with_name("moved.jsonl"))
    assert made(dataset.with_name("moved.jsonl")).folder == first.folder  # the content counts, not the name


def test_everything_that_tokens_depend_on_is_in_the_key(dataset, tokenizer, template, made, tmp_path):
    base = recipe(template, tokenizer, 24, False, None, "text-generation")
    other_tokenizer = toy_tokenizer.pieces(tmp_path / "other")
    others = [
        recipe(template, tokenizer, 25, False, None, "text-generation"),
        recipe(template, tokenizer, 24, True, None, "text-generation"),
        recipe(template, tokenizer, 24, False, "Be brief.", "text-generation"),
        recipe(template, tokenizer, 24, False, None, "summarization"),
        recipe(template, other_tokenizer, 24, False, None, "text-generation"),
        recipe(choose_template("llama", "m", tokenizer, "text-generation"), tokenizer, 24, False, None, "t"),
        recipe(template, toy_tokenizer.byte_level(tmp_path / "with eos"), 24, False, None, "text-generation"),
        base | {"format": -1},
        base | {"versions": []},
        base | {"date": "2020-01-01"},
    ]
    folders = [TokenCache(dataset, facts).folder for facts in [base, *others]]
    dataset.write_text(dataset.read_text() + "\n")
    assert len({*folders, TokenCache(dataset, base).folder}) == len(others) + 2


def test_a_template_that_tells_the_date_has_other_tokens_every_day(tokenizer, template, tmp_path):
    assert recipe(template, tokenizer, 24, False, None, "t")["date"] is None
    source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    dated = toy_tokenizer.byte_level(tmp_path / "dated", chat_template=source)
    facts = recipe(choose_template("model", "m", dated, "text-generation"), dated, 24, False, None, "t")
    assert facts["date"] == time.strftime("%Y-%m-%d")


def _flip(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {
    "cut short": lambda folder: os.truncate(folder / token_store.IDS, 8),
    "a token changed": lambda folder: _flip(folder / token_store.IDS),
    "a mask changed": lambda folder: _flip(folder / token_store.TRAINED),
    "a row changed": lambda folder: _flip(folder / token_store.ROWS),
    "a file missing": lambda folder: (folder / token_store.ROWS).unlink(),
    "no manifest": lambda folder: (folder / token_store.MANIFEST).unlink(),
    "half a manifest": lambda folder: os.truncate(folder / token_store.MANIFEST, 50),
    "a manifest of something else": lambda folder: (folder / token_store.MANIFEST).write_text("[1]"),
    "another's tokens": lambda folder: (folder / token_store.MANIFEST).write_text(
        (folder / token_store.MANIFEST).read_text().replace('"max_length": 24', '"max_length": 25')
    ),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_text("not a folder")),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM)
def test_a_torn_or_foreign_store_is_made_anew_and_said_so(harm, dataset, template, tokenizer, made, root):
    harm(made().folder)
    cache = made()
    assert "made anew" in cache.notes[0] and str(cache.folder) in cache.notes[0] and len(cache.notes) == 2
    assert as_values(cache.stored.documents()[0]) == as_values(in_memory(dataset, template, tokenizer)[0])
    assert made().notes == [] and [path.name for path in root.iterdir()] == [cache.folder.name]


@pytest.mark.parametrize("before", ["none", "damaged", "damaged, then deleted"])
def test_runs_that_make_the_same_store_at_once_do_not_harm_each_other(before, dataset, template, tokenizer, made, root):
    if before != "none":
        _flip(made().folder / token_store.IDS)
    facts = recipe(template, tokenizer, MAX_LENGTH, False, None, "text-generation")
    caches = [TokenCache(dataset, facts) for _ in range(3)]
    assert all(cache.stored is None for cache in caches)
    if before == "damaged, then deleted":
        shutil.rmtree(root)
    for cache in caches:
        cache.make(encode(read_examples(dataset, "text-generation"), template, tokenizer, MAX_LENGTH))
    expected = as_values(in_memory(dataset, template, tokenizer)[0])
    assert all(as_values(cache.stored.documents()[0]) == expected for cache in caches)
    assert made().notes == [] and len(list(root.iterdir())) == 1
    shutil.rmtree(root)  # who has mapped it keeps it
    assert as_values(caches[0].stored.documents()[0]) == expected


def test_a_full_disk_is_one_line_and_leaves_nothing(dataset, template, tokenizer, made, root):
    made(max_length=99)
    before = sorted(root.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # as good as full: a write fails
    try:
        with pytest.raises(DataError, match=r"rows.jsonl: its tokens cannot be kept in .*XDG_CACHE_HOME") as caught:
            made()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(caught.value.problems) == 1 and "\n" not in str(caught.value)
    assert sorted(root.rglob("*")) == before


def test_a_cache_that_cannot_be_made_is_one_line(made, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="its tokens cannot be kept in .*Not a directory"):
        made()


@pytest.mark.parametrize("is_removed", [False, True])
def test_a_dataset_that_changes_while_it_is_read_is_refused(is_removed, dataset, template, tokenizer, root):
    cache = TokenCache(dataset, recipe(template, tokenizer, MAX_LENGTH, False, None, "text-generation"))
    encoded = encode(read_examples(dataset, "text-generation"), template, tokenizer, MAX_LENGTH)

    def meanwhile():
        yield from encoded
        if is_removed:
            dataset.unlink()
        else:
            dataset.write_text(dataset.read_text() + '\n{"text": "more"}')

    with pytest.raises(DataError, match="rows.jsonl: changed while it was read"):
        cache.make(meanwhile())
    assert list(root.iterdir()) == []


def test_an_interrupted_making_leaves_nothing_and_a_killed_one_s_remains_go_after_a_day(made, dataset, root):
    def interrupted():
        yield Document(np.array([1, 2], np.int32), np.array([False, True]), 1), False
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TokenCache(dataset, {}).make(interrupted())
    assert list(root.iterdir()) == []
    for name, days in (("old", 2), ("young", 0.5)):
        (root / f".tmp-{name}").mkdir()
        for path in (root / f".tmp-{name}" / token_store.IDS, root / f".tmp-{name}"):
            path.touch()
            os.utime(path, (time.time() - days * 86400,) * 2)
    folder = made().folder
    assert {path.name for path in root.iterdir()} == {".tmp-young", folder.name}


def test_a_store_may_be_without_any_document(dataset, root):
    cache = TokenCache(dataset, {})
    cache.make((None, False) for _ in range(3))
    for stored in (cache.stored, TokenCache(dataset, {}).stored):
        store, stats = stored.documents()
        assert len(store) == 0 and not store and (stats.rows, stats.dropped, stats.tokens) == (3, 3, 0)


def test_the_cache_is_where_the_xdg_rules_say(dataset, monkeypatch, tmp_path, root):
    assert TokenCache(dataset, {}).folder.parent == root
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert TokenCache(dataset, {}).folder.parent == tmp_path / "home" / ".cache" / "mini_forge" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert TokenCache(dataset, {}).folder.parent == tmp_path / "home" / ".cache" / "mini_forge" / "tokens"


def test_only_large_files_are_kept_on_disk(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert not is_large(file) and not is_large(tmp_path)
    for size, expected in ((token_store.LARGE_BYTES - 1, False), (token_store.LARGE_BYTES, True)):
        file.touch()
        os.truncate(file, size)
        assert is_large(file) is expected


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_shuffled", [False, True])
def test_reading_a_store_holds_little_of_it(is_shuffled, dataset):
    """60 MB of tokens. Mapped pages count as the process's, so without a release all of them would."""
    count, length = 12_000, 1000
    ids, is_trained = np.arange(length, dtype=np.int32), np.ones(length, bool)
    cache = TokenCache(dataset, {})
    cache.make((Document(ids, is_trained, line), False) for line in range(count))
    store, _ = cache.stored.documents()
    order = np.random.default_rng(0).permutation(count) if is_shuffled else range(count)
    before, most = _resident("VmRSS"), 0
    for i, index in enumerate(order):
        batch = collate([store[index]])
        most = max(most, _resident("VmRSS")) if i % 100 == 0 else most
    assert batch.tokens == length - 1
    assert most - before < 40e6


def test_rows_are_read_as_they_are_consumed(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"}\nnoise\n')
    problems = []
    rows = scan(file, problems)
    assert next(rows).line == 1 and next(rows).line == 3 and problems == []
    assert list(rows) == [] and problems[0][0] == 4
    examples = read_examples(file, "text-generation")
    assert [next(examples).text, next(examples).text] == ["a", "b"]
    with pytest.raises(DataError, match="rows.jsonl:4: not JSON"):
        next(examples)
