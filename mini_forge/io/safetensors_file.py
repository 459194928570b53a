"""Files of safetensors: where each tensor lies in one, and one written a tensor at a time."""

import json
import math
from itertools import pairwise
from pathlib import Path

import torch

from mini_forge.errors import CheckpointError
from mini_forge.io.reading import TensorEntry

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT_BYTES = 100_000_000  # the format's own bound


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in file order. Raises CheckpointError for a file that is not sound."""
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if length < 8 or header_bytes > min(HEADER_LIMIT_BYTES, length - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut short; fetch it again")
            header = json.loads(file.read(header_bytes), object_pairs_hook=_unique)
            if not isinstance(header, dict):
                raise ValueError("not an object")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the weight index names this file, but it is absent; fetch it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the file, or fetch it again") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: broken safetensors header ({error}); fetch it again") from None
    entries = {n: _entry(path, n, e, 8 + header_bytes, length) for n, e in header.items() if n != "__metadata__"}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)))
    for (one, before), (other, after) in pairwise(entries.items()):
        if before.start + before.size > after.start:
            raise CheckpointError(f"{path}: tensors {one!r} and {other!r} lie over each other; fetch it again")
    return entries


def _unique(pairs: list[tuple[str, object]]) -> dict:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def _entry(path: Path, name: str, record: dict, data_start: int, file_bytes: int) -> TensorEntry:
    def refuse(what: str):
        raise CheckpointError(f"{path}: tensor {name!r} {what}; fetch it again") from None

    try:
        dtype, shape, (first, last) = DTYPES[record["dtype"]], tuple(record["shape"]), record["data_offsets"]
    except (KeyError, TypeError, ValueError):
        refuse(f"has an unreadable header entry {record!r}")
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        refuse(f"has an unreadable header entry {record!r}")
    size = last - first
    if data_start + last > file_bytes:
        refuse("ends past the end of the file")
    if size != math.prod(shape) * dtype.itemsize:
        refuse(f"of shape {list(shape)} cannot have {size} bytes")
    return TensorEntry(path, data_start + first, size, dtype, shape)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]):
    """A safetensors file of these tensors, from whichever device, in their order."""
    entries = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_safetensors(path, entries, (tensor.cpu() for tensor in tensors.values()))


def write_safetensors(path: Path, entries: list[tuple[str, torch.dtype, tuple[int, ...]]], tensors):
    """A safetensors file from tensors that are made one at a time, in the order of `entries` (name, dtype, shape)."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in entries:
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
