"""Providers: which functions the decoder calls. The only module that imports kernels.

`huggingface` is the plain reference path. `unsloth` is the fused path; `missing` says, op by op, why one is not fused,
and those ops stay plain. What is in use is printed when a run starts; nothing is swapped in silence.
"""

from dataclasses import dataclass, replace

from mini_forge.model.ops import PLAIN, Ops
from mini_forge_kernels.rms_norm import rms_norm
from mini_forge_kernels.rope import apply_rope
from mini_forge_kernels.swiglu import swiglu


@dataclass(frozen=True)
class Provider:
    """The ops a model is built with, and a reason for each op that is not fused though the provider asks for it."""

    ops: Ops
    missing: dict[str, str]

    def describe(self) -> str:
        reasons = "".join(f"; {op} plain: {why}" for op, why in self.missing.items())
        return f"ops: {self.ops.name}{reasons}"


def plain() -> Provider:
    return Provider(PLAIN, {})


def fused() -> Provider:
    """LoRA products and the loss head have hand-written gradients everywhere; this adds what lies between."""
    ops = replace(
        PLAIN, name="fused (rms_norm, apply_rope, swiglu)", rms_norm=rms_norm, apply_rope=apply_rope, swiglu=swiglu
    )
    return Provider(ops, {"attention": "torch's own kernels are used"})


PROVIDERS = {"huggingface": plain, "unsloth": fused}
