"""Documents on disk: the tokens of a dataset too large to hold, made once and memory-mapped in every later run.

A folder of the cache holds the tokens of all rows of one dataset file, end to end, as the run's template and tokenizer
make them:

    ids.i32  is_trained.bool   a number for each token
    rows.bin                   a record (`ROW`) for each row of the file, also for those with nothing to train on
    store.json                 the key, sizes and CRC-32 of the files, the highest token; written last

Its name is a digest of the key: the file's content, and everything else that tokens depend on (`recipe`), so the same
tokens serve runs with another seed, split or learning rate. It appears by one rename, when all is on the disk. A folder
that is torn or not ours is made anew. Runs that make the same one at once do not wait for each other: one of them
stays, and each keeps its own mapped. All of it may be deleted at any time:

    $XDG_CACHE_HOME/mini_forge/tokens/  or, without that variable, ~/.cache/mini_forge/tokens/

In memory stay 16 bytes a row, and of the mapped pages those of the last `_LOOKED_AT` documents.
"""

import errno
import hashlib
import json
import mmap
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import tokenizers

from mini_forge import __version__
from mini_forge.data.batches import Document, TokenStats
from mini_forge.data.chat import Template
from mini_forge.data.pairs import flatten
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.durable import TEMPORARY, flush, sync_folder
from mini_forge.errors import DataError
from mini_forge.user_cache import cache_folder

FORMAT = 2  # to be raised when the files' form, or what rows become, changes
LARGE_BYTES = 16 * 2**20  # of a dataset file: from here on, keeping all of it takes 0.4 GB, and tokenising it 10 s
ROW = np.dtype([("start", "i8"), ("line", "i4"), ("length", "i4"), ("trained", "i4"), ("is_truncated", "?")])
IDS, TRAINED, ROWS, MANIFEST = "ids.i32", "is_trained.bool", "rows.bin", "store.json"
_TEMPORARY_SECONDS = 24 * 3600  # one that nothing was written to for a day is nobody's
_LOOKED_AT = 128  # documents; for each the system maps up to 128 KiB of both files: 32 MiB
_PIECE = 2**20


class TokenStore(Sequence):
    """Documents whose tokens lie in mapped files; each is made of views when it is asked for."""

    def __init__(self, ids: "_Mapped", is_trained: "_Mapped", rows: np.ndarray, highest: int):
        self.highest = highest  # token of the whole file
        self._ids, self._is_trained, self._looked_at = ids, is_trained, 0
        self._starts, self._lengths, self._lines = (rows[name].copy() for name in ("start", "length", "line"))

    @property
    def inputs(self) -> np.ndarray:
        """(documents,) int32: the inputs of each, as `Document.inputs`."""
        return self._lengths - 1

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, line = int(self._starts[index]), int(self._lines[index])
        place = slice(start, start + int(self._lengths[index]))
        if self._looked_at == _LOOKED_AT:
            self._looked_at = 0
            for mapped in (self._ids, self._is_trained):
                mapped.release()
        self._looked_at += 1
        return Document(self._ids.values[place], self._is_trained.values[place], line)


@dataclass(frozen=True, eq=False)
class StoredRows:
    """The tokens of a dataset file's rows, all or some of them, in the order of the file."""

    ids: "_Mapped"
    is_trained: "_Mapped"
    rows: np.ndarray  # (rows,) ROW
    highest: int  # token of the whole file; -1 without any

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, chosen: np.ndarray) -> "StoredRows":
        """The rows at these indices, or where these booleans are true."""
        return StoredRows(self.ids, self.is_trained, self.rows[chosen], self.highest)

    def documents(self) -> tuple[TokenStore, TokenStats]:
        """As `tokenize` gives them: the rows with a token to train on, and what all took."""
        kept = self.rows[self.rows["length"] > 0]
        tokens, trained = (int(kept[name].sum(dtype=np.int64)) for name in ("length", "trained"))
        dropped, truncated = len(self.rows) - len(kept), int(kept["is_truncated"].sum())
        stats = TokenStats(len(self.rows), len(kept), dropped, truncated, tokens, trained)
        return TokenStore(self.ids, self.is_trained, kept, self.highest), stats


def is_large(path) -> bool:
    """Whether a dataset file is one whose tokens are kept on disk. A file that is not there is not."""
    path = Path(path)
    return os.path.isfile(path) and path.stat().st_size >= LARGE_BYTES


def recipe(
    template: Template,
    tokenizer: Tokenizer,
    max_length: int,
    train_on_prompt: bool,
    system_prompt: str | None,
    task: str,
) -> dict:
    """All that tokens depend on beside the rows, as JSON values.

    A template that tells the date makes other tokens every day; versions are in it because libraries are mended."""
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "special_tokens", "adds_bos")
    return {
        "format": FORMAT,
        "versions": [__version__, jinja2.__version__, tokenizers.__version__],
        "tokenizer": _digest(tokenizer.path / "tokenizer.json"),
        "special_tokens": [getattr(tokenizer, name) for name in names],
        "template": template.source,
        "date": template.date and template.date.isoformat(),
        "task": task,
        "max_length": max_length,
        "train_on_prompt": train_on_prompt,
        "system_prompt": system_prompt,
    }


class TokenCache:
    """The place of one dataset file's tokens. `stored` are those found there, `notes` what a user should know of it."""

    def __init__(self, path, recipe: dict):
        self.path, self._seen = Path(path), _stamp(path)
        self._key = json.loads(json.dumps({"file": _digest(path), **recipe}))  # as it is read back
        digest = hashlib.sha256(json.dumps(self._key, sort_keys=True).encode()).hexdigest()
        self.folder = cache_folder() / "tokens" / digest[:32]
        self.notes: list[str] = []
        self._is_damaged = False
        self.stored = self._find()

    def make(self, encoded: Iterable[tuple[Document | None, bool]]):
        """Write what `batches.encode` gives, publish it and map it as `stored`.

        Raises DataError if there is no room or the dataset changed meanwhile; then nothing is left behind."""
        temporary = None
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            _sweep(self.folder.parent)
            temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{self.folder.name}-", dir=self.folder.parent))
            highest = _write(temporary, encoded)
            if _stamp(self.path) != self._seen:
                raise DataError(f"{self.path}: changed while it was read; start again when it is complete")
            files = {name: _checksum(temporary / name) for name in (IDS, TRAINED, ROWS)}
            manifest = {"dataset": str(self.path.absolute()), "key": self._key, "files": files, "highest": highest}
            with (temporary / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=2)
                flush(file)
            self.stored = _open(temporary, highest)  # before it has its name: another run may put its own in its place
            _publish(temporary, self.folder, is_in_the_way=self._is_damaged)
        except OSError as error:
            raise DataError(
                f"{self.path}: its tokens cannot be kept in {self.folder.parent} ({error.strerror}); make room there, "
                "or name another folder in XDG_CACHE_HOME"
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)  # gone already, if all went well
        size = sum(size for size, _ in files.values())
        self.notes.append(f"{self.path}: its tokens are kept for later runs in {self.folder} ({size / 1e9:.2f} GB)")

    def _find(self) -> StoredRows | None:
        if not self.folder.exists():
            return None
        try:
            manifest = json.loads((self.folder / MANIFEST).read_bytes())
            files = {name: _checksum(self.folder / name) for name in (IDS, TRAINED, ROWS)}
            is_whole = manifest["key"] == self._key and manifest["files"] == files
            stored = _open(self.folder, int(manifest["highest"])) if is_whole else None
        except (OSError, ValueError, TypeError, KeyError):  # also of a run that replaces it at this moment
            stored = None
        if stored is None:
            self._is_damaged = True
            self.notes.append(f"{self.folder}: not the tokens of {self.path}, or damaged; made anew")
        return stored


class _Mapped:
    """A file of numbers, mapped into memory to be read. Pages count as the process's from the first look at them until
    `release`; the system keeps them in its cache all the same."""

    def __init__(self, path: Path, dtype):
        with path.open("rb") as file:
            is_empty = os.fstat(file.fileno()).st_size == 0  # such a file cannot be mapped
            self._map = None if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.values = np.frombuffer(self._map or b"", dtype)

    def release(self):
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def highest_token(documents: Sequence) -> int:
    """The highest token of documents or pairs; -1 without any."""
    if isinstance(documents, TokenStore):
        return documents.highest
    return max((int(document.ids.max()) for document in flatten(documents)), default=-1)


def inputs_of(documents: Sequence) -> np.ndarray:
    """(documents,) the inputs of each, without touching the tokens of a store."""
    if isinstance(documents, TokenStore):
        return documents.inputs
    return np.fromiter((document.inputs for document in documents), np.int64, len(documents))


def _write(folder: Path, encoded: Iterable[tuple[Document | None, bool]]) -> int:
    """The files of tokens and of rows, on the disk when this returns. Returns the highest token."""
    highest, start = -1, 0
    with ExitStack() as stack:
        files = [stack.enter_context((folder / name).open("wb", _PIECE)) for name in (IDS, TRAINED, ROWS)]
        ids, trained, rows = files
        for document, is_truncated in encoded:
            if document is None:
                rows.write(np.zeros(1, ROW))
                continue
            ids.write(document.ids.astype(np.int32, copy=False))
            trained.write(document.is_trained)
            length, count = len(document.ids), int(document.is_trained.sum())
            rows.write(np.array([(start, document.line, length, count, is_truncated)], ROW))
            highest, start = max(highest, int(document.ids.max())), start + length
        for file in files:
            flush(file)
    return highest


def _open(folder: Path, highest: int) -> StoredRows:
    rows = np.fromfile(folder / ROWS, ROW)
    return StoredRows(_Mapped(folder / IDS, np.int32), _Mapped(folder / TRAINED, bool), rows, highest)


def _publish(temporary: Path, folder: Path, is_in_the_way: bool):
    """Give a whole folder its name. `is_in_the_way`: what has that name is to go."""
    sync_folder(temporary)
    if is_in_the_way:
        doomed = tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent)
        with suppress(FileNotFoundError):  # another run has taken it away
            os.rename(folder, Path(doomed, folder.name))
        shutil.rmtree(doomed, ignore_errors=True)
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return  # another run was quicker, and its tokens are the same
    sync_folder(folder.parent)


def _sweep(root: Path):
    """Remove what killed runs left half-written."""
    for leftover in root.glob(TEMPORARY + "*"):
        with suppress(FileNotFoundError):  # it has just been published
            newest = max(path.stat().st_mtime for path in (leftover, *leftover.iterdir()))
            if newest < time.time() - _TEMPORARY_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _stamp(path) -> tuple[int, ...] | None:
    """By which a file that was changed, replaced or removed is known."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _pieces(path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            yield piece


def _digest(path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    try:
        for piece in _pieces(path):
            digest.update(piece)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it must be a readable file") from error
    return digest.hexdigest()


def _checksum(path: Path) -> list[int]:
    """The size and CRC-32 of a file."""
    size = checksum = 0
    for piece in _pieces(path):
        size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]
