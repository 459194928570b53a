"""What the config.json of a model folder describes."""

from pathlib import Path

from mini_forge.errors import CheckpointError
from mini_forge.json_faults import read_json
from mini_forge.model.families import decoder_spec
from mini_forge.model.spec import DecoderSpec


def read_spec(folder: Path) -> DecoderSpec:
    """What the model in `folder` is. Raises CheckpointError, which names its config.json."""
    return spec_of(read_json(folder / "config.json"), folder)


def spec_of(config: dict, folder: Path) -> DecoderSpec:
    """The same where that file has been read."""
    try:
        return decoder_spec(config)
    except CheckpointError as error:
        raise CheckpointError(*(f"{folder}/{problem}" for problem in error.problems)) from None
