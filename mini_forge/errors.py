"""What a user can do wrong, and what can go wrong in training: the exceptions the command line turns into exit codes.

`UserError` (exit 2) carries every problem found, one line each: field or file:line, value, rule, remedy.
`TrainingError` (exit 1) is a run that started and failed: non-finite loss, out of memory, disk full.
"""

import json


class UserError(ValueError):
    """The input is wrong. `problems` lists every fault, one line each."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ConfigError(UserError):
    """A configuration key, value or combination is wrong."""


class DataError(UserError):
    """A dataset file or row is wrong."""


class CheckpointError(UserError):
    """A model, tokenizer or adapter folder is wrong."""


class TrainingError(RuntimeError):
    """Training started and could not go on; the message names the last good checkpoint."""


def reason_of(error: OSError | ValueError) -> str:
    """Why a file could not be opened or read: the system's words, or Python's, which refuses a NUL in a name."""
    return getattr(error, "strerror", None) or str(error)


def json_fault(error: ValueError | RecursionError) -> str:
    """Why a text is no JSON, as json's decoder or a hook of it says, where in its line, and what to do about it."""
    if isinstance(error, RecursionError):
        return "not JSON: nested too deeply; write fewer brackets within brackets"
    if not isinstance(error, json.JSONDecodeError):
        is_long = "integer string conversion" in str(error)  # Python's own, whose remedy is a programmer's
        return f"not JSON: {'a number of thousands of digits; write a shorter one' if is_long else error}"
    what = error.msg.removesuffix(" at")
    return f"not JSON: {what} at column {error.colno}; {_json_remedy(error.doc, error.pos, error.msg)}"


def _json_remedy(text: str, position: int, message: str) -> str:
    """What to do about the usual slips."""
    before, here = text[:position].rstrip(), text[position : position + 1]
    if not text.strip():
        return "the file is empty, write {…} with keys and values"
    if message.startswith("Unterminated string"):
        return 'end the string with "'
    if not here or not text[position:].strip():
        return "the text ends too soon, close every { and ["
    if (before.endswith(",") and here in "}]") or here == ",":
        return "remove the comma before the closing bracket"
    if here in "#/":
        return 'JSON has no comments, remove it (a configuration may have the key "comment")'
    if here == "'":
        return 'JSON strings take double quotes (")'
    if message.startswith("Extra data"):
        return "remove what follows the closing bracket"
    if message.startswith("Expecting ','"):
        return 'put a comma before it, or \\ before a " within a string'
    if message.startswith("Invalid control"):
        return "write a line break in a string as \\n, a tab as \\t"
    if message.startswith("Invalid \\"):
        return "write a backslash in a string as \\\\"
    if here in "TFN":
        return "JSON writes true, false and null"
    return 'write strings and keys in double quotes ("), numbers, true, false or null'


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, on whichever device: torch's CPU allocator raises a bare RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text
