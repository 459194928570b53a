"""Providers: which functions the decoder calls. The only module that may import kernels.

`huggingface` is the plain reference path. `unsloth` asks for the fused path; `missing` says, op by op, why one cannot
run fused here, and those ops stay plain. What is in use is printed when a run starts; nothing is swapped in silence.
"""

from dataclasses import dataclass

from mini_forge.model.ops import PLAIN, Ops


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
    """LoRA projections and the loss head are fused in every provider. Fused versions of the rest are not written yet."""
    reason = "no fused version in this release"
    return Provider(PLAIN, dict.fromkeys(("rms_norm", "apply_rope", "swiglu"), reason))


PROVIDERS = {"huggingface": plain, "unsloth": fused}
