"""One pass over rows of float32 numbers on the CPU: what rms_norm.py, swiglu.py and rope.py do in several of torch's.

A tensor's rows come out of a cache that all cores share, or of memory, at 10 GB/s a core, in which time a core computes
a dozen operations a number. Torch's ops read and write them once for each operation: SwiGLU and its gradient move 15
tensors of the MLP's width by them, 9 here. rowwise.cpp beside this file is compiled on this machine (`compiled`).
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from math import inf
from pathlib import Path

import torch

from mini_forge.model.allocation import fresh
from mini_forge_kernels.compiled import declared, library, named, why_not
from mini_forge_kernels.triton_support import as_rows

__all__ = [
    "reason_not", "rms_norm", "rms_norm_gradient", "rms_norm_vjp", "rotate", "serves", "swiglu", "swiglu_gradient",
    "swiglu_vjp",
]  # fmt: skip


@cache
def reason_not() -> str | None:
    """Why these are not used on this machine; None where they are."""
    return why_not(_library)


def serves(*tensors: torch.Tensor) -> bool:
    """Whether these functions take such tensors here."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors) and reason_not() is None


@cache
def _library() -> ctypes.CDLL:
    return declared(library(Path(__file__).with_suffix(".cpp")), {
        "rms_norm": "ppppnnnfi", "rms_norm_gradient": "pppppnnnni", "rotate": "ppppnnnnnfi",
        "rms_norm_vjp": "pppppnnnnfi", "swiglu": "pppnnnnfffi", "swiglu_gradient": "ppppppnnnnnfffi",
    })  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x (…, D), weight (D,) → y (…, D) and r (N,)."""
    _must_be("weight", weight, x.shape[-1:])
    rows, y = as_rows(x), _like(x)
    r = torch.empty(len(rows), dtype=x.dtype, device=x.device)
    _call("rms_norm", (rows, weight.contiguous(), y, r), *rows.shape, rows.stride(0), eps)
    return y, r


def rms_norm_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """dx (…, D) for dy (…, D)."""
    _must_be("grad", grad, x.shape)
    _must_be("weight", weight, x.shape[-1:])
    upstream, rows = as_rows(grad), as_rows(x)
    dx = _like(grad)
    _call("rms_norm_gradient", (upstream, rows, weight.contiguous(), r, dx), *rows.shape, upstream.stride(0),
          rows.stride(0))  # fmt: skip
    return dx


def rms_norm_vjp(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and, in the memory of dy where that is one row after another, dx: both at once. All (…, D)."""
    _must_be("grad", grad, x.shape)
    _must_be("weight", weight, x.shape[-1:])
    upstream, rows = as_rows(grad), as_rows(x)
    y, dx = _like(x), _over(grad)
    _call("rms_norm_vjp", (upstream, rows, weight.contiguous(), y, dx), *rows.shape, upstream.stride(0),
          rows.stride(0), eps)  # fmt: skip
    return y, dx


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit=inf, slope=1.0, offset=0.0) -> torch.Tensor:
    """g σ(slope g) (u + offset) with g ≤ limit and u within ± limit. All (…, F)."""
    _must_be("up", up, gate.shape)
    g, u, h = as_rows(gate), as_rows(up), _like(gate)
    _call("swiglu", (g, u, h), *g.shape, g.stride(0), u.stride(0), limit, slope, offset)
    return h


def swiglu_gradient(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, limit=inf, slope=1.0, offset=0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate and dup for dh, all (…, F)."""
    return _swiglu_gradient(None, grad, gate, up, _like(gate), limit, slope, offset)


def swiglu_vjp(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """h and, in the memory of dh where that is one row after another, dgate, and dup: all at once. All (…, F)."""
    h = _like(gate)
    return h, *_swiglu_gradient(h, grad, gate, up, _over(grad), inf, 1.0, 0.0)


def _swiglu_gradient(h, grad, gate, up, dgate, limit, slope, offset):
    _must_be("up", up, gate.shape)
    _must_be("grad", grad, gate.shape)
    dh, g, u, dup = as_rows(grad), as_rows(gate), as_rows(up), _like(up)
    _call("swiglu_gradient", (dh, g, u, h, dgate, dup), *g.shape, dh.stride(0), g.stride(0), u.stride(0), limit, slope,
          offset)  # fmt: skip
    return dgate, dup


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """x (N, H, C) turned by the angles of cos and sin (N, C), or the other way with sign −1."""
    _must_be("cos", cos, (len(x), x.shape[-1] // 2 * 2))
    _must_be("sin", sin, cos.shape)
    _must_be("x", x, (len(x), x.shape[1], cos.shape[1]))
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = _like(x)
    _call("rotate", (x, cos.contiguous(), sin.contiguous(), y), *x.shape, *x.stride()[:2], sign)
    return y


def _must_be(name: str, x: torch.Tensor, shape: Sequence[int]):
    """Nothing is broadcast here: C++ would read on behind it."""
    if x.shape != tuple(shape):
        raise ValueError(f"{name}: {tuple(x.shape)}, not {tuple(shape)}")


def _like(x: torch.Tensor) -> torch.Tensor:
    return fresh(x.shape, x.dtype, x.device)


def _over(grad: torch.Tensor) -> torch.Tensor:
    return grad if grad.is_contiguous() else _like(grad)


def _call(name: str, tensors: tuple[torch.Tensor | None, ...], *numbers):
    with named(name):
        pointers = (None if x is None else x.data_ptr() for x in tensors)
        getattr(_library(), name)(*pointers, *numbers, torch.get_num_threads())
