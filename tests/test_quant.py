"""4-bit and 8-bit storage, bit for bit against bitsandbytes, and the layers that hold it."""

import copy
import gc
import json
import random
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mini_forge.errors import CheckpointError, UserError
from mini_forge.model import fourbit, quant
from mini_forge.model.quant import (
    Linear4bit,
    Linear8bit,
    backend,
    dequantize_4bit,
    dequantized_weight,
    frozen_products,
    quantize_4bit,
    quantize_8bit,
)

bnb = pytest.importorskip("bitsandbytes.functional")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = ("cpu", "torch", "bitsandbytes")  # to dequantize: on a CPU, and those between which other devices choose


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def dequantized(q, dtype, way):
    """`dequantize_4bit` as it is on a CPU, or with what it calls on other devices."""
    if way == "cpu":
        return dequantize_4bit(q, dtype)
    return fourbit._DECODERS[way](q.packed.view(-1), q.absmax, q, dtype)[: q.shape.numel()].view(q.shape)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def random_weight(trial, rng):
    """Odd and even shapes of one to three dimensions, every dtype, magnitudes 1e-6 … 1e3, zeros, and exact ties."""
    shape = rng.choice([(rng.randint(1, 150), rng.randint(1, 200)), (rng.randint(1, 4000),),
                        (rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 65))])  # fmt: skip
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(trial)) * 10 ** rng.uniform(-6, 3)
    if trial % 5 == 0:
        weight.view(-1)[: weight.numel() // 2] = 0
    if trial % 7 == 0:
        weight.zero_()
    if trial % 11 == 0:
        weight = torch.randint(-3, 4, shape).float()
    return weight.to(rng.choice(DTYPES))


def by_the_table(packed, absmax, code, count):
    """A slow oracle of dequantizing: one nibble at a time, from bitsandbytes' own table."""
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[:count]
    return code[codes.int()] * absmax.repeat_interleave(64)[:count]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_stored_and_dequantized_bits_equal_bitsandbytes(quant_type, nested):
    rng = random.Random(f"{quant_type} {nested}")
    for trial in range(60):
        weight = random_weight(trial, rng) if trial else torch.randn(700, 771)  # the first is of several chunks
        ours = quantize_4bit(weight, quant_type, nested)
        packed, theirs = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
        assert ours.packed.shape == packed.shape and torch.equal(ours.packed, packed)
        assert torch.equal(bits(ours.stored_absmax), bits(theirs.absmax))
        assert ours.shape == weight.shape and ours.dtype == weight.dtype and ours.absmax.dtype == torch.float32
        absmax = theirs.absmax
        if nested:
            assert torch.equal(ours.nested_absmax, theirs.state2.absmax) and ours.nested_offset == theirs.offset
            absmax = bnb.dequantize_blockwise(theirs.absmax, theirs.state2) + theirs.offset
        expected = by_the_table(packed, absmax, theirs.code, weight.numel()).view(weight.shape)
        for way in WAYS:
            for dtype in DTYPES:
                found, wanted = dequantized(ours, dtype, way), expected.to(dtype)
                assert torch.equal(found, wanted), (weight.shape, way)
                # FP4's second zero has either sign in bitsandbytes
                assert quant_type == "fp4" or torch.equal(bits(found), bits(wanted))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantized_values_equal_bitsandbytes_own_dequantizing(quant_type, dtype):
    # 128, 129, 7·64, 290: even and odd. (Its AVX-512 code is wrong where the last dimension is 16·k and not 64·k.)
    for shape in [(96, 128), (5, 129), (33, 448), (8, 290), (1, 2)]:
        weight = torch.randn(shape).to(dtype)
        packed, theirs = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=True)
        ours = quantize_4bit(weight, quant_type, nested=True)
        assert torch.equal(dequantize_4bit(ours), bnb.dequantize_4bit(packed, theirs).view(shape))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_equal_bitsandbytes_at_every_edge_of_rounding(quant_type):
    """Midpoints of neighbouring codes, edges of the parts that are looked up, and the next floats to both sides."""
    ascending = torch.tensor(fourbit.CODES[quant_type]).sort().values
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    assert fourbit._level(midpoints).unique().numel() == 15  # no part has two
    edges = torch.cat([midpoints, -midpoints, torch.linspace(-1, 1, fourbit.LEVELS + 1), torch.tensor([-0.0, 1e-40])])
    values = torch.cat([edges, *(edges.nextafter(torch.tensor(end)).clamp(-1, 1) for end in (2.0, -2.0))])
    values = F.pad(values, (0, -len(values) % 63)).view(-1, 63)
    blocks = F.pad(values, (1, 0), value=1.0)  # the largest of each is 1: nothing is rounded in scaling
    assert torch.equal(quantize_4bit(blocks, quant_type).packed, bnb.quantize_4bit(blocks, quant_type=quant_type)[0])


def test_golden_numbers():
    torch.manual_seed(0)
    weight = torch.randn(128, 192).bfloat16()
    assert quantize_4bit(weight).packed[:4, 0].tolist() == [68, 102, 169, 97]
    assert quantize_4bit(weight, "fp4").packed[:4, 0].tolist() == [204, 158, 118, 234]
    assert quantize_4bit(weight, nested=True).nested_offset.item() == 2.613525390625
    odd = quantize_4bit(torch.randn(5, 33))
    assert odd.packed.shape == (83, 1) and odd.absmax.shape == (3,)


def test_a_block_by_hand():
    # absmax 2, so 1 is 0.5 of it: between NF4's 0.4407 and 0.5626, nearer to 0.4407 + 0.0593 … 0.5017 is the middle
    quantized = quantize_4bit(torch.tensor([2.0, -2.0, 1.0, 0.0]))
    assert quantized.packed[:, 0].tolist() == [15 << 4 | 0, 12 << 4 | 7] and quantized.absmax.tolist() == [2.0]
    assert dequantize_4bit(quantized).tolist() == [2.0, -2.0, pytest.approx(2 * 0.44070982933044434), 0.0]


def test_dynamic_map_is_bitsandbytes():
    code = fourbit.dynamic_map()
    assert torch.equal(code, bnb.create_dynamic_map())
    assert code[0].item() == pytest.approx(-0.992968738079071) and (code == 0).nonzero().tolist() == [[127]]


def test_dynamic_codes_equal_at_every_edge_of_rounding():
    """bitsandbytes rounds to 65536 levels first: the edges between them, and the next floats to both sides."""
    edges = (torch.arange(65535) + 0.5) / 32767.5 - 1
    for end in (0.0, 2.0, -2.0):
        values = edges.nextafter(torch.tensor(end)) if end else edges
        values = F.pad(values.view(257, 255), (1, 0), value=1.0).view(-1)
        codes, largest = fourbit._encode_dynamic(values)
        theirs, state = bnb.quantize_blockwise(values, blocksize=256)
        assert torch.equal(codes, theirs) and torch.equal(largest, state.absmax)


def test_out_is_written_and_decides_the_dtype():
    for shape in [(3, 33), (64, 64), (600, 700)]:
        quantized = quantize_4bit(torch.randn(shape), nested=True)
        for dtype in (*DTYPES, torch.float64):
            out = torch.full(shape, 7.0, dtype=dtype)
            assert dequantize_4bit(quantized, out=out) is out
            assert torch.equal(out, dequantize_4bit(quantized, dtype))


def test_what_cannot_be_quantized_is_refused_in_one_line():
    for weight in (torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")]), torch.empty(0), torch.arange(4)):
        with pytest.raises(UserError, match="^weight: [^\n]*$"):
            quantize_4bit(weight)
    with pytest.raises(UserError, match="'int4'"):
        quantize_4bit(torch.ones(4), "int4")
    with pytest.raises(UserError, match="65504"):
        quantize_8bit(torch.full((2, 2), 1e5))


def test_backend_says_what_and_why():
    for device in ("cpu", "mps", "meta"):
        name, reason = backend(torch.device(device))
        assert name == "torch" and device in reason
    assert backend("cuda") == ("bitsandbytes", "its kernel is faster than torch operations")


def test_tables_first_made_under_another_default_device_are_real():
    for table in (fourbit.dynamic_map, fourbit._dynamic_code_of_level, fourbit._ranks, fourbit._byte_values):
        table.cache_clear()
    with torch.device("meta"):
        quantized = quantize_4bit(torch.ones(4, device="cpu"), nested=True)
    assert dequantize_4bit(quantized).tolist() == [1.0] * 4


def test_8_bit_equals_bitsandbytes_and_keeps_rows_of_zeros():
    weight = torch.randn(40, 77, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    ours, scale = quantize_8bit(weight)
    theirs, their_scale, _ = bnb.int8_vectorwise_quant(weight[torch.arange(40) != 3].half())
    keep = torch.arange(40) != 3
    assert torch.equal(ours[keep], theirs) and torch.equal(scale[keep], their_scale)
    layer = Linear8bit(ours, scale)
    assert not layer.dequantized().isnan().any() and (layer.dequantized()[3] == 0).all()
    # at most half a level of 1/127 of the row's largest, and the float16 rounding (2^-11 relative) before
    assert ((layer.dequantized() - weight).abs() <= scale[:, None] * (0.5 / 127 + 2**-11)).all()


def layers(bias=True, compute_dtype=torch.float32, size=(33, 50)):
    generator = torch.Generator().manual_seed(1)
    weight, b = torch.randn(size, generator=generator), torch.randn(size[0], generator=generator) if bias else None
    yield Linear4bit.from_weight(weight, b, "nf4", False, compute_dtype)
    yield Linear4bit.from_weight(weight, b, "fp4", True, compute_dtype)
    yield Linear8bit.from_weight(weight, b, compute_dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(50,), (7, 50), (2, 3, 50)])
def test_layers_equal_a_dense_layer_with_the_dequantized_weight(bias, shape):
    for layer in layers(bias):
        assert (layer.in_features, layer.out_features) == (50, 33) and not list(layer.parameters())[int(bias) :]
        weight = layer.dequantized(torch.float32)
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        expected = F.linear(x, weight, layer.bias)
        torch.testing.assert_close(y, expected)
        grad = torch.randn_like(y)
        torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad))


def test_gradient_equals_a_finite_difference():
    for layer in layers(True, torch.float64, (6, 8)):
        layer.bias = nn.Parameter(layer.bias.double())
        x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, (x,))
        (grad,) = torch.autograd.grad(layer(x).sum(), layer.bias)
        assert torch.equal(grad, torch.full((6,), 3.0, dtype=torch.float64))


def test_compute_dtype_is_that_of_the_product_and_the_result_has_that_of_the_input():
    for layer in layers(True, torch.bfloat16):
        x = torch.randn(4, 50)
        y = layer(x)
        expected = F.linear(x.bfloat16(), layer.dequantized(torch.bfloat16), layer.bias.bfloat16()).float()
        assert y.dtype == torch.float32 and torch.equal(y, expected)


def test_products_equal_bitsandbytes_matmul():
    from bitsandbytes import matmul_4bit

    weight, x = torch.randn(64, 128), torch.randn(5, 128)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    theirs = matmul_4bit(x, packed, quant_state=state)
    torch.testing.assert_close(Linear4bit.from_weight(weight)(x), theirs, rtol=1e-6, atol=1e-5)


def test_no_dense_weight_outlives_the_product_but_the_loan():
    for layer in layers(size=(64, 64)):
        x = torch.randn(2, 64, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = layer(x)
        assert not saved
        stored = sum(b.nbytes for b in layer.buffers())
        assert stored < 64 * 64 * (1.1 if isinstance(layer, Linear8bit) else 0.57)
        del y


def test_stored_bytes_per_weight():
    weight = torch.randn(256, 1024)
    for nested, expected in ((False, 0.5625), (True, 0.5 + 1 / 64 + 4 / 16384)):
        layer = Linear4bit.from_weight(weight, nested=nested)
        stored = sum(b.nbytes for b in layer.buffers()) / weight.numel()
        assert stored == pytest.approx(expected, abs=1e-4)


def test_moving_and_casting_keep_the_stored_bits():
    for layer in layers():
        before = {n: b.clone() for n, b in layer.named_buffers()}
        model = nn.Sequential(layer, nn.LayerNorm(33))
        for change in (lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float16), lambda m: m.double(),
                       lambda m: m.float(), copy.deepcopy):  # fmt: skip
            model = change(model) or model
            assert {n: b.dtype for n, b in model[0].named_buffers()} == {n: b.dtype for n, b in before.items()}
            assert all(torch.equal(b, before[n]) for n, b in model[0].named_buffers())
        assert model.half()[0].bias.dtype == torch.float16
        assert all(b.is_meta for b in model.to("meta")[0].buffers())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_state_is_bitsandbytes_state_both_ways(quant_type, nested):
    weight = torch.randn(48, 65).bfloat16()
    packed, theirs = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=nested)
    stored = {"weight": packed} | {f"weight.{k}": v for k, v in theirs.as_dict(packed=True).items()}
    layer = Linear4bit.from_state(stored, compute_dtype=torch.float32)
    assert (layer.quant_type, layer.weight_dtype, layer.compute_dtype) == (quant_type, torch.bfloat16, torch.float32)
    made = Linear4bit.from_weight(weight, quant_type=quant_type, nested=nested)
    state = made.state()
    assert state.keys() == stored.keys()
    key = f"weight.quant_state.bitsandbytes__{quant_type}"
    assert json.loads(bytes(state.pop(key).tolist())) == json.loads(bytes(stored.pop(key).tolist()))
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype, name
    assert torch.equal(Linear4bit.from_state(made.state()).dequantized(), layer.dequantized(torch.bfloat16))


def test_state_stored_in_another_dtype_of_the_same_bytes():
    layer = Linear4bit.from_weight(torch.randn(16, 32))
    state = layer.state()
    state["weight"] = state["weight"].view(-1).view(torch.bfloat16)[:, None]
    assert torch.equal(Linear4bit.from_state(state).packed, layer.packed)


@pytest.mark.parametrize("fault", ["weight.absmax", "weight.quant_map", "weight.nested_quant_map", "size", "scales",
                                   "code", "record", "blocksize", "nested"])  # fmt: skip
def test_a_damaged_state_is_refused(fault):
    state = Linear4bit.from_weight(torch.randn(16, 64), nested=True).state()
    key = "weight.quant_state.bitsandbytes__nf4"
    record = json.loads(bytes(state[key].tolist()))
    if fault in state:
        del state[fault]
    elif fault == "size":
        state["weight"] = state["weight"][:-1]
    elif fault == "scales":
        state["weight.absmax"] = state["weight.absmax"][:-1]
    elif fault == "nested":
        state["weight.nested_absmax"] = torch.ones(2)
    elif fault == "code":
        state["weight.quant_map"] = state["weight.quant_map"] * 0.9
    else:
        record.pop("dtype") if fault == "record" else record.update(blocksize=66)  # 16 blocks too
        state[key] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="^weight[^\n]*$"):
        Linear4bit.from_state(state)


def test_8_bit_state_round_trip_and_refusal():
    layer = Linear8bit.from_weight(torch.randn(5, 6))
    state = layer.state()
    assert state["weight"].dtype == torch.int8 and state["weight_format"].item() == 0
    again = Linear8bit.from_state(state["weight"], state["SCB"])
    assert torch.equal(again.dequantized(), layer.dequantized())
    with pytest.raises(CheckpointError, match="one scale a row"):
        Linear8bit.from_state(state["weight"], state["SCB"][:-1])


def test_the_loaned_weight_is_one_buffer_for_all_layers():
    a, b, c = (layer for layer in layers(size=(40, 64)))
    dense = nn.Linear(64, 40)
    for dtype in DTYPES:
        first = dequantized_weight(a, dtype)
        assert torch.equal(first, a.dequantized(dtype)) and first.dtype == dtype
        assert all(dequantized_weight(layer, dtype).data_ptr() == first.data_ptr() for layer in (b, c))
        assert torch.equal(dequantized_weight(c, dtype), c.dequantized(dtype))
    assert torch.equal(dequantized_weight(dense, torch.float32), dense.weight)
    wide = Linear4bit.from_weight(torch.randn(400, 640))
    assert torch.equal(dequantized_weight(wide, torch.float32), wide.dequantized(torch.float32))
    # a user who lets autograd keep the loan is told, not given wrong gradients
    x = torch.randn(2, 64, requires_grad=True)
    y = F.linear(x, dequantized_weight(a, torch.float32))
    dequantized_weight(b, torch.float32)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_loan_works_in_and_after_inference_mode():
    quant._LOANED.__dict__.clear()
    layer = next(layers())
    x = torch.randn(2, 50)
    with torch.inference_mode():
        y = layer(x)
    assert torch.equal(layer(x.requires_grad_()), y)


def test_frozen_product_is_that_of_every_kind_of_layer():
    dense = nn.Linear(50, 33)
    for layer in (*layers(), dense, *layers(bias=False, compute_dtype=torch.bfloat16)):
        weight = layer.weight if layer is dense else layer.dequantized(layer.compute_dtype)
        x = torch.randn(4, 50)
        bias = None if layer.bias is None else layer.bias.to(weight.dtype)
        expected = F.linear(x.to(weight.dtype), weight, bias).float()
        with torch.no_grad():
            assert torch.equal(frozen_products(x, [layer])[0], expected)


def test_threads_have_buffers_of_their_own():
    import threading

    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        layer = Linear4bit.from_weight(torch.randn(64, 64, generator=generator))
        x, weight = torch.eye(64), layer.dequantized()
        wrong.extend(i for i in range(200) if not torch.equal(layer(x), weight.t()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong


def test_a_layer_is_freed_with_its_graph():
    layer = next(layers())
    seen = weakref.ref(layer)
    y = layer(torch.randn(2, 50, requires_grad=True))
    del layer
    y.sum().backward()
    del y
    gc.collect()
    assert seen() is None


FIRST_USE = """
import sys
import torch
from mini_forge.model.fourbit import dequantize_4bit, quantize_4bit
weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
if sys.argv[1] == "inference":
    with torch.inference_mode():
        dequantize_4bit(quantize_4bit(weight, nested=True))
else:
    torch.set_default_dtype(getattr(torch, sys.argv[1]))
    dequantize_4bit(quantize_4bit(weight, nested=True))
    torch.set_default_dtype(torch.float32)
quantized = quantize_4bit(weight, nested=True)
x = torch.ones(16, requires_grad=True)
(x * quantized.code).sum().backward()
print(float((dequantize_4bit(quantized) - weight).abs().max()))
"""


@pytest.mark.parametrize("mode", ["float64", "bfloat16", "inference"])
def test_tables_that_are_kept_do_not_depend_on_the_mode_in_which_they_are_made(mode):
    done = subprocess.run([sys.executable, "-c", FIRST_USE, mode], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 0.6


def test_a_buffer_of_another_shape_is_refused():
    quantized = quantize_4bit(torch.randn(4, 64))
    for out in (torch.empty(8, 64), torch.empty(64, 4).t()):
        with pytest.raises(ValueError, match="must be contiguous and"):
            dequantize_4bit(quantized, out=out)


def test_magnitudes_without_a_mean_are_not_nested():
    weight = torch.full((64, 64), 1e37)
    assert dequantize_4bit(quantize_4bit(weight)).isfinite().all()
    with pytest.raises(UserError, match="leave nested out"):
        quantize_4bit(weight, nested=True)
