"""SwiGLU that saves its two inputs and nothing between.

    h = silu(g)·u,  silu(g) = g·σ(g)          du = dh·silu(g)          dg = dh·u·σ(g)(1 + g(1 − σ(g)))

SwiGLU (2002.05202) Eq. 6. Autograd on the reference also saves silu(g), a third tensor of the MLP's width; this makes
it again in the backward.
"""

import torch
import torch.nn.functional as F

from mini_forge.model.functional import swiglu as reference

__all__ = ["reference", "swiglu"]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Both (…, F) → (…, F); equals `reference`."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
