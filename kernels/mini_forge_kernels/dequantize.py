"""Weights of 4 bits made dense, or multiplied as they are where rows are few. Triton; not measured on a GPU yet.

    NF4, FP4   W = code[q] · s,   s = absmax[b]   or   map[absmax[b]] · nested_absmax[b / 256] + offset    2305.14314 §3
    MXFP4      W = e2m1(q) · 2^(scale[b] − 127)                                                          OCP MX v1.0
    product    y = x Wᵀ + bias,  dx = dy W                                                x (N, in), W (out, in)

Bytes moved for each of the n weights, 16-bit results: dequantizing reads 0.5625 (nested 0.516, MXFP4 0.531) and writes
2, in one pass; torch operations on MXFP4 also write and read 4 of indices and 2 of values, and nested statistics pass
through memory five times. A product of dense weights reads the 2 again: 4.6 in all. Decoding within the product moves
0.56, but once for every tile of rows, with about ten integer and float operations a weight.

So up to FEW_ROWS rows, one tile, as in generation, the product is bound by memory and should take an eighth of the
bytes' time: `matmul_4bit` and `matmul_mxfp4` decode as they multiply. Above, arithmetic outweighs bytes: at 4,096 rows
an H100 (990 TFLOP/s, 3.35 TB/s) multiplies for 8.3 ps a weight and dequantizes for 0.8, and torch's product of a dense
weight is the better one. Then W is made whole in memory that goes back to torch's caching allocator with the product:
the next one gets the same block, which makes it one buffer for each size and stream.

References: `mini_forge.model.fourbit.dequantize_4bit` and `mini_forge.model.mxfp4.dequantize_mxfp4`, equal bit for bit.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mini_forge_kernels.triton_support import IS_INTERPRETED, jit, launch, power_of_two, tl

__all__ = ["FEW_ROWS", "dequantize_4bit", "dequantize_mxfp4", "matmul_4bit", "matmul_mxfp4"]

FEW_ROWS = 64  # one tile of rows: twice as many would decode each weight twice
_BYTES = 1024  # decoded by one program of the dequantizing kernel: 8 for each of 128 threads
_PLAIN, _NESTED, _MXFP4 = 0, 1, 2


def dequantize_4bit(quantized, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weight, shaped as it was: code[q]·absmax in float32, rounded once to `dtype` (default: the weight's own).

    quantized: a `mini_forge.model.fourbit.Quantized4bit`. out: a contiguous buffer of the weight's shape to write to;
    its dtype decides. Carries no gradient. On a CUDA device, or anywhere under Triton's interpreter."""
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype or quantized.dtype, device=quantized.packed.device)
    return _dequantize(_stored_4bit(quantized), out)


def dequantize_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights: e2m1(q)·2^(scale−127), exact in float32 and bfloat16, rounded once to another `dtype`.

    blocks: uint8 (..., G, 16); scales: uint8 (..., G). out: a contiguous buffer (..., 32·G) to write to; its dtype
    decides. Without it a new tensor in `dtype` (float32). Carries no gradient."""
    if out is None:
        shape = (*scales.shape[:-1], 2 * blocks.shape[-1] * scales.shape[-1])
        out = torch.empty(shape, dtype=dtype, device=blocks.device)
    return _dequantize(_stored_mxfp4(blocks, scales), out)


def matmul_4bit(x: torch.Tensor, quantized, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + bias for x (…, in) and a Quantized4bit of shape (out, in) → (…, out) in x's dtype, differentiable in x.

    W is what `dequantize_4bit` makes in x's dtype; sums are float32. bias (out,) is frozen."""
    return _Product.apply(x, bias, _stored_4bit(quantized), quantized.shape)


def matmul_mxfp4(
    x: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`matmul_4bit` for blocks uint8 (out, G, 16) and scales uint8 (out, G): x (…, 32·G) → (…, out)."""
    shape = torch.Size((len(scales), 2 * blocks.shape[-1] * scales.shape[-1]))
    return _Product.apply(x, bias, _stored_mxfp4(blocks, scales), shape)


class _Stored(NamedTuple):
    """What a kernel needs of a stored weight. Unused pointers are None."""

    packed: torch.Tensor  # uint8, two codes a byte: NF4 and FP4 the high half first, MXFP4 the low half
    scales: torch.Tensor  # of each block of weights: float32; nested: uint8; MXFP4: uint8 exponents
    code: torch.Tensor | None  # float32 (16,)
    nested_code: torch.Tensor | None  # float32 (256,)
    nested_absmax: torch.Tensor | None  # float32, of each 256 scales
    nested_offset: torch.Tensor | None  # float32 ()
    blocksize: int
    form: int


def _stored_4bit(q) -> _Stored:
    nested = (q.nested_code, q.nested_absmax, q.nested_offset) if q.nested else (None, None, None)
    return _Stored(q.packed.view(-1), q.stored_absmax, q.code, *nested, q.blocksize, _NESTED if q.nested else _PLAIN)


def _stored_mxfp4(blocks, scales) -> _Stored:
    packed = blocks.reshape(-1)
    return _Stored(packed, scales.reshape(-1), None, None, None, None, 2 * blocks.shape[-1], _MXFP4)


def _dequantize(stored: _Stored, out: torch.Tensor) -> torch.Tensor:
    flat = out.view(-1)
    count, emulates = flat.numel(), IS_INTERPRETED and out.dtype == torch.bfloat16
    # No fused multiply-add: the reference rounds map·nested_absmax before it adds the offset.
    launch(_dequantize_kernel, -(-count // (2 * _BYTES)), flat, *stored[:-2], count, BLOCKSIZE=stored.blocksize,
           FORM=stored.form, EMULATES=emulates, BYTES=_BYTES, enable_fp_fusion=False)  # fmt: skip
    return out


class _Product(torch.autograd.Function):
    """Saves where the stored weight lies and nothing else."""

    @staticmethod
    def forward(ctx, x, bias, stored, shape):
        ctx.stored, ctx.shape = stored, shape
        rows = x.reshape(-1, x.shape[-1])
        # Rows of an odd width begin within a byte; no model has them.
        if len(rows) <= FEW_ROWS and shape[1] % 2 == 0:
            y = _few_rows_product(rows.contiguous(), bias, stored, shape)
        else:
            weight = _dequantize(stored, rows.new_empty(shape))
            y = F.linear(rows, weight, None if bias is None else bias.to(x.dtype))
        return y.view(*x.shape[:-1], shape[0])

    @staticmethod
    def backward(ctx, grad):
        return grad @ _dequantize(ctx.stored, grad.new_empty(ctx.shape)), None, None, None


def _few_rows_product(x, bias, stored: _Stored, shape) -> torch.Tensor:
    N, (out_features, in_features), columns = len(x), shape, 32
    y = x.new_empty(N, out_features)
    launch(
        _few_rows_kernel, -(-out_features // columns) if N else 0, y, x, bias, *stored[:-2], N, out_features,
        ROW_BYTES=in_features // 2, BLOCKSIZE=stored.blocksize, FORM=stored.form,
        EMULATES=IS_INTERPRETED and x.dtype == torch.bfloat16, ROWS=max(16, power_of_two(max(N, 1))), COLUMNS=columns,
        BYTES=64 if x.dtype.itemsize == 2 else 32, enable_fp_fusion=False,
    )  # fmt: skip
    return y


@jit
def _dequantize_kernel(
    out, packed, scales, code, nested_code, nested_absmax, nested_offset, count,
    BLOCKSIZE: tl.constexpr, FORM: tl.constexpr, EMULATES: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One program: BYTES bytes, 2·BYTES weights, which share a scale two by two."""
    start = tl.program_id(0).to(tl.int64) * BYTES
    byte = start + tl.arange(0, BYTES)
    keep = 2 * byte < count
    pair = tl.load(packed + byte, mask=keep, other=0).to(tl.int32)
    scale = _scale(2 * byte // BLOCKSIZE, keep, scales, nested_code, nested_absmax, nested_offset, FORM)
    first, second = _values(pair, code, FORM)
    weights = tl.interleave(first * scale, second * scale)
    index = 2 * start + tl.arange(0, 2 * BYTES)
    if EMULATES:
        weights = _to_bfloat16(weights)
    tl.store(out + index, weights.to(out.dtype.element_ty), mask=index < count)


@jit
def _few_rows_kernel(
    y, x, bias, packed, scales, code, nested_code, nested_absmax, nested_offset, N, out_features,
    ROW_BYTES: tl.constexpr, BLOCKSIZE: tl.constexpr, FORM: tl.constexpr, EMULATES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """One program: all N ≤ ROWS rows of x by COLUMNS rows of W. The two weights of a byte are never put side by side:
    even and odd channels of x are multiplied apart."""
    row = tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, ROW_BYTES, BYTES):
        within = start + tl.arange(0, BYTES)
        keep = (column < out_features)[:, None] & (within < ROW_BYTES)[None, :]
        byte = column[:, None] * ROW_BYTES + within[None, :]
        pair = tl.load(packed + byte, mask=keep, other=0).to(tl.int32)
        scale = _scale(2 * byte // BLOCKSIZE, keep, scales, nested_code, nested_absmax, nested_offset, FORM)
        first, second = _values(pair, code, FORM)
        first, second = first * scale, second * scale
        channel = row[:, None] * (2 * ROW_BYTES) + 2 * within[None, :]
        exists = (row < N)[:, None] & (within < ROW_BYTES)[None, :]
        even = tl.load(x + channel, mask=exists, other=0.0)
        odd = tl.load(x + channel + 1, mask=exists, other=0.0)
        if EMULATES:  # the interpreter's dot takes bfloat16 for integers; float32 holds their products exactly
            first, second = _to_bfloat16(first).to(tl.float32), _to_bfloat16(second).to(tl.float32)
            even, odd = even.to(tl.float32), odd.to(tl.float32)
        else:
            first, second = first.to(x.dtype.element_ty), second.to(x.dtype.element_ty)
        total = tl.dot(even, tl.trans(first), total, input_precision="ieee")
        total = tl.dot(odd, tl.trans(second), total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + column, mask=column < out_features, other=0.0).to(tl.float32)[None, :]
    if EMULATES:
        total = _to_bfloat16(total)
    keep = (row < N)[:, None] & (column < out_features)[None, :]
    place = row[:, None].to(tl.int64) * out_features + column[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=keep)


@jit
def _values(pair, code, FORM: tl.constexpr):
    """float32 values of the first and second code of each byte."""
    if FORM == 2:
        first, second = _e2m1(pair & 15), _e2m1(pair >> 4)
    else:
        first, second = tl.load(code + (pair >> 4)), tl.load(code + (pair & 15))
    return first, second


@jit
def _e2m1(q):
    """Sign, 2 bits of exponent (bias 1), 1 of mantissa; 0.5 is the one subnormal number. As bits of a float32."""
    exponent, mantissa = (q >> 1) & 3, q & 1
    magnitude = tl.where(exponent > 0, ((exponent + 126) << 23) | (mantissa << 22), mantissa * 0x3F000000)
    return (magnitude | ((q & 8) << 28)).to(tl.float32, bitcast=True)


@jit
def _scale(block, keep, scales, nested_code, nested_absmax, nested_offset, FORM: tl.constexpr):
    """float32 scale of each block's number."""
    stored = tl.load(scales + block, mask=keep, other=0)
    if FORM == 2:  # the byte is a float32's exponent, but for 2⁻¹²⁷, a subnormal number, and 255, which is NaN
        bits = stored.to(tl.int32) << 23
        bits = tl.where(stored == 0, 0x400000, tl.where(stored == 255, 0x7FC00000, bits))
        scale = bits.to(tl.float32, bitcast=True)
    elif FORM == 1:
        largest = tl.load(nested_absmax + block // 256, mask=keep, other=0.0)
        scale = tl.load(nested_code + stored.to(tl.int32)) * largest + tl.load(nested_offset)
    else:
        scale = stored
    return scale


@jit
def _to_bfloat16(x):
    """float32 → bfloat16 to the nearest, ties to even, as a GPU converts; the interpreter cuts off instead."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # arithmetic's own NaNs have a clear lower half and stay NaN
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
