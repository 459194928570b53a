"""Reading a configuration file: what is refused, with file and line, and where relative paths lead."""

import json

import pytest

from mini_forge.config import TrainingConfig
from mini_forge.errors import ConfigError
from mini_forge.json_faults import json_fault

FIRST = {"task": "text-generation", "model_name": "m", "dataset": "d.jsonl", "compute_specs": "low_end"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1]", "{path}: Must be a JSON object (got [1])"),
        (b'{\n "task": "x",\n}', "{path}:"),
        (
            b'{"a": 1\n,, "b": 2}',
            "{path}:2: not JSON: Expecting property name enclosed in double quotes at column 2; remove this",
        ),
        (b"{'a': 1}", "JSON strings take double quotes"),
        (b'{\n# no\n"a": 1}', 'JSON has no comments, remove it (a configuration may have the key "comment")'),
        (b"", "the file is empty"),
        (b'{\n"a": "\xff"}', "{path}:2: not UTF-8"),
        (b'{"lora_r": 1, "lora_r": 2}', "lora_r: given twice in {path}, as 1 and as 2"),
        (b"[" * 100_000, "{path}: not JSON: nested too deeply; write fewer brackets"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "{path}: not JSON: a number of thousands of digits; write a shorter one"),
    ],
)
def test_a_broken_file_is_reported_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "c.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_file(path)
    assert len(caught.value.problems) == 1 and message.format(path=path) in str(caught.value)


@pytest.mark.parametrize("text, remedy", [
    ("", "the file is empty"), ("{", "the text ends too soon, close"), ('{"a": [1', "the text ends too soon"),
    ('{"a": "b', 'end the string with "\n'), ('{"a": "b\tc"}', "write a tab in a string as \\t"),
    ('{"a": }', "write the value behind the colon"), ('{"a": 7B}', "write a number as 0.5"),
    ('{"a": 2024-01-01}', "write a number as 0.5"), ('{"a": ./b}', "write strings and keys in double quotes"),
    ("01", "write a number as 0.5"), ('{"a": 1,, ', "remove this comma"),
    ('{"a": "b\n', 'end the string with ", and write a line break in it as \\n'),
    ('{"a": "b,\n "c": 1}', 'end the string with ", and'),
    ('{"a": "C:\\data"}', "write a backslash in a string as \\\\"),
    ("{'a': 1}", "JSON strings take double quotes"), ("{a: 1}", "write strings and keys in double quotes"),
    ("{Task: 1}", "write strings and keys in double quotes"),
    ('{"a": /data}', "write strings and keys in double quotes"),
    ('{"a": True}', "JSON writes true, false and null"), ('{"a": .5}', "write a number as 0.5"),
    ('{"a": 1_000}', "write a number as 0.5"), ('{"a": 01}', "write a number as 0.5"),
    ('{"a": 1 // x\n}', "JSON has no comments"), ('{\n# x\n"a": 1}', "JSON has no comments"),
    ('{"a": 1,}', "remove the comma before the closing bracket"),
    ("[1,]", "remove the comma before the closing bracket"),
    ('{"a": 1,, "b": 2}', "remove this comma"), ('{"a": 1 "b": 2}', "put a comma before it"),
    ('{"a": "b "c" d"}', 'within a string write \\" for "'), ('{"a" 1}', "put a colon between a key and its value"),
    ('{"a": [1}', "close first what was opened last"), ('{"a": 1} x', "remove what follows the closing bracket"),
    ('{"a": 1}{"a": 2}', "write one object {…} a line"), ('{"a": 1},', "write one object {…} a line"),
    ('"a": 1', "put { and } around the whole"), ('{"a": 1}\ufeff{}', "remove the byte-order mark"),
])  # fmt: skip
def test_the_usual_slips_are_told_their_remedy(text, remedy):
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads(text)
    assert f"; {remedy}" in json_fault(caught.value) + "\n"


def test_a_file_that_cannot_be_read_is_reported(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            TrainingConfig.from_file(path)
    with pytest.raises(ConfigError, match="Must be a JSON object"):
        TrainingConfig.from_dict([])


def test_byte_order_mark_and_crlf_are_fine_and_the_stem_names_the_run(tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(FIRST, indent=1).replace("\n", "\r\n").encode())
    assert TrainingConfig.from_file(str(path)).output_dir == "runs/mine"
    assert TrainingConfig.from_file(path, output_dir=tmp_path / "x").output_dir == str(tmp_path / "x")


def test_relative_paths_are_taken_from_here_else_from_the_file_s_folder(tmp_path, monkeypatch):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "c.json").write_text(json.dumps({**FIRST, "dataset": "../rows.jsonl", "model_name": "hub/id"}))
    (tmp_path / "rows.jsonl").write_text("{}")
    elsewhere = tmp_path / "else" / "where"  # where no `../rows.jsonl` is
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    config = TrainingConfig.from_file(folder / "c.json")
    assert (config.dataset, config.model_name) == (str(folder / "../rows.jsonl"), "hub/id")
    assert config.provenance["dataset"] == "file"
    monkeypatch.chdir(folder)
    assert TrainingConfig.from_file("c.json").dataset == "../rows.jsonl"
    monkeypatch.chdir(tmp_path)
    assert TrainingConfig.from_file(folder / "c.json", dataset="c.json").dataset == "c.json"
