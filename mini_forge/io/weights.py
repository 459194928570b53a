"""Base weights: from a folder or hub ID of safetensors straight into a decoder, one tensor at a time.

Files are read with plain reads, not mapped: each byte is read once, in file order, and host memory never holds more
than the stored (possibly quantized) model and the tensor in hand. Only safetensors: a pickle can run code.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mini_forge.errors import CheckpointError
from mini_forge.io.expert_weights import StackLoader
from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec, expert_layout
from mini_forge.model.families.layout import text_name
from mini_forge.model.ops import PLAIN, Ops
from mini_forge.model.quant import Linear4bit, Linear8bit

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT_BYTES = 100_000_000  # the format's own bound
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # old checkpoints store these derived values
BNB_SUFFIXES = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
)  # fmt: skip


def resolve_model(name: str) -> Path:
    """The folder of a model: `name` itself if it is one, else a hub ID in the local cache, else downloaded."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if folder.exists() or not is_hub_id:
        raise CheckpointError(f"model_name: {name!r} is not a folder; give a model folder or a hub ID `owner/name`")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        try:
            return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model_name: {name!r} is neither a folder nor in the local hub cache, and the download failed: {reason}; "
            "give a model folder, or download it where there is a network"
        ) from None


def read_json(path: Path) -> dict:
    """A JSON object from a file; CheckpointError names the file when it is absent, broken or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: file not found; a model folder needs it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `start` and `size` in bytes of `file`."""

    file: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in file order. Raises CheckpointError for a file that is not sound."""
    try:
        length = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if length < 8 or header_bytes > min(HEADER_LIMIT_BYTES, length - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut short; fetch it again")
            header = json.loads(file.read(header_bytes))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the weight index names this file, but it is absent; fetch it again") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: broken safetensors header ({error}); fetch it again") from None
    entries = {n: _entry(path, n, e, 8 + header_bytes, length) for n, e in header.items() if n != "__metadata__"}
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _entry(path: Path, name: str, record: dict, data_start: int, file_bytes: int) -> TensorEntry:
    try:
        dtype, shape, (first, last) = DTYPES[record["dtype"]], tuple(record["shape"]), record["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path}: tensor {name!r} has an unreadable header entry {record!r}") from None
    size = last - first
    if first < 0 or data_start + last > file_bytes:
        raise CheckpointError(f"{path}: tensor {name!r} ends past the end of the file; fetch it again")
    if size != int(np.prod(shape, dtype=np.int64)) * dtype.itemsize:
        raise CheckpointError(f"{path}: tensor {name!r} of shape {list(shape)} cannot have {size} bytes")
    return TensorEntry(path, data_start + first, size, dtype, shape)


class Checkpoint:
    """A model folder: its parsed config.json and where each tensor lies."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self.entries: dict[str, TensorEntry] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8)
        for file in weight_files(self.folder):
            self.entries.update(read_header(file))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own, as stored."""
        return self._read(name, torch.empty(self.entries[name].size, dtype=torch.uint8))

    def borrow(self, name: str) -> torch.Tensor:
        """One tensor as stored, in memory that the next `borrow` takes again: freed blocks of a thousand sizes would
        leave the process half as large again as the model."""
        size = self.entries[name].size
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._read(name, self._buffer[:size])

    def _read(self, name: str, buffer: torch.Tensor) -> torch.Tensor:
        entry = self.entries[name]
        with entry.file.open("rb") as file:
            file.seek(entry.start)
            if file.readinto(memoryview(buffer.numpy())) != entry.size:
                raise CheckpointError(f"{entry.file}: ended while tensor {name!r} was read; fetch it again")
        return buffer.view(entry.dtype).view(entry.shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those its index names, else `model.safetensors`, else the only one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        root = folder.resolve()
        for name in names:
            # Hub caches keep files as links out of the folder, so the name is checked, not where a link leads.
            if Path(os.path.normpath(root / name)).parent != root or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: shard name {name!r} leaves the model folder; refused")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if (folder / "model.safetensors") in files:
        return [folder / "model.safetensors"]
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(f"{folder}: {len(files)} safetensors files and no model.safetensors.index.json")
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickled weights ({pickles[0]}); unpickling can run any code, so they are refused; "
            "convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: no .safetensors file; is this a model folder?")


def write_safetensors(path: Path, entries: list[tuple[str, torch.dtype, tuple[int, ...]]], tensors):
    """A safetensors file from tensors that are made one at a time, in the order of `entries` (name, dtype, shape)."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in entries:
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))


def load_base(
    folder: Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    quantization: str | None = None,
    *,
    nested: bool = False,
    compute_dtype: torch.dtype | None = None,
    ops: Ops = PLAIN,
) -> Decoder:
    """A decoder with the folder's weights, in eval mode.

    dtype: of floating weights; None keeps the stored one. quantization: None, "nf4", "fp4" or "int8", for all linear
    layers but the head; a checkpoint already stored in 4 or 8 bits is taken as it is, or made dense for None."""
    loader = Loader(folder, dtype, device, quantization, nested, compute_dtype, ops)
    loader.load()
    loader.check_complete()
    return loader.model.eval().requires_grad_(False)


class Loader:
    """A decoder that is filled from a checkpoint, all at once or a part at a time."""

    def __init__(self, folder, dtype, device="cpu", quantization=None, nested=False, compute_dtype=None, ops=PLAIN):
        self.checkpoint = checkpoint = Checkpoint(folder)
        spec, layout = decoder_spec(checkpoint.config), expert_layout(checkpoint.config)
        checkpoint.entries = text_entries(checkpoint.entries, layout)
        dtype = dtype or _stored_dtype(checkpoint)
        with torch.device("meta"):
            self.model = Decoder(spec, ops)
        self.model.layout = layout
        self.storage = Storage(quantization, nested, compute_dtype or dtype, dtype, torch.device(device))
        self.stacks = StackLoader(self.model, self.storage, layout)
        self.missing = set(self.model.state_dict())

    def load(self, prefix: str = ""):
        """Read the tensors whose names begin so, in file order, into the model."""
        checkpoint, spec, layout = self.checkpoint, self.model.spec, self.model.layout
        for name in [n for n in checkpoint.entries if n.startswith(prefix)]:
            if name.endswith((*IGNORED_SUFFIXES, *BNB_SUFFIXES, ".SCB", ".weight_format")):
                continue
            place = layout.place(name) if layout is not None else None
            if place is not None and (place.name in self.missing or place.name in self.stacks.missing):
                self.missing.discard(place.name)
                self.stacks.place(name, place, checkpoint)
            elif name in self.missing:
                self.missing.discard(name)
                self.storage.place(self.model, name, checkpoint)
            elif not (name == "lm_head.weight" and spec.tied_head):
                file = checkpoint.entries[name].file
                raise CheckpointError(f"{file}: unexpected tensor {name!r} for this model_type")

    def check_complete(self):
        missing = sorted(self.missing) + self.stacks.unfinished()
        if missing:
            few = ", ".join(missing[:5])
            raise CheckpointError(f"{self.checkpoint.folder}: {len(missing)} tensors are missing, among them {few}")


def text_entries(entries: dict[str, TensorEntry], layout) -> dict[str, TensorEntry]:
    """The tensors of the text model under its own names: multimodal checkpoints prefix them and hold other parts."""
    named = {text_name(name, layout): entry for name, entry in entries.items()}
    return {name: entry for name, entry in named.items() if name is not None}


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.entries["model.embed_tokens.weight"].dtype


@dataclass(frozen=True)
class Storage:
    """How weights are kept once read: the form of linear layers, and the dtype and device of everything else."""

    quantization: str | None
    nested: bool
    compute_dtype: torch.dtype
    dtype: torch.dtype
    device: torch.device

    def place(self, model: Decoder, name: str, checkpoint: Checkpoint):
        """Read tensor `name` and put it where the model has that parameter, quantized if it is a linear's weight."""
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        is_linear_weight = isinstance(owner, nn.Linear) and leaf == "weight" and owner_name != "lm_head"
        if is_linear_weight and name + ".absmax" in checkpoint.entries:
            stored = self._stored_4bit(name, checkpoint)
        elif is_linear_weight and owner_name + ".SCB" in checkpoint.entries:
            stored = Linear8bit.from_state(checkpoint.read(name), checkpoint.read(owner_name + ".SCB"),
                                           compute_dtype=self.compute_dtype)  # fmt: skip
        else:
            self._check_shape(name, checkpoint, getattr(owner, leaf))
            weight = checkpoint.borrow(name)
            if is_linear_weight and self.quantization is not None:
                # Statistics are taken of the weight in the training dtype, as loading stacks that quantize do.
                self._replace(model, owner_name, owner, self._quantize(weight.to(self.device, self.dtype)))
            elif is_linear_weight and not weight.is_floating_point():
                raise CheckpointError(f"{name}: stored as {weight.dtype} in a form that is not known here")
            else:
                own = weight.to(self.device, self.dtype, copy=True)
                setattr(owner, leaf, nn.Parameter(own, requires_grad=False))
            return
        if self.quantization is None:
            dense = nn.Parameter(stored.dequantized(self.dtype).to(self.device), requires_grad=False)
            owner.weight = dense
        else:
            self._replace(model, owner_name, owner, stored.to(self.device))

    def _stored_4bit(self, name: str, checkpoint: Checkpoint) -> Linear4bit:
        own = {n: checkpoint.read(n) for n in checkpoint.entries if n == name or n.startswith(name + ".")}
        state = {"weight" + n[len(name) :]: tensor for n, tensor in own.items()}
        linear = Linear4bit.from_state(state, compute_dtype=self.compute_dtype)
        if self.quantization not in (None, linear.quant_type):
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is stored as {linear.quant_type}, not {self.quantization}; "
                f"set bnb_4bit_quant_type to {linear.quant_type!r}"
            )
        return linear

    def _quantize(self, weight: torch.Tensor) -> nn.Module:
        if self.quantization == "int8":
            return Linear8bit.from_weight(weight, None, compute_dtype=self.compute_dtype)
        return Linear4bit.from_weight(
            weight, None, quant_type=self.quantization, nested=self.nested, compute_dtype=self.compute_dtype
        )

    def _replace(self, model: Decoder, name: str, dense: nn.Linear, quantized: nn.Module):
        shape = (quantized.out_features, quantized.in_features)
        if shape != tuple(dense.weight.shape):
            raise CheckpointError(
                f"{name}.weight: stored as {list(shape)}, config.json asks {list(dense.weight.shape)}"
            )
        quantized.bias = dense.bias  # filled now or later: `place` finds it under the same name
        model.set_submodule(name, quantized)

    @staticmethod
    def _check_shape(name: str, checkpoint: Checkpoint, parameter: torch.Tensor):
        shape = checkpoint.entries[name].shape
        if shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint.entries[name].file}: tensor {name!r} has shape {list(shape)}, "
                f"config.json asks for {list(parameter.shape)}"
            )
