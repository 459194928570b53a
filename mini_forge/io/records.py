"""The JSON files of a model folder, and what its config.json describes."""

import json
from pathlib import Path

from mini_forge.errors import CheckpointError, reason_of
from mini_forge.model.families import decoder_spec
from mini_forge.model.spec import DecoderSpec


def read_json(path: Path) -> dict:
    """A JSON object from a file; CheckpointError names the file when it is absent, unreadable, broken or no object."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found; a model folder needs it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason_of(error)}); give a folder that can be read") from None
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy the file again from its source") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}; copy it again")
    return value


def read_spec(folder: Path) -> DecoderSpec:
    """What the model in `folder` is. Raises CheckpointError, which names its config.json."""
    return spec_of(read_json(folder / "config.json"), folder)


def spec_of(config: dict, folder: Path) -> DecoderSpec:
    """The same where that file has been read."""
    try:
        return decoder_spec(config)
    except CheckpointError as error:
        raise CheckpointError(*(f"{folder}/{problem}" for problem in error.problems)) from None
