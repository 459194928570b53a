"""SwiGLU, and the clamped SwiGLU of gpt-oss, that save their two inputs and nothing between.

    h = silu(g)·u,  silu(g) = g·σ(g)          du = dh·silu(g)          dg = dh·u·σ(g)(1 + g(1 − σ(g)))

SwiGLU (2002.05202) Eq. 6. Autograd on the reference also saves silu(g), a third tensor of the MLP's width; this makes
it again in the backward. Clamped, with limit l and slope a:

    g' = min(g, l),  u' = u within ±l,  h = g'·σ(a·g')·(u' + 1)
    du = dh·g'·σ(a·g') where |u| ≤ l, else 0          dg = dh·(u' + 1)·silu'(a·g') where g ≤ l, else 0

where silu'(x) = σ(x)(1 + x(1 − σ(x))). Autograd on that reference saves six tensors of the MLP's width; this saves two.

The Triton kernels move the least there is: with b bytes a number, 3·N·F·b forward (g and u in, h out) and 5·N·F·b
backward (g, u and dh in, dg and du out). Speed on a GPU: not measured.
"""

import torch
from torch.autograd.function import once_differentiable

from mini_forge.model.allocation import fresh
from mini_forge.model.functional import clamped_swiglu as clamped_reference
from mini_forge.model.functional import swiglu as reference
from mini_forge.model.ops import applied, vjp
from mini_forge_kernels import rowwise
from mini_forge_kernels.triton_support import as_rows, jit, launch, power_of_two, reason_not, tl, widen

__all__ = ["TritonSwiGLU", "clamped_reference", "clamped_swiglu", "reference", "swiglu", "swiglu_vjp"]

BLOCK = 1024  # numbers of one row a program holds at a time


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Both (…, F) → (…, F); equals `reference`."""
    if reason_not(gate.device):
        return applied(_SwiGLU, gate, up)
    return TritonSwiGLU.apply(gate, up, None, 1.0)


@torch.no_grad()
def swiglu_vjp(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor):
    """`swiglu` and its vector-Jacobian product, as `ops.vjp` gives them; silu(gate) serves both."""
    if reason_not(gate.device) is None:
        return vjp(swiglu, grad, gate, up)
    if rowwise.serves(grad, gate, up):
        h, *grads = rowwise.swiglu_vjp(grad, gate, up)
        return h, grads
    silu = _silu(gate)
    h = torch.mul(silu, up, out=fresh(gate.shape, gate.dtype, gate.device))
    d_up = silu.mul_(grad)
    return h, [torch.ops.aten.silu_backward(grad.mul_(up), gate), d_up]


def _silu(gate: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.silu.out(gate, out=fresh(gate.shape, gate.dtype, gate.device))


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, slope: float) -> torch.Tensor:
    """Both (…, F) → (…, F); equals `clamped_reference`."""
    if reason_not(gate.device):
        return applied(_ClampedSwiGLU, gate, up, limit, slope)
    return TritonSwiGLU.apply(gate, up, limit, slope)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return rowwise.swiglu(gate, up) if rowwise.serves(gate, up) else _silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if rowwise.serves(grad, gate, up):
            return rowwise.swiglu_gradient(grad, gate, up)
        return torch.ops.aten.silu_backward(grad * up, gate), _silu(gate).mul_(grad)


class _ClampedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, limit, slope):
        ctx.save_for_backward(gate, up)
        ctx.limit, ctx.slope = limit, slope
        if rowwise.serves(gate, up):
            return rowwise.swiglu(gate, up, limit, slope, 1)
        g = gate.clamp(max=limit)
        return torch.sigmoid(g * slope).mul_(g).mul_(up.clamp(-limit, limit).add_(1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gate, up), limit, slope = ctx.saved_tensors, ctx.limit, ctx.slope
        if rowwise.serves(grad, gate, up):
            return *rowwise.swiglu_gradient(grad, gate, up, limit, slope, 1), None, None
        g = gate.clamp(max=limit)
        dup = torch.sigmoid(g * slope).mul_(g).mul_(grad).masked_fill_(up.abs() > limit, 0)
        dgate = torch.ops.aten.silu_backward(up.clamp(-limit, limit).add_(1).mul_(grad), g.mul_(slope))
        return dgate.masked_fill_(gate > limit, 0), dup, None, None


@jit
def _clamp(gate, up, LIMIT: tl.constexpr):
    """g' and the factor u' + 1, or both as they are where LIMIT is None. `where`, not `minimum`: a NaN stays one."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1
    return gate, up


@jit
def _place(F, BLOCK: tl.constexpr):
    """The row and the columns of this program: those of a row lie in neighbouring programs."""
    blocks = tl.cdiv(F, BLOCK)
    program = tl.program_id(0)
    columns = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # int64: N·F may pass 2³¹
    return (program // blocks).to(tl.int64), columns


@jit
def _forward(gate_at, up_at, h_at, F, gate_step, up_step,
             LIMIT: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """gate_step: numbers from one row of gate to the next; h is contiguous."""
    row, columns = _place(F, BLOCK)
    gate = widen(tl.load(gate_at + row * gate_step + columns, mask=columns < F, other=0.0))
    up = widen(tl.load(up_at + row * up_step + columns, mask=columns < F, other=0.0))
    g, u = _clamp(gate, up, LIMIT)
    h = g / (1 + tl.exp(-SLOPE * g)) * u
    tl.store(h_at + row * F + columns, h.to(h_at.dtype.element_ty), mask=columns < F)


@jit
def _backward(gate_at, up_at, dh_at, dgate_at, dup_at, F, gate_step, up_step, dh_step,
              LIMIT: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """As `_forward`; dgate and dup are contiguous."""
    row, columns = _place(F, BLOCK)
    gate = widen(tl.load(gate_at + row * gate_step + columns, mask=columns < F, other=0.0))
    up = widen(tl.load(up_at + row * up_step + columns, mask=columns < F, other=0.0))
    dh = widen(tl.load(dh_at + row * dh_step + columns, mask=columns < F, other=0.0))
    g, u = _clamp(gate, up, LIMIT)
    open_share = 1 / (1 + tl.exp(-SLOPE * g))  # σ
    dup = dh * g * open_share
    dgate = dh * u * open_share * (1 + SLOPE * g * (1 - open_share))
    if LIMIT is not None:
        dgate = tl.where(gate > LIMIT, 0.0, dgate)
        dup = tl.where(tl.abs(up) > LIMIT, 0.0, dup)
    out = row * F + columns
    tl.store(dgate_at + out, dgate.to(dgate_at.dtype.element_ty), mask=columns < F)
    tl.store(dup_at + out, dup.to(dup_at.dtype.element_ty), mask=columns < F)


def _launch(kernel, inputs, outputs, limit, slope):
    """All of one shape (…, F). Contiguous ones are one long row; others, like halves of a projection, are (N, F)."""
    assert len({x.shape for x in (*inputs, *outputs)}) == 1, [x.shape for x in inputs]
    is_one_row = all(x.is_contiguous() for x in inputs)
    inputs = [x.view(1, -1) if is_one_row else as_rows(x) for x in inputs]
    N, width = inputs[0].shape
    block = min(power_of_two(max(width, 1)), BLOCK)
    launch(kernel, N * -(-width // block), *inputs, *outputs, width, *(x.stride(0) for x in inputs),
           LIMIT=limit, SLOPE=slope, BLOCK=block, num_warps=4)  # fmt: skip


class TritonSwiGLU(torch.autograd.Function):
    """Both units by the kernels above, for CUDA tensors of any strides; plain SwiGLU has limit None and slope 1."""

    @staticmethod
    def forward(ctx, gate, up, limit, slope):
        ctx.save_for_backward(gate, up)
        ctx.limit, ctx.slope = limit, slope
        out = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
        _launch(_forward, (gate, up), (out,), limit, slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up)]
        _launch(_backward, (gate, up, grad), grads, ctx.limit, ctx.slope)
        return *grads, None, None
