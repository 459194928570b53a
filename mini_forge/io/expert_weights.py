"""Experts from a checkpoint into their stacks, one expert's matrix in hand at a time, quantized on arrival.

Each family's layout (`mini_forge.model.families.layout`) says where a stored tensor belongs. MXFP4 stays as it is stored.
"""

import torch
from torch import nn

from mini_forge.errors import CheckpointError
from mini_forge.model.decoder import Decoder
from mini_forge.model.families.layout import PACKED, Place
from mini_forge.model.stacks import Stack4bit, Stack8bit, StackMxfp4


class StackLoader:
    """Fills the stacks of one model. `storage` says how weights are kept (`mini_forge.io.weights.Storage`)."""

    def __init__(self, model: Decoder, storage, layout):
        self.model, self.storage, self.layout = model, storage, layout
        self.missing: dict[str, int] = {}  # rows or values that each stack still waits for
        self.halves: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def place(self, stored: str, place: Place, checkpoint):
        """Read tensor `stored` and put it where it belongs."""
        owner_name, _, leaf = place.name.rpartition(".")
        owner = self.model.get_submodule(owner_name)
        tensor = checkpoint.borrow(stored)
        if place.part in PACKED:
            self._put_packed(owner, leaf, place, tensor)
        elif leaf.endswith("_bias"):
            self._put_bias(owner, leaf, place, tensor)
        elif place.expert is not None:
            self._put_matrix(owner, leaf, place, place.expert, tensor)
        else:
            if tensor.dim() != 3 or len(tensor) != self.model.spec.experts.count:
                raise CheckpointError(f"{stored}: shape {list(tensor.shape)} is not a stack of the model's experts")
            for expert, matrix in enumerate(tensor):
                self._put_matrix(owner, leaf, place, expert, self.layout.canonical(place, matrix))

    def unfinished(self) -> list[str]:
        """Stacks of which a part never came."""
        return sorted(name for name, rows in self.missing.items() if rows)

    def _put_bias(self, owner, leaf, place, tensor):
        values = torch.stack([self.layout.canonical(place, row) for row in tensor])
        self._check(place.name, values.shape, getattr(owner, leaf).shape)
        own = values.to(self.storage.device, self.storage.dtype)
        setattr(owner, leaf, nn.Parameter(own, requires_grad=False))
        self.missing[place.name] = 0

    def _put_packed(self, owner, leaf, place, tensor):
        E, out, width = getattr(owner, leaf).shape
        groups = width // 32
        self._check(place.name + place.part, tensor.shape, (E, out, groups, 16)[: tensor.dim()])
        if not isinstance(getattr(owner, leaf), StackMxfp4):
            options = {"compute_dtype": self.storage.compute_dtype, "device": self.storage.device}
            self._install(owner, leaf, StackMxfp4.empty(E, out, width, **options), place.name, 2 * E)
        stack = getattr(owner, leaf)
        target = stack.blocks if place.part == "_blocks" else stack.scales
        for expert, rows in enumerate(tensor):
            target[expert].copy_(self.layout.canonical(place, rows))
        self.missing[place.name] -= E

    def _put_matrix(self, owner, leaf, place, expert: int, matrix: torch.Tensor):
        """One expert's (out, in) matrix, or the gate or up half of it."""
        E, out, width = getattr(owner, leaf).shape
        rows = out if place.part is None else out // 2
        self._check(f"{place.name} of expert {expert}", matrix.shape, (rows, width))
        if expert >= E:
            raise CheckpointError(f"{place.name}: an expert {expert}, but config.json has {E}")
        if place.name not in self.missing:
            self._install(owner, leaf, self._empty(E, out, width), place.name, E * out)
        stack = getattr(owner, leaf)
        self.missing[place.name] -= rows
        if isinstance(stack, nn.Parameter):
            first = rows if place.part == "up" else 0
            stack.data[expert, first : first + rows].copy_(matrix)
        elif place.part is None:
            stack.put(expert, matrix.to(self.storage.device, self.storage.dtype))
        else:  # quantized when both halves are there: the borrowed one must be copied
            halves = self.halves.setdefault((place.name, expert), {})
            halves[place.part] = matrix.to(self.storage.device, self.storage.dtype, copy=True)
            if len(halves) == 2:
                stack.put(expert, torch.cat((halves["gate"], halves["up"])))
                del self.halves[place.name, expert]

    def _empty(self, E: int, out: int, width: int):
        storage = self.storage
        if storage.quantization is None:
            stack = torch.empty(E, out, width, dtype=storage.dtype, device=storage.device)
            return nn.Parameter(stack, requires_grad=False)
        options = {"compute_dtype": storage.compute_dtype, "device": storage.device}
        if storage.quantization == "int8":
            return Stack8bit.empty(E, out, width, **options)
        return Stack4bit.empty(
            E, out, width, quant_type=storage.quantization, nested=storage.nested, **options
        )

    def _install(self, owner: nn.Module, leaf: str, stack, name: str, rows: int):
        delattr(owner, leaf)
        setattr(owner, leaf, stack)
        self.missing[name] = rows

    def _check(self, name: str, found, expected):
        if tuple(found) != tuple(expected):
            raise CheckpointError(f"{name}: stored as {list(found)}, config.json asks for {list(expected)}")
