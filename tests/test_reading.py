"""Reading a checkpoint as a stream: each byte once, in file order, the next piece while the last is used."""

import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mini_forge
from mini_forge.errors import CheckpointError, UserError
from mini_forge.io.reading import Piece, ReadAhead
from mini_forge.io.weights import Checkpoint, Loader
from mini_forge.model.quant import Linear4bit, Linear8bit
from tests import tiny_experts
from tests.test_weights import rewrite, split_in_two, store_in_4bit
from tests.tiny import write_checkpoint


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "model")


class RecordedFile:
    """A file that notes what is read of it: (file name, first byte, end)."""

    def __init__(self, file, name: str, log: list):
        self.file, self.name, self.log = file, name, log

    def readinto(self, buffer):
        start = self.file.tell()
        count = self.file.readinto(buffer)
        self.log.append((self.name, start, start + count))
        return count

    def __getattr__(self, attribute):
        return getattr(self.file, attribute)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


@pytest.fixture
def reads(monkeypatch):
    log, plain = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *a, **k: RecordedFile(plain(path, *a, **k), path.name, log))
    return log


def data_start(path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "read-ahead" in thread.name]


def checkpoint_of(kind, folder):
    if kind in ("llama", "stored_in_4bit"):
        write_checkpoint(folder)
        if kind == "stored_in_4bit":
            store_in_4bit(folder, nested=True)
    else:
        tiny_experts.write_checkpoint(folder, kind.removesuffix("_mxfp4"), mxfp4=kind.endswith("_mxfp4"))
    split_in_two(folder)
    return folder


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize("kind", ["llama", "stored_in_4bit", "qwen3_moe", "gpt_oss", "gpt_oss_mxfp4", "llama4_text"])
def test_each_byte_is_read_once_in_file_order(kind, quantization, tmp_path, reads, monkeypatch):
    monkeypatch.setattr("mini_forge.io.weights.DENSE_BYTES", 1000)  # tensors that stay dense come in many parts
    folder = checkpoint_of(kind, tmp_path / "m")
    mini_forge.load_model(folder, quantization=quantization)
    for file in sorted(folder.glob("*.safetensors")):
        spans = [(start, end) for name, start, end in reads if name == file.name]
        assert [start for start, _ in spans] == [data_start(file), *(end for _, end in spans[:-1])]
        assert spans[-1][1] == file.stat().st_size
    assert [name for name, _, _ in reads] == sorted(name for name, _, _ in reads)
    assert not reading_threads()


def test_parts_and_whole_tensors_give_the_same_weights(tiny, monkeypatch):
    monkeypatch.setattr("mini_forge.io.weights.DENSE_BYTES", 300)
    stored = load_file(tiny / "model.safetensors")
    assert all(torch.equal(p, stored[n]) for n, p in mini_forge.load_model(tiny).named_parameters())


def test_the_next_piece_is_read_while_the_last_is_used_and_does_not_touch_it(tiny, reads):
    stored, entries = load_file(tiny / "model.safetensors"), Checkpoint(tiny).entries
    pieces = [Piece(name, entry, None) for name, entry in entries.items()]
    for i, (piece, tensor) in enumerate(ReadAhead().stream(pieces)):
        ahead = min(i + 2, len(pieces))
        until = time.monotonic() + 20
        while len(reads) < ahead and time.monotonic() < until:
            time.sleep(0.001)
        assert len(reads) == ahead  # this one and the next, no more
        assert torch.equal(tensor, stored[piece.name])


def test_two_buffers_are_all_the_memory_there_is(tiny):
    pieces = [Piece(name, entry, None) for name, entry in Checkpoint(tiny).entries.items()]
    reader = ReadAhead()
    places = [tensor.data_ptr() for _, tensor in reader.stream(pieces)]
    places += [tensor.data_ptr() for _, tensor in reader.stream(pieces[:4])]
    assert len(set(places)) == 2 and all(a != b for a, b in zip(places, places[1 : len(pieces)], strict=False))
    kept = [replace(piece, is_kept=True) for piece in pieces]
    assert len({tensor.data_ptr() for tensor in [tensor for _, tensor in reader.stream(kept)]}) == len(pieces)


def test_files_that_give_less_than_they_are_asked_for_are_asked_again(tiny, monkeypatch, reads):
    """As Linux does above 2 GiB."""
    plain = RecordedFile.readinto
    monkeypatch.setattr(RecordedFile, "readinto", lambda file, buffer: plain(file, buffer[:1000]))
    stored = load_file(tiny / "model.safetensors")
    assert all(torch.equal(p, stored[n]) for n, p in mini_forge.load_model(tiny).named_parameters())
    assert len(reads) > len(stored)


@pytest.mark.parametrize("breakage, message", [
    (lambda file: os.truncate(file, file.stat().st_size - 3000), "b.safetensors: ended while tensor"),
    (lambda file: file.unlink(), "b.safetensors: tensor .* cannot be read .No such file"),
])  # fmt: skip
def test_a_file_that_changes_while_it_is_read_is_named(folder, breakage, message):
    split_in_two(folder)
    loader = Loader(folder, torch.float32)
    breakage(folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=message):
        loader.load()
    assert not reading_threads()


def test_the_thread_ends_when_a_weight_is_refused(folder):
    rewrite(folder, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(UserError, match="NaN") as caught:
        mini_forge.load_model(folder, quantization="nf4")
    assert caught.tb is not None and not reading_threads()  # while the traceback still holds the frames


def test_nothing_is_read_of_a_checkpoint_that_does_not_fit(folder, reads):
    rewrite(folder, lambda t: t.update({"zzz": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match="unexpected tensor 'zzz'"):
        mini_forge.load_model(folder)
    assert not reads


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_stacks_hold_each_expert_as_quantized_alone(kind, quantization, tmp_path):
    folder = tiny_experts.write_checkpoint(tmp_path / "m", kind)
    dense, stacks = mini_forge.load_model(folder), mini_forge.load_model(folder, quantization=quantization)
    checked = 0
    for name, weights in dense.named_parameters():
        if weights.dim() == 3:
            stack, checked = stacks.get_submodule(name), checked + 1
            for e, weight in enumerate(weights):
                alone = Linear4bit.from_weight(weight) if quantization == "nf4" else Linear8bit.from_weight(weight)
                assert torch.equal(stack.expert(e), alone.dequantized())
    assert checked == 4


def test_experts_in_two_forms_are_refused(tmp_path):
    folder = tiny_experts.write_checkpoint(tmp_path / "m", "gpt_oss", mxfp4=True)
    name = "layers.0.mlp.experts.down_proj"
    rewrite(folder, lambda t: t.update({f"model.{name}": torch.zeros(6, 64, 64)}))
    with pytest.raises(CheckpointError, match=f"{name}: stored both in MXFP4 and in another form"):
        mini_forge.load_model(folder, quantization="nf4")
