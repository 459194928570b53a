import json
import os

import pytest

from mini_forge.data.rows import SHOWN_PROBLEMS, read_rows
from mini_forge.data.tasks import TASKS, load_examples, user_message
from mini_forge.data.token_store import is_large
from mini_forge.errors import DataError

OK = '{"input": "a", "output": "b"}'
QA = "extractive-question-answering"


def write(folder, content):
    file = folder / "rows.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def problems(folder, content, task="text-generation", **options):
    """What is wrong with a dataset, without the file's name."""
    file = write(folder, content)
    with pytest.raises(DataError) as caught:
        load_examples(file, task, **options)
    assert all(problem.startswith((f"{file}:", "and ")) and "\n" not in problem for problem in caught.value.problems)
    return [problem.removeprefix(f"{file}:") for problem in caught.value.problems]


def one(folder, row, task="text-generation", **options):
    return load_examples(write(folder, json.dumps(row)), task, **options)[0]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (f"{OK}\n{OK}", [1, 2]),
        (f"\ufeff{OK}\r\n\r\n  \n{OK}\r\n", [1, 4]),
        (f"[{OK},\n\n{OK}\n]\n", [1, 3]),
        (f"\ufeff\n[\n{OK}\n,{OK}]", [3, 4]),
        ('{\n  "input": "a",\n  "output": "b"\n}\n' + OK + '\n{\n"input":"a",\n\n"output":"b"}\n', [1, 5, 6]),
        ('{"input": "a\u2028b", "output": "c\u0085"}\n' + OK, [1, 2]),  # line ends to Python, not to JSON
    ],
)
def test_rows_know_the_line_they_begin_on(content, lines, tmp_path):
    assert [row.line for row in read_rows(write(tmp_path, content))] == lines
    assert [example.line for example in load_examples(tmp_path / "rows.jsonl", "text-generation")] == lines


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f'{OK}\n{{"input": "a" "output"\n{OK}\n{{"input": "a"\n', ["2: not JSON: Expecting ','", "4: not JSON"]),
        (f"{OK} {OK}\n", ["1: not JSON: Extra data at column 31"]),
        ('{\n "input": "a",\n "output": b\n}\n{"x": 1}', ["3: not JSON: Expecting value at column 12", "5: has the"]),
        (f"[{OK}\n\n{OK}]", ["3: not JSON: expected ',' or ']'"]),
        (f"[{OK},\n]", ["2: not JSON: Expecting value"]),
        (f"[{OK}]\n\nmore", ["3: text after the array's end: 'more'"]),
        (f"[\n{OK},\n", ["3: not JSON"]),
        (f"3\nnull\n[1]\n{OK}", ["1: a row must be a JSON object {…}, this is 3", "2: a row", "3: a row"]),
        (f"[{OK},\n[]]", ["2: a row must be a JSON object {…}, this is an empty list"]),
        ('{"input": "a", "input": "b", "output": "c"}', ["1: not JSON: the key 'input' appears twice"]),
        ('{"input": NaN, "output": "c"}', ["1: not JSON: NaN is not a JSON value"]),
        ('{"input": ' + "[" * 100_000 + "]" * 100_000 + "}", ["1: not JSON: nested too deeply"]),
        (OK.encode() + b'\n{"input": "\xff"}\n{}', ["2: not UTF-8 at byte 12 of the line", "3: has the keys (none)"]),
        ('{"input": "\\ud800", "output": "b"}', ["1: input has half a character"]),
        ('{"input": 1, "output": "b"}\n{"input": "a", "output": null}', ["1: input must be a string, is 1", "2: outp"]),
        ('{"input": " ", "output": "b"}\n{"input": "a", "output": ""}', ["1: input is empty", "2: output is empty"]),
    ],
)
def test_each_fault_of_a_file_is_reported_at_its_own_line(content, expected, tmp_path):
    found = problems(tmp_path, content)
    assert len(found) == len(expected)
    assert all(message.startswith(start) for message, start in zip(found, expected, strict=True)), found


def test_a_long_list_of_problems_is_cut_short(tmp_path):
    found = problems(tmp_path, "x\n" * (SHOWN_PROBLEMS + 5))
    assert len(found) == SHOWN_PROBLEMS + 1 and found[-1] == "and 5 more problems like these"


def test_a_file_of_nothing_but_noise_is_refused_quickly(tmp_path):
    problems(tmp_path, "noise\n" * 50_000 + '{"a":\n' * 20_000)  # minutes, if every line searched the rest of the file


def test_files_that_are_no_datasets_are_named(tmp_path):
    with pytest.raises(DataError, match="none.jsonl: Dataset file not found"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="name too long.*; dataset must be a readable file"):
        read_rows("x" * 300)
    with pytest.raises(DataError, match=r"'a\\x00b': no file can have a NUL in its name"):
        read_rows("a\0b")
    assert not is_large("x" * 300)
    with pytest.raises(DataError, match="is a directory"):
        read_rows(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="pipe.jsonl: is a pipe or a device"):
        read_rows(tmp_path / "pipe.jsonl")
    for content in ("", "\n \n", "[]", "\ufeff"):
        with pytest.raises(DataError, match="no rows; write one JSON object a line"):
            read_rows(write(tmp_path, content))
    with pytest.raises(DataError, match="UTF-16; save it as UTF-8"):
        read_rows(write(tmp_path, OK.encode("utf-16")))
    (tmp_path / "rows.csv").write_text(OK)
    assert len(read_rows(tmp_path / "rows.csv")) == 1  # whatever its name
    with pytest.raises(DataError, match="none.csv: Dataset file not found"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "rows.CSV").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="rows.CSV: is a table; dataset must be a JSONL or JSON file"):
        load_examples(str(tmp_path / "rows.CSV"), "text-generation")


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"input": " a ", "output": "b\n"}, " a ", "b\n"),
        ({"prompt": "a", "completion": "b", "meta": 1}, "a", "b"),
        ({"instruction": " do ", "output": " b "}, "do", "b"),
        ({"instruction": "do", "input": "", "output": "b"}, "do", "b"),
        ({"instruction": "do", "input": None, "output": "b"}, "do", "b"),
        ({"instruction": "do\n", "input": " this ", "output": "b"}, "do\n\nthis", "b"),
        ({"messages": None, "text": None, "input": "a", "output": "b"}, "a", "b"),  # a null is no key
    ],
)
def test_text_generation_formats(row, prompt, response, tmp_path):
    example = one(tmp_path, row)
    assert (example.prompt, example.response, example.reference) == (prompt, response, response)
    assert example.messages == ({"role": "user", "content": prompt}, {"role": "assistant", "content": response})


def test_text_rows_have_no_conversation(tmp_path):
    example = one(tmp_path, {"text": "once upon a time"})
    assert (example.text, example.messages, example.reference) == ("once upon a time", None, None)


def test_rows_of_different_formats_may_stand_together(tmp_path):
    file = write(tmp_path, f'{OK}\n{{"text": "t"}}\n{{"prompt": "p", "completion": "c"}}')
    assert [e.text or e.prompt for e in load_examples(file, "text-generation")] == ["a", "t", "p"]


def test_messages_keep_their_own_keys_and_end_with_the_last_response(tmp_path):
    messages = [
        {"role": "developer", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "thinking": "hm"},
        {"role": "tool", "content": "", "name": "f"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "thanks"},
    ]
    example = one(tmp_path, {"messages": messages, "tools": [{"name": "f"}]})
    assert example.messages == (messages[0], {"role": "user", "content": "ab"}, *messages[2:5])
    assert (example.prompt, example.response, example.tools) == ("ab", "c", ({"name": "f"},))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages must be a list of at least one {role, content}, is an empty list"),
        ("hello", "messages must be a list of at least one {role, content}, is a string"),
        ([{"role": "user", "content": "a"}], "messages has no assistant turn"),
        ([3], "messages[0] must be an object with role and content, is 3"),
        ([{"role": "bot", "content": "a"}], "messages[0].role must be one of system, developer, user, assistant, tool"),
        ([{"role": "user"}], "messages[0].content must be a string, is null"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], "messages[1].content is empty"),
        ([{"role": "user", "content": [{"type": "image"}]}], "messages[0].content may only have parts"),
    ],
)
def test_messages_are_checked(messages, expected, tmp_path):
    assert problems(tmp_path, json.dumps({"messages": messages}))[0].startswith(f"1: {expected}")


@pytest.mark.parametrize("keys", [("document", "summary"), ("article", "summary"), ("input", "output")])
def test_summarization_formats(keys, tmp_path):
    example = one(tmp_path, dict(zip(keys, ("long {}", "short"), strict=True)), "summarization")
    assert example.prompt == "Summarize the following document:\nlong {}" and example.reference == "short"
    assert user_message("summarization", "long {}") == example.messages[0]


@pytest.mark.parametrize(
    ("answers", "gold"),
    [
        ({"answers": {"text": ["blue", "sky is blue"], "answer_start": [11, 4]}}, ["blue", "sky is blue"]),
        ({"answers": {"text": "blue", "answer_start": 11}}, ["blue"]),
        ({"answers": {"text": ["blue"]}}, ["blue"]),
        ({"answers": ["blue", "sky"]}, ["blue", "sky"]),
        ({"answers": "blue"}, ["blue"]),
        ({"answer": "The Sky"}, ["The Sky"]),  # without its place it may differ in case and spacing
    ],
)
def test_question_answering_formats(answers, gold, tmp_path):
    example = one(tmp_path, {"context": "The sky is blue.", "question": "Colour?", **answers}, QA)
    assert (example.reference, example.response, example.context) == (gold, gold[0], "The sky is blue.")
    assert example.prompt == "Context: The sky is blue.\n\nQuestion: Colour?"


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"answers": {"text": ["blue"], "answer_start": [10]}}, "the answer 'blue' is not at answer_start 10 of the"),
        ({"answers": {"text": ["red"], "answer_start": [-1]}}, "the answer 'red' is not at answer_start -1 of the"),
        ({"answers": {"text": ["blue", "sky"], "answer_start": [11]}}, "answer_start must be one integer for each of"),
        ({"answers": {"text": ["blue"], "answer_start": ["11"]}}, "answer_start must be one integer"),
        ({"answers": {"answer_start": [11]}}, "answers has the keys answer_start; it needs text"),
        ({"answers": {"text": [], "answer_start": []}}, "answers.text must be a string or a list of at least one"),
        ({"answers": [1]}, "answers[0] must be a string, is 1"),
        ({"answer": ""}, "answer is empty"),
        ({"answer": "red"}, "the answer 'red' is not in the context; copy it from there"),
        ({}, f"has the keys context, question; a row for {QA} needs context,question,answers · context,question,"),
    ],
)
def test_answers_are_checked(answers, expected, tmp_path):
    row = {"context": "The sky is blue.", "question": "Colour?", **answers}
    assert problems(tmp_path, json.dumps(row), QA)[0].startswith(f"1: {expected}")


@pytest.mark.parametrize("task", TASKS)
def test_a_row_that_fits_no_format_is_told_them_all(task, tmp_path):
    (found,) = problems(tmp_path, '{"inputs": "a", "outputs": "b"}', task)
    assert found.startswith(f"1: has the keys inputs, outputs; a row for {task} needs ") and " · " in found


def test_preference_pairs(tmp_path):
    user, good, bad = ({"role": r, "content": c} for r, c in [("user", "p"), ("assistant", "g"), ("assistant", "b")])
    rows = [
        {"prompt": "p", "chosen": "g", "rejected": "b"},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"prompt": "p", "chosen": [user, good], "rejected": [user, bad]},  # the whole conversation again
    ]
    for row in rows:
        pair = one(tmp_path, row, strategy="dpo")
        assert (pair.prompt, pair.chosen, pair.rejected) == ((user,), (good,), (bad,))
    assert problems(tmp_path, '{"prompt": "p"}', strategy="rlhf")[0].endswith("needs prompt,chosen,rejected")
    for strategy in ("dpo", "rlhf"):
        (told,) = problems(tmp_path, json.dumps({**rows[1], "prompt": [user, good]}), strategy=strategy)
        assert told.startswith("1: prompt ends with an assistant turn, which a response would follow as a second one")
    assert problems(tmp_path, json.dumps({**rows[1], "chosen": [good, user]}), strategy="dpo") == [
        "1: chosen must end with an assistant turn, ends with 'user'"
    ]
    twice = {"prompt": [{"role": "system", "content": "s"}, user], "chosen": [user, good], "rejected": [bad]}
    assert problems(tmp_path, json.dumps(twice), strategy="dpo") == [
        "1: chosen begins with the prompt's last message; give all of the prompt's there, or none"
    ]
    only = one(tmp_path, {"prompt": "p"}, strategy="rlhf", needs_pairs=False)
    assert (only.prompt, only.chosen, only.line) == ((user,), None, 1)
