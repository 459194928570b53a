"""MXFP4, the 4-bit form in which gpt-oss checkpoints hold their experts: quantize and dequantize a tensor.

OCP Microscaling Formats (MX) Specification v1.0: 32 neighbouring weights share one scale, a power of two (E8M0: 8 bits
of exponent, nothing else), and each is a float of 4 bits (E2M1: sign, 2 bits of exponent, 1 of mantissa):

    W = code[q] · 2^(scale − 127)                                            0.5 + 1/32 = 0.53125 bytes a weight

Two weights a byte, the low half first (NF4 and FP4 of model/fourbit.py: the high half first). All of it is powers of
two times at most two significant bits, so float32 and bfloat16 hold every weight exactly, subnormal ones too.

A scale of 255 is NaN in E8M0 and makes its 32 weights NaN (transformers reads it as 2^128). A product of 2^128 and more
is infinite, as ldexp's is: the specification leaves what float32 cannot hold to the implementation.
"""

import functools

import torch

from mini_forge.errors import CheckpointError, UserError
from mini_forge.model.fourbit import CHUNK, FLOATS

BLOCK = 32
NAN_SCALE = 255
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_CODE = _MAGNITUDES + tuple(-m for m in _MAGNITUDES)  # the second zero is −0
_LARGEST_EXPONENT = 2  # 6 = 1.5 · 2²
_BIAS = 127
_ROWS = CHUNK // 4 // BLOCK  # blocks handled at a time: 256 KiB of float32, twice at most, and 128 of indices


def dequantize_mxfp4(
    blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights: code[q]·2^(scale−127), exact in float32 and bfloat16, rounded once to another `dtype`. OCP MX v1.0.

    blocks: uint8 (..., G, 16); scales: uint8 (..., G), both best contiguous (else they are copied).
    out: a contiguous buffer (..., 32·G) to write to; its dtype decides. Without it a new tensor in `dtype` (float32).
    On CPU less than 1 MiB exists beyond `out`. Carries no gradient. Raises CheckpointError where blocks and
    scales do not fit together."""
    check_packed(blocks, scales)
    if out is None:
        out = torch.empty((*scales.shape[:-1], BLOCK * scales.shape[-1]), dtype=dtype, device=blocks.device)
    pairs, powers = _tables(torch.bfloat16 if out.dtype == torch.bfloat16 else torch.float32, blocks.device)
    packed, exponents = blocks.reshape(scales.numel(), BLOCK // 2), scales.reshape(-1)
    rows = out.view(scales.numel(), BLOCK)
    step = _ROWS if blocks.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        values = pairs.index_select(0, packed[part].reshape(-1).int()).view(powers.dtype).view(-1, BLOCK)
        torch.mul(values, powers.index_select(0, exponents[part].int())[:, None], out=rows[part])
    return out


def quantize_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., 32·G) float → blocks, uint8 (..., G, 16), and scales, uint8 (..., G), on the same device. OCP MX v1.0 §6.3.

    scale − 127 = ⌊log₂ max|w|⌋ − 2, and w / 2^(scale−127) is rounded to the nearest code, ties to the even one, and to
    ±6 above it. A block of zeros has scale 0. Raises UserError for another dtype, a last dimension that is not made of
    blocks of 32, and non-finite values."""
    if weight.dtype not in FLOATS or weight.dim() == 0 or weight.numel() == 0 or weight.shape[-1] % BLOCK:
        raise UserError(
            f"weight: {weight.dtype} {list(weight.shape)} must be float32, bfloat16 or float16, not empty, its last "
            f"dimension a multiple of {BLOCK}; other weights can be stored as nf4"
        )
    rows = weight.detach().reshape(-1, BLOCK)
    parts = [_encode(rows[i : i + _ROWS].float()) for i in range(0, len(rows), _ROWS)]
    blocks, scales = (torch.cat(column) for column in zip(*parts, strict=True))
    shape = (*weight.shape[:-1], weight.shape[-1] // BLOCK)
    return blocks.view(*shape, BLOCK // 2), scales.view(shape)


def check_packed(blocks: torch.Tensor, scales: torch.Tensor):
    """Raises CheckpointError unless blocks are uint8 (..., G, 16) and scales uint8 (..., G)."""
    is_packed = blocks.dtype == scales.dtype == torch.uint8 and blocks.shape == (*scales.shape, BLOCK // 2)
    if not is_packed or scales.dim() == 0:
        raise CheckpointError(
            f"blocks, scales: {blocks.dtype} {list(blocks.shape)} and {scales.dtype} {list(scales.shape)} must be "
            f"uint8 (..., G, {BLOCK // 2}) and uint8 (..., G), as MXFP4 has them; the checkpoint is of another format"
        )


def _encode(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (n, 32) → blocks (n, 16) and scales (n,)."""
    largest = rows.abs().amax(dim=1)
    if not bool(largest.isfinite().all()):
        raise UserError("weight: holds NaN or infinity, which 4 bits cannot hold; the checkpoint is damaged")
    exponent = torch.frexp(largest).exponent - 1  # ⌊log₂⌋, exact: frexp's mantissa is in [½, 1)
    scales = (exponent - _LARGEST_EXPONENT + _BIAS).clamp(min=0).masked_fill(largest == 0, 0)
    _, powers = _tables(torch.float32, rows.device)
    scaled = rows * powers.index_select(0, 2 * _BIAS - scales)[:, None]  # · 2^(127−scale): exact
    magnitude, code = scaled.abs(), torch.signbit(rows).to(torch.uint8) << 3
    for rank, (lower, upper) in enumerate(zip(_MAGNITUDES[:-1], _MAGNITUDES[1:], strict=True)):
        midpoint = (lower + upper) / 2
        code += magnitude > midpoint if rank % 2 == 0 else magnitude >= midpoint  # a tie goes to the even rank
    return code[:, 0::2] | (code[:, 1::2] << 4), scales.to(torch.uint8)


@functools.cache
def _tables(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The two values of each byte, side by side in one integer (256,) of twice dtype's size: looking up one number is
    twice as fast as a row of two. And 2^(scale−127) of each scale, `dtype` (256,)."""
    values = [(E2M1_CODE[byte & 15], E2M1_CODE[byte >> 4]) for byte in range(256)]
    powers = [2.0 ** (scale - _BIAS) for scale in range(NAN_SCALE)] + [float("nan")]
    pairs = torch.tensor(values, dtype=dtype, device="cpu").view(torch.int32 if dtype.itemsize == 2 else torch.int64)
    return pairs.view(-1).to(device), torch.tensor(powers, dtype=dtype, device="cpu").to(device)
