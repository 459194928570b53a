"""C++ files of this folder as libraries, compiled at first use: for CPUs with AVX-512, what torch has no op for.

The compiler is g++, whose OpenMP library is the one torch brings, so that both run on the same threads. A file takes it
half a second to one and a half; the result stays in the user's cache folder, under the digest of the file, its headers
and the flags."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from pathlib import Path

import torch
from torch.profiler import record_function

from mini_forge.user_cache import cache_folder

__all__ = ["CannotCompile", "declared", "library", "named", "why_not"]

FLAGS = ("-O2", "-std=gnu++17", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi",
         "-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma")  # fmt: skip

DIGEST_BYTES = 32
KINDS = {"p": ctypes.c_void_p, "n": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}


class CannotCompile(Exception):
    """Why a file is not used here, in one line."""


@cache
def library(source: Path, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The library of the C++ file `source`, compiled with `flags` and `FLAGS`. Raises `CannotCompile`."""
    if sys.platform != "linux":
        raise CannotCompile("compiled for Linux alone")
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise CannotCompile("this CPU has no AVX-512")
    digest = hashlib.sha256(" ".join((*FLAGS, *flags)).encode())
    for file in (source, *sorted(source.parent.glob("*.h"))):
        digest.update(file.read_bytes())
    kept = cache_folder() / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    with suppress(OSError):  # not there, or damaged: compiled anew
        if _is_whole(kept):
            return ctypes.CDLL(str(kept))
    try:
        return _compile_and_keep(source, flags, kept)
    except OSError as err:  # a full disk; or what g++ made cannot be loaded
        raise CannotCompile(f"{source.name}: {err}") from None


def declared(loaded: ctypes.CDLL, functions: dict[str, str], **structures: type) -> ctypes.CDLL:
    """The library with its functions' types. functions: of each the kinds of its arguments (`KINDS`); they return
    nothing. structures: of NAME the class here, which must be as large as the library's `size_of_NAME` says."""
    for name, arguments in functions.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = [KINDS[kind] for kind in arguments], None
    for name, here in structures.items():
        there = ctypes.c_long.in_dll(loaded, f"size_of_{name}").value
        assert ctypes.sizeof(here) == there, f"{name}: {ctypes.sizeof(here)} bytes in Python, {there} in C++"
    return loaded


def why_not(load: Callable[[], ctypes.CDLL]) -> str | None:
    """Why `load` gives no library, None where it does."""
    try:
        load()
    except CannotCompile as err:
        return str(err)
    return None


def named(name: str):
    """A range that shows a profiler what torch does not see; without a profiler nothing, as it costs 10 µs."""
    return record_function(name) if torch.autograd._profiler_enabled() else nullcontext()


def _compile_and_keep(source: Path, flags: tuple[str, ...], kept: Path) -> ctypes.CDLL:
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
    keeps = os.access(kept.parent, os.W_OK | os.X_OK)
    with tempfile.TemporaryDirectory(dir=kept.parent if keeps else None) as work:
        made = Path(work) / kept.name
        _compile(source, flags, made)
        loaded = ctypes.CDLL(str(made))  # stays when the file has gone
        if keeps:
            with made.open("ab") as file:  # behind what a loader reads
                file.write(_digest(made.read_bytes()))
            os.replace(made, kept)  # whole, whoever compiles it at the same time
        return loaded


def _is_whole(kept: Path) -> bool:
    """Whether a kept library ends in the digest of what is before it: to load one that was cut short, as a power cut
    may leave it, would end the process."""
    content = kept.read_bytes()
    return content[-DIGEST_BYTES:] == _digest(content[:-DIGEST_BYTES])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _compile(source: Path, flags: tuple[str, ...], made: Path):
    compiler = shutil.which("g++")
    if compiler is None:
        raise CannotCompile("no g++ here")
    run = subprocess.run([compiler, *FLAGS, *flags, "-o", str(made), str(source)], capture_output=True, text=True,
                         errors="replace")  # fmt: skip
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines() or ["?"]
        raise CannotCompile(f"g++ refuses {source.name}: {errors[0]}")
