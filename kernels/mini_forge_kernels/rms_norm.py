"""RMSNorm that keeps only its input and one number a row.

    y = x·r·w,  r = 1/√(mean(x²) + ε)          dx = r·(w·dy − x·r²·mean(w·dy·x))          dw = Σ dy·x·r

RMSNorm (1910.07467) Eq. 4. Autograd on the reference makes five tensors the size of x forward and six backward; this
makes one forward and two backward, and saves x, which its producer keeps anyway, and r.

The Triton kernels move the least there is: with b bytes a number, 2·N·D·b forward (x in, y out) and 3·N·D·b backward
(x and dy in, dx out), beside r and w. A program holds whole rows on the chip. Where the weight trains, each of at most
512 programs sums its own rows' dw and torch adds those sums up: the same order, so the same bits, every time. Speed on
a GPU: not measured.
"""

import torch
from torch.autograd.function import once_differentiable

from mini_forge.model.allocation import fresh
from mini_forge.model.functional import rms_norm as reference
from mini_forge.model.ops import applied, vjp
from mini_forge_kernels import rowwise
from mini_forge_kernels.triton_support import as_rows, jit, launch, power_of_two, reason_not, tl, warps, widen

__all__ = ["TritonRMSNorm", "reference", "rms_norm", "rms_norm_vjp"]

TILE = 2048  # numbers a program holds at a time, or one row if that is more
DW_PROGRAMS = 512  # about four for each multiprocessor of a large GPU


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (…, D), weight (D,) → (…, D) in x's dtype; equals `reference`."""
    if reason_not(x.device):
        return applied(_RMSNorm, x, weight, eps)
    return TritonRMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        wide = x.to(rstd.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * (wide * rstd).to(grad.dtype)).reshape(-1, x.shape[-1]).sum(0)
        return _input_gradient(grad, x, weight, rstd), grad_weight, None


def _normed(x, weight, eps):
    """y, and r (…, 1) in float32."""
    if rowwise.serves(x, weight):
        y, rstd = rowwise.rms_norm(x, weight, eps)
        return y, rstd.view(*x.shape[:-1], 1)
    wide = x.float() if x.dtype != torch.float64 else x  # 16-bit sums of D squares would keep 8 bits
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    if x.dtype == wide.dtype:
        return torch.mul(x, rstd, out=fresh(x.shape, x.dtype, x.device)).mul_(weight), rstd
    return weight * (wide * rstd).to(x.dtype), rstd


def _input_gradient(grad, x, weight, rstd):
    """dx for dy."""
    if rowwise.serves(grad, x, weight):
        return rowwise.rms_norm_gradient(grad, x, weight, rstd)
    weighted, wide = (grad * weight).to(rstd.dtype), x.to(rstd.dtype)
    shared = torch.linalg.vecdot(weighted, wide).unsqueeze(-1) * rstd.pow(3) / x.shape[-1]
    return weighted.mul_(rstd).addcmul_(wide, shared, value=-1).to(x.dtype)


@torch.no_grad()
def rms_norm_vjp(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float):
    """`rms_norm` under a frozen weight and its vector-Jacobian product, as `ops.vjp` gives them."""
    if reason_not(x.device) is None:
        return vjp(lambda x: rms_norm(x, weight, eps), grad, x)
    if rowwise.serves(grad, x, weight):
        y, dx = rowwise.rms_norm_vjp(grad, x, weight, eps)
        return y, [dx]
    y, rstd = _normed(x, weight, eps)
    return y, [_input_gradient(grad, x, weight, rstd)]


@jit
def _forward(x_at, w_at, y_at, rstd_at, N, D, x_step, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of ROWS rows. x_step: numbers from one row of x to the next; y is contiguous."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # int64: N·D may pass 2³¹
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < N) & (columns < D)
    x = tl.load(x_at + rows * x_step + columns, mask=inside, other=0.0)
    w = tl.load(w_at + columns, mask=columns < D, other=0.0)
    wide = widen(x)  # as the reference: 16-bit sums of D squares would keep 8 bits
    rstd = 1 / tl.sqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / D + eps)
    normed = (wide * rstd).to(x.dtype)  # rounded before the product with the weight, as the reference does it
    y = widen(normed) * widen(w)
    tl.store(y_at + rows * D + columns, y.to(y_at.dtype.element_ty), mask=inside)
    tl.store(rstd_at + rows, rstd, mask=rows < N)


@jit
def _backward(x_at, dy_at, w_at, rstd_at, dx_at, dw_at, N, D, x_step, dy_step,
              TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WEIGHT_TRAINS: tl.constexpr):  # fmt: skip
    """TILES tiles of ROWS rows, one after another. dw_at (programs, D): this program's sum over its rows."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)[None, :]
    w = widen(tl.load(w_at + columns, mask=columns < D, other=0.0))
    dw = tl.zeros((1, BLOCK), dtype=dw_at.dtype.element_ty)
    for tile in range(TILES):
        rows = (program * TILES + tile) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (rows < N) & (columns < D)
        x = widen(tl.load(x_at + rows * x_step + columns, mask=inside, other=0.0))
        dy = widen(tl.load(dy_at + rows * dy_step + columns, mask=inside, other=0.0))
        rstd = tl.load(rstd_at + rows, mask=rows < N, other=0.0)
        normed = x * rstd
        if WEIGHT_TRAINS:
            dw += tl.sum(dy * normed, axis=0, keep_dims=True)
        dnormed = dy * w
        dx = rstd * (dnormed - normed * (tl.sum(dnormed * normed, axis=1, keep_dims=True) / D))
        tl.store(dx_at + rows * D + columns, dx.to(dx_at.dtype.element_ty), mask=inside)
    if WEIGHT_TRAINS:
        tl.store(dw_at + program * D + columns, dw, mask=columns < D)


def _tile(D: int) -> dict[str, int]:
    block = power_of_two(D)
    rows = max(1, TILE // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": warps(rows * block)}


class TritonRMSNorm(torch.autograd.Function):
    """`rms_norm` by the two kernels above, for CUDA tensors; x (…, D) of any strides, also of no rows."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows, weight = as_rows(x), weight.contiguous()
        N, D = rows.shape
        y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
        rstd = torch.empty(N, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        tile = _tile(D)
        launch(_forward, -(-N // tile["ROWS"]), rows, weight, y, rstd, N, D, rows.stride(0), eps, **tile)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        rows, upstream = as_rows(x), as_rows(grad)
        N, D = rows.shape
        trains, tile = ctx.needs_input_grad[1], _tile(D)
        count = -(-N // tile["ROWS"])
        tiles = power_of_two(max(-(-count // DW_PROGRAMS), 1)) if trains else 1  # few values: each is compiled once
        programs = -(-count // tiles)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dw = torch.empty(programs if trains else 0, D, dtype=rstd.dtype, device=x.device)
        launch(_backward, programs, rows, upstream, weight, rstd, dx, dw, N, D, rows.stride(0), upstream.stride(0),
               TILES=tiles, WEIGHT_TRAINS=trains, **tile)  # fmt: skip
        return dx, dw.sum(0).to(weight.dtype) if trains else None, None
