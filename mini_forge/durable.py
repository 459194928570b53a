"""Files and folders that appear whole or not at all: each is written under a temporary name, flushed to the disk and
renamed."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mini_forge.errors import ConfigError, is_disk_full, reason_of

TEMPORARY = ".tmp-"


def write_atomic(path: Path, text: str):
    """Write a text file so that a reader sees the old one or the whole new one."""
    fresh = staged(path, text)
    try:
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def write_together(folder: Path, texts: dict[str, str | None]):
    """Write files of a folder; none is replaced before all are on the disk. None removes one."""
    fresh: dict[Path, Path] = {}
    try:
        for name, text in texts.items():
            if text is not None:
                fresh[folder / name] = staged(folder / name, text)
        for name in texts:
            path = folder / name
            if path in fresh:
                os.replace(fresh[path], path)
            else:
                path.unlink(missing_ok=True)
    finally:
        for temporary in fresh.values():
            temporary.unlink(missing_ok=True)


def staged(path: Path, text: str) -> Path:
    """The text on the disk under a temporary name beside `path`, which is this process's own."""
    temporary, content = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name[-40:]}"), text.encode("utf-8")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            flush(file)
    except BaseException as error:  # as a full disk, or a signal
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise
    return temporary


def json_text(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value):
    write_atomic(path, json_text(value))


def flush(file):
    """Have what was written to an open file on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush_file(path: Path):
    """Have a closed file on the disk."""
    with path.open("rb+") as file:
        flush(file)


def flush_folder(folder: Path):
    """Have a folder's files, and their names, on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            flush_file(file)
    sync_folder(folder)


def sync_folder(folder: Path):
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_output(out: Path, kind: str) -> Iterator[Path]:
    """A temporary path, on which the body makes what is to be `out`: kind, a "file" or a "folder", given as empty.

    It gets its name when the body ends, and when that fails nothing is left, nor any folder made for it. Raises
    ConfigError where `out` is there (an empty folder may be), then or in the end, or cannot be written, or where the
    body cannot read a file; OSError for a full disk."""
    missing = _check_place(out, kind)
    room = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        room = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{out.name[:60]}-", dir=out.parent))
        temporary = room / out.name
        if kind == "folder":
            temporary.mkdir()
        yield temporary
        flush_folder(room)
        if kind == "file" and os.path.lexists(out):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(temporary, out)  # of a folder: fails where one is that is not empty
        sync_folder(out.parent)
    except OSError as error:
        if is_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out)) from error
        file = error.filename
        if file and room is not None and not Path(os.fsdecode(file)).is_relative_to(room):
            raise ConfigError(f"{file}: cannot be read ({reason_of(error)}); check the file") from None
        raise _unwritable(out, kind, error) from None
    finally:
        if room is not None:
            shutil.rmtree(room, ignore_errors=True)
        for folder in missing:
            with suppress(OSError):  # not made, or something is in it
                folder.rmdir()


def _check_place(out: Path, kind: str) -> list[Path]:
    """The folders that `new_output` has to make, innermost first. Raises ConfigError where it cannot be there."""
    try:
        with suppress(FileNotFoundError):
            os.lstat(out)  # what Path asks says of a name that cannot be that it is not there
        is_foreign = out.is_symlink() or os.path.ismount(os.path.abspath(out))
        is_taken = os.path.lexists(out) and (kind == "file" or not out.is_dir() or any(out.iterdir()))
        missing = [folder for folder in out.absolute().parents if not folder.exists()]
    except (OSError, ValueError) as error:
        raise _unwritable(out, kind, error) from None
    if is_foreign:
        raise ConfigError(f"{out}: is a link or a disk of its own; name a new {kind} elsewhere or within it")
    if is_taken:
        raise ConfigError(f"{out}: exists{' and is not empty' if kind == 'folder' else ''}; name a new {kind}")
    return missing


def _unwritable(out: Path, kind: str, error: OSError | ValueError) -> ConfigError:
    return ConfigError(f"{out}: cannot be written ({reason_of(error)}); name another {kind}")
