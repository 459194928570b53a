"""What is wrong with a text that is no JSON, and what to do about it: json's own words are a programmer's.

And the files of models and runs, as they are read wherever they are wanted."""

import json
import re
from pathlib import Path

from mini_forge.errors import CheckpointError, reason_of


def read_text(file: Path) -> str | None:
    """The text of an optional file, line ends as they are; None when there is none. Raises CheckpointError for one that
    cannot be read or is not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({reason_of(error)}); give a folder that can be read") from None


def read_json(path: Path, absent: dict | None = None, remedy: str = "copy it again from its source") -> dict:
    """A JSON object from a file, or `absent` where there is none. CheckpointError names the file when it is absent and
    nothing stands for it, unreadable, not UTF-8, or no JSON object, of which `remedy` tells what to do."""
    text = read_text(path)
    if text is None and absent is None:
        raise CheckpointError(f"{path}: file not found; a model folder needs it")
    if text is None:
        return absent
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{located_fault(path, error)}, or {remedy}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}; {remedy}")
    return value


def located_fault(path: str | Path, error: ValueError | RecursionError) -> str:
    """`json_fault` of the text of a file, with the line where it is known."""
    line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
    return f"{path}{line}: {json_fault(error)}"


def json_fault(error: ValueError | RecursionError) -> str:
    """Why a text is no JSON, as json's decoder or a hook of it says, where in its line, and what to do about it."""
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply; write fewer brackets within brackets"
    if not isinstance(error, json.JSONDecodeError):
        is_long = "integer string conversion" in str(error)  # Python's own, whose remedy is a programmer's
        return f"not JSON: {'a number of thousands of digits; write a shorter one' if is_long else error}"
    what = error.msg.removesuffix(" at")
    return f"not JSON: {what} at column {error.colno}; {_json_remedy(error.doc, error.pos, error.msg)}"


def _json_remedy(text: str, position: int, fault: str) -> str:
    """What to do about the usual slips: the first of them that fits `fault` (json's words) at `position`."""
    before, behind = text[:position].rstrip(), text[position:]
    here, next_ = behind[:1], behind[1:].lstrip()[:1]
    closes = "]}"
    slips = {
        "the file is empty, write {…} with keys and values": not text.strip(),
        "write a tab in a string as \\t": fault.startswith("Invalid control") and here == "\t",
        'end the string with ", and write a line break in it as \\n': fault.startswith("Invalid control"),
        'end the string with "': fault.startswith("Unterminated string"),
        "write a backslash in a string as \\\\": fault.startswith("Invalid \\"),
        "the text ends too soon, close every { and [": not behind.strip(),
        'JSON strings take double quotes (")': here == "'",
        'JSON has no comments, remove it (a configuration may have the key "comment")':
            behind.startswith(("//", "/*", "#")),
        "remove the byte-order mark (U+FEFF)": here == "\ufeff",
        'write a number as 0.5, 10 or 1e-4, and what is a string in double quotes (")':
            _is_in_number(text, position, fault),
        "write one object {…} a line, with nothing between them": fault.startswith("Extra data") and here in "{[,",
        "put { and } around the whole": fault.startswith("Extra data") and here == ":",
        "remove what follows the closing bracket": fault.startswith("Extra data"),
        "put a colon between a key and its value": fault.startswith("Expecting ':'"),
        "remove the comma before the closing bracket":
            before.endswith(",") and here in closes or here == "," and next_ != "" and next_ in closes,
        "write the value behind the colon": before.endswith(":") and here in "]},",
        "remove this comma, or write what is missing before it": here == ",",
        "close first what was opened last, { with } and [ with ]": here in closes,
        "JSON writes true, false and null":
            fault == "Expecting value" and re.match(r"(True|False|None)\b", behind) is not None,
        'put a comma before it; within a string write \\" for "': fault.startswith("Expecting ','"),
    }  # fmt: skip
    usual = 'write strings and keys in double quotes ("), and numbers, true, false or null without'
    return next((remedy for remedy, fits in slips.items() if fits), usual)


def _is_in_number(text: str, position: int, fault: str) -> bool:
    """Whether a number stands there that JSON writes in another way, or a string without quotes: 01, 1., .5, +1, 7B."""
    if fault == "Expecting value":
        return re.match(r"[+-]?\.?\d", text[position:]) is not None
    between = text[max(position - 1, 0) : position + 1]
    return fault.startswith(("Expecting ','", "Extra data")) and re.fullmatch(r"\d[\w.-]", between) is not None
