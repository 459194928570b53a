"""Products of float32 activations and bfloat16 weights, on CPUs whose matrix unit (AMX) multiplies bfloat16.

    x = x₁ + x₂ + x₃     x₁ = bfloat16(x)     x₂ = bfloat16(x − x₁)     x₃ = x − x₁ − x₂
    x Wᵀ = x₃Wᵀ + x₂Wᵀ + x₁Wᵀ                 dY W likewise

A float32 has 24 significant bits and a bfloat16 8, with the same exponents, so the three are all of x. The product of
two bfloat16 numbers has 16 bits, and float32 holds it as it is: where a checkpoint stores W in bfloat16, as most do,
nothing is rounded but sums. Measured, the result is 2 to 3 times closer to float64 than a float32 product's (rms over
576 to 4,096 terms: 1e-7 to 2e-7). The unit takes numbers below 2⁻¹²⁶ for 0, so of an x below 2⁻¹⁰² the last bits are
lost; and what is infinite in x makes NaN, not infinity, of a row.

torch rounds the result of a bfloat16 product to bfloat16, so there are two other ways, "c++" where it can be:

- c++: bfloat16_product.cpp beside this file, compiled on this machine (`compiled`). It reads the parts of x once for
  all three products. On a Xeon of two cores the products reach 2.4 to 3.2 TFLOP/s, where float32 ones have 0.36;
- mkl: cblas_gemm_bf16bf16f32 of the oneAPI Math Kernel Library, by name in torch's own library. Out of the cache it
  reaches 1.7 to 2.0 TFLOP/s, and splitting in torch's ops takes four times as long.

W takes half the memory of a float32 one, and is kept as it lies in the file.

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
from mini_forge_kernels.compiled import CannotCompile, library

__all__ = ["NAME", "Split", "backend", "reason_not"]

NAME = "bfloat16_product"


def reason_not(device: torch.device) -> str | None:
    """Why these products are not used for tensors on `device`; None where they are."""
    if device.type != "cpu":
        return f"for CPUs, this is {device.type}"
    if not torch.cpu._is_amx_tile_supported():
        return "this CPU has no AMX"
    unit, why = backend()
    return why if unit is None else None


@cache
def backend() -> "tuple[type[Compiled] | type[Mkl] | None, str | None]":
    """What multiplies on this machine, and why it is not the first of the two."""
    try:
        Compiled.library()
        return Compiled, None
    except CannotCompile as err:
        return (Mkl, str(err)) if Mkl.gemm() else (None, f"{err}, and this torch has no MKL")


class Split(LeftSide):
    """The left side x (N, K), float32, of products with frozen bfloat16 matrices, as its three parts."""

    def __init__(self, x: torch.Tensor):
        if x.dtype != torch.float32:
            raise ValueError(f"x: {x.dtype}, not float32")
        self.shape, self.unit = x.shape, backend()[0]
        with _named():
            self.parts = self.unit.split(x if x.stride(1) == 1 else x.contiguous())

    def product_t(self, weight: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """x Wᵀ, (N, out) float32, or that added to `onto` in place. weight (out, K) bfloat16, its rows contiguous."""
        return self._multiply(weight, True, onto)

    def product(self, weight: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """x W, (N, in) float32, or that added to `onto` in place. weight (K, in) bfloat16, its rows contiguous."""
        return self._multiply(weight, False, onto)

    def _multiply(self, weight: torch.Tensor, transposed: bool, onto: torch.Tensor | None) -> torch.Tensor:
        N, K = self.shape
        terms, columns = weight.shape[::-1] if transposed else weight.shape
        if terms != K or weight.dtype != torch.bfloat16 or not _is_in_rows(weight):
            raise ValueError(
                f"weight: {weight.dtype} {tuple(weight.shape)}, strides {weight.stride()}, for {K} columns"
            )
        if onto is not None and (onto.shape != (N, columns) or onto.dtype != torch.float32 or not _is_in_rows(onto)):
            raise ValueError(f"onto: {onto.dtype} {tuple(onto.shape)} of strides {onto.stride()}, not {(N, columns)}")
        out = fresh((N, columns), torch.float32, weight.device) if onto is None else onto
        if 0 in (N, columns, K):
            return out if onto is not None else out.zero_()
        with _named():
            self.unit.multiply(self.parts, N, weight, transposed, out, onto is not None)
        return out


class Compiled:
    """By bfloat16_product.cpp. The parts: (⌈N/16⌉, ⌈K/32⌉, 3, 16, 32), tiles of the unit, zeros beyond x."""

    name = "c++"
    FLAGS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mamx-tile", "-mamx-bf16")

    @staticmethod
    @cache
    def library() -> ctypes.CDLL:
        loaded = library(Path(__file__).with_suffix(".cpp"), Compiled.FLAGS)
        pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
        loaded.split.argtypes = [pointer, size, size, size, pointer, number]
        loaded.product.argtypes = [pointer, pointer, pointer, *[size] * 5, *[number] * 3]
        loaded.split.restype = loaded.product.restype = None
        if status := loaded.allow_tiles():
            raise CannotCompile(f"Linux lends no AMX tiles (arch_prctl gives {status})")
        return loaded

    @staticmethod
    def split(x: torch.Tensor) -> torch.Tensor:
        N, K = x.shape
        parts = fresh((-(-N // 16), -(-K // 32), 3, 16, 32), torch.bfloat16, x.device)
        Compiled.library().split(x.data_ptr(), N, K, x.stride(0), parts.data_ptr(), torch.get_num_threads())
        return parts

    @staticmethod
    def multiply(parts: torch.Tensor, N: int, weight: torch.Tensor, transposed: bool, out: torch.Tensor, adds: bool):
        """out (N, columns) = x W, or x Wᵀ; or that added to out."""
        Compiled.library().product(
            parts.data_ptr(), weight.data_ptr(), out.data_ptr(), N, weight.shape[1 if transposed else 0], out.shape[1],
            weight.stride(0), out.stride(0), transposed, adds, torch.get_num_threads(),
        )  # fmt: skip


class Mkl:
    """By MKL, one product after the other. The parts: (3, N, K), whose sum is x to the last bit, but for the last bits
    of numbers below 2⁻¹¹⁰ and for those above 3.39e38, which bfloat16 rounds to infinity."""

    name = "mkl"
    CHUNK = 1 << 18  # numbers that are split at a time: with their parts they stay in the cache
    FEW_ROWS = 32  # up to which the three products are one: it reads W once, and adds three results up
    ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112  # CBLAS_LAYOUT, CBLAS_TRANSPOSE

    @staticmethod
    def split(x: torch.Tensor) -> torch.Tensor:
        parts = fresh((3, *x.shape), torch.bfloat16, x.device)
        rows = max(1, Mkl.CHUNK // max(1, x.shape[1]))
        rest = torch.empty(min(rows, len(x)), x.shape[1], dtype=torch.float32, device="cpu")
        for some, first, second, third in zip(x.split(rows), *(part.split(rows) for part in parts), strict=True):
            left = rest[: len(some)]
            first.copy_(some)
            torch.sub(some, first, out=left)
            second.copy_(left)
            third.copy_(left.sub_(second))
        return parts

    @staticmethod
    def multiply(parts: torch.Tensor, N: int, weight: torch.Tensor, transposed: bool, out: torch.Tensor, adds: bool):
        """out (N, columns) = x W, or x Wᵀ; or that added to out."""
        if N > Mkl.FEW_ROWS:
            for i in (2, 1, 0):  # the smallest first
                Mkl.multiply_one(parts[i], weight, transposed, out, adds or i < 2)
            return
        products = torch.empty(3 * N, out.shape[1], dtype=torch.float32, device="cpu")
        Mkl.multiply_one(parts.view(3 * N, -1), weight, transposed, products, False)
        total = products.view(3, *out.shape).sum(0)
        out.add_(total) if adds else out.copy_(total)

    @staticmethod
    def multiply_one(a: torch.Tensor, b: torch.Tensor, transposed: bool, out: torch.Tensor, adds: bool):
        """out (M, columns) float32 = a (M, K) b, or a bᵀ, of bfloat16; or that added to out."""
        Mkl.gemm()(
            Mkl.ROW_MAJOR, Mkl.AS_IT_IS, Mkl.TRANSPOSED if transposed else Mkl.AS_IT_IS, *out.shape, a.shape[1],
            1.0, a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), float(adds), out.data_ptr(), out.stride(0),
        )  # fmt: skip

    @staticmethod
    @cache
    def gemm():
        """out = alpha·a·b + beta·out with bfloat16 a, b and float32 out; None where torch's library has no such
        function. It runs on the threads of `torch.set_num_threads`."""
        path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        gemm = getattr(ctypes.CDLL(str(path)), "cblas_gemm_bf16bf16f32", None) if path.exists() else None
        if gemm is not None:
            size, pointer, number = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
            gemm.argtypes = [size] * 6 + [number, pointer, size, pointer, size, number, pointer, size]
            gemm.restype = None
        return gemm


def _is_in_rows(matrix: torch.Tensor) -> bool:
    """Whether it lies as both ways can read and write it."""
    return matrix.device.type == "cpu" and matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def _named():
    """A range that shows a profiler what torch does not see; without a profiler nothing, as it costs 10 µs."""
    return record_function(NAME) if torch.autograd._profiler_enabled() else nullcontext()
