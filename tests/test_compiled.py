"""C++ files compiled on the user's machine: kept, made anew where that is needed, and named reasons where it fails."""

import ctypes
import shutil
from pathlib import Path

import pytest

from mini_forge.user_cache import cache_folder
from mini_forge_kernels import compiled
from mini_forge_kernels.compiled import CannotCompile

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
ANSWER = 'extern "C" int answer() { return %d; }\n'


def library(source, *flags):
    """As in a new process."""
    return compiled.library.__wrapped__(source, flags)


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answers.cpp"
    path.write_text(ANSWER % 42)
    return path


def kept():
    return sorted(cache_folder().iterdir())


@needs_compiler
def test_it_is_compiled_once_for_what_it_says(source, monkeypatch):
    assert library(source).answer() == 42
    (file,) = kept()
    compiles = []
    compile_ = compiled._compile
    monkeypatch.setattr(compiled, "_compile", lambda *args: (compiles.append(args), compile_(*args)))
    assert library(source).answer() == 42 and not compiles
    source.write_text(ANSWER % 43)
    assert library(source).answer() == 43 and len(compiles) == 1
    assert library(source, "-DNAME").answer() == 43 and len(compiles) == 2
    assert len(kept()) == 3 and file in kept()


@needs_compiler
def test_a_structure_must_have_its_size_in_cpp(source):
    class Pair(ctypes.Structure):
        _fields_ = [("a", ctypes.c_long), ("b", ctypes.c_int)]

    source.write_text(
        'struct Pair { long a; int b, c[2]; }; extern "C" { extern const long size_of_Pair = sizeof(Pair); }'
    )
    with pytest.raises(AssertionError, match="Pair: 16 bytes in Python, 24 in C"):
        compiled.declared(library(source), {}, Pair=Pair)


@needs_compiler
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_what_was_kept_and_cannot_be_loaded_is_made_anew(source, share):
    """To load a file that was cut in half would be a bus error."""
    library(source)
    (file,) = kept()
    part = file.read_bytes()
    part = part[: int(share * len(part))]
    file.unlink()  # a new file in its place: this process still runs from the old one's pages
    file.write_bytes(part)
    assert library(source).answer() == 42
    assert kept() == [file] and file.stat().st_size > 1000


def test_a_folder_is_absolute_or_none(monkeypatch):
    """Else libraries would be loaded from wherever a process works."""
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", "/home/of/someone")
    assert cache_folder() == Path("/home/of/someone/.cache/mini_forge")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME, and no entry in passwd
    assert cache_folder() == Path("/dev/null/mini_forge")


@needs_compiler
def test_where_nothing_can_be_kept_it_is_compiled_for_this_process(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library(source).answer() == 42


@needs_compiler
def test_what_the_compiler_refuses_is_named_in_a_line(source):
    source.write_text("int answer() { return forty_two; }")
    with pytest.raises(CannotCompile, match=r"^g\+\+ refuses answers.cpp: .*'?forty_two.*$") as refused:
        library(source)
    assert "\n" not in str(refused.value) and not kept()
    with pytest.raises(CannotCompile, match="-mno-such-flag"):
        library(source, "-mno-such-flag")


def test_without_a_compiler_or_a_disk(source, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CannotCompile, match="^no g[+][+] here$"):
        library(source)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled.tempfile, "TemporaryDirectory", full)
    with pytest.raises(CannotCompile, match="No space left on device"):
        library(source)
    monkeypatch.setattr(compiled.sys, "platform", "darwin")
    with pytest.raises(CannotCompile, match="Linux"):
        library(source)


def test_the_cache_folder(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/mini_forge")
