"""Adapters of expert stacks in the two layouts that other programs read.

PEFT's fused layout (`target_parameters`) puts one wrapper around `experts` for each adapted stack, the first innermost:
of two, gate_up_proj is `….experts.base_layer.lora_A.weight` and down_proj `….experts.lora_A.weight`; one alone is the
latter. A is (E·R, in) with row e·R + k, B is (out, R·E) with column k·E + e. Where a checkpoint's stacks are stored
(E, in, out) and PEFT takes them as they lie, its A and B are our B and A, transposed; where gate and up rows lie by
turns, so do the rows of its B.

The per-expert layout has `….experts.3.gate_proj.lora_A.weight`, and so up_proj and down_proj, as if each expert were
three linear layers; gate and up have the same A. Its names are the checkpoint's: Mixtral's are w1, w3 and w2, under
`block_sparse_moe`. Here they are read as `own_name` gives them.
"""

import re

import torch

from mini_forge.errors import CheckpointError
from mini_forge.model.families.layout import PerExpert
from mini_forge.model.lora import LoRAStack
from mini_forge.model.stacks import deinterleave_rows, interleave_rows

FORMATS = ("peft", "per-expert")
PARTS = ("gate_proj", "up_proj", "down_proj")
PER_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.lora_([AB])\.weight")
# Of checkpoints that name their experts' matrices otherwise.
OTHER_NAMES = re.compile(r"(.*)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.(.*)")
OTHER_PARTS = dict(zip(("w1", "w3", "w2"), PARTS, strict=True))
FactorPair = tuple[torch.Tensor, torch.Tensor]  # A (E, R, in) and B (E, out, R), float32


def fused_tensors(stacks: dict[str, LoRAStack], layout) -> dict[str, torch.Tensor]:
    """PEFT's tensors, by module path, of our stacks: `stacks` maps `….experts.gate_up_proj` and so on to layers."""
    tensors = {}
    for name, layer in stacks.items():
        A, B = to_fused(name, layer.lora_A.detach().float().cpu(), layer.lora_B.detach().float().cpu(), layout)
        stem = _fused_stem(name, stacks)
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = A.contiguous(), B.contiguous()
    return tensors


def _fused_stem(name: str, stacks) -> str:
    owner, _, leaf = name.rpartition(".")
    has_both = f"{owner}.down_proj" in stacks and f"{owner}.gate_up_proj" in stacks
    return f"{owner}.base_layer" if has_both and leaf == "gate_up_proj" else owner


def to_fused(name: str, A: torch.Tensor, B: torch.Tensor, layout) -> FactorPair:
    """Our factors (E, R, in), (E, out, R) → PEFT's (E·R, in), (out, R·E)."""
    if layout.interleaves and name.endswith("gate_up_proj"):
        B = interleave_rows(B, 1)
    if layout.swaps_factors:
        A, B = B.transpose(1, 2), A.transpose(1, 2)
    return A.reshape(-1, A.shape[2]), B.permute(1, 2, 0).reshape(B.shape[1], -1)


def from_fused(name: str, A: torch.Tensor, B: torch.Tensor, experts: int, layout) -> FactorPair:
    """The inverse of `to_fused`."""
    if A.dim() != 2 or B.dim() != 2 or len(A) % experts or B.shape[1] != len(A):
        raise CheckpointError(f"{name}: factors {list(A.shape)} and {list(B.shape)} are not those of {experts} experts")
    A = A.view(experts, -1, A.shape[1])
    B = B.view(B.shape[0], -1, experts).permute(2, 0, 1)
    if layout.swaps_factors:
        A, B = B.transpose(1, 2), A.transpose(1, 2)
    if layout.interleaves and name.endswith("gate_up_proj"):
        B = deinterleave_rows(B, 1)
    return A, B


def own_name(name: str) -> str:
    """The tensor `….mlp.experts.3.gate_proj.…` of an adapter whose base names its experts' matrices otherwise."""
    match = OTHER_NAMES.fullmatch(name)
    return name if match is None else f"{match[1]}.mlp.experts.{match[2]}.{OTHER_PARTS[match[3]]}.{match[4]}"


def per_expert_tensors(stacks: dict[str, LoRAStack], layout=None) -> dict[str, torch.Tensor]:
    """One adapter for every matrix of every expert, by the checkpoint's names where it has some for them."""
    tensors, (gate, up, down) = {}, layout.names if isinstance(layout, PerExpert) else PARTS
    for name, layer in stacks.items():
        owner, _, leaf = name.rpartition(".")
        owner = layout.stored_name(owner) if isinstance(layout, PerExpert) else owner
        for e, (A, B) in enumerate(zip(layer.lora_A.detach(), layer.lora_B.detach(), strict=True)):
            halves = dict(zip((gate, up), B.chunk(2), strict=True)) if leaf == "gate_up_proj" else {down: B}
            for part, rows in halves.items():
                stem = f"{owner}.{e}.{part}"
                tensors[f"{stem}.lora_A.weight"] = A.float().cpu().clone()
                tensors[f"{stem}.lora_B.weight"] = rows.float().cpu().clone()
    return tensors


def fuse(tensors: dict[str, torch.Tensor], stacks: list[str], experts: int, layout) -> dict[str, torch.Tensor]:
    """An adapter's tensors with those of experts, in either layout, replaced by `STACK.lora_A` (E, R, in) and
    `STACK.lora_B` (E, out, R) for each name in `stacks` that the adapter has. Other tensors stay as they are, those of
    experts that the model lacks among them."""
    rest = dict(tensors)
    pieces = {name: rest.pop(name) for name in tensors if PER_EXPERT.fullmatch(name)}
    for name in stacks:
        owner, _, leaf = name.rpartition(".")
        if pieces:
            found = _from_pieces(pieces, owner, leaf, experts)
        else:
            stem = _fused_stem(name, [n for n in stacks if n.startswith(owner + ".")])
            keys = f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"
            if any(key not in rest for key in keys):
                continue
            found = from_fused(name, rest.pop(keys[0]), rest.pop(keys[1]), experts, layout)
        rest[f"{name}.lora_A"], rest[f"{name}.lora_B"] = found
    return rest | pieces


def stack_targets(targets: tuple[str, ...] | None, names) -> tuple[str, ...] | None:
    """An adapter's targets with per-expert modules named as the stacks they are here. names: its tensors'."""
    found = {match[3] for name in names if (match := PER_EXPERT.fullmatch(name))}
    if not found or targets is None:
        return targets
    stacks = ["experts.gate_up_proj"] * bool(found & set(PARTS[:2])) + ["experts.down_proj"] * (PARTS[2] in found)
    others = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names if not PER_EXPERT.fullmatch(name)}
    return (*(t for t in targets if t not in (*PARTS, *OTHER_PARTS) or t in others), *stacks)


def _from_pieces(pieces, owner: str, leaf: str, experts: int) -> FactorPair:
    """One stack's factors from its `pieces`, which are taken out."""
    parts = PARTS[:2] if leaf == "gate_up_proj" else PARTS[2:]
    try:
        A = [[pieces.pop(f"{owner}.{e}.{part}.lora_A.weight") for part in parts] for e in range(experts)]
        B = [[pieces.pop(f"{owner}.{e}.{part}.lora_B.weight") for part in parts] for e in range(experts)]
    except KeyError as missing:
        raise CheckpointError(f"adapter: tensor {missing} is missing") from None
    if any(len({piece.shape for each in factor for piece in each}) > 1 for factor in (A, B)):
        raise CheckpointError(f"{owner}.{leaf}: its experts have adapters of unequal shape; they need one rank")
    if any(not torch.equal(each[0], each[-1]) for each in A):
        raise CheckpointError(f"adapter: {owner} has another lora_A for gate_proj than for up_proj; not supported")
    return torch.stack([each[0] for each in A]), torch.stack([torch.cat(each) for each in B])
