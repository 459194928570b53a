"""Rotary embedding of queries and keys together; the backward is the rotation by the opposite angle.

    (y₁, y₂) = (x₁c − x₂s, x₂c + x₁s)          (dx₁, dx₂) = (dy₁c + dy₂s, dy₂c − dy₁s)

RoFormer (2104.09864) Eq. 34, half layout. The reference writes three tensors the size of x; this writes one, and saves
cos and sin alone. Not in place: what made x may have kept it, and a gradient may belong to others too.

One Triton launch turns queries and keys: with b bytes a number it moves 2·N·(H + K)·C·b, beside the halves of cos and
sin, N·C·b, which a program reads once for all heads of its token. Speed on a GPU: not measured.
"""

import torch
from torch.autograd.function import once_differentiable

from mini_forge.model.allocation import fresh
from mini_forge.model.functional import apply_rope as reference
from mini_forge.model.ops import applied
from mini_forge_kernels import rowwise
from mini_forge_kernels.triton_support import jit, launch, power_of_two, reason_not, tl, warps, widen

__all__ = ["TritonRotation", "apply_rope", "reference", "rope_qk"]

TILE = 32  # heads a program turns at a time


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (N, H, C); cos, sin (N, C), both halves equal → (N, H, C); equals `reference`."""
    if reason_not(x.device):
        return applied(_Rotation, x, cos, sin)
    return TritonRotation.apply(x, x[:, :0], cos, sin)[0]


def rope_qk(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope` to query (N, H, C) and key (N, K, C); cos, sin (N, C). Returns both, in their own shapes."""
    if reason_not(query.device):
        return applied(_Rotation, query, cos, sin), applied(_Rotation, key, cos, sin)
    return TritonRotation.apply(query, key, cos, sin)


def _rotate(x, cos, sin, sign):
    if rowwise.serves(x, cos, sin):
        return rowwise.rotate(x, cos, sin, sign)
    half = x.shape[-1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    out = fresh(x.shape, x.dtype, x.device)
    torch.mul(x[..., :half], c, out=out[..., :half]).addcmul_(x[..., half:], s, value=-sign)
    torch.mul(x[..., half:], c, out=out[..., half:]).addcmul_(x[..., :half], s, value=sign)
    return out


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _rotate(grad, *ctx.saved_tensors, -1), None, None


@jit
def _turn(x_at, y_at, token, x_step, head_step, c, s, half,
          HEADS: tl.constexpr, TILE: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """All heads of one token, TILE at a time; y is contiguous."""
    pairs = tl.arange(0, PAIRS)[None, :]
    for start in range(0, HEADS, TILE):
        head = start + tl.arange(0, TILE)[:, None]
        inside = (head < HEADS) & (pairs < half)
        x = x_at + token * x_step + head * head_step + pairs
        first, second = widen(tl.load(x, mask=inside, other=0.0)), widen(tl.load(x + half, mask=inside, other=0.0))
        y = y_at + (token * HEADS + head) * (2 * half) + pairs
        tl.store(y, (first * c - second * s).to(y_at.dtype.element_ty), mask=inside)
        tl.store(y + half, (second * c + first * s).to(y_at.dtype.element_ty), mask=inside)


@jit
def _turn_both(q_at, k_at, cos_at, sin_at, q_out, k_out, half, q_step, q_head, k_step, k_head,
               SIGN: tl.constexpr, PAIRS: tl.constexpr,
               H: tl.constexpr, K: tl.constexpr, H_TILE: tl.constexpr, K_TILE: tl.constexpr):  # fmt: skip
    """One token. SIGN −1 turns backward; q_step and q_head: numbers from token to token and from head to head."""
    token = tl.program_id(0).to(tl.int64)  # int64: N·H·C may pass 2³¹
    pairs = tl.arange(0, PAIRS)[None, :]
    angle = token * (2 * half) + pairs
    c = widen(tl.load(cos_at + angle, mask=pairs < half, other=0.0))
    s = widen(tl.load(sin_at + angle, mask=pairs < half, other=0.0)) * SIGN
    _turn(q_at, q_out, token, q_step, q_head, c, s, half, H, H_TILE, PAIRS)
    _turn(k_at, k_out, token, k_step, k_head, c, s, half, K, K_TILE, PAIRS)


def _turned(query, key, cos, sin, sign: int):
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    (N, H, C), K = query.shape, key.shape[1]
    assert C % 2 == 0 and key.shape == (N, K, C), (query.shape, key.shape)
    assert cos.shape == sin.shape == (N, C), (query.shape, cos.shape, sin.shape)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
    pairs, tiles = power_of_two(C // 2), [min(power_of_two(max(heads, 1)), TILE) for heads in (H, K)]
    launch(_turn_both, N, query, key, cos.contiguous(), sin.contiguous(), *outs, C // 2,
           *query.stride()[:2], *key.stride()[:2], SIGN=sign, PAIRS=pairs, H=H, K=K, H_TILE=tiles[0], K_TILE=tiles[1],
           num_warps=warps(pairs * max(tiles)))  # fmt: skip
    return tuple(outs)


class TritonRotation(torch.autograd.Function):
    """`rope_qk` by the kernel above, for CUDA tensors of any strides."""

    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(query, key, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, dquery, dkey):
        return *_turned(dquery, dkey, *ctx.saved_tensors, -1), None, None
