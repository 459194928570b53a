"""The functions a decoder calls, as a value: two models with different ops live in one process, and nothing is patched.

`PLAIN` is the reference: plain torch, differentiated by autograd. A provider (see `mini_forge.providers`) hands the
decoder another `Ops` whose functions have the same names, signatures and results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mini_forge.model import functional


@dataclass(frozen=True)
class Ops:
    """Signatures and shapes are those of the functions of the same names in `mini_forge.model.functional`."""

    name: str
    rms_norm: Callable
    apply_rope: Callable
    swiglu: Callable
    attention: Callable


def gated_unit(ops: Ops, activation: str, clamp: tuple[float, float]) -> Callable:
    """The function of gate and up that a spec names (`DecoderSpec.activation`); only silu has a fused form."""
    limit, slope = clamp
    units = {
        "silu": ops.swiglu,
        "gelu_tanh": functional.gelu_glu,
        "clamped": partial(functional.clamped_swiglu, limit=limit, slope=slope),
    }
    return units[activation]


PLAIN = Ops("plain", functional.rms_norm, functional.apply_rope, functional.swiglu, functional.attention)
