"""Products of float32 activations and a frozen W as it is stored, on the CPU: bfloat16, NF4, FP4, int8.

    y = x Wᵀ + l Bᵀ          dx = dy W + l A          x (N, in), W (out, in); l (N, R), B (out, R), A (R, in)

W is made float32 a panel of some columns at a time, in a core's own cache, and multiplied there: it never lies in
memory in 4 bytes a number, takes the room it has on disk, and is read from memory in half the bytes or an eighth. A
low-rank term beside it costs its own multiplications and no more: y is written once. Nothing is rounded but sums.

frozen_product.cpp beside this file is compiled on this machine (`compiled`). On two cores of a Xeon with AVX-512, whose
registers allow 351 GFLOP/s, it reaches 320 to 330 for N from 800 on with bfloat16, the panels' making included, and 300
to 315 where x and y are not in the caches; torch's product of a float32 W 315 to 325 and 295 to 302. Up to FEW rows, as
in generation, W is read once and used at once, at 21 GB/s of the memory's 27 in bfloat16, and an update's l is made
along the way.

On a CPU with a matrix unit amx_product.py is faster: 1.8 to 2 times for bfloat16 and more than FEW rows, 1.3 times for
4 and 8 bits and more than MANY.

Reference: `mini_forge.model.frozen.IN_TORCH`, on a weight made float32.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from mini_forge.model.allocation import fresh
from mini_forge.model.fourbit import Quantized4bit
from mini_forge.model.frozen import FrozenProducts, Low, Update, low_and_factor, low_product
from mini_forge.model.quant import Quantized8bit
from mini_forge_kernels import amx_product
from mini_forge_kernels.compiled import declared, library, named, why_not
from mini_forge_kernels.product_job import Job

__all__ = ["FEW", "IN_CPP", "NAME", "reason_not"]

NAME = "frozen_product"
FEW = 8  # rows, as in frozen_product.cpp
MOST_RANK = 128  # likewise; of more the low-rank term is a product of its own
MANY = 100  # rows up to which the matrix unit is no faster where it takes W in three parts

Stored = torch.Tensor | Quantized4bit | Quantized8bit


def reason_not(device: torch.device) -> str | None:
    """Why these products are not used for tensors on `device`; None where they are."""
    return f"for CPUs, this is {device.type}" if device.type != "cpu" else _reason_not_here()


@cache
def _reason_not_here() -> str | None:
    return why_not(_library)


def product_t(x: torch.Tensor, weight: Stored, onto: torch.Tensor | None = None, low: Low | None = None):
    """x Wᵀ + l Bᵀ (N, out), or that added to `onto` in place. x (N, K) float32; W (out, K): bfloat16, or quantized.
    low: l, B; or A, B and s, where l = s x Aᵀ."""
    return _multiply(x, weight, True, onto, low)


def product(x: torch.Tensor, weight: Stored, onto: torch.Tensor | None = None, low: tuple | None = None):
    """x W + l A (N, in), or that added to `onto` in place. W (K, in) likewise. low: l, A."""
    return _multiply(x, weight, False, onto, low)


IN_CPP = FrozenProducts(product_t, product, FEW)


def _multiply(x, weight, is_transposed, onto, low) -> torch.Tensor:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"x: {x.dtype} on {x.device}, not float32 on the CPU")
    x = x if x.stride(1) == 1 else x.contiguous()
    N, K = x.shape
    terms, columns = weight.shape[::-1] if is_transposed else weight.shape
    is_dense = isinstance(weight, torch.Tensor)
    if terms != K or not (_lies(weight, torch.bfloat16) if is_dense else _is_whole(weight)):
        form = f"{weight.dtype}, strides {weight.stride()}," if is_dense else "quantized"
        raise ValueError(f"weight: {form} {tuple(weight.shape)}, for {K} columns")
    if onto is not None and not (onto.shape == (N, columns) and _lies(onto, torch.float32)):
        raise ValueError(f"onto: {onto.dtype} {tuple(onto.shape)} of strides {onto.stride()}, not {(N, columns)}")
    low = None if low is None else _checked(low, x, columns, is_transposed)
    if isinstance(low, tuple) and (low[0].shape[1] > MOST_RANK or not K):
        onto, low = low_product(low, is_transposed, onto), None
    out = fresh((N, columns), torch.float32, x.device) if onto is None else onto
    if 0 in (N, columns, K):
        return out if onto is not None else out.zero_()
    with named(NAME):
        _call(x, weight, is_transposed, out, onto is not None, low)
    return out


@cache
def _library() -> ctypes.CDLL:
    return declared(library(Path(__file__).with_suffix(".cpp")), {"product": "p"}, Job=Job)


def _call(x: torch.Tensor, weight: Stored, is_transposed: bool, out: torch.Tensor, adds: bool, low: Low | None):
    """out (N, columns) = x Wᵀ + l Bᵀ, or x W + l A, or that added to out."""
    stride, blocksize, scales, code = weight.shape[1], 0, None, None
    if isinstance(weight, Quantized4bit):
        bits, numbers, scales, code, blocksize = 4, weight.packed, weight.absmax, weight.code, weight.blocksize
    elif isinstance(weight, Quantized8bit):
        bits, numbers, scales = 8, weight.numbers, weight.scales
    else:
        bits, numbers, stride = 16, weight, weight.stride(0)
    left, factor, before, scale = None, None, None, 1.0
    if isinstance(low, Update):
        before, factor, scale = low.A, low.B, low.scale
    elif low is not None:
        left, factor = low
    rank = 0 if factor is None else factor.shape[is_transposed]
    pointers = (None if t is None else t.data_ptr() for t in (x, out, numbers, scales, code, left, factor, before))
    strides = (0 if t is None else t.stride(0) for t in (left, factor, before))
    job = Job(
        *pointers, *x.shape, out.shape[1], rank, x.stride(0), out.stride(0), stride, *strides, blocksize, scale, bits,
        is_transposed, adds, torch.get_num_threads(),
    )  # fmt: skip
    if len(x) > (FEW if bits == 16 else MANY) and amx_product.reason_not() is None:
        amx_product.multiply(job)
    else:
        _library().product(ctypes.byref(job))


def _lies(matrix: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether it lies as it can be read and written here."""
    return matrix.is_cpu and matrix.dtype == dtype and _is_in_rows(matrix)


def _is_in_rows(matrix: torch.Tensor) -> bool:
    return matrix.is_contiguous() or matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def _is_whole(weight: Quantized4bit | Quantized8bit) -> bool:
    """Whether its numbers and scales are as many as its shape says, one behind the other."""
    n = weight.shape.numel()
    if isinstance(weight, Quantized4bit):
        parts = {weight.packed: -(-n // 2), weight.stored_absmax: -(-n // weight.blocksize)}
    else:
        parts = {weight.numbers: n, weight.scales: weight.shape[0]}
    return all(x.numel() == count and x.is_contiguous() and x.device.type == "cpu" for x, count in parts.items())


def _checked(low: Low, x: torch.Tensor, columns: int, is_transposed: bool) -> Low:
    """l (N, R) and B (columns, R), or A (R, columns); an `Update` as it is where its l is made along with the product.
    float32 in rows, or copied."""
    N, K = x.shape
    if isinstance(low, Update):
        if not is_transposed:
            raise ValueError("low: an Update stands beside x Wᵀ alone")
        R = low.A.shape[0]
        low = Update(_in_rows("A", low.A, (R, K)), _in_rows("B", low.B, (columns, R)), low.scale)
        return low if K and N <= FEW and R <= MOST_RANK else low_and_factor(low, x)
    left, factor = low
    R = left.shape[-1]
    shape = (columns, R) if is_transposed else (R, columns)
    return _in_rows("l", left, (N, R)), _in_rows("factor", factor, shape)


def _in_rows(name: str, matrix: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    if matrix.shape != shape or matrix.dtype != torch.float32 or not matrix.is_cpu:
        raise ValueError(f"{name}: {matrix.dtype} {tuple(matrix.shape)} on {matrix.device}, not float32 {shape}")
    return matrix if _is_in_rows(matrix) else matrix.contiguous()
