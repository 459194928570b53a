"""x Wᵀ + l Bᵀ and x W + l A for float32 x, l, A, B and a frozen W as it is stored, on CPUs whose matrix unit (AMX)
multiplies bfloat16: exact but for sums.

    x = x₁ + x₂ + x₃     x₁ = bfloat16(x)     x₂ = bfloat16(x − x₁)     x₃ = x − x₁ − x₂
    x Wᵀ = x₃Wᵀ + x₂Wᵀ + x₁Wᵀ                                 for a bfloat16 W; dY W likewise
    l Bᵀ = l₃B₁ᵀ + l₂B₁ᵀ + l₁B₁ᵀ + l₂B₂ᵀ + l₁B₂ᵀ + l₁B₃ᵀ      W of 4 or 8 bits likewise

A float32 has 24 significant bits and a bfloat16 8, with the same exponents, so the three are all of x. The product of
two bfloat16 numbers has 16 bits, and float32 holds it as it is, so nothing is rounded but sums. Of two float32 numbers
l₂B₃, l₃B₂ and l₃B₃ are left out: 2⁻²⁴ of |l||B| at most, 2⁻²⁷ in the mean. Measured over 576 to 11,008 terms, the
result is 1.7 to 2.2 times closer to float64 than a float32 product's (rms 1.4e-7 to 2.0e-7 beside 3.0e-7 to 3.6e-7).
The unit takes numbers below 2⁻¹²⁶ for 0, so of an x below 2⁻¹⁰² the last bits are lost; and what is infinite in x makes
NaN, not infinity, of a row.

amx_product.cpp beside this file is compiled on this machine (`compiled`). On two cores of a Xeon where torch's float32
products reach 280 to 300 GFLOP/s, those of 919 rows with SmolLM2's matrices reach 430 to 550 for bfloat16 and 270 to
320 for 4 and 8 bits, x, W and the result far from the caches; the unit alone would make 2,000 of bfloat16.
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
    """Make the product that `job` describes."""
    _library().product(ctypes.byref(job))
