"""Whether a Triton kernel can run on a device here, as a value read before a launch; nothing is tried and caught.

triton is an optional extra (`pip install 'mini-forge[kernels]'`, Linux). It is imported where its kernels can run,
beside a CUDA device or under its interpreter; elsewhere it would cost every start 0.1 s and 52 MiB. Without it the
kernel files still import: their kernels stay ordinary functions that are never launched, since `reason_not` speaks
first.

Under `TRITON_INTERPRET=1`, set before this module is imported, kernels run on CPU tensors, one program after another in
Python. That is for tests, which call the Triton functions themselves: a thousand times slower than torch, it is never
picked for work, so `reason_not` names a reason for every CPU tensor. Loops of kernels have constexpr bounds: with numpy
2.4 Triton 3.6's interpreter takes no others.
"""

import importlib.util
import os
import sys
from functools import cache
from types import SimpleNamespace

import torch

IS_INSTALLED = importlib.util.find_spec("triton") is not None

# A program that has imported triton by itself may want to compile kernels for a GPU that is not here.
if IS_INSTALLED and (torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ or "triton" in sys.modules):
    import triton
    import triton.language as tl

    jit = triton.jit
    IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
else:
    tl = SimpleNamespace(constexpr=object)  # the one name that is read when a kernel is defined

    def jit(function):
        return function

    IS_INTERPRETED = False

OLDEST_GPU = (8, 0)  # compute capability; Triton 3 supports no older NVIDIA card


def reason_not(device: torch.device) -> str | None:
    """Why Triton kernels are not used for tensors on `device`; None where they are."""
    if not IS_INSTALLED:
        return "triton is not installed: pip install 'mini-forge[kernels]'"
    if device.type != "cuda":
        return f"Triton needs a CUDA device, this is {device.type}"
    return _reason_not_gpu(device)


@cache
def _reason_not_gpu(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_GPU:
        needed, found = (".".join(map(str, version)) for version in (OLDEST_GPU, capability))
        return f"Triton needs compute capability {needed}, this GPU has {found}"
    return None


def reason_not_testable() -> str | None:
    """Why a test can launch no Triton kernel at all here; None with a GPU, or with the interpreter on the CPU."""
    if not IS_INSTALLED:
        return "triton is not installed: pip install 'mini-forge[kernels]'"
    if torch.cuda.is_available():
        return reason_not(torch.device("cuda"))
    return None if IS_INTERPRETED else "no CUDA device, and TRITON_INTERPRET=1 was not set before kernels were imported"


def launch(kernel, programs: int, tensor: torch.Tensor, *arguments, **options) -> None:
    """Run `kernel` in `programs` programs on `tensor`'s device, whichever device is current; none for no programs.

    `tensor` is passed first. The grid has one dimension: CUDA allows 2³¹ − 1 there and 65,535 in the others."""
    if programs == 0:
        return
    with torch.cuda.device_of(tensor):  # does nothing for a CPU tensor
        kernel[(programs,)](tensor, *arguments, **options)


def power_of_two(size: int) -> int:
    """The least power of two ≥ size ≥ 1: what a block of a kernel may measure."""
    return 1 << (size - 1).bit_length()


def warps(size: int) -> int:
    """Warps of 32 threads for a program that holds `size` numbers at a time: 16 a thread, from 4 warps up to 16."""
    return min(max(power_of_two(size) // 512, 4), 16)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(…, D) → (N, D) with neighbouring columns one number apart: a view of x where its strides allow it, else a copy.

    Rows may lie apart (a half of a fused projection does), so a kernel takes `stride(0)`."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


@jit
def widen(x):
    """Where a kernel computes: float32, or float64 for float64. 16 bits hold a result but no sum or square."""
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)
