"""The functions a decoder calls, as a value: two models with different ops live in one process, and nothing is patched.

`PLAIN` is the reference: plain torch, differentiated by autograd. A provider (see `mini_forge.providers`) hands the
decoder another `Ops` whose functions have the same names, signatures and results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mini_forge.model import functional


@dataclass(frozen=True)
class Ops:
    """Signatures and shapes are those of the functions of the same names in `mini_forge.model.functional`, and of
    `rope_qk` here."""

    name: str
    rms_norm: Callable
    rope_qk: Callable
    swiglu: Callable
    clamped_swiglu: Callable
    attention: Callable
    token_nll: Callable | None = None  # of losses.py, which is used where this is None
    grouped_lora: Callable | None = None  # `LoRAStack.update`


def rope_qk(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope` to query (N, H, C) and key (N, K, C); cos, sin (N, C). Returns both, in their own shapes."""
    return functional.apply_rope(query, cos, sin), functional.apply_rope(key, cos, sin)


def gated_unit(ops: Ops, activation: str, clamp: tuple[float, float]) -> Callable:
    """The function of gate and up that a spec names (`DecoderSpec.activation`); gelu has no fused form."""
    limit, slope = clamp
    units = {
        "silu": ops.swiglu,
        "gelu_tanh": functional.gelu_glu,
        "clamped": partial(ops.clamped_swiglu, limit=limit, slope=slope),
    }
    return units[activation]


PLAIN = Ops(
    name="plain",
    rms_norm=functional.rms_norm,
    rope_qk=rope_qk,
    swiglu=functional.swiglu,
    clamped_swiglu=functional.clamped_swiglu,
    attention=functional.attention,
)
