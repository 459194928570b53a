"""Rotary embedding with nothing saved but cos and sin: the backward is the rotation by the opposite angle.

    (y₁, y₂) = (x₁c − x₂s, x₂c + x₁s)          (dx₁, dx₂) = (dy₁c + dy₂s, dy₂c − dy₁s)

RoFormer (2104.09864) Eq. 34, half layout. The reference writes three tensors the size of x; this writes one.
"""

import torch

from mini_forge.model.functional import apply_rope as reference

__all__ = ["apply_rope", "reference"]


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (N, H, C); cos, sin (N, C), both halves equal → (N, H, C); equals `reference`."""
    return _Rotation.apply(x, cos, sin)


def _rotate(x, cos, sin, sign):
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(x[..., :half], c, out=out[..., :half]).addcmul_(x[..., half:], s, value=-sign)
    torch.mul(x[..., half:], c, out=out[..., half:]).addcmul_(x[..., :half], s, value=sign)
    return out


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, -1), None, None
