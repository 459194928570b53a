"""RMSNorm that keeps only its input and one number a row.

    y = x·r·w,  r = 1/√(mean(x²) + ε)          dx = r·(w·dy − x·r²·mean(w·dy·x))          dw = Σ dy·x·r

RMSNorm (1910.07467) Eq. 4. Autograd on the reference makes five tensors the size of x forward and six backward; this
makes one forward and two backward, and saves x, which its producer keeps anyway, and r.
"""

import torch

from mini_forge.model.functional import rms_norm as reference

__all__ = ["reference", "rms_norm"]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (…, D), weight (D,) → (…, D) in x's dtype; equals `reference`."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float() if x.dtype != torch.float64 else x  # 16-bit sums of D squares would keep 8 bits
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        ctx.save_for_backward(x, weight, rstd)
        if x.dtype == wide.dtype:
            return (x * rstd).mul_(weight)
        return weight * (wide * rstd).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        wide = x.to(rstd.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * rstd).to(grad.dtype)).flatten(0, -2).sum(0)
        weighted = (grad * weight).to(rstd.dtype)
        shared = torch.linalg.vecdot(weighted, wide).unsqueeze(-1) * rstd.pow(3) / x.shape[-1]
        return weighted.mul_(rstd).addcmul_(wide, shared, value=-1).to(x.dtype), grad_weight, None
