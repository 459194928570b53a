"""Merge an adapter into its full-precision base: a model folder that any program reads.

The base's files are read and written tensor by tensor, in their order, so memory holds one tensor (of experts: one
stack). Only weights that have an adapter change: W + s·BA, summed in float32 and rounded once to the stored dtype, and
put back in the order in which the family stores it. A base that exists only in 4 or 8 bits is made dense first, in the
dtype it was quantized from; nothing is ever merged into quantized weights.
"""

import json
import math
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from mini_forge.durable import new_output
from mini_forge.errors import CheckpointError
from mini_forge.io.adapters import PREFIX, read_adapter_config, read_adapter_tensors
from mini_forge.io.expert_adapters import fuse, stack_targets
from mini_forge.io.models import base_of, load_tokenizer, require_adapter
from mini_forge.io.records import spec_of
from mini_forge.io.safetensors_file import write_safetensors
from mini_forge.io.weights import BNB_SUFFIXES, EMBEDDING, HEAD, ONE_SOURCE, Checkpoint, Loader, weight_files
from mini_forge.json_faults import read_json
from mini_forge.model.families import expert_layout
from mini_forge.model.families.layout import PACKED, Place, text_name
from mini_forge.model.lora import STACK_NAMES, LoraSpec, inject
from mini_forge.model.mxfp4 import dequantize_mxfp4
from mini_forge.model.quant import Linear4bit, Linear8bit

COPIED = ("generation_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "LICENSE",
          "preprocessor_config.json", "processor_config.json")  # fmt: skip


def merge_adapter(run: str | Path, out: str | Path) -> Path:
    """Write base + adapter of folder `run` as a Hugging Face model folder `out`, which must not exist or be empty.

    `largest_difference` tells what rounding the merged weights has done. Raises UserError for what cannot be merged or
    written, OSError for a full disk."""
    run, out = Path(run).expanduser(), Path(out).expanduser()
    require_adapter(run, "merge")
    merger = Merger(run)
    if any((folder / "tokenizer.json").is_file() for folder in (run, merger.checkpoint.folder)):
        load_tokenizer(run)  # what is copied must be readable
    with new_output(out, "folder") as temporary:
        for file in weight_files(merger.checkpoint.folder):
            stored = [n for n, e in merger.checkpoint.entries.items() if e.file == file and not _is_companion(n)]
            entries = [merger.entries[name] for name in stored]
            write_safetensors(temporary / file.name, entries, (merger.merged(name) for name in stored))
        _write_records(merger, run, temporary)
    return out


def _is_companion(name: str) -> bool:
    """Whether a tensor only says how another one is quantized."""
    return name.endswith((*BNB_SUFFIXES, ".SCB", ".weight_format", "_proj_scales"))


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a weight (out, in) or a stack (E, out, in): scaling · B A."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float

    def delta(self, expert: int | None = None) -> torch.Tensor:
        """(out, in) float32."""
        A, B = (self.A, self.B) if expert is None else (self.A[expert], self.B[expert])
        return self.scaling * (B.float() @ A.float())


class Merger:
    """A base checkpoint and an adapter's updates of its weights. Tensors go by their names in the files."""

    def __init__(self, run: Path):
        self.checkpoint = Checkpoint(base_of(run))
        self.spec = spec_of(self.checkpoint.config, self.checkpoint.folder)
        self.layout = expert_layout(self.checkpoint.config)
        self.own = {name: text_name(name, self.layout) for name in self.checkpoint.entries}
        self.updates = adapter_updates(run, read_adapter_config(run)[0], self)
        stored = {own: name for name, own in self.own.items() if own in (EMBEDDING, HEAD)}
        if not stored:
            raise CheckpointError(f"{self.checkpoint.folder}: no tensor {EMBEDDING}; {ONE_SOURCE}")
        self.dense_dtype = self.checkpoint.entries[stored.get(EMBEDDING) or stored[HEAD]].dtype

    def place(self, stored: str) -> Place | None:
        own = self.own[stored]
        return self.layout.place(own) if self.layout is not None and own is not None else None

    def weights(self) -> set[str]:
        """The names of all weights that could be updated."""
        places = (self.place(name) for name in self.checkpoint.entries)
        return {name for name in self.own.values() if name} | {place.name for place in places if place is not None}

    @cached_property
    def entries(self) -> dict[str, tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of each merged tensor. Found once: of a quantized weight it takes reading it."""
        return {name: self._entry(name) for name in self.checkpoint.entries if not _is_companion(name)}

    def _entry(self, stored: str) -> tuple[str, torch.dtype, tuple[int, ...]]:
        entry, place, linear = self.checkpoint.entries[stored], self.place(stored), self._linear(stored)
        if linear is not None:
            return stored, self.dense_dtype, (linear.out_features, linear.in_features)
        if place is not None and place.part == "_blocks":
            E, out, groups, _ = entry.shape
            return stored.removesuffix("_blocks"), self.dense_dtype, (E, groups * 32, out)
        return stored, entry.dtype, entry.shape

    def merged(self, stored: str) -> torch.Tensor:
        place, linear = self.place(stored), self._linear(stored)
        if place is not None and not place.name.endswith("_bias"):
            return self._merged_stack(stored, place)
        weight = self.checkpoint.read(stored) if linear is None else linear.dequantized(self.dense_dtype)
        update = self.updates.get(self.own[stored])
        return weight if update is None else added(weight, update.delta(), stored)

    def _merged_stack(self, stored: str, place: Place) -> torch.Tensor:
        """Experts as the family stores them, dense."""
        update, tensor = self.updates.get(place.name), self.checkpoint.read(stored)
        if place.expert is not None:
            if update is None:
                return tensor
            delta = update.delta(place.expert)
            if place.part is not None:
                delta = delta.chunk(2)[place.part == "up"]
            return added(tensor, delta, stored)
        if place.part in PACKED:
            scales = self.checkpoint.read(stored.removesuffix("_blocks") + "_scales")
            dense = torch.empty(self.entries[stored][2], dtype=self.dense_dtype)
            for matrix, blocks, scale in zip(dense, tensor, scales, strict=True):
                matrix.copy_(dequantize_mxfp4(blocks, scale, self.dense_dtype).t())
            tensor = dense
        if update is not None:
            whole = Place(place.name)
            for expert, matrix in enumerate(tensor):
                matrix.copy_(added(matrix, self.layout.stored(whole, update.delta(expert)), stored))
        return tensor

    def _linear(self, stored: str):
        """The quantized layer a weight is stored as, or None for a dense weight."""
        entries, read = self.checkpoint.entries, self.checkpoint.read
        if stored + ".absmax" in entries:
            own = [n for n in entries if n == stored or n.startswith(stored + ".")]
            return Linear4bit.from_state({"weight" + n[len(stored) :]: read(n) for n in own})
        owner = stored.removesuffix(".weight")
        return Linear8bit.from_state(read(stored), read(owner + ".SCB")) if owner + ".SCB" in entries else None


def adapter_updates(run: Path, spec: LoraSpec, merger: Merger) -> dict[str, Update]:
    """For each weight that has an adapter: its update. Every factor must find its weight."""
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in read_adapter_tensors(run).items()}
    weights = merger.weights()
    if merger.layout is not None:
        targets = tuple(f".{target}" for target in stack_targets(spec.targets, tensors) or () if "experts." in target)
        endings = tuple(f".experts.{name}" for name in STACK_NAMES)
        stacks = sorted(n for n in weights if n.endswith(endings) and f".{n}".endswith(targets))
        tensors = fuse(tensors, stacks, merger.spec.experts.count, merger.layout)
    updates, used = {}, set()
    for key in [key for key in tensors if ".lora_A" in key]:
        name, partner = key.replace(".lora_A", ""), key.replace(".lora_A", ".lora_B")
        if name not in weights:
            raise CheckpointError(
                f"{run}: the adapter's {name.removesuffix('.weight')} has no weight {name!r} in "
                f"{merger.checkpoint.folder}"
            )
        if not name.startswith("model.layers."):
            raise CheckpointError(f"{run}: the adapter changes {name}; only layers of the decoder can be merged")
        if partner not in tensors:
            raise CheckpointError(f"{run}: the adapter has {key} but no {partner}")
        updates[name] = _checked_update(tensors[key], tensors[partner], spec, f"{run}: {key}")
        used |= {key, partner}
    if left := sorted(tensors.keys() - used):
        raise CheckpointError(
            f"{run}: the adapter has {len(left)} tensors that are no update of the decoder's layers, among them "
            f"{left[0]}; only plain LoRA on these can be merged"
        )
    return updates


def _checked_update(A: torch.Tensor, B: torch.Tensor, spec: LoraSpec, where: str) -> Update:
    """The update of factors that are of the rank that adapter_config.json says, by which their scale is known."""
    if A.shape[-2] != spec.rank or B.shape[-1] != spec.rank:
        raise CheckpointError(
            f"{where}: factors of shape {list(A.shape)} and {list(B.shape)} are not of rank {spec.rank}, as "
            "adapter_config.json says; fetch or train the adapter again"
        )
    if spec.scaling * float(A.abs().max()) * float(B.abs().max()) > torch.finfo(torch.float32).max:
        raise CheckpointError(f"{where}: lora_alpha {spec.alpha:g} makes of it what is no number; correct lora_alpha")
    return Update(A, B, spec.scaling)


def added(weight: torch.Tensor, delta: torch.Tensor, name: str) -> torch.Tensor:
    """weight + delta, of one shape, delta float32; the sum is float32 too, and rounded once to the weight's dtype."""
    if weight.shape != delta.shape:
        raise CheckpointError(f"{name}: the adapter is {tuple(delta.shape)}, the weight {tuple(weight.shape)}")
    return (weight.float() + delta).to(weight.dtype)


def _write_records(merger: Merger, run: Path, out: Path):
    """config.json without its quantization, the shard index without the dropped tensors, tokenizer and template."""
    checkpoint, config = merger.checkpoint, dict(merger.checkpoint.config)
    if config.pop("quantization_config", None) is not None:  # it says in which dtype the weights now are
        config.pop("torch_dtype", None)
        config["dtype"] = str(merger.dense_dtype).removeprefix("torch.")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    index = checkpoint.folder / "model.safetensors.index.json"
    if index.exists():
        record = read_json(index)
        files = {n: f for n, f in record["weight_map"].items() if n in checkpoint.entries and not _is_companion(n)}
        record["weight_map"] = {merger.entries[n][0]: f for n, f in files.items()}
        total = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in map(merger.entries.get, files))
        record["metadata"] = {**(record.get("metadata") or {}), "total_size": total}
        (out / index.name).write_text(json.dumps(record, indent=2) + "\n")
    for folder in (checkpoint.folder, run):  # the run's own tokenizer files, where it has them, come last and win
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", *COPIED):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, out / name)


@torch.no_grad()
def largest_difference(run: str | Path, out: str | Path, tokens: int = 32) -> tuple[float, float]:
    """The largest difference between logits with the adapter beside its base and logits of the merged model.

    Both in float32, a layer at a time, on the same random tokens: as is, and in standard deviations of the logits."""
    run = Path(run).expanduser()
    merger = Merger(run)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(merger.spec.vocab_size, (1, tokens), generator=generator)
    adapted = streamed_logits(merger.checkpoint.folder, ids, merger.updates)
    merged = streamed_logits(Path(out).expanduser(), ids, {})
    worst = float((adapted - merged).abs().max())
    return worst, worst / float(adapted.std())


def streamed_logits(folder: Path, ids: torch.Tensor, updates: dict[str, Update]) -> torch.Tensor:
    """Logits (1, T, V) float32 of the model in `folder` with updates beside its weights; memory holds one layer."""
    loader = Loader(folder, torch.float32)
    model = loader.model.eval()
    loader.load("model.embed_tokens.")
    x, stream = model.begin(ids)
    for i in range(len(model.model.layers)):
        prefix = f"model.layers.{i}."
        loader.load(prefix)
        block = model.model.layers[i]
        for name in [name for name in updates if name.startswith(prefix)]:
            _attach(block, name.removeprefix(prefix).removesuffix(".weight"), updates[name])
        x = block(x, stream)
        model.model.layers[i] = torch.nn.Identity()
    loader.load("model.norm.")
    loader.load("lm_head.")
    return model.head(model.finish(x)).view(*ids.shape, -1)


def _attach(block: torch.nn.Module, name: str, update: Update):
    rank = update.A.shape[-2]
    inject(block, LoraSpec(rank, update.scaling * rank, targets=(name,)))
    layer = block.get_submodule(name)
    layer.lora_A.data, layer.lora_B.data = update.A.float(), update.B.float()
