"""Merge an adapter into its full-precision base: a model folder that any program reads.

The base's files are read and written tensor by tensor, in their order, so memory holds one tensor. Only weights that
have an adapter change: W + s·BA, summed in float32 and rounded once to the stored dtype. A base that exists only in
4 or 8 bits is made dense first, in the dtype it was quantized from; nothing is ever merged into quantized weights.
"""

import json
import shutil
from pathlib import Path

import torch

from mini_forge.errors import CheckpointError, ConfigError
from mini_forge.io.adapters import PREFIX, read_adapter_config, read_adapter_tensors
from mini_forge.io.models import base_of, is_adapter
from mini_forge.io.runs import TEMPORARY, publish_folder
from mini_forge.io.weights import BNB_SUFFIXES, Checkpoint, read_json, weight_files, write_safetensors
from mini_forge.model.quant import Linear4bit, Linear8bit

COPIED = ("generation_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "LICENSE")


def merge_adapter(run: str | Path, out: str | Path) -> Path:
    """Write base + adapter of folder `run` as a Hugging Face model folder `out`, which must not exist or be empty."""
    run, out = Path(run).expanduser(), Path(out).expanduser()
    if not is_adapter(run):
        raise CheckpointError(f"{run}: no adapter_config.json; merge takes the folder of a run or adapter")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty; name a new folder")
    base = base_of(run)
    checkpoint = Checkpoint(base)
    deltas = _factors(run, checkpoint)
    try:
        _write_merged(checkpoint, run, deltas, out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); name another folder") from None
    return out


def _write_merged(checkpoint: Checkpoint, run: Path, deltas: dict, out: Path):
    temporary = out.with_name(TEMPORARY + out.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for file in weight_files(checkpoint.folder):
            names = [n for n, e in checkpoint.entries.items() if e.file == file and not _is_companion(n)]
            entries = [_dense_entry(checkpoint, n) for n in names]
            tensors = (_merged(checkpoint, n, deltas.get(n)) for n in names)
            write_safetensors(temporary / file.name, entries, tensors)
        _write_records(checkpoint, run, temporary)
        if out.exists():
            out.rmdir()
        publish_folder(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _factors(run: Path, checkpoint: Checkpoint) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """For each base weight that has an adapter: its factors A, B and scaling. Every factor must find its weight."""
    spec, _ = read_adapter_config(run)
    tensors = read_adapter_tensors(run)
    factors = {}
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key.removesuffix(".lora_A.weight")
        name = stem.removeprefix(PREFIX) + ".weight"
        if name not in checkpoint.entries:
            raise CheckpointError(f"{run}: the adapter's {stem} has no weight {name!r} in {checkpoint.folder}")
        if f"{stem}.lora_B.weight" not in tensors:
            raise CheckpointError(f"{run}: the adapter has {key} but no {stem}.lora_B.weight")
        factors[name] = (tensors[key], tensors[f"{stem}.lora_B.weight"], spec.scaling)
    return factors


def _is_companion(name: str) -> bool:
    return name.endswith((*BNB_SUFFIXES, ".SCB", ".weight_format"))


def _stored_linear(checkpoint: Checkpoint, name: str):
    """The quantized layer a weight is stored as, or None for a dense weight."""
    if name + ".absmax" in checkpoint.entries:
        own = [n for n in checkpoint.entries if n == name or n.startswith(name + ".")]
        return Linear4bit.from_state({"weight" + n[len(name) :]: checkpoint.read(n) for n in own})
    owner = name.removesuffix(".weight")
    if owner + ".SCB" in checkpoint.entries:
        return Linear8bit.from_state(checkpoint.read(name), checkpoint.read(owner + ".SCB"))
    return None


def _dense_entry(checkpoint: Checkpoint, name: str) -> tuple[str, torch.dtype, tuple[int, ...]]:
    linear = _stored_linear(checkpoint, name)
    if linear is None:
        entry = checkpoint.entries[name]
        return name, entry.dtype, entry.shape
    return name, _dense_dtype(checkpoint), (linear.out_features, linear.in_features)


def _dense_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.entries["model.embed_tokens.weight"].dtype


def _merged(checkpoint: Checkpoint, name: str, factors) -> torch.Tensor:
    linear = _stored_linear(checkpoint, name)
    weight = checkpoint.read(name) if linear is None else linear.dequantized(_dense_dtype(checkpoint))
    if factors is None:
        return weight
    A, B, scaling = factors
    if (B.shape[0], A.shape[1]) != tuple(weight.shape):
        raise CheckpointError(f"{name}: the adapter is {(B.shape[0], A.shape[1])}, the weight {tuple(weight.shape)}")
    return (weight.float() + scaling * (B.float() @ A.float())).to(weight.dtype)


def _write_records(checkpoint: Checkpoint, run: Path, out: Path):
    """config.json without its quantization, the shard index without the dropped tensors, tokenizer and template."""
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    index = checkpoint.folder / "model.safetensors.index.json"
    if index.exists():
        record = read_json(index)
        record["weight_map"] = {n: f for n, f in record["weight_map"].items() if not _is_companion(n)}
        (out / index.name).write_text(json.dumps(record, indent=2) + "\n")
    for folder in (checkpoint.folder, run):  # the run's own tokenizer files, where it has them, come last and win
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", *COPIED):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)
