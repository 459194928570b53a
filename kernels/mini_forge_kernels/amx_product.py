"""x Wᵀ + l Bᵀ and x W + l A for float32 x, l, A, B and a frozen W as it is stored, on CPUs whose matrix unit (AMX)
multiplies bfloat16: exact but for sums.

    x = x₁ + x₂ + x₃     x₁ = bfloat16(x)     x₂ = bfloat16(x − x₁)     x₃ = x − x₁ − x₂
    x Wᵀ = x₃Wᵀ + x₂Wᵀ + x₁Wᵀ                                 for a bfloat16 W; dY W likewise
    l Bᵀ = l₃B₁ᵀ + l₂B₁ᵀ + l₁B₁ᵀ + l₂B₂ᵀ + l₁B₂ᵀ + l₁B₃ᵀ      and 2⁻²⁶ of it that is left out; W of 4 or 8 bits likewise

A float32 has 24 significant bits and a bfloat16 8, with the same exponents, so the three are all of x. The product of
two bfloat16 numbers has 16 bits, and float32 holds it as it is, so nothing is rounded but sums. Measured, the result is
2 to 3 times closer to float64 than a float32 product's (rms over 576 to 4,096 terms: 1e-7 to 2e-7). The unit takes
numbers below 2⁻¹²⁶ for 0, so of an x below 2⁻¹⁰² the last bits are lost; and what is infinite in x makes NaN, not
infinity, of a row.

amx_product.cpp beside this file is compiled on this machine (`compiled`). On two cores of a Xeon whose vectors make 280
GFLOP/s, products of 919 rows with SmolLM2's matrices reach 430 to 550 for bfloat16 and 270 to 320 for 4 and 8 bits, all
from memory; of what stays in the caches the unit alone would make 2,000.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from mini_forge_kernels.compiled import declared, library, why_not
from mini_forge_kernels.product_job import Job

__all__ = ["multiply", "reason_not"]

FLAGS = ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")


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
    return load()


def load(*flags: str) -> ctypes.CDLL:
    return declared(library(Path(__file__).with_suffix(".cpp"), (*FLAGS, *flags)), {"product": "p"}, Job=Job)


def multiply(job: Job):
    """Make the product that `job` describes, of bfloat16 w."""
    _library().product(ctypes.byref(job))
