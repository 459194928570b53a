"""Experts from a checkpoint into their stacks, one expert's matrix in hand at a time, quantized on arrival.

Each family's layout (`mini_forge.model.families.layout`) says where a stored tensor belongs. MXFP4 stays as it is
stored. A stack on disk is read expert by expert: its experts lie one after the other.
"""

from functools import partial

import torch
from torch import nn

from mini_forge.errors import CheckpointError
from mini_forge.io.reading import Piece, TensorEntry
from mini_forge.model.decoder import Decoder
from mini_forge.model.families.layout import PACKED, Place
from mini_forge.model.mxfp4 import BLOCK, NAN_SCALE
from mini_forge.model.stacks import Stack4bit, Stack8bit, StackMxfp4


class StackLoader:
    """Fills the stacks of one model. `storage` says how weights are kept (`mini_forge.io.weights.Storage`)."""

    def __init__(self, model: Decoder, storage, layout):
        self.model, self.storage, self.layout = model, storage, layout
        self.missing: dict[str, int] = {}  # rows of each stack that no piece brings yet
        self.packed: dict[str, bool] = {}  # whether a stack is stored in MXFP4
        self.halves: dict[tuple[str, int], torch.Tensor] = {}  # gate_up matrices of which one half has come
        self.spare: list[torch.Tensor] = []  # those that are done with: memory for the next

    def pieces(self, stored: str, place: Place, entry: TensorEntry) -> list[Piece]:
        """How tensor `stored` is read. Raises CheckpointError where it is not made for the model's experts."""
        owner, leaf = self._owner(place)
        E, out, *width = getattr(owner, leaf).shape
        if not (entry.dtype == torch.uint8 if place.part in PACKED else entry.dtype.is_floating_point):
            raise CheckpointError(f"{stored}: stored as {entry.dtype} in a form that is not known here")
        if leaf.endswith("_bias"):
            self._check(place.name, entry.shape, (E, out))
            self.missing[place.name] = self.missing.get(place.name, E) - E
            return [Piece(stored, entry, partial(self._put_bias, place))]
        is_packed = place.part in PACKED
        if self.packed.setdefault(place.name, is_packed) != is_packed:
            raise CheckpointError(f"{place.name}: stored both in MXFP4 and in another form; fetch the checkpoint again")
        self.missing.setdefault(place.name, E * out * (2 if is_packed else 1))
        if place.expert is not None:
            if place.expert >= E:
                raise CheckpointError(f"{place.name}: an expert {place.expert}, but config.json has {E}")
            self.missing[place.name] -= self._checked_rows(place, entry.shape, out, width[0])
            return [Piece(stored, entry, partial(self._put_matrix, place, place.expert))]
        if is_packed:
            shape = (E, out, width[0] // BLOCK, BLOCK // 2)
            self._check(place.name + place.part, entry.shape, shape if place.part == "_blocks" else shape[:3])
            self.missing[place.name] -= E * out
        elif len(entry.shape) != 3 or entry.shape[0] != E:
            raise CheckpointError(f"{stored}: shape {list(entry.shape)} is not a stack of the model's experts")
        else:
            self.missing[place.name] -= E * self._checked_rows(place, entry.shape[1:], out, width[0])
        put = self._put_packed if is_packed else self._put_matrix
        return [Piece(stored, entry.rows(e, e + 1), partial(put, place, e)) for e in range(E)]

    def unfinished(self) -> list[str]:
        """Stacks of which a part is not stored."""
        return sorted(name for name, rows in self.missing.items() if rows)

    def _checked_rows(self, place: Place, stored: tuple[int, ...], out: int, width: int) -> int:
        """The rows that a stored matrix fills of its expert's (out, width): all, or the gate or up half of them."""
        rows = out if place.part is None else out // 2
        found = self.layout.canonical(place, torch.empty(stored, device="meta")).shape
        self._check(f"{place.name} of expert {place.expert or 0}", found, (rows, width))
        return rows

    def _owner(self, place: Place) -> tuple[nn.Module, str]:
        owner, _, leaf = place.name.rpartition(".")
        return self.model.get_submodule(owner), leaf

    def _put_bias(self, place: Place, tensor: torch.Tensor):
        owner, leaf = self._owner(place)
        values = torch.stack([self.layout.canonical(place, row) for row in tensor])
        own = values.to(self.storage.device, self.storage.dtype)
        setattr(owner, leaf, nn.Parameter(own, requires_grad=False))

    def _put_packed(self, place: Place, expert: int, tensor: torch.Tensor):
        """One expert's blocks (1, out, in/32, 16) or scales (1, out, in/32)."""
        stack = self._stack(place)
        if place.part == "_scales" and int(tensor.max()) == NAN_SCALE:
            raise CheckpointError(
                f"{place.name}_scales: hold {NAN_SCALE}, which is NaN; the checkpoint is damaged, fetch it again"
            )
        target = stack.blocks if place.part == "_blocks" else stack.scales
        target[expert].copy_(self.layout.canonical(place, tensor[0]))

    def _put_matrix(self, place: Place, expert: int, tensor: torch.Tensor):
        """One expert's matrix, or the gate or up half of it, as stored: alone, or (1, …) out of a stack."""
        stack = self._stack(place)
        is_dense = isinstance(stack, nn.Parameter)
        tensor = tensor if is_dense else self.storage.cast(tensor)
        matrix = self.layout.canonical(place, tensor[0] if tensor.dim() == 3 else tensor)
        rows = stack.shape[1] if place.part is None else stack.shape[1] // 2
        first = rows if place.part == "up" else 0
        if is_dense:
            stack.data[expert, first : first + rows].copy_(matrix)
        elif place.part is None:
            stack.put(expert, matrix)
        else:
            self._put_half(stack, place.name, expert, first, matrix)

    def _put_half(self, stack, name: str, expert: int, first: int, matrix: torch.Tensor):
        """Quantizes an expert's gate_up when both halves are there; the first waits in memory that is used again."""
        whole = self.halves.pop((name, expert), None)
        is_last = whole is not None
        if whole is None:
            whole = self.spare.pop() if self.spare else matrix.new_empty(stack.shape[1:])
        whole[first : first + len(matrix)].copy_(matrix)
        if is_last:
            stack.put(expert, whole)
            self.spare.append(whole)
        else:
            self.halves[name, expert] = whole

    def _stack(self, place: Place):
        """The stack that `place` names, all its memory there."""
        owner, leaf = self._owner(place)
        stack, is_packed = getattr(owner, leaf), place.part in PACKED
        if isinstance(stack, nn.Parameter) and stack.is_meta:
            stack = self._empty(*stack.shape, is_packed)
            delattr(owner, leaf)
            setattr(owner, leaf, stack)
        return stack

    def _empty(self, E: int, out: int, width: int, is_packed: bool):
        storage = self.storage
        options = {"compute_dtype": storage.compute_dtype, "device": storage.device}
        if is_packed:
            return StackMxfp4.empty(E, out, width, **options)
        if storage.quantization is None:
            stack = torch.empty(E, out, width, dtype=storage.dtype, device=storage.device)
            return nn.Parameter(stack, requires_grad=False)
        if storage.quantization == "int8":
            return Stack8bit.empty(E, out, width, **options)
        return Stack4bit.empty(E, out, width, quant_type=storage.quantization, nested=storage.nested, **options)

    def _check(self, name: str, found, expected):
        if tuple(found) != tuple(expected):
            raise CheckpointError(f"{name}: stored as {list(found)}, config.json asks for {list(expected)}")
