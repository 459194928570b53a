"""The state in a checkpoint, beside its adapter: written, read with care, and that it is of the same data."""

import hashlib
import io
import pickle
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from mini_forge.errors import CheckpointError, ConfigError, is_out_of_memory
from mini_forge.io.adapters import WEIGHTS_FILE

# What torch.load raises for another program's archive, or for bytes that only look like a pickle.
FOREIGN = (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError,
           struct.error)  # fmt: skip
STATE_PARTS = ("loop", "optimizer", "rng")  # the records in every trainer_state.pt


def rng_state() -> dict:
    """The states of every random generator that training may draw from, as tensors and plain values."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict):
    torch.set_rng_state(state["torch"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    random.setstate((3, tuple(state["python"]), state["python_gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save_state(path: Path, state: dict):
    """Write a `trainer_state.pt`, with the digest of the adapter beside it, by which `load_state` knows a damaged one.
    By our own hand: torch.save tells of a full disk as a bare RuntimeError."""
    adapter = path.with_name(WEIGHTS_FILE)
    buffer = io.BytesIO()
    torch.save(state | ({"adapter": _digest(adapter)} if adapter.exists() else {}), buffer)
    path.write_bytes(buffer.getbuffer())


def load_state(path: Path, parts: tuple[str, ...] = ("data",)) -> dict:
    """A `trainer_state.pt` of ours. Read with weights_only: it holds tensors and plain values, and can run no code.

    parts: what must be in it beside STATE_PARTS. Raises CheckpointError for a file that is damaged or not ours. torch
    saves a zip archive, whose checksums tell a damaged file before anything of it is used."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        damaged = str(error)
    if damaged is not None:
        raise CheckpointError(f"{path}: unreadable checkpoint ({damaged}); delete its folder to resume before it")
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except FOREIGN as error:
        if is_out_of_memory(error):
            raise
        state = None
    is_ours = isinstance(state, dict) and all(part in state for part in (*parts, *STATE_PARTS))
    if not is_ours or not all(isinstance(state[part], dict) for part in STATE_PARTS):
        raise CheckpointError(f"{path}: not the state of a training of ours; delete its folder to resume before it")
    adapter = path.with_name(WEIGHTS_FILE)
    if "adapter" in state and not (adapter.is_file() and _digest(adapter) == state["adapter"]):
        raise CheckpointError(f"{adapter}: damaged, not what was saved with {path.name}; delete its folder to resume "
                              "before it")  # fmt: skip
    return state


def check_same_data(state: dict, fingerprint: str, dataset: str, source: Path):
    """Raise ConfigError if the checkpoint `source` was saved over other data than has `fingerprint`."""
    if state.get("data", fingerprint) != fingerprint:  # a reward model of an older version has none
        raise ConfigError(
            f"dataset: {dataset!r} (or the tokenizer) has changed since {source} was saved, so its place in the data "
            "means nothing; put it back, or start another run with init_adapter"
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
