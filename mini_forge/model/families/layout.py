"""How the experts of a checkpoint lie on disk, and the stacks they become: (E, 2F, D) with gate rows first, (E, D, F).

A layout says where a tensor belongs (`place`, by its name in the text model) and turns one expert's matrix into ours
(`canonical`) and back (`stored`); the two are inverse to each other, bit for bit.
"""

import re
from dataclasses import dataclass

import torch

from mini_forge.model.stacks import deinterleave_rows, interleave_rows

STACKS = re.compile(r"(.*\.experts\.(?:gate_up|down)_proj)(_bias|_blocks|_scales)?")
PACKED = ("_blocks", "_scales")  # of MXFP4
# Where multimodal checkpoints keep their text model, and what belongs to their other parts.
TEXT_PREFIXES = {"language_model.": "", "model.language_model.": "model."}
OTHER_PARTS = re.compile(r"(model\.)?(vision_model|vision_tower|multi_modal_projector|embed_vision|audio_tower)\.")


@dataclass(frozen=True)
class Place:
    """Where a stored tensor belongs: in our parameter `name`, for one expert or (None) all of them in a stack.

    part: the rows of gate_up it fills, "gate" or "up"; "_blocks" or "_scales" of MXFP4; None for the whole."""

    name: str
    expert: int | None = None
    part: str | None = None


def without_text_prefix(name: str) -> str:
    """The name of a module or tensor of a multimodal model, as its text model alone has it."""
    for prefix, own in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            name = own + name.removeprefix(prefix)
    return name


def text_name(stored: str, layout=None) -> str | None:
    """The name of a tensor in the text model; None for a tensor of another part of a multimodal checkpoint."""
    if OTHER_PARTS.match(stored):
        return None
    stored = without_text_prefix(stored)
    return layout.own_name(stored) if isinstance(layout, PerExpert) else stored


class PerExpert:
    """Three matrices (out, in) for each expert: `….mlp.experts.3.GATE.weight`, and so up and down; or stacks like ours.

    mlp: what stored names say for `mlp`."""

    swaps_factors = interleaves = False  # how PEFT's adapter of a stack differs from ours: see io/expert_adapters.py

    def __init__(self, names: tuple[str, str, str], mlp: str = "mlp"):
        self.names, self.mlp = names, mlp
        self.pattern = re.compile(rf"(.*\.mlp\.experts)\.(\d+)\.({'|'.join(names)})\.weight")

    def own_name(self, stored: str) -> str:
        return stored.replace(f".{self.mlp}.", ".mlp.")

    def stored_name(self, own: str) -> str:
        return own.replace(".mlp.", f".{self.mlp}.")

    def place(self, name: str) -> Place | None:
        match = self.pattern.fullmatch(name)
        if match is None:  # or in stacks like ours, as newer programs may save them
            whole = STACKS.fullmatch(name)
            return None if whole is None or whole[2] is not None else Place(whole[1])
        owner, expert, name = match.groups()
        part = ("gate", "up", None)[self.names.index(name)]
        return Place(f"{owner}.{'down_proj' if part is None else 'gate_up_proj'}", int(expert), part)

    def canonical(self, place: Place, matrix: torch.Tensor) -> torch.Tensor:
        return matrix

    stored = canonical


class TransposedStacks:
    """Stacks (E, in, out), gate columns first."""

    swaps_factors, interleaves = True, False

    def place(self, name: str) -> Place | None:
        match = STACKS.fullmatch(name)
        return None if match is None or match[2] is not None else Place(match[1])

    def canonical(self, place: Place, matrix: torch.Tensor) -> torch.Tensor:
        """One expert's stored matrix → (out, in)."""
        return matrix.t()

    def stored(self, place: Place, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.t()


class InterleavedStacks:
    """Stacks (E, in, out) with gate and up columns by turns, biases likewise; or MXFP4 blocks and scales by rows."""

    swaps_factors, interleaves = False, True

    def place(self, name: str) -> Place | None:
        match = STACKS.fullmatch(name)
        if match is None:
            return None
        return Place(match[1] + "_bias") if match[2] == "_bias" else Place(match[1], None, match[2])

    def canonical(self, place: Place, matrix: torch.Tensor) -> torch.Tensor:
        matrix = matrix if place.part in PACKED or matrix.dim() == 1 else matrix.t()
        return deinterleave_rows(matrix, 0) if "gate_up" in place.name else matrix

    def stored(self, place: Place, matrix: torch.Tensor) -> torch.Tensor:
        matrix = interleave_rows(matrix, 0) if "gate_up" in place.name else matrix
        return matrix if place.part in PACKED or matrix.dim() == 1 else matrix.t()
