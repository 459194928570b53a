"""LoRA of experts: each expert's rows get the update of its own factors, in place, with the backward written by hand.

    y_e += s · (x_e A_eᵀ) B_eᵀ            x_e (m_e, in): the rows of expert e; A_e (R, in), B_e (out, R)

    dA_e = s · (dY_e B_e)ᵀ x_e      dB_e = s · dY_eᵀ (x_e A_eᵀ)      dx_e = s · (dY_e B_e) A_e      dy = dY

LoRA (2106.09685) Eq. 3, for each expert. Saved: x and the narrow x_e A_eᵀ (M, R). Autograd on the plain formula also
keeps or makes three tensors of y's size: each expert's update, all of them joined, and that times s.

In torch (CPU, Mac) it is two products an expert forward and four backward, each written where it belongs. In Triton it
is one kernel for all experts' rows, used twice forward and twice backward, and one for both factors' gradients; a
program is told its expert by a table of tiles, so rows and experts in any proportion need no padding. With b bytes a
number, M rows: forward M·(in + 2·out + 2R)·b, backward M·(2·in + 2·out + 4R)·b, and the factors, read as stored
(float32) and rounded on the chip. Sums are float32, and y is rounded once. Not measured on a GPU yet.

Reference: `mini_forge.model.lora.LoRAStack`.
"""

import torch
from torch.autograd.function import once_differentiable

from mini_forge.model.grouped import blocks
from mini_forge_kernels.triton_support import IS_INTERPRETED, jit, launch, power_of_two, reason_not, tl

__all__ = ["TorchProducts", "TritonProducts", "grouped_lora"]

ROWS = 64  # of a tile; an expert with fewer pays for a whole one in arithmetic, not in bytes


def grouped_lora(
    y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scale: float, counts: list[int]
) -> torch.Tensor:
    """y with s·(x_e A_eᵀ) B_eᵀ added to it in place, for the rows of each expert e.

    y (M, out) and x (M, in) of one dtype, rows sorted by expert, `counts[e]` each; A (E, R, in) and B (E, out, R)
    float32 or of that dtype. Differentiable in y, x, A and B; gradients have their tensors' dtypes, zero for experts
    without rows. y must not be needed by the backward of what made it."""
    products = TorchProducts if reason_not(x.device) else TritonProducts
    return _GroupedLoRA.apply(y, x, A, B, scale, products(x, counts))


class _GroupedLoRA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, A, B, scale, products):
        ctx.mark_dirty(y)
        low = x.new_empty(len(x), A.shape[1])
        products.by_expert(low, x, A.transpose(1, 2))
        products.by_expert(y, low, B.transpose(1, 2), scale, adds=True)
        ctx.save_for_backward(x, A, B, low)
        ctx.scale, ctx.products = scale, products
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, A, B, low = ctx.saved_tensors
        _, needs_x, needs_A, needs_B, _, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = None
        grad_low = torch.empty_like(low)
        ctx.products.by_expert(grad_low, grad, B, ctx.scale)  # s·(dY B), (M, R)
        if needs_x:
            grad_x = torch.empty_like(x)
            ctx.products.by_expert(grad_x, grad_low, A)
        if needs_A:
            grad_A = torch.empty_like(A)
            ctx.products.over_rows(grad_A, grad_low, x)
        if needs_B:
            grad_B = torch.empty_like(B)
            ctx.products.over_rows(grad_B, grad, low, ctx.scale)
        return grad, grad_x, grad_A, grad_B, None, None


class TorchProducts:
    """Both products an expert at a time. Experts without rows are not touched, but for their gradients' zeros."""

    def __init__(self, x: torch.Tensor, counts: list[int]):
        self.blocks = list(blocks(counts))

    def by_expert(self, out, rows, weights, scale: float = 1.0, adds: bool = False):
        """out_e = scale · rows_e W_e, or that added to it. out (M, N), rows (M, K), weights (E, K, N), strides any."""
        for e, part in self.blocks:
            out[part].addmm_(rows[part], weights[e].to(rows.dtype), beta=float(adds), alpha=scale)

    def over_rows(self, out, left, right, scale: float = 1.0):
        """out_e = scale · left_eᵀ right_e. left (M, P), right (M, Q), out (E, P, Q)."""
        out.zero_()
        for e, part in self.blocks:
            out[e].add_(left[part].t() @ right[part], alpha=scale)


class TritonProducts:
    """`TorchProducts` in one launch each, for CUDA tensors (or anywhere under Triton's interpreter)."""

    def __init__(self, x: torch.Tensor, counts: list[int]):
        parts = [(e, part.stop, range(part.start, part.stop, ROWS)) for e, part in blocks(counts)]
        tiles = [(e, first, min(first + ROWS, stop)) for e, stop, firsts in parts for first in firsts]
        ends = torch.tensor([0, *counts]).cumsum(0)
        self.tiles = torch.tensor(tiles, dtype=torch.int32).to(x.device)  # (tiles, 3): expert, first row, last row + 1
        self.ends = ends.to(x.device, torch.int32)  # (E + 1,): where each expert's rows begin, and the last's end

    def by_expert(self, out, rows, weights, scale: float = 1.0, adds: bool = False):
        K, N = weights.shape[1:]
        columns = _block(N)
        launch(
            _by_expert, len(self.tiles) * -(-N // columns), out, rows, weights, self.tiles, scale, *out.stride(),
            *rows.stride(), *weights.stride(), K=K, N=N, ADDS=adds, DOT=_dot_type(rows), ROWS=ROWS, COLUMNS=columns,
            INNER=_block(K, 32),
        )  # fmt: skip

    def over_rows(self, out, left, right, scale: float = 1.0):
        E, P, Q = out.shape
        p, q = _block(P), _block(Q)
        launch(
            _over_rows, E * -(-P // p) * -(-Q // q), out, left, right, self.ends, scale, *left.stride(),
            *right.stride(), *out.stride(), P=P, Q=Q, DOT=_dot_type(left), P_BLOCK=p, Q_BLOCK=q, ROWS=32,
        )  # fmt: skip


def _block(size: int, largest: int = 64) -> int:
    """Of a dimension of that size, what a program holds at a time: tl.dot takes no less than 16."""
    return max(16, min(power_of_two(size), largest))


def _dot_type(rows: torch.Tensor):
    """Of a product's factors: the rows' own, on tensor cores. The interpreter takes bfloat16 for integers, and float32
    holds the products of any 16 bits as exactly."""
    if IS_INTERPRETED or rows.dtype == torch.float32:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[rows.dtype]


@jit
def _by_expert(
    out, rows, weights, tiles, scale, out_row, out_column, rows_row, rows_inner, w_expert, w_inner, w_column,
    K: tl.constexpr, N: tl.constexpr, ADDS: tl.constexpr, DOT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of one expert by COLUMNS columns. Neighbours share their rows."""
    tile = tiles + 3 * (tl.program_id(0) // tl.cdiv(N, COLUMNS))
    expert, stop = tl.load(tile).to(tl.int64), tl.load(tile + 2)
    row = tl.load(tile + 1).to(tl.int64) + tl.arange(0, ROWS)
    column = tl.program_id(0) % tl.cdiv(N, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, K, INNER):
        inner = start + tl.arange(0, INNER)
        keep = (row < stop)[:, None] & (inner < K)[None, :]
        left = tl.load(rows + row[:, None] * rows_row + inner[None, :] * rows_inner, mask=keep, other=0.0)
        keep = (inner < K)[:, None] & (column < N)[None, :]
        at = expert * w_expert + inner[:, None] * w_inner + column[None, :] * w_column
        right = tl.load(weights + at, mask=keep, other=0.0).to(left.dtype)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    total *= scale
    place = row[:, None] * out_row + column[None, :] * out_column
    keep = (row < stop)[:, None] & (column < N)[None, :]
    if ADDS:
        total += tl.load(out + place, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=keep)


@jit
def _over_rows(
    out, left, right, ends, scale, left_row, left_p, right_row, right_q, out_expert, out_p, out_q,
    P: tl.constexpr, Q: tl.constexpr, DOT: tl.constexpr,
    P_BLOCK: tl.constexpr, Q_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: a block of one expert's matrix, summed over its rows in their order; zeros without rows."""
    blocks = tl.cdiv(P, P_BLOCK) * tl.cdiv(Q, Q_BLOCK)
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    p = block // tl.cdiv(Q, Q_BLOCK) * P_BLOCK + tl.arange(0, P_BLOCK)
    q = block % tl.cdiv(Q, Q_BLOCK) * Q_BLOCK + tl.arange(0, Q_BLOCK)
    start, stop = tl.load(ends + expert).to(tl.int64), tl.load(ends + expert + 1).to(tl.int64)
    total = tl.zeros((P_BLOCK, Q_BLOCK), dtype=tl.float32)
    while start < stop:
        row = start + tl.arange(0, ROWS)
        keep = (p < P)[:, None] & (row < stop)[None, :]
        turned = tl.load(left + row[None, :] * left_row + p[:, None] * left_p, mask=keep, other=0.0)
        keep = (row < stop)[:, None] & (q < Q)[None, :]
        straight = tl.load(right + row[:, None] * right_row + q[None, :] * right_q, mask=keep, other=0.0)
        total = tl.dot(turned.to(DOT), straight.to(DOT), total, input_precision="ieee")
        start += ROWS
    keep = (p < P)[:, None] & (q < Q)[None, :]
    place = out + expert.to(tl.int64) * out_expert + p[:, None] * out_p + q[None, :] * out_q
    tl.store(place, (total * scale).to(out.dtype.element_ty), mask=keep)
