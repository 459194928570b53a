"""Products of float32 activations and bfloat16 weights, on CPUs whose matrix unit (AMX) multiplies bfloat16.

    x = x₁ + x₂ + x₃     x₁ = bfloat16(x)     x₂ = bfloat16(x − x₁)     x₃ = x − x₁ − x₂
    x Wᵀ = x₃Wᵀ + x₂Wᵀ + x₁Wᵀ                 dY W likewise

A float32 has 24 significant bits and a bfloat16 8, with the same exponents, so the three are all of x. The product of
two bfloat16 numbers has 16 bits, and float32 holds it as it is: where a checkpoint stores W in bfloat16, as most do,
nothing is rounded but sums. Measured, the result is 2 to 3 times closer to float64 than a float32 product's (rms over
576 to 4,096 terms: 1e-7 to 2e-7). The unit takes numbers below 2⁻¹²⁶ for 0, so of an x below 2⁻¹⁰² the last bits are
lost; and what is infinite in x makes NaN, not infinity, of a row.

On a Xeon of two cores with AMX: float32 products 340 GFLOP/s, bfloat16 ones 1,950 in the cache. Out of it three of them
take 0.6 to 0.75 of the time of the float32 one (812 rows, matrices from 576 × 1,536 to 2,048 × 8,192), and x must be
split, at 0.6 to 1 ns a number. W takes half the memory, and is kept as it lies in the file.

torch rounds the result of a bfloat16 product to bfloat16, so this calls the function of MKL (oneAPI Math Kernel
Library, which torch brings on x86) that does not: cblas_gemm_bf16bf16f32, by name in torch's own library.

Reference: `mini_forge.model.functional.LeftSide`, on a weight made float32.
"""

import ctypes
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import torch
from torch.profiler import record_function

from mini_forge.model.functional import LeftSide
from mini_forge.model.memory import fresh

__all__ = ["NAME", "Split", "reason_not"]

NAME = "bfloat16_product"
CHUNK = 1 << 18  # numbers that are split at a time: with their parts they stay in the cache
FEW_ROWS = 32  # up to which the three products are one: it reads W once, and adds three results up
_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112  # CBLAS_LAYOUT, CBLAS_TRANSPOSE


def reason_not(device: torch.device) -> str | None:
    """Why these products are not used for tensors on `device`; None where they are."""
    if device.type != "cpu":
        return f"for CPUs, this is {device.type}"
    if not torch.cpu._is_amx_tile_supported():
        return "this CPU has no AMX"
    return None if _gemm_of_mkl() else "this torch has no MKL"


class Split(LeftSide):
    """The left side x (N, K), float32, of products with frozen bfloat16 matrices, as its three parts."""

    def __init__(self, x: torch.Tensor):
        if x.dtype != torch.float32:
            raise ValueError(f"x: {x.dtype}, not float32")
        with _named():
            self.parts = split(x)

    def product_t(self, weight: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ, (N, out) float32, or that added to `onto` in place. weight (out, K) bfloat16, its rows contiguous."""
        return self._add_up(weight, _TRANSPOSED, onto)

    def product(self, weight: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """x W, (N, in) float32, or that added to `onto` in place. weight (K, in) bfloat16, its rows contiguous."""
        return self._add_up(weight, _AS_IT_IS, onto)

    def _add_up(self, weight, transpose: int, onto):
        _, N, K = self.parts.shape
        rows, columns = weight.shape if transpose == _AS_IT_IS else weight.shape[::-1]
        if rows != K or weight.dtype != torch.bfloat16 or not _is_in_rows(weight):
            raise ValueError(
                f"weight: {weight.dtype} {tuple(weight.shape)}, strides {weight.stride()}, for {K} columns"
            )
        if onto is not None and (onto.shape != (N, columns) or onto.dtype != torch.float32 or not _is_in_rows(onto)):
            raise ValueError(f"onto: {onto.dtype} {tuple(onto.shape)} of strides {onto.stride()}, not {(N, columns)}")
        with _named():
            if N <= FEW_ROWS:
                parts = torch.empty(3 * N, columns, dtype=torch.float32, device="cpu")
                _multiply(self.parts.view(3 * N, K), weight, transpose, parts, False)
                total = parts.view(3, N, columns).sum(0)
                return total if onto is None else onto.add_(total)
            out = fresh((N, columns), torch.float32, self.parts.device) if onto is None else onto
            for i in (2, 1, 0):  # the smallest first
                _multiply(self.parts[i], weight, transpose, out, onto is not None or i < 2)
            return out


def _is_in_rows(matrix: torch.Tensor) -> bool:
    """Whether it lies as MKL can read and write it."""
    return matrix.device.type == "cpu" and matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def split(x: torch.Tensor) -> torch.Tensor:
    """(3, N, K) bfloat16 whose sum over the first dimension is x (N, K), float32, to the last bit.

    But for the last bits of numbers below 2⁻¹¹⁰, and for those above 3.39e38, which bfloat16 rounds to infinity."""
    parts = fresh((3, *x.shape), torch.bfloat16, x.device)
    rows = max(1, CHUNK // max(1, x.shape[1]))
    rest = torch.empty(min(rows, len(x)), x.shape[1], dtype=torch.float32, device="cpu")
    for some, first, second, third in zip(x.split(rows), *(part.split(rows) for part in parts), strict=True):
        left = rest[: len(some)]
        first.copy_(some)
        torch.sub(some, first, out=left)
        second.copy_(left)
        third.copy_(left.sub_(second))
    return parts


def _multiply(a: torch.Tensor, b: torch.Tensor, transpose: int, out: torch.Tensor, adds: bool):
    """out (M, N) float32 = a (M, K) b, or a bᵀ, of bfloat16; or that added to out."""
    (M, K), N = a.shape, out.shape[1]
    if 0 in (M, K, N):
        if not adds:
            out.zero_()
        return
    _gemm_of_mkl()(
        _ROW_MAJOR, _AS_IT_IS, transpose, M, N, K, 1.0, a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0),
        float(adds), out.data_ptr(), out.stride(0),
    )  # fmt: skip


@cache
def _gemm_of_mkl():
    """out = alpha·a·b + beta·out with bfloat16 a, b and float32 out; None where torch's library has no such function.
    It runs on the threads of `torch.set_num_threads`."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    gemm = getattr(ctypes.CDLL(str(library)), "cblas_gemm_bf16bf16f32", None) if library.exists() else None
    if gemm is not None:
        size, pointer, number = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
        gemm.argtypes = [size] * 6 + [number, pointer, size, pointer, size, number, pointer, size]
        gemm.restype = None
    return gemm


def _named():
    """A range that shows a profiler what torch does not see; without a profiler nothing, as it costs 10 µs."""
    return record_function(NAME) if torch.autograd._profiler_enabled() else nullcontext()
