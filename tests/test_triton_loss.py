"""Triton's linear cross-entropy against the torch one and a float64 oracle: under the interpreter, or on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from mini_forge.training import losses
from mini_forge_kernels import linear_cross_entropy as kernel
from mini_forge_kernels.triton_support import reason_not_testable

pytestmark = pytest.mark.skipif(reason_not_testable() is not None, reason=str(reason_not_testable()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest element. Float32: the order of sums. 16 bits: logits of about 4 are rounded by half a unit, 4·2⁻⁹ or
# 4·2⁻¹², which is the relative error of a probability; dz and the result are rounded once more.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}
# One row; one class; a vocabulary below, of, just above and not a multiple of the block; chunks that do not divide N.
SHAPES = [(1, 7, 5), (3, 1, 4), (5, 33, 8), (4, 64, 6), (7, 65, 6), (13, 257, 19)]


def inputs(N, V, D, dtype, weight_trains):
    generator = torch.Generator().manual_seed(N + V)
    hidden = torch.randn(N, D, generator=generator).to(DEVICE, dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator) / D**0.5).to(DEVICE, dtype).requires_grad_(weight_trains)
    targets = torch.randint(0, V, (N,), generator=generator).to(DEVICE)
    return hidden, weight, targets, torch.randn(N, generator=generator).to(DEVICE)


def oracle(hidden, weight, targets, upstream, wanted):
    wide, head = hidden.double(), weight.double()
    nll = F.cross_entropy(wide @ head.t(), targets, reduction="none")
    return nll, torch.autograd.grad((nll * upstream.double()).sum(), wanted)


def assert_near(found, expected, dtype):
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).abs().amax()
    assert error <= TOLERANCE[dtype] * (expected.abs().amax() + 1), error


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of 64 logits, and chunks of one to four rows."""
    monkeypatch.setattr(kernel, "BLOCK", 64)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 4096)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("weight_trains", [False, True])
def test_values_and_gradients_equal_the_reference_and_float64(shape, dtype, weight_trains):
    hidden, weight, targets, upstream = inputs(*shape, dtype, weight_trains)
    wanted = (hidden, weight) if weight_trains else (hidden,)
    exact, exact_grads = oracle(hidden, weight, targets, upstream, wanted)
    nll = kernel.token_nll(hidden, weight, targets)
    reference = losses.token_nll(hidden, weight, targets)
    assert nll.dtype == torch.float32 and nll.requires_grad
    assert_near(nll, exact, dtype)
    assert_near(nll, reference, dtype)
    grads = torch.autograd.grad(nll, wanted, upstream)
    reference_grads = torch.autograd.grad(reference, wanted, upstream)
    for grad, tensor, expected, other in zip(grads, wanted, exact_grads, reference_grads, strict=True):
        assert grad.dtype == tensor.dtype
        assert_near(grad, expected, dtype)
        assert_near(grad, other, dtype)


def test_only_the_head_may_train():
    hidden, weight, targets, upstream = inputs(5, 33, 8, torch.float32, True)
    hidden = hidden.detach()
    _, (expected,) = oracle(hidden, weight, targets, upstream, (weight,))
    (grad,) = torch.autograd.grad(kernel.token_nll(hidden, weight, targets), (weight,), upstream)
    assert_near(grad, expected, torch.float32)


def test_large_and_flat_logits_by_hand():
    hidden = torch.tensor([[1000.0, 0.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], device=DEVICE)
    nll = kernel.token_nll(hidden, weight, torch.tensor([1], device=DEVICE))
    nll.sum().backward()
    assert nll.item() == 2000.0
    assert hidden.grad.tolist() == [[2.0, 0.0]]  # (softmax − onehot) W = [1, −1, 0] W
    flat = kernel.token_nll(hidden.detach(), torch.zeros(100, 2, device=DEVICE), torch.tensor([99], device=DEVICE))
    assert flat.item() == pytest.approx(4.605170, abs=1e-6)  # ln 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sure_token_keeps_its_distance_from_certainty_in_16_bits(dtype):
    """Two classes, logits 8 and 0: p = 1 − 3.35e-4, which 16 bits round to 1. dh = (p − 1, 1 − p) W all the same."""
    hidden = torch.tensor([[8.0]], dtype=dtype, device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=dtype, device=DEVICE)
    kernel.token_nll(hidden, weight, torch.tensor([0], device=DEVICE)).sum().backward()
    assert hidden.grad.item() == pytest.approx(-3.3535e-4, rel=2**-7)


def test_no_tokens_are_an_empty_loss_with_a_gradient_path():
    for weight_trains in (False, True):
        hidden, weight, targets, _ = inputs(0, 9, 6, torch.float32, weight_trains)
        nll = kernel.token_nll(hidden, weight, targets)
        assert nll.shape == (0,)
        nll.sum().backward()
        assert hidden.grad.shape == (0, 6) and (not weight_trains or not weight.grad.any())


def test_rows_that_lie_apart_are_read_where_they_lie():
    hidden, weight, targets, upstream = inputs(5, 33, 8, torch.float32, True)
    apart = torch.cat((hidden, hidden), dim=1)[:, :8]
    tokens = torch.stack((targets, targets), dim=1)[:, 0]
    expected = torch.autograd.grad(kernel.token_nll(hidden, weight, targets), (hidden, weight), upstream)
    found = torch.autograd.grad(kernel.token_nll(apart, weight, tokens), (hidden, weight), upstream)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weight_trains", [False, True])
def test_full_logits_never_exist(weight_trains, monkeypatch):
    hidden, weight, targets, _ = inputs(64, 4096, 4, torch.float32, weight_trains)
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 8 * 4096 * 4)
    monkeypatch.setattr(kernel, "BLOCK", 4096)
    with torch.profiler.profile(profile_memory=True) as profile:
        kernel.token_nll(hidden, weight, targets).sum().backward()
    made = [e.self_cpu_memory_usage + e.self_device_memory_usage for e in profile.events()]
    assert max(made) < 2 * 8 * 4096 * 4
    # One buffer for all chunks, and one more in a backward that makes the logits again.
    assert 1 <= sum(size > 7 * 4096 * 4 for size in made) <= 1 + weight_trains


def test_no_gradient_is_made_where_none_is_asked_for(monkeypatch):
    hidden, weight, targets, _ = inputs(5, 33, 8, torch.float32, True)
    written = []
    launch = kernel.launch
    monkeypatch.setattr(kernel, "launch", lambda *a, **k: written.append(k["WRITES"]) or launch(*a, **k))
    with torch.no_grad():
        assert not kernel.token_nll(hidden, weight, targets).requires_grad
    assert written and not any(written)
