"""The form in which a base's weights are held, once read."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mini_forge.errors import CheckpointError
from mini_forge.model.fourbit import FLOATS
from mini_forge.model.frozen import FrozenProducts
from mini_forge.model.ops import Ops
from mini_forge.model.quant import Linear4bit, Linear8bit


def multiplies_stored(ops: Ops, dtype: torch.dtype, device: str | torch.device) -> bool:
    """Whether matrices are multiplied as they are stored, and so held in bfloat16 where a checkpoint stores them in it,
    under activations in `dtype`."""
    return ops.stored_products is not None and dtype == torch.float32 and torch.device(device).type == "cpu"


@dataclass(frozen=True)
class Storage:
    """How weights are kept once read: the form of linear layers, and the dtype and device of everything else."""

    quantization: str | None
    nested: bool
    compute_dtype: torch.dtype
    dtype: torch.dtype
    device: torch.device
    stored_products: FrozenProducts | None = None  # `Ops.stored_products`, where matrices are multiplied so

    def cast(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight that is to be quantized, on the device, with the values it has in the training dtype: statistics are
        taken of these, as loading stacks that quantize do. No copy is made for float32, which holds all the values of
        the 16-bit dtypes and by way of which these are quantized anyway."""
        weight = weight.to(self.device)
        return weight if self.dtype == torch.float32 and weight.dtype in FLOATS else weight.to(self.dtype)

    def quantized(self, weight: torch.Tensor) -> Linear4bit | Linear8bit:
        """The layer of a dense (out, in) weight, without its bias."""
        weight = self.cast(weight)
        if self.quantization == "int8":
            return self._with_ops(Linear8bit.from_weight(weight, None, compute_dtype=self.compute_dtype))
        options = {"quant_type": self.quantization, "nested": self.nested, "compute_dtype": self.compute_dtype}
        layer = Linear4bit.from_weight(weight, None, **options)
        layer.weight_dtype = self.dtype
        return self._with_ops(layer)

    def stored(self, name: str, parts: dict[str, torch.Tensor], folder: Path) -> Linear4bit | Linear8bit:
        """The layer of weight `name` from the tensors in which a checkpoint holds it, without its bias."""
        if name + ".absmax" not in parts:
            self._check_same("int8", name, folder)
            scale = parts[name.removesuffix("weight") + "SCB"]
            return self._with_ops(Linear8bit.from_state(parts[name], scale, compute_dtype=self.compute_dtype))
        state = {"weight" + key.removeprefix(name): tensor for key, tensor in parts.items()}
        layer = Linear4bit.from_state(state, compute_dtype=self.compute_dtype)
        self._check_same(layer.quant_type, name, folder)
        return self._with_ops(layer)

    def _check_same(self, stored: str, name: str, folder: Path):
        if self.quantization in (None, stored):
            return
        keys = "use_8bit" if stored == "int8" else f"use_4bit, and bnb_4bit_quant_type to {stored!r}"
        raise CheckpointError(f"{folder}: {name} is stored as {stored}, not {self.quantization}; set {keys}")

    def _with_ops(self, layer: Linear4bit | Linear8bit) -> Linear4bit | Linear8bit:
        layer.stored_products = self.stored_products
        return layer
