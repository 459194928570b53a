"""Base weights: from a folder or hub ID of safetensors straight into a decoder, one tensor at a time.

Files are read with plain reads, not mapped: each byte is read once, in file order, the next tensor while the last is
quantized. Host memory never holds more than the stored (possibly quantized) model, the tensor in hand and the one being
read; of stacks of experts one matrix, of other tensors that stay dense a part. Only safetensors: a pickle can run code.
"""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mini_forge.errors import CheckpointError
from mini_forge.io.expert_weights import StackLoader
from mini_forge.io.reading import Piece, ReadAhead, TensorEntry, read_tensor
from mini_forge.io.records import spec_of
from mini_forge.io.safetensors_file import read_header
from mini_forge.io.storage import Storage, multiplies_stored
from mini_forge.json_faults import read_json
from mini_forge.model.decoder import Decoder
from mini_forge.model.families import expert_layout, text_model
from mini_forge.model.families.layout import text_name
from mini_forge.model.ops import PLAIN, Ops
from mini_forge.model.quant import Linear16bit
from mini_forge.model.stacks import use_kernels

ONE_SOURCE = "take the weights, all of them, and config.json from one source"
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # old checkpoints store these derived values
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DENSE_BYTES = 4 << 20  # of a tensor that stays dense this much is read at once, and stays in cache until it is copied
MATRICES = (nn.Linear, nn.Embedding)
QUANT_STATE = ".quant_state.bitsandbytes__"
QUANT_STATES = (f"{QUANT_STATE}nf4", f"{QUANT_STATE}fp4")
BNB_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *QUANT_STATES)


class Checkpoint:
    """A model folder: its parsed config.json and where each tensor lies."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.config = read_json(self.folder / "config.json")
        self.entries: dict[str, TensorEntry] = {}
        for file in weight_files(self.folder):
            self.entries.update(read_header(file))

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own, as stored."""
        entry = self.entries[name]
        return read_tensor(name, entry, torch.empty(entry.size, dtype=torch.uint8))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those its index names, else `model.safetensors`, else the only one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index}: weight_map must name each tensor's file; fetch it again")
        names = sorted(set(shards.values()))
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


def load_base(
    folder: Path,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    quantization: str | None = None,
    *,
    nested: bool = False,
    compute_dtype: torch.dtype | None = None,
    ops: Ops = PLAIN,
    headers_only: bool = False,
) -> Decoder:
    """A decoder with the folder's weights, in eval mode.

    dtype: of floating weights; None keeps the stored one. Under float32, matrices stored in bfloat16 stay so where
    `ops` multiply them (`Ops.stored_products`). quantization: None, "nf4", "fp4" or "int8", for all linear
    layers but the head; a checkpoint already stored so is taken as it is, made dense for None, and else refused.
    headers_only: no weight is read, the decoder stays on the meta device; what does not fit is refused all the same."""
    loader = Loader(folder, dtype, device, quantization, nested, compute_dtype, ops)
    loader.load_all(headers_only)
    use_kernels(loader.model, ops)
    return loader.model.eval().requires_grad_(False)


class Loader:
    """A decoder that is filled from a checkpoint, all at once or a part at a time."""

    def __init__(self, folder, dtype, device="cpu", quantization=None, nested=False, compute_dtype=None, ops=PLAIN):
        self.checkpoint = checkpoint = Checkpoint(folder)
        spec, layout = spec_of(checkpoint.config, checkpoint.folder), expert_layout(checkpoint.config)
        checkpoint.entries = text_entries(checkpoint.entries, layout)
        if spec.tied_head and EMBEDDING not in checkpoint.entries and HEAD in checkpoint.entries:  # stored under either
            checkpoint.entries[EMBEDDING] = checkpoint.entries.pop(HEAD)
        dtype = dtype or _stored_dtype(checkpoint)
        with torch.device("meta"):
            self.model = Decoder(spec, ops)
        self.model.layout, self.model.text_model = layout, text_model(checkpoint.config)
        self.storage = Storage(quantization, nested, compute_dtype or dtype, dtype, torch.device(device),
                               ops.stored_products if multiplies_stored(ops, dtype, device) else None)  # fmt: skip
        self.stacks = StackLoader(self.model, self.storage, layout)
        self.missing = set(self.model.state_dict())
        linears = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        self.linears = {f"{name}.weight" for name in linears if f"{name}.weight" != HEAD}
        self.stored = StoredLayers(checkpoint.entries, self.linears)
        self.reader = ReadAhead()

    def load(self, prefix: str = ""):
        """Read the tensors whose names begin so, in file order, into the model. What does not fit it is refused before
        anything is read."""
        names = [name for name in self.checkpoint.entries if name.startswith(prefix)]
        self._put([piece for name in names for piece in self._pieces(name)])
        if HEAD in names and self.model.spec.tied_head:  # once the embedding is there
            self._put(self._in_rows(HEAD, self.checkpoint.entries[HEAD], self._compare_rows))

    def _put(self, pieces: list[Piece]):
        with closing(self.reader.stream(pieces)) as stream:
            for piece, tensor in stream:
                piece.put(tensor)

    def load_all(self, headers_only: bool = False):
        """The whole model. headers_only: what `load` refuses before it reads, and what the small tensors tell that say
        how a layer is stored; the weights themselves are not read."""
        if not headers_only:
            self.load()
        else:
            for name, entry in self.checkpoint.entries.items():
                self._pieces(name)
                if name in self.stored.weight_of:
                    is_read = QUANT_STATE in name or name.endswith("quant_map")
                    tensor = self.checkpoint.read(name) if is_read else torch.empty(entry.shape, dtype=entry.dtype)
                    self._stored_layer(name, tensor)
        self.check_complete()

    def _pieces(self, name: str) -> list[Piece]:
        """How a stored tensor is read; not at all where the model makes no use of it."""
        entry, layout = self.checkpoint.entries[name], self.model.layout
        if name in self.stored.weight_of:
            self.missing.discard(name)
            return [Piece(name, entry, partial(self._put_stored, name), is_kept=True)]
        if name.endswith((*IGNORED_SUFFIXES, *BNB_SUFFIXES, ".SCB", ".weight_format")):
            return []
        place = layout.place(name) if layout is not None else None
        if place is not None and (place.name in self.missing or place.name in self.stacks.missing):
            self.missing.discard(place.name)
            return self.stacks.pieces(name, place, entry)
        if name in self.missing:
            self.missing.discard(name)
            return self._dense_pieces(name, entry)
        if name == HEAD and self.model.spec.tied_head:  # compared later: one of two trained matrices would be lost
            if entry.shape != tuple(self.model.head_weight.shape):
                raise self._untied()
            return []
        raise CheckpointError(f"{entry.file}: unexpected tensor {name!r} for this model_type; {ONE_SOURCE}")

    def _dense_pieces(self, name: str, entry: TensorEntry) -> list[Piece]:
        shape = tuple(self.model.get_parameter(name).shape)
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file}: tensor {name!r} has shape {list(entry.shape)}, config.json asks for {list(shape)}; "
                f"{ONE_SOURCE}"
            )
        if not entry.dtype.is_floating_point:
            raise CheckpointError(
                f"{name}: stored as {entry.dtype} in a form that is not known here; take another copy of the model"
            )
        if name in self.linears and self.storage.quantization is not None:
            return [Piece(name, entry, partial(self._put_quantized, name))]
        return self._in_rows(name, entry, self._put_rows)

    def _in_rows(self, name: str, entry: TensorEntry, put: Callable) -> list[Piece]:
        """Some rows at a time for put(name, first, rows)."""
        count = entry.shape[0]
        step = max(1, DENSE_BYTES * count // max(1, entry.size))
        parts = [(first, min(first + step, count)) for first in range(0, count, step)]
        return [Piece(name, entry.rows(*part), partial(put, name, part[0])) for part in parts]

    def _compare_rows(self, name: str, first: int, rows: torch.Tensor):
        """A head that is stored although it is the embedding must be equal to it, as exactly as both are known."""
        tied = self.model.head_weight[first : first + len(rows)]
        stored = self.checkpoint.entries[EMBEDDING].dtype
        narrow = min((tied.dtype, rows.dtype, stored), key=lambda dtype: dtype.itemsize)
        rows, tied = rows.to(tied.device, narrow), tied.to(narrow)
        if not bool(((rows == tied) | (rows.isnan() & tied.isnan())).all()):
            raise self._untied()

    def _untied(self) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.folder}: {HEAD} is not the embedding, but config.json says tie_word_embeddings; set it "
            "to false there to use both"
        )

    def _put_rows(self, name: str, first: int, rows: torch.Tensor):
        owner, leaf = self._owner(name)
        if getattr(owner, leaf).is_meta:
            self._allocate(name, rows.dtype)
            owner, leaf = self._owner(name)
        getattr(owner, leaf).data[first : first + len(rows)].copy_(rows)

    def _allocate(self, name: str, stored: torch.dtype):
        """Memory for a tensor that is not quantized."""
        owner, leaf = self._owner(name)
        is_matrix = isinstance(owner, MATRICES) and leaf == "weight"
        is_kept = is_matrix and stored == torch.bfloat16 and self.storage.stored_products is not None
        dtype = stored if is_kept else self.storage.dtype
        # Not empty_like: asked about a meta tensor, torch answers in Python and imports SymPy for it, 0.3 s.
        own = torch.empty(getattr(owner, leaf).shape, dtype=dtype, device=self.storage.device)
        if is_kept and isinstance(owner, nn.Linear):
            self._replace(name, Linear16bit(own, None, self.storage.stored_products))
        else:
            setattr(owner, leaf, nn.Parameter(own, requires_grad=False))

    def _put_quantized(self, name: str, weight: torch.Tensor):
        self._replace(name, self.storage.quantized(weight))

    def _stored_layer(self, name: str, tensor: torch.Tensor) -> tuple[str, nn.Module | None]:
        """A weight that is stored in several tensors, and its layer if this is the last of them."""
        weight, parts = self.stored.collect(name, tensor)
        if parts is None:
            return weight, None
        layer = self.storage.stored(weight, parts, self.checkpoint.folder)
        shape, expected = [layer.out_features, layer.in_features], list(self._owner(weight)[0].weight.shape)
        if shape != expected:
            raise CheckpointError(f"{weight}: stored as {shape}, config.json asks for {expected}; {ONE_SOURCE}")
        return weight, layer

    def _put_stored(self, name: str, tensor: torch.Tensor):
        weight, layer = self._stored_layer(name, tensor)
        if layer is None:
            return
        owner, leaf = self._owner(weight)
        if self.storage.quantization is not None:
            self._replace(weight, layer.to(self.storage.device))
        else:
            dense = layer.dequantized(self.storage.dtype).to(self.storage.device)
            setattr(owner, leaf, nn.Parameter(dense, requires_grad=False))

    def _replace(self, name: str, linear: nn.Module):
        owner, _ = self._owner(name)
        linear.bias = owner.bias  # filled now or later: `_put_rows` finds it under the same name
        self.model.set_submodule(name.removesuffix(".weight"), linear)

    def _owner(self, name: str) -> tuple[nn.Module, str]:
        owner, _, leaf = name.rpartition(".")
        return self.model.get_submodule(owner), leaf

    def check_complete(self):
        missing = sorted(self.missing) + self.stacks.unfinished()
        if missing:
            few = ", ".join(missing[:5])
            raise CheckpointError(
                f"{self.checkpoint.folder}: {len(missing)} tensors are missing, among them {few}; {ONE_SOURCE}"
            )


class StoredLayers:
    """The linear layers that a checkpoint holds in 4 or 8 bits, in several tensors each, which may lie far apart."""

    def __init__(self, entries: dict[str, TensorEntry], linears: set[str]):
        in_4bit = {n.removesuffix(".absmax") for n in entries if n.endswith(".absmax")} & linears & entries.keys()
        in_8bit = {n.removesuffix("SCB") + "weight" for n in entries if n.endswith(".SCB")} & linears & entries.keys()
        self.weight_of = {name: name for name in in_4bit | in_8bit}  # the layer's weight, of each of its tensors
        self.weight_of |= {name.removesuffix("weight") + "SCB": name for name in in_8bit}
        for name in entries:
            owner, is_companion, _ = name.partition(".weight.")
            if is_companion and f"{owner}.weight" in in_4bit:
                self.weight_of[name] = f"{owner}.weight"
        self.count = Counter(self.weight_of.values())
        self.parts: dict[str, dict[str, torch.Tensor]] = {}

    def collect(self, name: str, tensor: torch.Tensor) -> tuple[str, dict[str, torch.Tensor] | None]:
        """The layer's weight, and all of its tensors by name if this is the last of them, else None."""
        weight = self.weight_of[name]
        parts = self.parts.setdefault(weight, {})
        parts[name] = tensor
        return weight, self.parts.pop(weight) if len(parts) == self.count[weight] else None


def bfloat16_matrices(folder: Path, model: Decoder) -> frozenset[str]:
    """The weights of a model's linear layers and embeddings that its checkpoint stores in bfloat16; of a folder without
    weights all, unless its config.json says otherwise: most published ones are."""
    config = read_json(folder / "config.json")
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, MATRICES)}
    if any(folder.glob("*.safetensors")):
        entries = text_entries(Checkpoint(folder).entries, expert_layout(config))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        stored = {name: entry.shape for name, entry in entries.items() if entry.dtype == torch.bfloat16}
        names = {name for name in names if stored.get(name) == shapes[name]}  # packed bits have another
    elif (config.get("dtype") or config.get("torch_dtype") or "bfloat16") != "bfloat16":
        names = set()
    return frozenset(names)


def other_parts(folder: Path) -> int:
    """How many tensors of a multimodal checkpoint are not its text model's."""
    return sum(text_name(name) is None for file in weight_files(folder) for name in read_header(file))


def text_entries(entries: dict[str, TensorEntry], layout) -> dict[str, TensorEntry]:
    """The tensors of the text model under its own names: multimodal checkpoints prefix them and hold other parts."""
    named = {text_name(name, layout): entry for name, entry in entries.items()}
    return {name: entry for name, entry in named.items() if name is not None}


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    if EMBEDDING not in checkpoint.entries:
        raise CheckpointError(f"{checkpoint.folder}: no tensor {EMBEDDING}; {ONE_SOURCE}")
    return checkpoint.entries[EMBEDDING].dtype
