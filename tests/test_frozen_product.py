"""Products of float32 activations with weights as they are stored, and the layers, heads and files that use them."""

import copy
import json
import threading
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mini_forge
import mini_forge_kernels
from mini_forge.bench.shapes import random_base
from mini_forge.config_plan import Plan
from mini_forge.io.weights import bfloat16_matrices, load_base
from mini_forge.memory_items import Job, sizes_of, stored_bytes
from mini_forge.model.cache import KVCache, read_prompts
from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec
from mini_forge.model.frozen import IN_TORCH, Update
from mini_forge.model.lora import LoRALinear, LoraSpec, inject, lora_layers, merge, project
from mini_forge.model.quant import (
    Linear4bit,
    Linear8bit,
    Linear16bit,
    Quantized8bit,
    dequantize_4bit,
    dequantized_weight,
    frozen_gradient,
    frozen_products,
    quantize_4bit,
    quantize_8bit,
)
from mini_forge.providers import PROVIDERS
from mini_forge.training import losses
from mini_forge_kernels import amx_product, compiled, frozen_product
from mini_forge_kernels.compiled import CannotCompile
from mini_forge_kernels.frozen_product import FEW, IN_CPP, MANY, MOST_RANK, reason_not
from tests.tiny import write_checkpoint, write_rows

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (1, 64, 7), (3, 5, 2), (FEW // 2, 33, 130), (FEW, 33, 130), (FEW + 1, 33, 130), (16, 32, 32),
          (131, 576, 96), (45, 1600, 260), (300, 3100, 33), (0, 8, 4), (40, 0, 3), (40, 3, 0)]  # fmt: skip
FORMS = ["bfloat16", "nf4", "fp4", "nf4 nested", "int8"]


def has_flag(name):
    with open("/proc/cpuinfo") as info:
        return f" {name} " in info.read()


def emulate_tiles(monkeypatch):
    """amx_product.cpp with the matrix unit's instructions in C++."""
    header = Path(__file__).parent / "emulated_tiles.h"
    digest = crc32(header.read_bytes())  # else one of old would be kept
    loaded = amx_product.load("-include", str(header), f"-DHEADER={digest}")
    monkeypatch.setattr(amx_product, "_library", lambda: loaded)
    monkeypatch.setattr(amx_product, "reason_not", lambda: None)


@pytest.fixture(params=["vectors", "matrix unit"])
def unit(request, monkeypatch):
    """What multiplies here: AVX-512 alone; or the matrix unit, emulated where there is none."""
    if reason := reason_not(CPU):
        pytest.skip(reason)
    if request.param == "vectors":
        monkeypatch.setattr(amx_product, "reason_not", lambda: "a reason")
    elif amx_product.reason_not():
        if not has_flag("avx512_bf16"):
            pytest.skip("this CPU has no AVX-512 BF16")
        emulate_tiles(monkeypatch)
    monkeypatch.setattr(frozen_product, "MANY", FEW)
    return request.param


def drawn(*shape, seed=0, spread=0.0):
    """Normal numbers, times e to the power of others of deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp(spread * torch.randn(shape, generator=generator))


def rms(x):
    return float(x.double().pow(2).mean().sqrt())


def stored(form, dense):
    """A weight as it is stored, and its values in float64."""
    if form == "bfloat16":
        return dense.bfloat16(), dense.bfloat16().double()
    if form == "int8":
        numbers, scale = quantize_8bit(dense)
        return Quantized8bit(numbers, scale / 127), numbers.double() * (scale / 127).double()[:, None]
    quantized = quantize_4bit(dense, form.split()[0], nested="nested" in form)
    return quantized, dequantize_4bit(quantized, torch.float32).double()


@pytest.mark.parametrize("N, K, out", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_float64(unit, form, N, K, out):
    if form != "bfloat16" and 0 in (K, out):
        return  # quantized weights are not empty
    x, grad = drawn(N, K), drawn(N, out, seed=1)
    weight, exact = stored(form, drawn(out, K, seed=2))
    forward, back = x.double() @ exact.t(), grad.double() @ exact
    made, made_back = IN_CPP.product_t(x, weight), IN_CPP.product(grad, weight)
    assert made.shape == (N, out) and made_back.shape == (N, K) and made.dtype == made_back.dtype == torch.float32
    close = {"rtol": 2e-6, "atol": 2e-6 * max(1, float(exact.abs().max()) if exact.numel() else 1)}
    torch.testing.assert_close(made.double(), forward, rtol=close["rtol"], atol=close["atol"] * K**0.5)
    torch.testing.assert_close(made_back.double(), back, rtol=close["rtol"], atol=close["atol"] * out**0.5)
    onto = torch.ones(N, 2 * K)[:, :K]
    assert IN_CPP.product(grad, weight, onto) is onto
    torch.testing.assert_close(onto.double(), back + 1, rtol=close["rtol"], atol=close["atol"] * out**0.5)
    onto = torch.ones(N, out)
    assert IN_CPP.product_t(x, weight, onto) is onto
    torch.testing.assert_close(onto.double(), forward + 1, rtol=close["rtol"], atol=close["atol"] * K**0.5)
    if N and K and out:
        strided = drawn(K, N).t()
        torch.testing.assert_close(IN_CPP.product_t(strided, weight).double(), strided.double() @ exact.t(),
                                   rtol=close["rtol"], atol=close["atol"] * K**0.5)  # fmt: skip


@pytest.mark.parametrize("rank", [1, 16, 20, MOST_RANK, MOST_RANK + 1])
@pytest.mark.parametrize("N, K, out", [(1, 40, 50), (FEW, 40, 50), (FEW + 1, 40, 50), (131, 1600, 90)])
@pytest.mark.parametrize("adds", [False, True])
def test_a_low_rank_term_is_added(unit, rank, N, K, out, adds):
    x, grad, weight = drawn(N, K), drawn(N, out, seed=1), drawn(out, K, seed=2).bfloat16()
    low, A, B = drawn(N, 2 * rank, seed=3)[:, rank:], drawn(rank, K, seed=4), drawn(out, rank, seed=5)
    forward = x.double() @ weight.double().t() + low.double() @ B.double().t() + adds
    back = grad.double() @ weight.double() + low.double() @ A.double() + adds
    ones = [torch.ones(N, n) if adds else None for n in (out, K)]
    made = IN_CPP.product_t(x, weight, ones[0], (low, B))
    made_back = IN_CPP.product(grad, weight, ones[1], (low, A))
    torch.testing.assert_close(made.double(), forward, rtol=2e-6, atol=2e-6 * (K + rank) ** 0.5)
    torch.testing.assert_close(made_back.double(), back, rtol=2e-6, atol=2e-6 * (out + rank) ** 0.5)
    reference = IN_TORCH.product_t(x, weight.float(), None if ones[0] is None else torch.ones(N, out), (low, B))
    torch.testing.assert_close(made, reference, rtol=1e-5, atol=1e-5 * (K + rank) ** 0.5)


@pytest.mark.parametrize("rank", [1, 20, MOST_RANK, MOST_RANK + 1])
@pytest.mark.parametrize("N", [0, 1, FEW // 2, FEW, FEW + 1])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("form", ["bfloat16", "nf4", "int8"])
def test_an_update_is_made_of_its_factors(unit, form, rank, N, adds):
    K, out, scale = 70, 50, 0.3
    weight, exact = stored(form, drawn(out, K, seed=2))
    x, A, B = drawn(N, 2 * K)[:, K:], drawn(rank, 2 * K, seed=4)[:, K:], drawn(out, 2 * rank, seed=5)[:, rank:]
    expected = x.double() @ exact.t() + scale * (x.double() @ A.double().t()) @ B.double().t() + adds
    ones = [torch.ones(N, out) if adds else None for _ in range(2)]
    found = IN_CPP.product_t(x, weight, ones[0], Update(A, B, scale))
    reference = IN_TORCH.product_t(x, exact.float(), ones[1], Update(A, B, scale))
    for made in (found, reference):
        torch.testing.assert_close(made.double(), expected, rtol=2e-6, atol=4e-6 * (K * rank) ** 0.5)


def times_identity(x):
    """What the parts of each number make again."""
    return IN_CPP.product_t(x, torch.eye(x.shape[1], dtype=torch.bfloat16))


@pytest.mark.parametrize("shape", [(9, 1), (16, 32), (77, 130), (300, 1000)])
def test_the_parts_of_a_number_are_all_of_it(unit, shape):
    x = drawn(*shape, spread=8.0)
    assert torch.equal(times_identity(x), x)
    wide = drawn(20, 80)[:, 3:40]
    assert torch.equal(times_identity(wide), wide)


def test_numbers_at_the_edges_of_rounding_are_split_exactly(unit):
    mantissas = torch.tensor(
        [0, 1, 2**7, 2**15, 2**15 - 1, 2**15 + 1, 2**16 - 1, 2**23 - 1, 2**22 + 2**14], dtype=torch.int32
    )
    exponents = torch.tensor([127, 1 + 24, 253, 100], dtype=torch.int32)
    x = (mantissas[:, None] + (exponents << 23)[None]).view(torch.float32)
    x = torch.cat((x, -x))
    assert torch.equal(times_identity(x), x)


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_of_a_weight_and_of_a_factor_are_all_of_them(unit, form):
    weight, exact = stored(form, drawn(130, 64, seed=2, spread=2.0))
    assert torch.equal(IN_CPP.product_t(torch.eye(64), weight), exact.float().t())
    assert torch.equal(IN_CPP.product(torch.eye(130), weight), exact.float())
    nothing, factor = torch.zeros(50, 64), drawn(130, 50, seed=3, spread=2.0)
    made = IN_CPP.product_t(nothing, weight, low=(torch.eye(50), factor))
    assert torch.equal(made, factor.t())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [1536, 6000])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_they_are_as_close_to_float64_as_those_of_float32(unit, spread, K, form):
    x = drawn(100, K, spread=spread)
    weight, values = stored(form, drawn(70, K, seed=2))
    exact, dense = x.double() @ values.t(), values.float()
    error = rms(IN_CPP.product_t(x, weight) - exact)
    assert error < 1.1 * rms(IN_TORCH.product_t(x, dense) - exact) and error < 1e-6 * rms(exact)
    onto = drawn(100, 70, seed=3) * 100 * rms(exact)
    added, by_torch = (onto.clone() for _ in range(2))
    IN_CPP.product_t(x, weight, added)
    IN_TORCH.product_t(x, dense, by_torch)
    # Sums of some hundred terms are added to what is there, one after the other, each with a rounding of its size.
    assert rms(added - onto.double() - exact) < 1.8 * rms(by_torch - onto.double() - exact)


@pytest.mark.parametrize("form", ["bfloat16", "nf4"])
def test_a_row_of_work_that_no_cache_holds_is_done_in_blocks(unit, form):
    N, K, out, rank = 700, 1600, 90, 20
    x, (weight, exact), onto = drawn(N, K), stored(form, drawn(out, K, seed=2)), drawn(N, out, seed=3)
    low, B = drawn(N, rank, seed=4), drawn(out, rank, seed=5)
    expected = x.double() @ exact.t() + low.double() @ B.double().t() + onto.double()
    assert rms(IN_CPP.product_t(x, weight, onto, (low, B)) - expected) < 1e-6 * rms(expected)


def test_the_same_bits_wherever_a_tensor_lies(unit):
    """A resumed run finds its tensors at other addresses."""
    x, weight = drawn(100, 96), drawn(200, 96, seed=1).bfloat16()
    expected = IN_CPP.product_t(x, weight)
    for offset in (1, 2, 3, 5, 8):
        room = torch.empty(weight.numel() + offset, dtype=torch.bfloat16)
        moved = room[offset:].view(weight.shape).copy_(weight)
        assert torch.equal(IN_CPP.product_t(x, moved), expected)
        room = torch.empty(x.numel() + offset)
        assert torch.equal(IN_CPP.product_t(room[offset:].view(x.shape).copy_(x), weight), expected)


@pytest.mark.parametrize("N, K, out", [(1, 300, 333), (5, 300, 333), (40, 300, 333), (300, 300, 333), (310, 1600, 70)])
@pytest.mark.parametrize("form", ["bfloat16", "nf4"])
def test_threads_share_the_work_and_change_no_bit(unit, form, N, K, out, monkeypatch):
    x, (weight, _) = drawn(N, K), stored(form, drawn(out, K, seed=1))
    update, onto = Update(drawn(20, K, seed=2), drawn(out, 20, seed=3), 0.5), drawn(N, out, seed=4)

    def products():
        return [IN_CPP.product_t(x, weight), IN_CPP.product_t(x, weight, onto.clone(), update)]

    expected = products()
    for threads in (1, 2, 3, 4, 6, 7, 16):  # more than there are cores, too
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert all(map(torch.equal, products(), expected))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_beside_the_result_is_written(unit, form):
    for N, columns in ((1, 1), (3, 7), (16, 16), (37, 50), (64, 33)):
        room = torch.full((N + 2, columns + 60), 7.0)
        weight, _ = stored(form, drawn(columns, 20, seed=1))
        IN_CPP.product_t(drawn(N, 20), weight, room[1 : N + 1, 3 : columns + 3])
        assert (room == 7).sum() == room.numel() - N * columns


@pytest.mark.parametrize("form", FORMS)
def test_nothing_beside_what_is_multiplied_is_read_into_the_result(unit, form):
    """What lies behind a bfloat16 weight, and beside x, is NaN here."""
    for N, K, columns in ((1, 5, 3), (6, 20, 50), (9, 33, 47), (70, 45, 90)):
        weight, exact = stored(form, drawn(columns, K, seed=1))
        if form == "bfloat16":
            room = torch.full((weight.numel() + 64,), torch.nan, dtype=torch.bfloat16)
            weight = room[: weight.numel()].view(columns, K).copy_(weight)
        x, grad = (
            torch.full((N + 40, n + 40), torch.nan)[1 : N + 1, 1 : n + 1].copy_(drawn(N, n)) for n in (K, columns)
        )
        torch.testing.assert_close(IN_CPP.product_t(x, weight).double(), x.double() @ exact.t(), rtol=1e-5,
                                   atol=1e-5 * float(exact.abs().max()))  # fmt: skip
        torch.testing.assert_close(IN_CPP.product(grad, weight).double(), grad.double() @ exact, rtol=1e-5,
                                   atol=1e-5 * float(exact.abs().max()))  # fmt: skip


def test_factors_of_a_low_rank_term_may_lie_in_columns_but_not_be_others(unit):
    """Transposed ones are what a caller's own initialisation leaves in lora_A and lora_B."""
    N, K, columns, R = 37, 50, 60, 8
    x, low, B = drawn(N, K), drawn(R, N, seed=2).t(), drawn(R, columns, seed=3).t()
    weight = drawn(columns, K, seed=1).bfloat16()
    expected = (x @ weight.float().t()).double() + low.double() @ B.double().t()
    found = IN_CPP.product_t(x, weight, low=(low, B))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    grad, A = drawn(N, columns), drawn(K, R, seed=4).t()
    expected = (grad @ weight.float()).double() + low.double() @ A.double()
    found = IN_CPP.product(grad, weight, low=(low, A))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    wrong = {"factor": [(low, B[:, :4]), (low, B.t())], "l": [(low[1:], B), (low.double(), B)]}
    for name, pairs in wrong.items():
        for pair in pairs:
            with pytest.raises(ValueError, match=f"^{name}: "):
                IN_CPP.product_t(x, weight, low=pair)
    A = drawn(R, K)
    wrong = {"A": [(A[:, 1:], B), (A.double(), B)], "B": [(A, B[1:])]}
    for name, pairs in wrong.items():
        for pair in pairs:
            for rows in (2, N):
                with pytest.raises(ValueError, match=f"^{name}: "):
                    IN_CPP.product_t(x[:rows], weight, low=Update(*pair, 1.0))
    with pytest.raises(ValueError, match="^low: an Update stands beside x Wᵀ alone"):
        IN_CPP.product(grad[:2], weight, low=Update(A, B, 1.0))


def test_quantized_weights_that_are_a_part_of_others_are_refused(unit):
    (numbers, SCB), x = quantize_8bit(drawn(50, 60)), drawn(7, 30)
    part = Quantized8bit(numbers[:, :30], SCB / 127)
    with pytest.raises(ValueError, match="^weight: quantized"):
        IN_CPP.product_t(x, part)
    four = quantize_4bit(drawn(50, 60), "nf4")
    with pytest.raises(ValueError, match="^weight: quantized"):
        IN_CPP.product_t(drawn(7, 60), replace(four, packed=four.packed[:-1]))


def test_a_thread_s_stack_need_not_be_large(unit):
    x, weight = drawn(300, 2000), drawn(200, 2000, seed=1).bfloat16()
    expected, found = IN_CPP.product_t(x, weight), []
    before = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=lambda: found.append(IN_CPP.product_t(x, weight)))
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("make", [
    lambda w: Linear16bit(w.bfloat16(), None, IN_CPP), Linear8bit.from_weight, Linear4bit.from_weight,
])  # fmt: skip
def test_a_second_derivative_is_refused(make):
    x = drawn(6, 64).requires_grad_()
    (first,) = torch.autograd.grad(make(drawn(20, 64, seed=1))(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_number_that_is_not_finite_stays_so(unit):
    for bad in (torch.nan, torch.inf):
        x = drawn(20, 40)
        x[7, 3] = bad
        out = IN_CPP.product_t(x, drawn(60, 40, seed=1).bfloat16())
        assert not out[7].isfinite().any() and out[:7].isfinite().all() and out[8:].isfinite().all()


def test_without_a_compiler_weights_are_made_float32(monkeypatch):
    def refuses(*_):
        raise CannotCompile("no g++ here")

    monkeypatch.setattr(frozen_product, "library", refuses)
    monkeypatch.setattr(frozen_product, "_library", frozen_product._library.__wrapped__)
    monkeypatch.setattr(frozen_product, "_reason_not_here", frozen_product._reason_not_here.__wrapped__)
    provider = PROVIDERS["unsloth"]("cpu")
    assert reason_not(CPU) == "no g++ here" and provider.ops.stored_products is None
    assert "plain: frozen_product (no g++ here)" in provider.describe()


def test_what_does_not_fit_is_refused(unit):
    x = drawn(40, 6)
    for weight in (drawn(5, 6), drawn(5, 7).bfloat16(), drawn(6, 5).bfloat16().t()):
        with pytest.raises(ValueError, match="weight"):
            IN_CPP.product_t(x, weight)
    with pytest.raises(ValueError, match="weight"):
        IN_CPP.product(x, drawn(5, 6).bfloat16())
    with pytest.raises(ValueError, match="weight"):
        IN_CPP.product_t(x, drawn(1, 6).bfloat16().expand(5, 6))
    with pytest.raises(ValueError, match="weight: quantized"):
        IN_CPP.product_t(x, stored("nf4", drawn(5, 7))[0])
    with pytest.raises(ValueError, match="x: torch.float64"):
        IN_CPP.product_t(x.double(), drawn(5, 6).bfloat16())


@pytest.mark.parametrize("shape, turned", [((39, 5), False), ((40, 6), False), ((200,), False), ((5, 40), True)])
def test_what_cannot_be_added_to_is_refused(shape, turned):
    onto = torch.zeros(shape).t() if turned else torch.zeros(shape)
    with pytest.raises(ValueError, match="onto"):
        IN_CPP.product(drawn(40, 6), drawn(6, 5).bfloat16(), onto)


def test_a_reason_is_named_where_they_cannot_run(monkeypatch):
    assert reason_not(torch.device("cuda")) == "for CPUs, this is cuda"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert amx_product.reason_not.__wrapped__() == "this CPU has no AMX"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.raises(CannotCompile, match="^this CPU has no AVX-512$"):
        compiled.library.__wrapped__(Path(frozen_product.__file__).with_suffix(".cpp"))
    monkeypatch.setattr(mini_forge_kernels, "reason_not", lambda device: None)  # of a GPU that is not here
    for provider in (PROVIDERS["huggingface"]("cpu"), PROVIDERS["unsloth"]("cuda")):
        assert provider.ops.stored_products is None


def test_quantized_weights_are_taken_as_stored_by_loaded_layers_alone():
    """Of the layers of another training dtype, or of no provider, dense weights are made."""
    layer, x = Linear4bit.from_weight(drawn(10, 24)), drawn(6, 24, seed=1)
    expected = x @ layer.dequantized().t()
    assert layer.stored_products is None
    torch.testing.assert_close(layer(x), expected)
    layer.stored_products = IN_CPP
    if reason_not(CPU) is None:
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    layer.compute_dtype = torch.bfloat16
    assert torch.equal(layer(x), frozen_products(x, [layer])[0])
    torch.testing.assert_close(layer(x), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 24), (2, 3, 24), (1, 24), (24,), (0, 24)])
def test_a_layer_is_the_linear_one(unit, shape, has_bias):
    weight, x = drawn(10, 24).bfloat16(), drawn(*shape, seed=1)
    bias = nn.Parameter(drawn(10, seed=2)) if has_bias else None
    layer, dense = Linear16bit(weight, bias, IN_CPP), nn.Linear(24, 10, bias=has_bias).double()
    dense.weight.data.copy_(weight)
    if has_bias:
        dense.bias.data.copy_(bias)
        layer.bias.requires_grad_()
    results = []
    for module, leaf in ((layer, x.clone().requires_grad_()), (dense, x.double().requires_grad_())):
        out = module(leaf)
        (out * out).sum().backward()
        results.append([out, leaf.grad, *([module.bias.grad] if has_bias else [])])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.dequantized(), weight.float()) and torch.equal(layer.dense().weight, weight.float())
    assert layer.half().weight.dtype == torch.bfloat16  # as other frozen forms, it keeps its own


def test_layers_that_share_their_input(unit):
    x, layers = drawn(50, 8), [Linear16bit(drawn(n, 8).bfloat16(), None, IN_CPP) for n in (4, 6)]
    for out, layer in zip(frozen_products(x, layers), layers, strict=True):
        torch.testing.assert_close(out, x @ layer.dequantized().t())
    grad = drawn(50, 6)
    torch.testing.assert_close(frozen_gradient(grad, layers[1]), grad @ layers[1].dequantized())


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_loss_head(unit, tokens):
    hidden, weight = drawn(tokens, 24), drawn(1000, 24, seed=1).bfloat16()
    targets = torch.arange(tokens) * 7
    results = []
    for nll, h, w in ((PROVIDERS["unsloth"]("cpu").ops.token_nll, hidden, weight),
                      (losses.token_nll, hidden.double(), weight.double())):  # fmt: skip
        h = h.clone().requires_grad_()
        found = nll(h, w, targets)
        found.sum().backward()
        results.append((found, h.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of which all but the norms and one projection is stored in bfloat16."""
    folder = write_checkpoint(tmp_path / "model", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    kept = "model.layers.1.self_attn.o_proj.weight"
    tensors = {n: t if t.dim() == 1 or n == kept else t.bfloat16() for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, {n for n, t in tensors.items() if t.dtype == torch.bfloat16}


def test_a_checkpoint_keeps_its_matrices_as_they_are_stored(unit, checkpoint):
    folder, names = checkpoint
    plain, fused = (load_base(folder, ops=PROVIDERS[name]("cpu").ops) for name in ("huggingface", "unsloth"))
    tensors = {**dict(fused.named_parameters()), **dict(fused.named_buffers())}
    assert {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16} == names
    assert {tensor.dtype for tensor in plain.parameters()} == {torch.float32} and not list(plain.buffers())
    assert bfloat16_matrices(folder, plain) == names
    plan = Plan("cpu", "float32", None, False, "float32", False, [])
    job = Job(plan, 10, 10, 8, "sgd", None, True, in_bfloat16=frozenset(names))
    sizes = sizes_of(plain, None)
    assert sum(stored_bytes(sizes, n, job) for n in sizes.shapes) == sum(tensor.nbytes for tensor in tensors.values())
    ids = torch.arange(1, 50)[None]
    assert fused.dtype == torch.float32
    torch.testing.assert_close(fused.logits(ids), plain.logits(ids), rtol=2e-5, atol=2e-5)
    for options in ({"dtype": torch.bfloat16}, {"dtype": None}):  # nothing is float32 here
        model = load_base(folder, ops=PROVIDERS["unsloth"]("cpu").ops, **options)
        assert not any(isinstance(module, Linear16bit) for module in model.modules())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_layers_stay_quantized_beside_the_head(unit, checkpoint, quantization):
    folder, _ = checkpoint
    plain, fused = (
        load_base(folder, quantization=quantization, ops=PROVIDERS[name]("cpu").ops)
        for name in ("huggingface", "unsloth")
    )
    assert [name for name, module in fused.named_modules() if isinstance(module, Linear16bit)] == ["lm_head"]
    assert fused.head_weight.dtype == torch.bfloat16
    ids = torch.arange(1, 50)[None]
    torch.testing.assert_close(fused.logits(ids), plain.logits(ids), rtol=2e-5, atol=2e-5)


def test_random_weights_are_held_like_a_checkpoints(unit, checkpoint):
    folder, _ = checkpoint
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    for said in (None, "bfloat16", "float32"):
        (folder / "config.json").write_text(json.dumps({**config, **({"dtype": said} if said else {})}))
        model = random_base(folder, torch.float32, ops=PROVIDERS["unsloth"]("cpu").ops)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        matrices = {name for name, tensor in tensors.items() if tensor.dim() == 2}
        kept = {name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16}
        assert kept == (set() if said == "float32" else matrices)
        with torch.device("meta"):
            assert bfloat16_matrices(folder, Decoder(decoder_spec(config))) == kept


def test_merging_gives_a_float32_layer(unit, checkpoint):
    model = load_base(checkpoint[0], ops=PROVIDERS["unsloth"]("cpu").ops)
    inject(model, LoraSpec(2, 4), torch.Generator().manual_seed(0))
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(1, 50)[None]
    before = model.logits(ids)
    merged = merge(model)
    assert not any(isinstance(m, Linear16bit) for n, m in merged.named_modules() if n != "lm_head")
    torch.testing.assert_close(merged.logits(ids), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["sft", "dpo"])
def test_a_run_is_the_plain_run(unit, checkpoint, tmp_path, strategy):
    if strategy == "dpo":
        rows = tmp_path / "pairs.jsonl"
        pairs = [{"prompt": f"{i}", "chosen": f"= {i * i}", "rejected": "no idea"} for i in range(8)]
        rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    else:
        rows = write_rows(tmp_path / "rows.jsonl")
    logged, said = {}, {}
    for provider in ("huggingface", "unsloth"):
        config = mini_forge.TrainingConfig.from_dict({
            "task": "text-generation", "strategy": strategy, "model_name": str(checkpoint[0]), "dataset": str(rows),
            "output_dir": str(tmp_path / provider), "compute_specs": "high_end", "device": "cpu", "dtype": "float32",
            "provider": provider, "lora_dropout": 0.0, "optim": "adamw_torch", "max_steps": 4, "logging_steps": 1,
            "per_device_train_batch_size": 2, "learning_rate": 1e-3, "eval_split": 0, "save_strategy": "no",
        })  # fmt: skip
        reports = []
        mini_forge.train(config, report=reports.append)
        said[provider] = "\n".join(reports)
        lines = (tmp_path / provider / "metrics.jsonl").read_text().splitlines()
        logged[provider] = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert "(bfloat16 and float32, training in float32)" in said["unsloth"]
    assert "(float32, training in float32)" in said["huggingface"]
    assert len(logged["unsloth"]) == 4
    assert logged["unsloth"] == pytest.approx(logged["huggingface"], rel=1e-5)


def linear(kind, weight, bias):
    """A frozen layer of (out, in) bfloat16 numbers."""
    if kind.endswith(" as stored"):
        layer = linear(kind.removesuffix(" as stored"), weight, bias)
        layer.stored_products = IN_CPP
        return layer
    if kind == "bfloat16":
        return Linear16bit(weight.bfloat16(), bias, IN_CPP)
    if kind == "dense":
        layer = nn.Linear(*weight.shape[::-1], bias=bias is not None)
        layer.weight, layer.bias = nn.Parameter(weight), bias
        return layer
    if kind == "int8":
        return Linear8bit.from_weight(weight, bias)
    layer = Linear4bit.from_weight(weight, bias, compute_dtype=torch.bfloat16 if "16" in kind else None)
    if "multiplied" in kind:  # as Triton's kernel
        layer.matmul = lambda x, q, bias: nn.functional.linear(x, dequantized_weight_of(q, x.dtype), bias)
    return layer


def dequantized_weight_of(quantized, dtype):
    return dequantized_weight(Linear4bit(quantized), dtype).clone()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 20, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bfloat16", "dense", "int8", "int8 as stored", "nf4", "nf4 as stored",
                                  "nf4 in 16 bits", "nf4 multiplied"])  # fmt: skip
def test_an_adapter_of_zeros_changes_no_bit(unit, kind, dtype, rows, has_bias):
    """DPO's first rewards are 0 because policy and reference compute the same."""
    weight, x = drawn(130, 600).bfloat16().float(), drawn(rows, 600, seed=1).to(dtype)
    layer = linear(kind, weight, nn.Parameter(drawn(130, seed=2)) if has_bias else None)
    layer = layer.to(dtype) if kind == "dense" else layer
    adapted = LoRALinear(layer, LoraSpec(4, 6))
    expected = frozen_products(x, [layer])[0]
    assert expected.dtype == dtype and torch.equal(adapted(x), expected)
    with torch.no_grad():
        assert torch.equal(adapted(x), expected)
    adapted.enabled = False
    with torch.no_grad():
        assert torch.equal(project(x, adapted)[0], expected)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_an_adapted_layer_gives_the_same_bits_with_and_without_gradients(unit, rows):
    """A policy and its reference that begins as the same adapter; a block and its recomputation."""
    assert IN_CPP.few == FEW
    layers = [
        LoRALinear(linear("bfloat16", drawn(n, 96), None), LoraSpec(4, alpha)) for n, alpha in ((40, 6), (130, 2))
    ]
    for layer in layers:
        layer.lora_B.data.copy_(drawn(*layer.lora_B.shape))
    x, factors = drawn(rows, 96, seed=1), [f for layer in layers for f in (layer.lora_A, layer.lora_B)]
    with torch.no_grad():
        expected = project(x, *layers)
    outs = project(x, *layers)
    assert all(map(torch.equal, outs, expected))
    grads = torch.autograd.grad(sum(out.square().sum() for out in outs), factors)
    plain = [x @ layer.base.dequantized().t() + scale * x @ layer.lora_A.t() @ layer.lora_B.t()
             for layer, scale in zip(layers, (1.5, 0.5), strict=True)]  # fmt: skip
    for found, want in zip(grads, torch.autograd.grad(sum(out.square().sum() for out in plain), factors), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("is_adapted", [False, True])
def test_text_is_generated_as_by_the_plain_model(unit, checkpoint, is_adapted):
    """Through the cache, whose keys and values are of the activations' dtype."""
    plain, fused = (load_base(checkpoint[0], ops=PROVIDERS[name]("cpu").ops) for name in ("huggingface", "unsloth"))
    found = []
    for model in (plain, fused):
        if is_adapted:
            inject(model, LoraSpec(2, 4), torch.Generator().manual_seed(0))
            for _, layer in lora_layers(model):
                layer.lora_B.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        cache = KVCache(model, 2, 12)
        with torch.no_grad():
            lengths = torch.tensor([5, 3])
            hidden = read_prompts(model, [[1, 2, 3, 4, 5], [6, 7, 8]], lengths, cache)
            token = torch.tensor([[9], [10]])
            found.append((model.head(hidden), model.head(model(token, position=lengths[:, None], cache=cache))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_a_model_can_be_moved_and_copied(unit, checkpoint):
    model = load_base(checkpoint[0], ops=PROVIDERS["unsloth"]("cpu").ops)
    ids = torch.arange(1, 50)[None]
    expected = model.logits(ids)
    assert torch.equal(copy.deepcopy(model).logits(ids), expected)
    layer = copy.deepcopy(model.model.layers[0].mlp.up_proj).to("meta")  # stands for any device but the CPU
    assert layer(torch.empty(3, layer.in_features, device="meta")).shape == (3, layer.out_features)
    assert copy.deepcopy(model).half().logits(ids).dtype == torch.float32


def test_which_of_the_two_multiplies(monkeypatch):
    if reason := reason_not(CPU):
        pytest.skip(reason)
    called = []
    monkeypatch.setattr(amx_product, "reason_not", lambda: None)
    monkeypatch.setattr(amx_product, "multiply", lambda job: called.append(job.rows))
    for form, most in (("bfloat16", FEW), ("nf4", MANY), ("int8", MANY)):
        weight, _ = stored(form, drawn(20, 64))
        called.clear()
        for N in (1, most, most + 1):
            IN_CPP.product_t(drawn(N, 64), weight)
        assert called == [most + 1]
