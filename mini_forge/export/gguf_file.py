"""A run as one GGUF file: merged weights, tokenizer and chat template, for llama.cpp and what is built on it.

Weights are read and written a layer at a time, so memory holds one layer in float32 (of MXFP4 experts, as stored), in
the end the embedding and head, and beside it the tensor that is written. What an adapter adds is summed in float32 and
rounded once, to the type asked for. Experts stored in MXFP4 stay in it, unless the adapter changes them: nothing is
merged into 4-bit weights.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. llama.cpp's names of tensors and its 8-bit
rounding are those of its own package `gguf`, which the extra of that name installs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mini_forge.data.chat import Template
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.durable import new_output
from mini_forge.errors import CheckpointError, ConfigError, DataError
from mini_forge.export import TYPES
from mini_forge.export.architectures import ARCHITECTURES, metadata, notes, problems, rope_factors
from mini_forge.export.vocabulary import vocabulary
from mini_forge.io.adapters import read_adapter_config
from mini_forge.io.merge import Merger, added
from mini_forge.io.models import require_adapter
from mini_forge.io.weights import Loader
from mini_forge.model.decoder import RMSNorm
from mini_forge.model.mxfp4 import BLOCK
from mini_forge.model.stacks import Stack, expert_weight
from mini_forge.use import spelling_of

HALVES = ("gate_proj", "up_proj")  # of the rows of a stack of experts: two tensors there
ROUTER = "ffn_gate_inp.weight"  # float32 whatever the type


@dataclass(frozen=True)
class Output:
    """A tensor of the file. source: the parameter of ours that it is, or of whose rows it is the first or second
    `half`. kind: how its numbers are held, "f32", "f16", "bf16", "q8_0" or "mxfp4"."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: str
    half: int | None = None


def export_gguf(run: str | Path, out: str | Path, kind: str = "f16") -> list[str]:
    """Write base + adapter of folder `run` as the GGUF file `out`, which must not exist. kind: one of TYPES; under q8_0
    rows that are not made of whole blocks of 32 are float16.

    Returns where llama.cpp will compute otherwise, a line each. Raises CheckpointError for a model or tokenizer that
    llama.cpp does not have, ConfigError for a file that cannot be written, or where the package gguf is missing,
    OSError for a full disk."""
    run, out = Path(run).expanduser(), Path(out).expanduser()
    if kind not in TYPES:
        raise ConfigError(f"kind: {kind!r} must be one of {', '.join(TYPES)}")
    require_adapter(run, "export")
    export = Export(run, kind)
    with new_output(out, "file") as temporary:
        export.write(temporary)
    return export.notes


class Export:
    """What is to be written, known before any weight is read."""

    def __init__(self, run: Path, kind: str):
        self.gguf, self.kind, merger = _gguf_package(), kind, Merger(run)
        self.updates, folder = merger.updates, merger.checkpoint.folder
        self.loader = Loader(folder, torch.float32)
        self.model, self.spec = self.loader.model, self.loader.model.spec
        family = self.loader.checkpoint.config["model_type"]
        if family not in ARCHITECTURES:
            raise CheckpointError(f"{folder}/config.json: model_type {family!r} is none that export knows; use `merge`")
        self.arch = ARCHITECTURES[family]
        wrong = problems(self.arch, self.spec)
        if wrong:
            raise CheckpointError(
                *(f"{folder}/config.json: {text}: llama.cpp's {self.arch.name} has none; use `merge`" for text in wrong)
            )
        _, tokenizer, template = spelling_of(str(run))
        end, base = tokenizer.token_id(template.end), Path(read_adapter_config(run)[1]).name
        ends = sorted(template.stop_ids(tokenizer), key=lambda i: (i != tokenizer.eos_id, i != end))
        begins_with_bos = _begins_with_bos(template, tokenizer)
        words, told = vocabulary(tokenizer, self.spec.vocab_size, base, begins_with_bos, ends)
        self.notes = [*notes(self.arch, self.spec), *told]
        if tokenizer.bos_token is None and "bos_token" in template.source:
            self.notes.append("llama.cpp spells some token for the chat template's bos_token; this tokenizer has none")
        self.values = {**metadata(self.arch, self.spec), **words, "tokenizer.chat_template": template.source}
        kinds = {name: kind for kind, name in self.gguf.MODEL_ARCH_NAMES.items()}
        self.names = self.gguf.get_tensor_name_map(kinds[self.arch.name], len(self.spec.layers))
        self.divisors = rope_factors(self.spec)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        # What is in memory at a time. A head that is stored beside an embedding it equals is compared with it.
        layers = [(f"model.layers.{i}.",) for i in range(len(self.spec.layers))]
        self.groups = {
            prefixes: [output for name in shapes if name.startswith(prefixes) for output in self._outputs(name, shapes)]
            for prefixes in [*layers, ("model.norm.",), ("model.embed_tokens.", "lm_head.")]
        }

    def _outputs(self, source: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[Output]:
        """The tensors that one of our parameters becomes."""
        shape, is_stacked = shapes[source], ".experts.gate_up_proj" in source
        if is_stacked:
            shape = (shape[0], shape[1] // 2, *shape[2:])
        is_packed = f"{source}_blocks" in self.loader.checkpoint.entries and source not in self.updates
        for half in (0, 1) if is_stacked else (None,):
            name = self._name(source if half is None else source.replace("gate_up_proj", HALVES[half]))
            yield Output(name, source, shape, "mxfp4" if is_packed else self._kind(name, shape), half)

    def _name(self, source: str) -> str:
        if source.endswith("_bias"):
            source = source.removesuffix("_bias") + ".bias"
        elif not source.endswith((".weight", ".bias")):  # stacks and sinks
            source += ".weight"
        name = self.names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(f"{source}: nothing that llama.cpp's {self.arch.name} has; use `merge`")
        return name

    def _kind(self, name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1 or not name.endswith(".weight") or name.endswith(ROUTER):
            return "f32"
        return "f16" if self.kind == "q8_0" and shape[-1] % BLOCK else self.kind

    def write(self, path: Path):
        writer = self.gguf.GGUFWriter(None, self.arch.name)
        outputs = [output for group in self.groups.values() for output in group]
        is_packed = self.kind != "q8_0" and any(output.kind == "mxfp4" for output in outputs)
        mostly = "mxfp4_moe" if is_packed else self.kind
        writer.add_file_type(self.gguf.LlamaFileType[f"MOSTLY_{mostly.upper()}"])
        writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
        for key, value in self.values.items():
            _add(writer, key, value)
        if self.divisors is not None:
            outputs.insert(0, Output("rope_freqs.weight", "", tuple(self.divisors.shape), "f32"))
        for output in outputs:
            kind = self.gguf.GGMLQuantizationType[output.kind.upper()]
            weights, size = self.gguf.GGML_QUANT_SIZES[kind]
            bytes_ = math.prod(output.shape) // weights * size
            writer.add_tensor_info(output.name, output.shape, np.dtype(np.float32), bytes_, raw_dtype=kind)
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for data in self._tensors():
                writer.write_tensor_data(data)
        finally:
            writer.close()

    def _tensors(self) -> Iterator[np.ndarray]:
        """The data of all tensors, in order, a group in memory at a time."""
        if self.divisors is not None:
            yield self.divisors.numpy()
        for prefixes, group in self.groups.items():
            for prefix in prefixes:
                self.loader.load(prefix)
            yield from map(self._data, group)
            for output in group:
                owner, leaf = self._owner(output)
                setattr(owner, leaf, None)
        self.loader.check_complete()

    def _owner(self, output: Output) -> tuple[torch.nn.Module, str]:
        owner, _, leaf = output.source.rpartition(".")
        return self.model.get_submodule(owner), leaf

    def _data(self, output: Output) -> np.ndarray:
        owner, leaf = self._owner(output)
        stored = getattr(owner, leaf)
        if output.kind == "mxfp4":
            return packed_mxfp4(_half(stored.blocks, output.half), _half(stored.scales, output.half)).numpy()
        if len(output.shape) == 3:
            return self._experts(output, stored)
        weight = _half(stored, output.half)
        if output.source in self.updates:
            weight = added(weight, self.updates[output.source].delta(), output.source)
        if isinstance(owner, RMSNorm):
            weight = weight + self.spec.norm_offset
        heads = {"q_proj": self.spec.heads, "k_proj": self.spec.kv_heads}.get(output.source.split(".")[-2])
        if self.arch.swaps_rows and heads is not None:
            weight = neighbouring_rows(weight, heads)
        return self._encoded(output, weight)

    def _experts(self, output: Output, stack: torch.Tensor | Stack) -> np.ndarray:
        """A stack of matrices, made one by one."""
        update, encoded = self.updates.get(output.source), None
        for e in range(output.shape[0]):
            matrix = expert_weight(stack, e, torch.float32)
            if update is not None:
                matrix = added(matrix, update.delta(e), output.source)
            matrix = self._encoded(output, matrix if output.half is None else matrix.chunk(2)[output.half])
            encoded = np.empty((output.shape[0], *matrix.shape), matrix.dtype) if encoded is None else encoded
            encoded[e] = matrix
        return encoded

    def _encoded(self, output: Output, weight: torch.Tensor) -> np.ndarray:
        """float32 numbers as the file holds them."""
        weight = weight.contiguous()
        if not bool(weight.isfinite().all()):
            raise CheckpointError(f"{output.source}: holds numbers that are not finite; the base or adapter is damaged")
        if output.kind == "f32":
            return weight.numpy()
        if output.kind == "q8_0":
            return self.gguf.quants.quantize(weight.numpy(), self.gguf.GGMLQuantizationType.Q8_0)
        if output.kind == "bf16":
            return weight.bfloat16().view(torch.int16).numpy()
        rounded = weight.half()
        if not bool(rounded.isfinite().all()):
            raise CheckpointError(f"{output.source}: has weights beyond 65504, too large for f16; use --type bf16")
        return rounded.numpy()


def _begins_with_bos(template: Template, tokenizer: Tokenizer) -> bool:
    try:
        prompt = template.render_prompt([{"role": "user", "content": "x"}])
    except DataError:  # a template that refuses a plain question: as other texts begin
        return tokenizer.adds_bos
    return tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)


def packed_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """uint8 (..., G, 16) and (..., G) → (..., G·17): of 32 weights each the scale, then in byte i the codes of weights
    i (low half) and i + 16. OCP's order, and ours, has neighbours in a byte."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    first, second = codes.chunk(2, dim=-1)
    return torch.cat((scales[..., None], first | (second << 4)), dim=-1).flatten(-2)


def neighbouring_rows(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads·C, …) of queries or keys in the order in which channels that are rotated together, i and i + C/2 of
    each head, are neighbours."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _half(tensor: torch.Tensor, half: int | None) -> torch.Tensor:
    return tensor if half is None else tensor.chunk(2, dim=1)[half]


def _add(writer, key: str, value):
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}  # fmt: skip
    kinds[type(value)](key, value)


def _gguf_package():
    try:
        import gguf
    except ImportError:
        raise ConfigError("export: needs the package gguf; pip install 'mini-forge[gguf]'") from None
    return gguf
