"""Stacks of experts in few bits: each expert bit for bit what its matrix alone would be, and no dense copy kept."""

import copy
import math

import pytest
import torch
from torch import nn

from mini_forge.errors import CheckpointError, UserError
from mini_forge.model import quant
from mini_forge.model.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from mini_forge.model.quant import Linear8bit, dequantize_4bit, dequantized_weight, quantize_4bit
from mini_forge.model.stacks import (
    Stack4bit,
    Stack8bit,
    StackMxfp4,
    deinterleave_rows,
    expert_weight,
    interleave_rows,
)
from tests.test_mxfp4 import PeakBytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOUR_BIT = [(kind, nested) for kind in ("nf4", "fp4") for nested in (False, True)]


def matrices(count, out_features, in_features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, out_features, in_features), generator=generator)


def stacks(count=3, out_features=6, in_features=96):
    """One of each form, filled from the same matrices, and what each expert must be, found one matrix at a time."""
    weights = matrices(count, out_features, in_features)
    for kind, nested in FOUR_BIT:
        stack = Stack4bit.empty(count, out_features, in_features, kind, nested)
        yield filled(stack, weights), [dequantize_4bit(quantize_4bit(w, kind, nested)) for w in weights]
    stack = Stack8bit.empty(count, out_features, in_features)
    yield filled(stack, weights), [Linear8bit.from_weight(w).dequantized() for w in weights]
    stack = StackMxfp4.empty(count, out_features, in_features)
    yield filled(stack, weights), [dequantize_mxfp4(*quantize_mxfp4(w), torch.float32) for w in weights]


def filled(stack, weights):
    for e in reversed(range(len(weights))):  # in whichever order
        put(stack, e, weights[e])
    return stack


def put(stack, e, weight):
    stack.put_packed(e, *quantize_mxfp4(weight)) if isinstance(stack, StackMxfp4) else stack.put(e, weight)


def bytes_of(stack):
    return {name: buffer.clone() for name, buffer in stack.named_buffers()}


@pytest.mark.parametrize("kind,nested", FOUR_BIT)
def test_4_bit_experts_are_stored_as_bitsandbytes_stores_each(kind, nested):
    bnb = pytest.importorskip("bitsandbytes.functional")
    for shape in [(3, 5, 33), (2, 64, 64), (2, 1, 1), (2, 129, 131)]:  # odd sizes; a last block that is short
        weights = matrices(*shape).bfloat16()
        stack = filled(Stack4bit.empty(*shape, kind, nested), weights)
        for e, weight in enumerate(weights):
            packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
            assert torch.equal(stack.packed[e], packed.view(-1)) and torch.equal(stack.absmax[e], state.absmax)
            if nested:
                assert torch.equal(stack.nested_absmax[e], state.state2.absmax)
                assert stack.nested_offset[e] == state.offset


@pytest.mark.parametrize("kind,nested", FOUR_BIT)
@pytest.mark.parametrize("shape", [(2, 5, 33), (3, 700, 771), (2, 512, 1024)])  # the second: odd, of several parts
def test_4_bit_experts_are_the_matrices_quantized_alone(kind, nested, shape):
    weights = matrices(*shape)
    stack = filled(Stack4bit.empty(*shape, kind, nested), weights)
    for dtype in DTYPES:
        for e, weight in enumerate(weights):
            expected = dequantize_4bit(quantize_4bit(weight, kind, nested), dtype)
            assert torch.equal(stack.expert(e, dtype), expected) and stack.expert(e, dtype).dtype == dtype


@pytest.mark.parametrize("shape", [(3, 5, 33), (2, 700, 771)])
def test_8_bit_experts_are_rounded_by_the_row(shape):
    weights = matrices(*shape)
    weights[0, 2] = 0
    stack = filled(Stack8bit.empty(*shape), weights)
    largest = weights.half().float().abs().amax(dim=2)  # bitsandbytes rounds to float16 first
    assert stack.weight.dtype == torch.int8 and torch.equal(stack.SCB, largest)
    for e, weight in enumerate(weights):
        step = largest[e, :, None] / 127
        assert ((stack.expert(e, torch.float32) - weight).abs() <= step * 0.501 + weight.abs() * 2**-11 + 1e-7).all()
        for dtype in DTYPES:
            expected = Linear8bit.from_weight(weight).dequantized(dtype)
            assert torch.equal(stack.expert(e, dtype), expected)


def test_mxfp4_is_kept_as_stored():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 7, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 7, 5), generator=generator, dtype=torch.uint8)
    stack = StackMxfp4.empty(3, 7, 160)
    for e in (1, 0, 2):
        stack.put_packed(e, blocks[e], scales[e])
    assert torch.equal(stack.blocks, blocks) and torch.equal(stack.scales, scales)
    for dtype in DTYPES:
        assert torch.equal(stack.expert(1, dtype), dequantize_mxfp4(blocks, scales, dtype)[1])
    assert torch.equal(StackMxfp4(blocks, scales).expert(2), dequantize_mxfp4(blocks, scales, torch.float32)[2])


def test_every_form_has_the_one_interface():
    for stack, expected in stacks():
        assert (stack.count, stack.out_features, stack.in_features) == stack.shape == (3, 6, 96)
        assert stack.compute_dtype == torch.float32 and not list(stack.parameters())
        for e in range(3):
            assert torch.equal(stack.expert(e), expected[e]) and stack.expert(e).shape == (6, 96)
            out = torch.full((6, 96), math.nan)
            assert stack.expert(e, torch.float16, out) is out and torch.equal(out, expected[e])
            assert torch.equal(expert_weight(stack, e, torch.bfloat16), stack.expert(e, torch.bfloat16))
        stack.compute_dtype = torch.bfloat16
        assert stack.expert(0).dtype == torch.bfloat16


def test_an_expert_is_put_where_it_belongs_and_nowhere_else():
    other = matrices(1, 6, 96, seed=1)[0]
    for stack, expected in stacks():
        pointers = [b.data_ptr() for b in stack.buffers()]
        put(stack, 1, other)
        assert [b.data_ptr() for b in stack.buffers()] == pointers
        assert not torch.equal(stack.expert(1), expected[1])
        assert torch.equal(stack.expert(0), expected[0]) and torch.equal(stack.expert(2), expected[2])


def test_a_dense_stack_gives_its_expert_with_gradient():
    dense = nn.Parameter(matrices(3, 4, 5))
    assert torch.equal(expert_weight(dense, 2, torch.bfloat16), dense[2].bfloat16())
    expert_weight(dense, 1, torch.float32).sum().backward()
    assert dense.grad.sum(dim=(1, 2)).tolist() == [0, 20, 0]


def test_stored_bytes_by_hand():
    # 2 experts of 64 × 1024 = 65,536 weights: 1,024 blocks of 64, 4 nested blocks; 2,048 blocks of 32.
    size = (2, 64, 1024)
    expected = [
        (Stack4bit.empty(*size), 32768 + 1024 * 4),
        (Stack4bit.empty(*size, nested=True), 32768 + 1024 + 4 * 4 + 4),
        (Stack8bit.empty(*size), 65536 + 64 * 4),
        (StackMxfp4.empty(*size), 32768 + 2048),
    ]
    for stack, per_expert in expected:
        assert stack.stored_bytes == 2 * per_expert
    # gpt-oss-20b: 24 layers of 32 experts of 5760 × 2880 and 2880 × 2880 are 19,110,297,600 weights, 17 bytes for 32.
    parts = [StackMxfp4.empty(32, rows, 2880, device="meta") for rows in (5760, 2880)]
    assert 24 * sum(part.stored_bytes for part in parts) == 10_152_345_600


def test_moving_and_casting_keep_the_stored_bits():
    for stack, expected in stacks():
        before = bytes_of(stack)
        model = nn.Sequential(stack, nn.LayerNorm(3))
        for change in (lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float16), lambda m: m.double(),
                       lambda m: m.float(), copy.deepcopy):  # fmt: skip
            model = change(model)
            after = dict(model[0].named_buffers())
            assert after.keys() == before.keys()
            assert all(b.dtype == before[n].dtype and torch.equal(b, before[n]) for n, b in after.items())
        assert model.half()[1].weight.dtype == torch.float16
        assert torch.equal(model[0].expert(2, torch.float32), expected[2])
        assert all(b.is_meta for b in model.to("meta")[0].buffers())


def test_a_state_dict_holds_all():
    for (stack, expected), (other, _) in zip(stacks(), stacks(), strict=True):
        for buffer in other.buffers():
            buffer.zero_()
        other.load_state_dict(stack.state_dict())
        assert torch.equal(other.expert(1), expected[1])


def test_experts_are_lent_in_the_one_buffer_of_all_layers():
    layer = Linear8bit.from_weight(torch.ones(40, 64))
    for dtype in DTYPES:
        pointer = dequantized_weight(layer, dtype).data_ptr()
        for stack, expected in stacks():
            assert all(stack.expert(e, dtype).data_ptr() == pointer for e in range(3))
            assert torch.equal(stack.expert(0, torch.float32), expected[0])


def test_whoever_lets_autograd_keep_a_loan_is_told():
    for stack, _ in stacks():
        y = torch.ones(2, 96, requires_grad=True) @ stack.expert(0).t()
        stack.expert(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_the_loan_works_in_and_after_inference_mode():
    quant._LOANED.__dict__.clear()
    for stack, expected in stacks():
        with torch.inference_mode():
            assert torch.equal(stack.expert(0), expected[0])
        assert torch.equal(stack.expert(1), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2048, 4096), (1029, 2016)])  # dense: 8M and 2M weights, 4 to 32 MiB
def test_dequantizing_an_expert_makes_about_a_mebibyte(size, dtype):
    forms = [Stack4bit.empty(1, *size), Stack4bit.empty(1, *size, nested=True), Stack8bit.empty(1, *size),
             StackMxfp4.empty(1, *size)]  # fmt: skip
    for stack in forms:
        for buffer in stack.buffers():
            buffer.zero_()
        stack.expert(0, dtype)  # the loan is made
        out = torch.empty(size, dtype=dtype)
        for known in (out, stack.expert(0, dtype)):
            with PeakBytes(*stack.buffers(), known) as seen:
                stack.expert(0, dtype, out if known is out else None)
            # Besides an expert's 1 MiB, decoding of 4 bits holds indices and values of 128k weights at a time.
            assert seen.peak <= 1.75 * 2**20, (type(stack).__name__, seen.peak)


def test_what_does_not_fit_is_refused_in_one_line_and_not_stored():
    for stack, _ in stacks():
        before = bytes_of(stack)
        # None of these may be broadcast: a row, a matrix of the same size, another number of blocks.
        for shape in [(1, 96), (18, 32), (6, 64), (1, 6, 96)]:
            with pytest.raises(CheckpointError, match="must be.*(one of each 32 weights|one expert)") as error:
                put(stack, 1, torch.ones(shape))
            assert len(error.value.problems) == 1
        assert all(torch.equal(b, before[n]) for n, b in stack.named_buffers())


def test_damaged_weights_are_refused():
    for stack, _ in stacks():
        with pytest.raises(UserError, match="NaN"):
            put(stack, 0, torch.full((6, 96), math.nan))
    stack = StackMxfp4.empty(1, 2, 32)
    blocks, scales = torch.zeros(2, 1, 16, dtype=torch.uint8), torch.tensor([[1], [255]], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="^scales: hold 255, which is NaN"):
        stack.put_packed(0, blocks, scales)
    with pytest.raises(CheckpointError, match="^blocks, scales: "):
        stack.put_packed(0, blocks.float(), scales)
    with pytest.raises(CheckpointError, match="^in_features: 48 must be a multiple of 32"):
        StackMxfp4.empty(1, 2, 48)
    with pytest.raises(CheckpointError, match="^blocks, scales: "):
        StackMxfp4(torch.zeros(1, 2, 2, 16, dtype=torch.uint8), torch.zeros(1, 2, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match="^quant_type: 'int4'"):
        Stack4bit.empty(1, 2, 32, "int4")


def test_rows_are_deinterleaved_by_hand_and_back():
    x = torch.tensor([10, 20, 11, 21, 12, 22])  # gate, up, gate, up, …
    assert deinterleave_rows(x, 0).tolist() == [10, 11, 12, 20, 21, 22]
    assert interleave_rows(torch.tensor([10, 11, 12, 20, 21, 22]), 0).tolist() == x.tolist()
    generator = torch.Generator().manual_seed(0)
    for shape, dim in [((6,), 0), ((3, 10, 7), 1), ((3, 7, 10), -1), ((4, 2, 3, 16), -3), ((2, 6, 5, 16), 1)]:
        x = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        apart = deinterleave_rows(x, dim)
        gate, up = apart.chunk(2, dim)
        assert torch.equal(gate, x.index_select(dim, torch.arange(0, x.shape[dim], 2)))
        assert torch.equal(up, x.index_select(dim, torch.arange(1, x.shape[dim], 2)))
        assert torch.equal(interleave_rows(apart, dim), x) and torch.equal(deinterleave_rows(apart * 0 + x, dim), apart)
    for change in (deinterleave_rows, interleave_rows):
        with pytest.raises(CheckpointError, match="^gate_up: 5 rows"):
            change(torch.zeros(2, 5), 1)


def test_deinterleaving_packed_rows_deinterleaves_the_weights():
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 6, 3, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 130, (2, 6, 3), generator=generator, dtype=torch.uint8)
    dense = dequantize_mxfp4(blocks, scales, torch.float32)
    stack = StackMxfp4(deinterleave_rows(blocks, 1), deinterleave_rows(scales, 1))
    for e in range(2):
        assert torch.equal(stack.expert(e), torch.cat([dense[e, 0::2], dense[e, 1::2]]))
