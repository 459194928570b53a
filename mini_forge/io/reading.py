"""Tensors out of safetensors files, with plain reads: one at a time, or a stream that reads ahead."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch

from mini_forge.errors import CheckpointError


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `start` and `size` in bytes of `file`."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def rows(self, first: int, last: int) -> "TensorEntry":
        """Rows first … last of it, which lie together."""
        row = self.size // self.shape[0]
        start, size = self.start + first * row, (last - first) * row
        return replace(self, start=start, size=size, shape=(last - first, *self.shape[1:]))


@dataclass(frozen=True)
class Piece:
    """What is read at once, a tensor or some rows of it, and what takes it.

    is_kept: read into memory of its own, which `put` may keep. Else `put` must copy what it needs."""

    name: str
    entry: TensorEntry
    put: Callable[[torch.Tensor], None]
    is_kept: bool = False


def read_tensor(name: str, entry: TensorEntry, buffer: torch.Tensor) -> torch.Tensor:
    """The tensor, as stored, in `buffer`: uint8 (entry.size,). Raises CheckpointError where the file cannot be read,
    or ends too early."""
    rest = memoryview(buffer.numpy())
    try:
        with entry.file.open("rb", buffering=0) as file:  # a buffered file would read on into the next tensor
            file.seek(entry.start)
            while len(rest):
                count = file.readinto(rest)  # lets other threads run; at most 2 GiB a call on Linux
                if not count:
                    raise CheckpointError(f"{entry.file}: ended while tensor {name!r} was read; fetch it again")
                rest = rest[count:]
    except OSError as error:
        raise CheckpointError(
            f"{entry.file}: tensor {name!r} cannot be read ({error.strerror}); check the file, or fetch it again"
        ) from None
    return buffer.view(entry.dtype).view(entry.shape)


class ReadAhead:
    """Reads pieces in the order given, each by a thread while the one before it is used.

    Host memory: two buffers, for the piece in hand and the one being read, each as large as the largest piece. They are
    taken in turn and kept: freed blocks of a thousand sizes would leave the process half as large again as the model.
    """

    def __init__(self):
        self.buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    def stream(self, pieces: list[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each piece with its tensor, as stored; unless it is kept, it holds until the next is taken.

        What goes wrong in the thread is raised here, when the piece is due. The thread ends with the generator: close
        it (contextlib.closing) where it may not be used up."""
        self._grow(max((piece.entry.size for piece in pieces if not piece.is_kept), default=0))
        buffers = cycle(self.buffers)
        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:

            def start(piece: Piece) -> Future:
                # Memory is allocated here: what a thread allocates comes from a heap of its own.
                size = piece.entry.size
                buffer = torch.empty(size, dtype=torch.uint8) if piece.is_kept else next(buffers)[:size]
                return thread.submit(read_tensor, piece.name, piece.entry, buffer)

            coming = start(pieces[0]) if pieces else None
            for i, piece in enumerate(pieces):
                tensor = coming.result()
                coming = start(pieces[i + 1]) if i + 1 < len(pieces) else None
                yield piece, tensor

    def _grow(self, size: int):
        if self.buffers[0].numel() < size:
            self.buffers = []  # the old ones go first
            self.buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
