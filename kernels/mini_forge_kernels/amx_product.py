"""x Wᵀ and x W for float32 x and bfloat16 W on CPUs whose matrix unit (AMX) multiplies bfloat16, exact but for sums.

    x = x₁ + x₂ + x₃     x₁ = bfloat16(x)     x₂ = bfloat16(x − x₁)     x₃ = x − x₁ − x₂
    x Wᵀ = x₃Wᵀ + x₂Wᵀ + x₁Wᵀ                 dY W likewise

A float32 has 24 significant bits and a bfloat16 8, with the same exponents, so the three are all of x. The product of
two bfloat16 numbers has 16 bits, and float32 holds it as it is, so nothing is rounded but sums. Measured, the result is
2 to 3 times closer to float64 than a float32 product's (rms over 576 to 4,096 terms: 1e-7 to 2e-7). The unit takes
numbers below 2⁻¹²⁶ for 0, so of an x below 2⁻¹⁰² the last bits are lost; and what is infinite in x makes NaN, not
infinity, of a row.

amx_product.cpp beside this file is compiled on this machine (`compiled`). It reads the parts of x once for all three
products. On a Xeon of two cores they reach 2.4 to 3.2 TFLOP/s, where float32 ones have 0.36.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from mini_forge.model.allocation import fresh
from mini_forge_kernels.compiled import declared, library, why_not

__all__ = ["multiply", "reason_not", "split"]

FLAGS = ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")
FUNCTIONS = {"split": "pnnnpi", "product": "pppnnnnniii"}


@cache
def reason_not() -> str | None:
    """Why this is not used on this machine; None where it is."""
    if not torch.cpu._is_amx_tile_supported():
        return "this CPU has no AMX"
    if reason := why_not(_library):
        return reason
    status = _library().allow_tiles()
    return f"Linux lends no AMX tiles (arch_prctl gives {status})" if status else None


@cache
def _library() -> ctypes.CDLL:
    return declared(library(Path(__file__).with_suffix(".cpp"), FLAGS), FUNCTIONS)


def split(x: torch.Tensor) -> torch.Tensor:
    """The parts of x (N, K): (⌈N/16⌉, ⌈K/32⌉, 3, 16, 32) bfloat16, tiles of the unit, zeros beyond x."""
    N, K = x.shape
    parts = fresh((-(-N // 16), -(-K // 32), 3, 16, 32), torch.bfloat16, x.device)
    _library().split(x.data_ptr(), N, K, x.stride(0), parts.data_ptr(), torch.get_num_threads())
    return parts


def multiply(parts: torch.Tensor, N: int, weight: torch.Tensor, transposed: bool, out: torch.Tensor, adds: bool):
    """out (N, columns) = x Wᵀ, or x W, or that added to out; rows of weight and out contiguous."""
    _library().product(
        parts.data_ptr(), weight.data_ptr(), out.data_ptr(), N, weight.shape[1 if transposed else 0], out.shape[1],
        weight.stride(0), out.stride(0), transposed, adds, torch.get_num_threads(),
    )  # fmt: skip
