"""LoRA's own products on the CPU: those of dY in one pass over it; with dropout no mask and no masked x is ever stored.

    dl_i = dY_i B_i      dB_i = dY_iᵀ l_i      l_i = x̃_i A_iᵀ      dA_i = dl_iᵀ x̃_i      dx = Σ_i m_i ⊙ dl_i A_i

LoRA (2106.09685) Eq. 3 of projections i that share x (N, in), but for its scale, which products.py puts on A and B;
x̃_i = m_i ⊙ x, m_i the mask of dropout. dY is far longer than what is made of it and comes from a cache that cores
share: to read it once takes 0.65 to 0.9 of the time of two products of torch's. A mask is a function of a seed, the row
and the column (a hash of the three), so x̃ is made a few rows at a time, in the cache, wherever it is needed. PEFT's
dropout, with masks of its own for each projection, then keeps nothing and costs 6 % of a step of SmolLM2, where torch's
ops on masks and masked copies cost 35 % and a fifth more memory.

low_rank.cpp beside this file is compiled on this machine (`compiled`), for float32. Of x without dropout torch's
products are as fast and are used. The masks are others than those of `mini_forge.model.low_rank`, of the same
statistics.

Reference: `mini_forge.model.low_rank.IN_TORCH`.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from mini_forge.model.allocation import fresh
from mini_forge.model.low_rank import IN_TORCH, LowRank, Seed
from mini_forge_kernels.compiled import declared, library, named, why_not

__all__ = ["IN_CPP", "reason_not"]

WIDTH = 16  # numbers, as in vectors.h


@cache
def reason_not() -> str | None:
    """Why these are not used on this machine; None where they are."""
    return why_not(_library)


def down(x: torch.Tensor, As: Sequence[torch.Tensor], seeds: Sequence[Seed]) -> torch.Tensor:
    if not (any(seeds) and _serves(x, *As)):
        return IN_TORCH.down(x, As, seeds)
    (N, K), x = x.shape, _in_rows(x)
    factors = torch.cat([_padded(A.t()) for A in As], dim=1)
    lows = fresh((N, len(As), factors.shape[1] // len(As)), x.dtype, x.device)
    room = torch.empty(torch.get_num_threads(), 8 * K, dtype=x.dtype, device=x.device)
    _call("down", (x, factors, lows, room), seeds, N, K, len(As), x.stride(0), lows.shape[2])
    return lows


def pull_back(grads: Sequence[torch.Tensor], Bs: Sequence[torch.Tensor], lows: torch.Tensor):
    if not _serves(lows, *grads, *Bs):
        return IN_TORCH.pull_back(grads, Bs, lows)
    N, R = len(lows), Bs[0].shape[1]
    threads = max(1, min(torch.get_num_threads(), N // R))  # else their parts of dB would be longer than dY
    lows = _padded(lows)
    grad_lows = lows.new_empty(N, len(Bs), R)
    grad_Bs = [torch.empty(B.shape, dtype=B.dtype, device=B.device) for B in Bs]
    room = lows.new_empty((threads - 1) * max(B.numel() for B in Bs))
    for dY, B, low, dl, dB in zip(grads, Bs, lows.unbind(1), grad_lows.unbind(1), grad_Bs, strict=True):
        dY, B = _in_rows(dY), _padded(B)
        with named("pull_back"):
            _library().pull_back(
                *(x.data_ptr() for x in (dY, B, low, dl, dB, room)), *dY.shape, R,
                *(x.stride(0) for x in (dY, B, low, dl)), threads,
            )  # fmt: skip
    return grad_lows, grad_Bs


def outer(grad_lows: torch.Tensor, x: torch.Tensor, seeds: Sequence[Seed]) -> list[torch.Tensor]:
    if not (any(seeds) and len(x) and _serves(x, grad_lows)):
        return IN_TORCH.outer(grad_lows, x, seeds)
    (N, count, R), K, x = grad_lows.shape, x.shape[1], _in_rows(x)
    grad_As = torch.empty(count * R, K, dtype=x.dtype, device=x.device)
    _call("outer", (grad_lows.contiguous(), x, grad_As), seeds, N, K, count, x.stride(0), R)
    return list(grad_As.split(R))


def up(grad_lows: torch.Tensor, As: Sequence[torch.Tensor], seeds: Sequence[Seed]) -> torch.Tensor:
    if not _serves(grad_lows, *As):
        return IN_TORCH.up(grad_lows, As, seeds)
    (N, count, R), K = grad_lows.shape, As[0].shape[1]
    factors = F.pad(torch.cat(list(As)), (0, -K % WIDTH))
    dx = fresh((N, K), grad_lows.dtype, grad_lows.device)
    _call("up", (grad_lows.contiguous(), factors, dx), seeds, N, K, count, R, factors.stride(0))
    return dx


IN_CPP = LowRank(down, pull_back, outer, up)


class _Mask(ctypes.Structure):
    """Fields as in low_rank.cpp's Mask."""

    _fields_ = [("seed", ctypes.c_uint64), ("least", ctypes.c_uint32)]


@cache
def _library() -> ctypes.CDLL:
    functions = {"down": "pppppnnnnni", "outer": "ppppnnnnni", "up": "ppppnnnnni", "pull_back": "ppppppnnnnnnni"}
    return declared(library(Path(__file__).with_suffix(".cpp")), functions, Mask=_Mask)


def _serves(*tensors: torch.Tensor) -> bool:
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and reason_not() is None


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _padded(x: torch.Tensor) -> torch.Tensor:
    """x in rows, with zeros behind each up to a multiple of WIDTH."""
    more = -x.shape[-1] % WIDTH
    return F.pad(x, (0, more)) if more else x.contiguous()


def _call(name: str, tensors: tuple[torch.Tensor, ...], seeds: Sequence[Seed], *numbers: int):
    """With the tensors' addresses, held as long as the call lasts, and the masks."""
    # A projection that drops nothing keeps numbers of any hash.
    masks = (_Mask * len(seeds))(*((s[1], min(round(s[0] * 2**32), 2**32 - 1)) if s else (0, 0) for s in seeds))
    with named(name):
        getattr(_library(), name)(*(x.data_ptr() for x in tensors), masks, *numbers, torch.get_num_threads())
