"""A JSON object from a file, strictly: duplicate keys and syntax errors are reported with file and line."""

import json
from pathlib import Path

from mini_forge.config_keys import show
from mini_forge.errors import ConfigError
from mini_forge.json_faults import json_fault, located_fault


def read_object(path: str | Path) -> dict:
    """The object in the UTF-8 file `path` (a byte-order mark is fine). Raises ConfigError."""
    text = _read_text(Path(path))
    problems = []
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: unique(pairs, str(path), problems))
    except (ValueError, RecursionError) as error:
        raise ConfigError(located_fault(path, error)) from None
    if problems:
        raise ConfigError(*problems)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: Must be a JSON object (got {show(value)}); write keys and values between {{ and }}")
    return value


def read_value(key: str, text: str):
    """The value of `--set KEY=TEXT`: JSON where it is JSON, else the bare string. Raises ConfigError."""
    problems = []
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: unique(pairs, f"--set {key}", problems))
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {json_fault(error)}") from None
    if problems:
        raise ConfigError(*problems)
    return value


def unique(pairs: list[tuple[str, object]], where: str, problems: list[str]) -> dict:
    """The pairs as a dict; each key that is given twice becomes a problem."""
    found = {}
    for name, value in pairs:
        if name in found:
            problems.append(
                f"{name}: given twice in {where}, as {show(found[name])} and as {show(value)}; keep one of them"
            )
        found[name] = value
    return found


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the path of a configuration file") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
