"""MXFP4: against the formula in float64 for every byte and scale, hand-made bytes, and what transformers reads."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mini_forge.errors import CheckpointError, UserError
from mini_forge.model import mxfp4
from mini_forge.model.mxfp4 import dequantize_mxfp4, quantize_mxfp4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
# What transformers 5.23's convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16) gave on CPU, transposed back
# from its (E, in, out): bytes of blocks (2, 2, 1, 16), scales (2, 2, 1) and the bfloat16 result (2, 2, 32).
BLOCKS = bytes.fromhex(
    "4d8533a7560dd2d0263440a3f2e6d26a66a2aba8da2ffbcf29697c1167302a6181919c83533c0b887770791c06998f46abe54e8cdd50"
    "54cf3d40dbb0723b1a63"
)  # fmt: skip
SCALES = bytes.fromhex("7f646401")
RESULT = bytes.fromhex(
    "40c0004040400080c03fc03fc04080bf8040404040c00000803f40c0000040c08040803f0040c03f00000040c03f80bf803fc0c08040"
    "80c0803f40c080bf804000330033003200b240b200b2008000b200b2c0b240b3003240b240b340b380b280b1003280b1003380b24033"
    "80318031403300330000403200b200328031003380310080803180b180b280b1403200804032c03280b2403240b20000008000804033"
    "40330000403380b1403380b280310033000080b180b140b3008000338032c08080804001808180810001008100804081408100004001"
    "00014001c08100814081c00000000001c08040810000c0808000c001c080c00080804000c0008001"
)  # fmt: skip


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made within lived in at once."""

    def __init__(self, *known):
        super().__init__()
        self.peak, self.alive, self.known = 0, [], {t.untyped_storage().data_ptr() for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.alive += [weakref.ref(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        tensors = [t for t in (ref() for ref in self.alive) if t is not None]
        self.alive = [weakref.ref(t) for t in tensors]
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        self.peak = max(self.peak, sum(size for pointer, size in sizes.items() if pointer not in self.known))
        return result


def tensor_of(data, dtype, *shape):
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def by_the_formula(blocks, scales):
    """A slow oracle in float64, one nibble at a time; NaN for scale 255."""
    rows = []
    for packed, scale in zip(blocks.reshape(-1, 16).tolist(), scales.reshape(-1).tolist(), strict=True):
        values = [VALUES[half] for byte in packed for half in (byte % 16, byte // 16)]
        rows.append([math.ldexp(v, scale - 127) if scale != 255 else math.nan for v in values])
    return torch.tensor(rows, dtype=torch.float64).view(*scales.shape[:-1], -1)


def nearest_code(value):
    """The code of the nearest of VALUES; of two equally near the one whose last bit is 0."""
    distances = [abs(v - abs(value)) for v in VALUES[:8]]
    nearest = [code for code in range(8) if distances[code] == min(distances)]
    return next(c for c in nearest if len(nearest) == 1 or c % 2 == 0) + 8 * (math.copysign(1, value) < 0)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_every_byte_and_scale_is_the_formula(dtype):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16)
    expected = by_the_formula(blocks, scales)
    ours = dequantize_mxfp4(blocks, scales, dtype)
    assert ours.shape == (256, 512) and ours.dtype == dtype
    assert ours[255].isnan().all() and not ours[:255].isnan().any()
    fits = expected.abs() < 2.0**128
    if dtype != torch.float16:  # exact, subnormals of bfloat16 and float32 too; beyond 2^128 infinite
        assert torch.equal(ours.double()[fits], expected[fits])
        assert (ours[:255][~fits[:255]].abs() == math.inf).all() and (~fits[:255]).any()
    else:
        assert torch.equal(ours[:255], expected[:255].half())
    assert torch.equal(torch.signbit(ours[:255]), torch.signbit(expected[:255]))  # −0 is −0


def test_bytes_by_hand():
    # 0x21: low half 1 → 0.5, high half 2 → 1. 0xF7: 6, then −6. 0x8C: code 12 → −2, code 8 → −0. Scale 128: times 2.
    blocks = torch.tensor([[0x21, 0xF7, 0x8C] + [0] * 13, [0x03] * 16], dtype=torch.uint8)
    ours = dequantize_mxfp4(blocks, torch.tensor([128, 124], dtype=torch.uint8), torch.bfloat16)
    assert ours.shape == (64,) and ours[:6].tolist() == [1, 2, 12, -12, -4, 0]
    assert ours[32:].tolist() == [1.5 / 8, 0] * 16


def test_golden_bytes_of_transformers():
    blocks, scales = tensor_of(BLOCKS, torch.uint8, 2, 2, 1, 16), tensor_of(SCALES, torch.uint8, 2, 2, 1)
    theirs = tensor_of(RESULT, torch.bfloat16, 2, 2, 32)
    assert torch.equal(dequantize_mxfp4(blocks, scales, torch.bfloat16).view(torch.int16), theirs.view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_is_written_and_decides_the_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (37, 2, 83, 16), generator=generator, dtype=torch.uint8)  # three chunks, the last short
    scales = torch.randint(118, 136, (37, 2, 83), generator=generator, dtype=torch.uint8)
    expected = by_the_formula(blocks, scales).to(dtype)
    out = torch.full((37, 2, 83 * 32), math.nan, dtype=dtype)
    assert dequantize_mxfp4(blocks, scales, torch.float64, out) is out and torch.equal(out, expected)
    strided = dequantize_mxfp4(blocks.transpose(0, 1), scales.transpose(0, 1), dtype)
    assert torch.equal(strided, expected.transpose(0, 1))
    with pytest.raises(RuntimeError):
        dequantize_mxfp4(blocks, scales, out=torch.empty(37, 83 * 32))
    assert dequantize_mxfp4(blocks[:0], scales[:0], dtype).shape == (0, 2, 83 * 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2880, 2880), (33, 32 * 251)])
def test_dequantizing_makes_nothing_larger_than_a_chunk(dtype, shape):
    blocks, scales = torch.zeros(shape[0], shape[1] // 32, 16, dtype=torch.uint8), torch.zeros(shape[0], shape[1] // 32)
    scales, out = scales.to(torch.uint8), torch.empty(shape, dtype=dtype)
    with PeakBytes(blocks, scales, out) as seen:
        dequantize_mxfp4(blocks, scales, out=out)
    assert 2**16 < seen.peak <= 2**20, seen.peak  # the matrix itself: 0.5 to 32 MiB


def weights_to_round():
    """(n, 32) float64 holding float32 values: normal, ties, zeros, subnormal and huge blocks, single large values."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn((64, 32), generator=generator) * torch.logspace(-30, 30, 64)[:, None]
    ties = torch.randint(-32, 33, (32, 32), generator=generator) / 4 * 2.0 ** torch.arange(-16, 16)[:, None]
    ties[:, 0] = 4 * 2.0 ** torch.arange(-16, 16)  # so that quarters are midpoints
    subnormal = torch.randint(-9, 10, (8, 32), generator=generator) * 2.0**-149
    huge = torch.randn((8, 32), generator=generator).clamp(-1, 1) * torch.finfo(torch.float32).max
    saturating = torch.tensor([7.99, 6.0, 5.0, 4.99, 7.0, -7.5, 0.25, -0.25] * 4)[None]
    return torch.cat([normal, ties, subnormal, huge, saturating, torch.zeros(1, 32), -torch.zeros(1, 32)])


def test_quantized_bits_are_the_specifications_rounding():
    weight = weights_to_round()
    blocks, scales = quantize_mxfp4(weight)
    assert blocks.shape == (len(weight), 1, 16) and scales.shape == (len(weight), 1)
    for row, packed, (scale,) in zip(weight.tolist(), blocks[:, 0].tolist(), scales.tolist(), strict=True):
        largest = max(abs(v) for v in row)
        expected = max(0, math.floor(math.log2(largest)) - 2 + 127) if largest else 0
        assert scale == expected and scale <= 252
        codes = [half for byte in packed for half in (byte % 16, byte // 16)]
        assert codes == [nearest_code(math.ldexp(v, 127 - scale)) for v in row]


def test_a_block_by_hand():
    # max 7 → ⌊log₂ 7⌋ − 2 = 0, scale 127. Ties: 0.25 → 0, 0.75 → 1, 2.5 → 2, 5 → 4, and 7 is above 6.
    weight = torch.tensor([7, 0.25, 0.75, 2.5, -5, -1.25, 3.5, 6] + [0] * 24)
    blocks, scales = quantize_mxfp4(weight)
    assert scales.tolist() == [127] and blocks[0, :4].tolist() == [0x07, 0x42, 0xAE, 0x76]
    assert dequantize_mxfp4(blocks, scales, torch.float32)[:8].tolist() == [6, 0, 1, 2, -4, -1, 4, 6]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_dequantized_is_quantized_to_the_same_values(dtype):
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(256, (3, 700, 5, 16), generator=generator, dtype=torch.uint8)  # several chunks
    scales = torch.randint(120, 134, (3, 700, 5), generator=generator, dtype=torch.uint8)
    weight = dequantize_mxfp4(blocks, scales, dtype)
    again = quantize_mxfp4(weight)
    assert again[0].shape == blocks.shape and again[1].shape == scales.shape
    assert torch.equal(dequantize_mxfp4(*again, dtype), weight)
    has_four = (blocks & 7 >= 6).any(-1) | (blocks >> 4 & 7 >= 6).any(-1)  # such a block has one way to be written
    assert has_four.any() and torch.equal(again[0][has_four], blocks[has_four])
    assert torch.equal(again[1][has_four], scales[has_four])


@pytest.mark.parametrize("weight", [torch.zeros(2, 33), torch.zeros(0, 32), torch.zeros(32, dtype=torch.int32),
                                    torch.full((1, 32), math.nan), torch.tensor([math.inf] + [0] * 31)])  # fmt: skip
def test_what_cannot_be_quantized_is_refused_in_one_line(weight):
    with pytest.raises(UserError, match="^weight: ") as error:
        quantize_mxfp4(weight)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("blocks,scales", [((2, 16), (3,)), ((2, 8), (2,)), ((32,), (2,)), ((16,), ())])
def test_blocks_and_scales_that_do_not_fit_are_refused(blocks, scales):
    with pytest.raises(CheckpointError, match="^blocks, scales: ") as error:
        dequantize_mxfp4(torch.zeros(blocks, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8), torch.float32)
    assert len(error.value.problems) == 1
    for dtypes in [(torch.int8, torch.uint8), (torch.uint8, torch.int8), (torch.int8, torch.int8)]:
        with pytest.raises(CheckpointError, match="torch.int8"):
            dequantize_mxfp4(torch.zeros(2, 16, dtype=dtypes[0]), torch.zeros(2, dtype=dtypes[1]), torch.float32)


def test_tables_first_made_under_another_default_device_are_real():
    mxfp4._tables.cache_clear()
    with torch.device("meta"):
        mxfp4._tables(torch.float32, torch.device("cpu"))
    assert dequantize_mxfp4(torch.full((1, 16), 0x22, dtype=torch.uint8), torch.tensor([127], dtype=torch.uint8),
                            torch.float32).sum() == 32  # fmt: skip
