"""One product for each expert's block of rows. Rows lie sorted by expert; experts without rows are never touched."""

import torch
import torch.nn.functional as F

from mini_forge.model.stacks import expert_product, expert_weight
from mini_forge.model.transfer import to_device


def grouped_products(x: torch.Tensor, stack, bias: torch.Tensor | None, counts: list[int]) -> torch.Tensor:
    """x_e W_eᵀ + b_e for the rows of each expert, differentiable in x.

    x (M, in), sorted by expert, `counts[e]` rows each; stack (E, out, in) frozen, dense or quantized; bias (E, out) or
    None. Returns (M, out)."""
    return _FrozenProducts.apply(x, bias, stack, counts)


class _FrozenProducts(torch.autograd.Function):
    """Saves nothing but where the weights are: backward makes each W_e again for dX_e = dY_e W_e."""

    @staticmethod
    def forward(ctx, x, bias, stack, counts):
        ctx.stack, ctx.counts = stack, counts
        dtype, x = x.dtype, x.to(getattr(stack, "compute_dtype", x.dtype))
        if is_groupable(x, stack):
            out = grouped(x, stack.transpose(1, 2), counts)
        else:
            out = x.new_empty(len(x), stack.shape[1])
            for e, rows in blocks(counts):
                expert_product(x[rows], stack, e, out[rows])
        if bias is not None:
            for e, rows in blocks(counts):
                out[rows] += bias[e].to(x.dtype)
        return out.to(dtype)

    @staticmethod
    def backward(ctx, grad):
        dtype, grad = grad.dtype, grad.to(getattr(ctx.stack, "compute_dtype", grad.dtype)).contiguous()
        if is_groupable(grad, ctx.stack):
            return grouped(grad, ctx.stack, ctx.counts), None, None, None
        grad_x = grad.new_empty(len(grad), ctx.stack.shape[2])
        for e, rows in blocks(ctx.counts):
            torch.mm(grad[rows], expert_weight(ctx.stack, e, grad.dtype), out=grad_x[rows])
        return grad_x.to(dtype), None, None, None


def blocks(counts: list[int]):
    """(expert, slice of its rows) for each expert that has rows."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count


def is_groupable(x: torch.Tensor, stack) -> bool:
    """Whether one grouped product serves: dense bfloat16 on CUDA, sizes in steps of 16 bytes."""
    is_dense = isinstance(stack, torch.Tensor) and stack.dtype == x.dtype == torch.bfloat16
    return is_dense and x.is_cuda and stack.shape[1] % 8 == 0 and stack.shape[2] % 8 == 0


def grouped(x: torch.Tensor, stack: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """x_e W_e for all experts in one kernel: x (M, in), stack (E, in, out) → (M, out), differentiable in both."""
    ends = to_device(torch.tensor(counts).cumsum(0).to(torch.int32), x.device)
    return F.grouped_mm(x, stack, offs=ends)
