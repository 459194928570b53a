"""Compile Triton kernels to machine code of GPUs that need not be here, as the launches of given calls would.

Run as a script, without TRITON_INTERPRET: calls each op forward and backward with `launch` replaced, and prints a line
"module.kernel dtype" for each kernel that came through Triton's whole compiler, down to a cubin.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mini_forge_kernels import rms_norm, rope, swiglu
from mini_forge_kernels.triton_support import OLDEST_GPU

TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
         torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}  # fmt: skip
TARGET = GPUTarget("cuda", 10 * OLDEST_GPU[0] + OLDEST_GPU[1], 32)


def compile_launch(kernel, programs, tensor, *arguments, **options):
    """In `launch`'s place: compiles what it would have run. Integers of 1 become constants, as at a real launch."""
    given = dict(zip(kernel.arg_names, (tensor, *arguments), strict=False))
    given |= {name: value for name, value in options.items() if name in kernel.arg_names}
    declared = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    constants = {n for n, v in given.items() if n in declared or v is None or (type(v) is int and v == 1)}
    signature = {n: "constexpr" if n in constants else _type(given[n]) for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): given[n] for n in constants}
    choices = {n: v for n, v in options.items() if n not in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    assert triton.compile(source, target=TARGET, options=choices).asm["cubin"], kernel
    print(f"{kernel.__module__.split('.')[-1]}.{kernel.__name__} {tensor.dtype}")


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def call_ops(dtype: torch.dtype, N: int, width: int, heads: int):
    """Each op forward and backward, its values left as they lie in memory."""
    x, weight = (torch.ones(*size, dtype=dtype, requires_grad=True) for size in ((N, width), (width,)))
    rms_norm.TritonRMSNorm.apply(x, weight, 1e-5).backward(x.detach())
    rms_norm.TritonRMSNorm.apply(x, weight.detach(), 1e-5).backward(x.detach())
    query = torch.ones(N, heads, 64, dtype=dtype, requires_grad=True)
    angle = torch.ones(N, 64, dtype=dtype)
    torch.autograd.backward(rope.TritonRotation.apply(query, query[:, :1], angle, angle), (query, query[:, :1]))
    for limit, slope in ((None, 1.0), (7.0, 1.702)):
        swiglu.TritonSwiGLU.apply(x, x, limit, slope).backward(x.detach())
        halves = torch.cat((x, x), dim=-1).chunk(2, dim=-1)
        swiglu.TritonSwiGLU.apply(*halves, limit, slope).backward(halves[0].detach())


if __name__ == "__main__":
    for module in (rms_norm, rope, swiglu):
        module.launch = compile_launch
    for name in sys.argv[1:]:
        call_ops(getattr(torch, name), 2048, 2048, 40)
    call_ops(torch.bfloat16, 1, 1, 1)
