"""Read a dataset file: JSONL (an object may be spread over lines) or one JSON array, to rows that know their line.

A byte-order mark, CRLF and blank lines are fine. Every fault is kept with its line, so that one reading reports all:
functions here append (line, message) to a list of problems, and `raise_problems` makes a DataError of it.

JSONL is read as it is consumed, and never held whole; a JSON array's text is (its rows come one by one too).
"""

import json
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from mini_forge.errors import DataError
from mini_forge.json_faults import json_fault

TABLES = (".csv", ".tsv", ".xlsx", ".parquet", ".arrow")
SHOWN_PROBLEMS = 100


@dataclass(frozen=True)
class Row:
    """One JSON object of a dataset and the line it begins on."""

    line: int
    fields: dict


def read_rows(path) -> list[Row]:
    """The objects of a dataset file. Raises DataError with every problem."""
    problems = []
    rows = list(scan(path, problems))
    raise_problems(path, problems)
    return rows


def scan(path, problems: list[tuple[int, str]]) -> Iterator[Row]:
    """The rows that can be read, one by one; what is wrong with the others goes to `problems`."""
    lines, leading = _lines(path, problems), []
    for text in lines:
        leading.append(text)
        if text.strip():
            break
    lines, is_array, is_empty = chain(leading, lines), bool(leading) and leading[-1].lstrip().startswith("["), True
    values = _array_values("\n".join(lines), problems) if is_array else _line_values(lines, problems)
    for line, value in values:
        if isinstance(value, dict):
            is_empty = False
            yield Row(line, value)
        else:
            problems.append(
                (line, f"a row must be a JSON object {{…}}, this is {kind(value)}; give each row its keys and values")
            )
    if is_empty and not problems:
        raise DataError(f"{path}: no rows; write one JSON object a line")


def raise_problems(path, problems: list[tuple[int, str]]) -> None:
    """DataError with the first problems by line, if there are any."""
    if problems:
        raise DataError(*first_problems([f"{path}:{line}: {message}" for line, message in sorted(problems)]))


def first_problems(problems: list[str]) -> list[str]:
    """As many as a person reads, and how many more there are."""
    more = len(problems) - SHOWN_PROBLEMS
    return problems if more <= 0 else [*problems[:SHOWN_PROBLEMS], f"and {more} more problems like these"]


def kind(value) -> str:
    """A JSON value as an error message names it."""
    if value is None or isinstance(value, (bool, int, float)):
        return json.dumps(value)
    name = {str: "string", list: "list", dict: "object"}[type(value)]
    return f"a{'' if value else 'n empty'} {name}".replace("a object", "an object")


def _lines(path, problems: list[tuple[int, str]]) -> Iterator[str]:
    """The file's text split at "\\n", without a byte-order mark; a line that is not UTF-8 is noted and left blank."""
    path, line = Path(os.path.expanduser(path)), b""
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: no file can have a NUL in its name; dataset must be a JSONL or JSON file")
    try:
        if path.is_dir():
            raise DataError(f"{path}: is a directory; dataset must be a JSONL or JSON file")
        if path.exists() and not path.is_file():  # to open one may wait for ever, and a dataset is read more than once
            raise DataError(f"{path}: is a pipe or a device; dataset must be a JSONL or JSON file")
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise DataError(f"{path}: is UTF-16; save it as UTF-8")
                if number == 1 and path.suffix.lower() in TABLES and not re.match(rb"[\s\xef\xbb\xbf]*[{\[]", line):
                    raise DataError(
                        f"{path}: is a table; dataset must be a JSONL or JSON file: write each row as an object {{…}}"
                    )
                yield _decode(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, problems)
        if line.endswith(b"\n"):  # where a fault at the end is: on the empty line behind it
            yield ""
    except FileNotFoundError as error:
        raise DataError(f"{path}: Dataset file not found; dataset must be a JSONL or JSON file") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); dataset must be a readable file") from error


def _decode(number: int, line: bytes, problems: list[tuple[int, str]]) -> str:
    try:
        return line.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        problems.append((number, f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8"))
        return ""


def _line_values(lines: Iterator[str], problems: list[tuple[int, str]]) -> Iterator[tuple[int, object]]:
    """(line, value) of JSONL. A line that is no JSON by itself but begins with "{" may open an object that ends before
    the next such line; if it does not, the line is a problem and the next ones are read as if it were not there."""
    ahead: deque[str] = deque()  # lines that were looked at and not yet taken
    number = 0
    while (text := ahead.popleft() if ahead else next(lines, None)) is not None:
        number += 1
        if not text.strip():
            continue
        try:
            yield number, _DECODER.decode(text)
            continue
        except _BAD_JSON as error:
            fault, faulty = error, number
        more = _lines_before_object(ahead, lines) if text.startswith("{") else 0
        try:
            yield number, _DECODER.decode("\n".join([text, *islice(ahead, more)]))
        except _BAD_JSON as error:
            is_spread = text.strip() == "{"  # surely: one problem, where it is, for the whole object
            if is_spread:
                fault, faulty = error, number + getattr(error, "lineno", 1) - 1
            problems.append((faulty, json_fault(fault)))
            if not is_spread:
                continue
        number += more
        for _ in range(more):
            ahead.popleft()


def _lines_before_object(ahead: deque[str], lines: Iterator[str]) -> int:
    """How many lines come before the next that begins with "{"; they are read into `ahead`."""
    for count, text in enumerate(ahead):
        if text.startswith("{"):
            return count
    for text in lines:
        ahead.append(text)
        if text.startswith("{"):
            return len(ahead) - 1
    return len(ahead)


def _array_values(text: str, problems: list[tuple[int, str]]) -> Iterator[tuple[int, object]]:
    """(line, value) of a JSON array's elements. The first fault of syntax is the last that can be found."""
    place = _skip(text, text.index("[") + 1)
    line, counted = 1, 0
    is_first = True
    while not (is_first and text.startswith("]", place)):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, end = _DECODER.raw_decode(text, place)
        except _BAD_JSON as error:
            problems.append((getattr(error, "lineno", line), json_fault(error)))
            return
        yield line, value
        is_first, place = False, _skip(text, end)
        if text.startswith("]", place):
            break
        if not text.startswith(",", place):
            line += text.count("\n", counted, place)
            problems.append((line, "not JSON: expected ',' or ']' after an element of the array; put one there"))
            return
        place = _skip(text, place + 1)
    rest = text[place + 1 :].strip()
    if rest:
        line = 1 + text.count("\n", 0, _skip(text, place + 1))
        problems.append((line, f"text after the array's end: {rest[:40]!r}; remove it"))


def _skip(text: str, place: int) -> int:
    """The next place that is not white space."""
    while text[place : place + 1] in (" ", "\t", "\r", "\n"):
        place += 1
    return place


def _unique(pairs: list[tuple[str, object]]) -> dict:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice!r} appears twice in one object; keep one of them")
    return fields


def _no_constant(name: str):
    raise ValueError(f"{name} is not a JSON value; use null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_BAD_JSON = (ValueError, RecursionError)  # ValueError: JSONDecodeError, the hooks' own, integers of 5000 digits
