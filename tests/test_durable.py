"""Files and folders that appear whole or not at all."""

import errno
import os

import pytest

from mini_forge.durable import new_output, staged, write_together
from mini_forge.errors import CheckpointError, ConfigError


def make(temporary, kind):
    (temporary / "a" if kind == "folder" else temporary).write_text("whole")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_output_has_its_name_only_when_it_is_whole(tmp_path, kind):
    out = tmp_path / "new" / "deep" / "out"
    with new_output(out, kind) as temporary:
        make(temporary, kind)
        assert not out.exists() and temporary.parent.parent == out.parent
    assert (out / "a" if kind == "folder" else out).read_text() == "whole"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("failure, raised", [
    (lambda: CheckpointError("no"), CheckpointError), (KeyboardInterrupt, KeyboardInterrupt),
    (lambda: OSError(errno.EIO, "broken"), ConfigError), (lambda: OSError(errno.ENOSPC, "full"), OSError),
])  # fmt: skip
def test_an_output_that_fails_leaves_nothing(tmp_path, kind, failure, raised):
    (tmp_path / "kept").mkdir()
    with pytest.raises(raised) as caught, new_output(tmp_path / "kept" / "new" / "deep" / "out", kind) as temporary:
        make(temporary, kind)
        raise failure()
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"] and not any((tmp_path / "kept").iterdir())
    assert raised is not OSError or caught.value.filename == str(tmp_path / "kept" / "new" / "deep" / "out")
    assert raised is not ConfigError or f"cannot be written (broken); name another {kind}" in str(caught.value)


def test_a_folder_made_for_an_output_stays_where_another_has_put_something(tmp_path):
    with pytest.raises(CheckpointError), new_output(tmp_path / "new" / "out", "file"):
        (tmp_path / "new" / "other").write_text("theirs")
        raise CheckpointError("no")
    assert os.listdir(tmp_path / "new") == ["other"]


def test_what_is_there_is_not_replaced_but_an_empty_folder(tmp_path):
    file, full, empty = tmp_path / "file", tmp_path / "full", tmp_path / "empty"
    file.write_text("mine")
    full.mkdir()
    (full / "a").write_text("mine")
    empty.mkdir()
    for out, kind in ((file, "file"), (file, "folder"), (full, "folder"), (full, "file"), (empty, "file")):
        with pytest.raises(ConfigError, match=f"exists.*; name a new {kind}"), new_output(out, kind):
            raise AssertionError
    with new_output(empty, "folder") as temporary:
        make(temporary, "folder")
    assert (empty / "a").read_text() == "whole" and file.read_text() == (full / "a").read_text() == "mine"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_appears_meanwhile_is_left_alone(tmp_path, kind):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="cannot be written"), new_output(out, kind) as temporary:
        make(temporary, kind)
        if kind == "folder":
            out.mkdir()
        (out / "theirs" if kind == "folder" else out).write_text("theirs")
    assert os.listdir(tmp_path) == ["out"]
    assert (out / "theirs" if kind == "folder" else out).read_text() == "theirs"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_link_is_not_written_through(tmp_path, kind):
    (tmp_path / "place").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "place")
    with pytest.raises(ConfigError, match="is a link"), new_output(tmp_path / "out", kind):
        raise AssertionError
    assert sorted(os.listdir(tmp_path)) == ["out", "place"] and (tmp_path / "out").is_symlink()


def test_what_another_is_making_is_not_removed(tmp_path):
    with new_output(tmp_path / "out", "folder") as first:
        make(first, "folder")
        with new_output(tmp_path / "out", "folder") as second:
            (second / "b").write_text("second")
        assert (first / "a").exists()
        (tmp_path / "out").rename(tmp_path / "moved")
    assert os.listdir(tmp_path / "out") == ["a"] and os.listdir(tmp_path / "moved") == ["b"]


def test_a_file_that_the_body_cannot_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="base/x: cannot be read"), new_output(tmp_path / "out", "file"):
        (tmp_path / "base" / "x").read_text()


def test_files_are_written_together_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError):
        write_together(tmp_path, {"a": "new", "gone/b": "new"})
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
    write_together(tmp_path, {"a": None, "b": "new"})
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "file/out"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_place_that_cannot_be_is_refused(tmp_path, name, kind):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=f"cannot be written .*; name another {kind}"),
        new_output(tmp_path / name, kind),
    ):
        raise AssertionError
    assert os.listdir(tmp_path) == ["file"]


def test_two_processes_write_one_file_under_names_of_their_own(tmp_path, monkeypatch):
    one = staged(tmp_path / "eval.json", "{}")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    other = staged(tmp_path / "eval.json", "[]")
    assert one != other and one.read_text() == "{}" and other.read_text() == "[]"
    staged(tmp_path / ("é" * 120 + ".html"), "x")  # as long as a name may be
