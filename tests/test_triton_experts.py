"""The experts' LoRA in torch and in Triton against the plain layer and a float64 loop: under the interpreter, or on a
GPU."""

import pytest
import torch
from torch import nn

from mini_forge.model.lora import LoraSpec, LoRAStack
from mini_forge_kernels import grouped_lora as kernel
from mini_forge_kernels.grouped_lora import TorchProducts, TritonProducts, grouped_lora
from mini_forge_kernels.triton_support import reason_not_testable

why_not = reason_not_testable()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENGINES = [
    TorchProducts,
    pytest.param(TritonProducts, marks=pytest.mark.skipif(why_not is not None, reason=str(why_not))),
]
# Of the largest element. Float32: the order of sums. 16 bits: x A and dY B are rounded (half a unit of 8 or 11 bits;
# the interpreter cuts bfloat16 off, a whole one), so are the factors, and the result.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}
COUNTS = [[1], [0, 5, 0, 2], [9, 0, 0], [0, 0], [3, 70, 1, 0, 64], [200]]
# in, out, rank: whole tiles, odd ones, one number, several blocks of the widths, several of the rank.
SIZES = [(32, 64, 16), (33, 7, 3), (1, 1, 1), (35, 70, 5), (20, 17, 65)]
CASES = [(counts, SIZES[1]) for counts in COUNTS] + [([3, 0, 66], size) for size in SIZES]


def inputs(counts, size, dtype, seed=0):
    """y, x, A, B as leaves, the factors float32 as they are trained, and an upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    (width, out, rank), M, E = size, sum(counts), len(counts)
    shapes = [(M, out), (M, width), (E, rank, width), (E, out, rank), (M, out)]
    y, x, A, B, upstream = (
        torch.randn(s, generator=generator).to(DEVICE) / (s[-1] ** 0.5 if s[-1] else 1) for s in shapes
    )
    leaves = [t.requires_grad_() for t in (y.to(dtype), x.to(dtype), A, B)]
    return leaves, upstream.to(dtype)


def oracle(y, x, A, B, scale, counts):
    """One row at a time in float64."""
    y, x, A, B = (t.double() for t in (y, x, A, B))
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    rows = [y[m] + scale * (B[e] @ (A[e] @ x[m])) for m, e in enumerate(experts)]
    return torch.stack(rows) if rows else y + 0 * (x.sum() + A.sum() + B.sum())


@pytest.fixture
def engine(request, monkeypatch):
    monkeypatch.setattr(kernel, "TorchProducts", request.param)  # what is picked on this device, either way
    monkeypatch.setattr(kernel, "TritonProducts", request.param)
    return request.param


def assert_near(found, expected, dtype):
    assert found.shape == expected.shape
    if found.numel():
        error = (found.double() - expected).abs().amax()
        assert error <= TOLERANCE[dtype] * (expected.abs().amax() + 1), error


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("counts, size", CASES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_value_and_gradients_equal_a_float64_loop(engine, counts, size, dtype):
    leaves, upstream = inputs(counts, size, dtype)
    y, x, A, B = leaves
    exact = oracle(*leaves, 0.7, counts)
    exact_grads = torch.autograd.grad(exact, leaves, upstream.double())
    found = grouped_lora(y + 0, x, A, B, 0.7, counts)
    assert found.dtype == dtype
    assert_near(found, exact, dtype)
    for grad, leaf, expected in zip(torch.autograd.grad(found, leaves, upstream), leaves, exact_grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert_near(grad, expected.double(), dtype)  # zero for experts without rows, in factors and oracle alike


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_the_update_is_that_of_the_plain_layer(engine, counts):
    (_, x, A, B), upstream = inputs(counts, (33, 7, 3), torch.float32)
    base = nn.Parameter(torch.randn(len(counts), 7, 33, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    layer = LoRAStack(base, LoraSpec(rank=3, alpha=6.0)).to(DEVICE)
    layer.lora_A.data.copy_(A)
    layer.lora_B.data.copy_(B)
    if not sum(counts):
        return
    wanted = (x, layer.lora_A, layer.lora_B)
    expected = layer(x, None, counts)
    layer.enabled = False
    found = grouped_lora(layer(x, None, counts), x, layer.lora_A, layer.lora_B, layer.scaling, counts)
    assert_near(found, expected.double(), torch.float32)
    grads = [torch.autograd.grad(y, wanted, upstream) for y in (found, expected)]
    for a, b in zip(*grads, strict=True):
        assert_near(a, b.double(), torch.float32)


def test_gradients_are_finite_differences():
    (y, x, A, B), _ = inputs([2, 0, 3], (5, 4, 2), torch.float64)
    A, B = (t.detach().double().requires_grad_() for t in (A, B))
    assert torch.autograd.gradcheck(lambda y, *rest: grouped_lora(y + 0, *rest, 0.7, [2, 0, 3]), (y, x, A, B))


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_y_is_written_in_place_and_tensors_of_any_strides_are_read(engine):
    counts, size = [2, 0, 5], (12, 6, 3)
    (y, x, A, B), upstream = inputs(counts, size, torch.float32)
    expected = grouped_lora(y + 0, x, A, B, 0.5, counts)
    grads = torch.autograd.grad(expected, (x, A, B), upstream)
    turned = y.detach().t().contiguous().t()
    apart = [t.transpose(-1, -2).contiguous().transpose(-1, -2).detach().requires_grad_() for t in (x, A, B)]
    found = grouped_lora(turned, *apart, 0.5, counts)
    assert found.data_ptr() == turned.data_ptr()
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, apart, upstream), grads, strict=True):
        torch.testing.assert_close(a, b)
    one = torch.ones((), device=DEVICE).expand(7, 6)  # the gradient of a sum: all its rows are one number
    (grad,) = torch.autograd.grad(grouped_lora(y + 0, x, A, B, 0.5, counts), B, one)
    (expected,) = torch.autograd.grad(grouped_lora(y + 0, x, A, B, 0.5, counts), B, one.contiguous())
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("engine", ENGINES, indirect=True)
def test_only_the_narrow_product_is_saved_besides_the_arguments(engine):
    (y, x, A, B), _ = inputs([4, 5], (12, 6, 3), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        grouped_lora(y.detach(), x, A, B, 0.5, [4, 5])
    extra = [t for t in saved if t.data_ptr() not in {x.data_ptr(), A.data_ptr(), B.data_ptr()}]
    assert [t.shape for t in extra] == [(9, 3)]
