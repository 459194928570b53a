"""What a user can do wrong, and what can go wrong in training: the exceptions the command line turns into exit codes.

`UserError` (exit 2) carries every problem found, one line each: field or file:line, value, rule, remedy.
`TrainingError` (exit 1) is a run that started and failed: non-finite loss, out of memory, disk full.
"""

import errno


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


class SignalExit(SystemExit):
    """A signal ends the process at once. A class of its own, so that it is not taken for an exit of a user's code."""


def reason_of(error: OSError | ValueError) -> str:
    """Why a file could not be opened or read: the system's words, or Python's, which refuses a NUL in a name."""
    return getattr(error, "strerror", None) or str(error)


def is_disk_full(error: OSError) -> bool:
    """Whether there is no room left to write, on the disk or in the user's share of it. numpy's error has no number."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or error.errno is None and "requested and" in str(error)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, on whichever device: torch's CPU allocator raises a bare RuntimeError,
    Python for a thread too."""
    text = str(error).lower()
    signs = ("can't allocate memory", "out of memory", "can't start new thread", "failed to map segment")
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)
