"""Files and folders that appear whole or not at all: each is written under a temporary name, flushed to the disk and
renamed."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mini_forge.errors import ConfigError, is_disk_full, reason_of

TEMPORARY, REPLACED = ".tmp-", ".old-"


def write_atomic(path: Path, text: str):
    """Write a text file so that a reader sees the old one or the whole new one."""
    os.replace(staged(path, text), path)


def write_together(folder: Path, texts: dict[str, str | None]):
    """Write files of a folder, all or none of them; None removes one."""
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
    """The text on the disk under a temporary name beside `path`."""
    temporary, content = path.with_name(TEMPORARY + path.name), text.encode("utf-8")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            flush(file)
    except OSError as error:  # as of a full disk
        temporary.unlink(missing_ok=True)
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


def publish_file(temporary: Path, final: Path):
    """Flush a finished file to the disk and give it its name; the folder is left to `sync_folder`."""
    with temporary.open("rb+") as file:
        flush(file)
    os.replace(temporary, final)


def publish_folder(temporary: Path, final: Path):
    """Flush a finished temporary folder to the disk and give it its name, in place of what had that name."""
    for file in temporary.rglob("*"):
        if file.is_file():
            with file.open("rb+") as handle:
                flush(handle)
    sync_folder(temporary)
    old = final.with_name(REPLACED + final.name)
    if final.exists():
        os.rename(final, old)  # if the next rename never comes, `RunFolder.sweep` takes this one back
    os.rename(temporary, final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


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
    ConfigError where `out` is there already (an empty folder may be) or cannot be written; OSError for a full disk."""
    temporary, missing = _place_of(out, kind)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder":
            temporary.mkdir()
        yield temporary
        if kind == "folder":
            publish_folder(temporary, out)
        else:
            publish_file(temporary, out)
            sync_folder(out.parent)
    except OSError as error:
        if is_disk_full(error):
            error.filename = error.filename or str(out)
            raise
        raise _unwritable(out, kind, error) from None
    finally:
        with suppress(OSError):
            _remove(temporary)
            for folder in missing:
                folder.rmdir()  # unless something is in it


def _place_of(out: Path, kind: str) -> tuple[Path, list[Path]]:
    """The temporary path of `new_output`, and the folders it lacks, innermost first."""
    try:
        is_taken = out.exists() and not (kind == "folder" and out.is_dir() and not any(out.iterdir()))
        temporary = out.with_name(TEMPORARY + out.name)
        _remove(temporary)  # of a process that was killed
        missing = [folder for folder in out.absolute().parents if not folder.exists()]
    except (OSError, ValueError) as error:
        raise _unwritable(out, kind, error) from None
    if is_taken:
        raise ConfigError(f"{out}: exists{' and is not empty' if kind == 'folder' else ''}; name a new {kind}")
    return temporary, missing


def _unwritable(out: Path, kind: str, error: OSError | ValueError) -> ConfigError:
    return ConfigError(f"{out}: cannot be written ({reason_of(error)}); name another {kind}")


def _remove(path: Path):
    """Remove a file, or a folder with all in it, that may not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
