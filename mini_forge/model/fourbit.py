"""4-bit codes, bit-equal to bitsandbytes 0.50: quantize and dequantize a tensor. No layers here (see quant.py).

QLoRA (2305.14314) §3: each block of 64 weights is divided by its largest magnitude and rounded to one of 16 codes (NF4:
quantiles of a normal distribution; FP4: sign and three bits of a float), two codes a byte, the high half first:

    W ≈ code[q] · absmax[block]                                                    0.5 + 4/64 = 0.5625 bytes a weight
    absmax ≈ map[c] · nested_absmax[block of 256 blocks] + offset  (`nested`)      0.5 + 1/64 + 4/16384 = 0.516

What is stored is bit for bit what bitsandbytes stores on CPU, on whichever device it is computed; what is dequantized
is equal whichever backend does it (FP4's second zero has either sign in bitsandbytes' kernel, as the shape has it).
One slip of bitsandbytes is not followed: called with the weight's shape, its AVX-512 code takes wrong scales where the
last dimension is a multiple of 16 but not of 64.
"""

import functools
import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mini_forge.errors import UserError

NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_MAGNITUDES = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
FP4_CODE = _FP4_MAGNITUDES + tuple(0.0 - m for m in _FP4_MAGNITUDES)  # its second zero is +0 too
CODES = {"nf4": NF4_CODE, "fp4": FP4_CODE}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024)
NESTED_BLOCKSIZE = 256
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1 << 18  # weights handled at a time: their float32 copy (1 MiB) stays in cache. A multiple of every blocksize
DECODED = CHUNK // 2  # weights dequantized at a time: 512 KiB of float32, and of indices half of that
LEVELS = 1024  # of [-1, 1]: so many that none holds two midpoints of codes; FP4's are 1/384 apart about 0


@dataclass(frozen=True)
class Quantized4bit:
    """A 4-bit weight. packed: uint8 (⌈n/2⌉, 1). stored_absmax: float32 (⌈n/blocksize⌉,), or uint8 when nested, with
    nested_absmax float32 and nested_offset float32 (). shape and dtype are the weight's before."""

    packed: torch.Tensor
    stored_absmax: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    quant_type: str = "nf4"
    blocksize: int = 64
    nested_absmax: torch.Tensor | None = None
    nested_offset: torch.Tensor | None = None

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def code(self) -> torch.Tensor:
        """float32 (16,): the value of each code, on the weight's device."""
        return code_table(self.quant_type, self.packed.device)

    @property
    def nested_code(self) -> torch.Tensor:
        """float32 (256,): the value of each code of a nested absmax."""
        return dynamic_map(self.packed.device)

    @property
    def absmax(self) -> torch.Tensor:
        """float32 (⌈n/blocksize⌉,): the scale of each block, as dequantizing uses it."""
        if not self.nested:
            return self.stored_absmax
        codes = self.nested_code.index_select(0, self.stored_absmax.int())
        return _scale_blocks(codes, self.nested_absmax, NESTED_BLOCKSIZE, codes) + self.nested_offset


def quantize_4bit(
    weight: torch.Tensor, quant_type: str = "nf4", nested: bool = False, blocksize: int = 64
) -> Quantized4bit:
    """A weight in 4 bits. weight: float32, bfloat16 or float16, any shape, on any device; the result is on the same.

    Always plain torch, in exact float32 steps, so a weight has the same bits wherever it is quantized (bitsandbytes'
    CUDA kernel breaks ties otherwise than its CPU code). Raises UserError for another dtype or non-finite values."""
    if quant_type not in CODES or blocksize not in BLOCKSIZES:
        raise UserError(f"quant_type, blocksize: {quant_type!r}, {blocksize} must be in {tuple(CODES)}, {BLOCKSIZES}")
    if weight.dtype not in FLOATS or weight.numel() == 0:
        raise UserError(f"weight: {weight.dtype} {tuple(weight.shape)} must be float32, bfloat16 or float16, not empty")
    flat = weight.detach().reshape(-1)
    count = flat.numel()  # results first: parts made and freed between them would leave the heap in pieces
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // blocksize), dtype=torch.float32, device=flat.device)
    for i in range(0, count, CHUNK):
        part, scales = _encode(flat[i : i + CHUNK].float(), quant_type, blocksize)
        packed[i // 2 : i // 2 + len(part)] = part
        absmax[i // blocksize : i // blocksize + len(scales)] = scales
    if not bool(absmax.isfinite().all()):
        raise UserError("weight: holds NaN or infinity, which 4 bits cannot hold; the checkpoint is damaged")
    plain = Quantized4bit(packed[:, None], absmax, weight.shape, weight.dtype, quant_type, blocksize)
    if nested and not bool(absmax.mean().isfinite()):
        raise UserError("weight: its magnitudes add up to infinity, so their mean cannot be taken; leave nested out")
    return _nest(plain) if nested else plain


def dequantize_4bit(
    quantized: Quantized4bit, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight, shaped as it was: code[q]·absmax in float32, rounded once to `dtype` (default: the weight's own).

    out: a contiguous buffer of the weight's shape to write to; its dtype decides. Carries no gradient."""
    q, dtype = quantized, out.dtype if out is not None else dtype or quantized.dtype
    if out is not None and (out.shape != q.shape or not out.is_contiguous()):
        raise ValueError(f"out: {tuple(out.shape)} of strides {out.stride()} must be contiguous and {tuple(q.shape)}")
    count, absmax, packed = q.shape.numel(), q.absmax, q.packed.view(-1)
    if packed.device.type != "cpu":
        weight = _DECODERS[backend(packed.device)[0]](packed, absmax, q, dtype)[:count].view(q.shape)
        return weight if out is None else out.copy_(weight)
    out = torch.empty(q.shape, dtype=dtype, device=packed.device) if out is None else out
    flat = out.view(-1)
    for start in range(0, count, DECODED):
        stop = min(start + DECODED, count)
        values = _look_up(packed[start // 2 : (stop + 1) // 2], q.quant_type)[: stop - start]
        scales = absmax[start // q.blocksize : -(-stop // q.blocksize)]
        _scale_blocks(values, scales, q.blocksize, flat[start:stop])
    return out


@functools.cache
def backend(device: torch.device | str) -> tuple[str, str]:
    """What dequantizes 4-bit weights on a device, "bitsandbytes" or "torch", and the reason in words.

    Both give the same values. For 4M weights on one core torch takes 2.7 ms and bitsandbytes 2.3 (to 16 bits 3.2 and
    1.6), but its import 1.9 s and 117 MiB, most of it for torch's compiler: so not on the CPU."""
    kind = torch.device(device).type
    if kind != "cuda":
        return "torch", f"bitsandbytes' kernel is imported for cuda, not for {kind}"
    # Said on import about a fused inference kernel that is not used here, on the error stream that users read.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except ImportError as error:
        return "torch", f"bitsandbytes cannot be imported: {error}"
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        return "torch", "bitsandbytes has no native library for this machine"
    return "bitsandbytes", "its kernel is faster than torch operations"


def _encode(values: torch.Tensor, quant_type: str, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (n,) → packed uint8 (⌈n/2⌉,) and absmax float32. A value between two codes takes the nearer, the lower of
    two equally near. bitsandbytes multiplies a whole block by 1/absmax but divides a last, partial one."""
    n, lacking = values.numel(), -values.numel() % blocksize
    blocks = (F.pad(values, (0, lacking)) if lacking else values).view(-1, blocksize)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    if lacking:
        absmax[-1].clamp_(min=1e-38)
        scaled[-1] = blocks[-1] / absmax[-1]
    scaled = scaled.view(-1)
    below, boundary, order = _ranks(quant_type, scaled.device)
    level = _level(scaled)  # two look-ups and a comparison: a quarter of the time of 15 comparisons
    rank = below.index_select(0, level)
    rank += (scaled > boundary.index_select(0, level)).view(torch.uint8)
    if order is not None:
        rank = order[rank.int()]
    pairs = rank.view(-1, 2)
    return ((pairs[:, 0] << 4) | pairs[:, 1])[: (n + 1) // 2], absmax


def _level(scaled: torch.Tensor) -> torch.Tensor:
    """int32: which of LEVELS even parts of [-1, 1] each number lies in. Rounding may shift it, but not past a greater
    number's. NaN has one too: what refuses it is its block's absmax."""
    return (scaled * (LEVELS / 2) + LEVELS / 2).int().clamp_(0, LEVELS)


def _kept(make):
    """A table that is made once. Not as an inference tensor, wherever it is first asked for: it serves training too."""
    return functools.cache(torch.inference_mode(False)(make))


@_kept
def _ranks(quant_type: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What finds a number's rank, which is how many of the 15 midpoints of neighbouring codes it is above: for each
    level the midpoints of lower ones, uint8 (LEVELS + 1,), and the next midpoint, float32, the only one that may lie in
    the level itself. Then which code each rank is, uint8 (16,); None: the rank itself."""
    ascending, order = torch.sort(_codes(quant_type), stable=True)
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    below = torch.bucketize(torch.arange(LEVELS + 1, device="cpu"), _level(midpoints))
    following = F.pad(midpoints, (0, 1), value=math.inf)[below]
    order = None if quant_type == "nf4" else order.to(torch.uint8).to(device)
    return below.to(torch.uint8).to(device), following.to(device), order


def _look_up(packed: torch.Tensor, quant_type: str) -> torch.Tensor:
    """float32, two values a byte: each byte looks up those of its halves at once, as one number of 8 bytes. (torch
    copies a row of two numbers in twice the time.)"""
    return _byte_values(quant_type, packed.device).index_select(0, packed.int()).view(torch.float32)


def _decode_torch(packed: torch.Tensor, absmax: torch.Tensor, q: Quantized4bit, dtype: torch.dtype) -> torch.Tensor:
    values = _look_up(packed, q.quant_type)
    return _scale_blocks(values, absmax, q.blocksize, values).to(dtype)


def _decode_bitsandbytes(packed: torch.Tensor, absmax: torch.Tensor, q: Quantized4bit, dtype: torch.dtype):
    # The shape is given flat and even: its AVX-512 code misplaces the scales of some row lengths, and compiles a slower
    # path for odd ones. Dtypes it does not know go by way of float32.
    kernel_dtype = dtype if dtype in FLOATS else torch.float32
    shape = (2 * packed.numel(),)
    kernel = torch.ops.bitsandbytes.dequantize_4bit.default
    return kernel(packed, absmax, q.blocksize, q.quant_type, shape, kernel_dtype).view(-1).to(dtype)


_DECODERS = {"torch": _decode_torch, "bitsandbytes": _decode_bitsandbytes}


def _codes(quant_type: str) -> torch.Tensor:
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device="cpu")


@_kept
def code_table(quant_type: str, device: torch.device) -> torch.Tensor:
    """float32 (16,): the values of the codes."""
    return _codes(quant_type).to(device)


@_kept
def _byte_values(quant_type: str, device: torch.device) -> torch.Tensor:
    """int64 (256,): two float32, the values of each byte's high and low half."""
    code = _codes(quant_type)
    return torch.cartesian_prod(code, code).view(torch.int64).view(-1).to(device)


def _scale_blocks(values: torch.Tensor, scales: torch.Tensor, blocksize: int, out: torch.Tensor) -> torch.Tensor:
    """out = values (n,) · scales (⌈n/blocksize⌉,), one scale a block; a last block may be short, and out be values."""
    whole = values.numel() // blocksize
    n = whole * blocksize
    torch.mul(values[:n].view(whole, blocksize), scales[:whole, None], out=out[:n].view(whole, blocksize))
    torch.mul(values[n:], scales[whole:], out=out[n:])
    return out


@_kept
def dynamic_map(device: torch.device | str = "cpu") -> torch.Tensor:
    """float32 (256,), ascending: the signed dynamic 8-bit code. 8-bit optimizers (2110.02861) §2.1.

    For each decade 10⁻⁶ … 1, the centres of 2^i equal parts of [0.1, 1] with both signs (i = 0 … 6), and 0 and 1."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        centres = (10 ** (i - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += centres.tolist() + (-centres).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@_kept
def _dynamic_code_of_level() -> torch.Tensor:
    """uint8 (65536,): the code nearest to each of 65536 even levels of [-1, 1]: bitsandbytes rounds to a level first,
    which makes 0 the code of 2.1e-5."""
    code = dynamic_map()
    levels = torch.arange(65536, dtype=torch.float32, device="cpu") * 2 / 65535 - 1
    return torch.bucketize(levels, (code[:-1] + code[1:]) * 0.5).to(torch.uint8)


def _nest(plain: Quantized4bit) -> Quantized4bit:
    """`plain` with its absmax in 8 bits. Computed on the CPU: the same bits on every device (and few: n/64 of them)."""
    device, absmax = plain.packed.device, plain.stored_absmax.cpu()
    offset = absmax.mean()
    codes, largest = _encode_dynamic(absmax - offset)
    return Quantized4bit(plain.packed, codes.to(device), plain.shape, plain.dtype, plain.quant_type, plain.blocksize,
                         largest.to(device), offset.to(device))  # fmt: skip


def _encode_dynamic(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 (n,) → dynamic 8-bit codes, uint8 (n,), and the largest magnitude of each block of 256, float32."""
    n = values.numel()
    blocks = F.pad(values, (0, -n % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    largest = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / largest)[:, None]).clamp_(-1, 1)
    level = (scaled + 1) * 0.5 * 65535 + 0.5  # bitsandbytes fuses it: all floats tried, no level differs
    level = level.nan_to_num(0.0).int()  # 0/0 in a block of zeros, for which bitsandbytes writes code 0
    return _dynamic_code_of_level()[level.view(-1)[:n]], largest
