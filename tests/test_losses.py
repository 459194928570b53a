"""token_nll against torch's cross entropy in float64."""

import pytest
import torch
import torch.nn.functional as F

from mini_forge.training import losses
from mini_forge.training.losses import token_nll


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("head_trains", [False, True])
def test_value_and_gradient_equal_full_logits(monkeypatch, tokens, head_trains):
    """In chunks of 4 tokens, in tiles of 4 of the 9 words: a target in each, a largest logit in each."""
    monkeypatch.setattr(losses, "CHUNK_TOKENS", 4)
    monkeypatch.setattr(losses, "TILE_TOKENS", 4)
    monkeypatch.setattr(losses, "tile_width", lambda tokens, device: 4)
    torch.manual_seed(tokens)
    hidden = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=head_trains)
    targets, upstream = torch.randint(0, 9, (tokens,)), torch.randn(tokens)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    found = token_nll(hidden, weight, targets)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    wanted = (hidden, weight) if head_trains else (hidden,)
    a = torch.autograd.grad((expected * upstream.double()).sum(), wanted)
    b = torch.autograd.grad((found * upstream).sum(), wanted)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_tile_takes_its_bytes_whatever_the_tokens():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert losses.tile_width(1024, cpu) == 1024
    assert losses.tile_width(1000, cpu) == 1024  # 1,048.6 rounded down to a multiple of 256
    assert losses.tile_width(1, cpu) == 2**20
    assert losses.tile_width(2**30, cpu) == 256
    assert losses.tile_width(1024, cuda) == 2**15


def test_no_tokens_is_an_empty_loss_with_a_gradient_path():
    hidden = torch.randn(0, 6, requires_grad=True)
    token_nll(hidden, torch.randn(9, 6), torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert hidden.grad.shape == (0, 6)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    nll = token_nll(hidden, weight, torch.tensor([1]))
    nll.sum().backward()
    assert nll.item() == 2000.0
    assert torch.equal(hidden.grad, torch.tensor([[2.0, 0.0]]))  # (softmax − onehot) W = [1, −1, 0] W


def test_full_logits_never_exist():
    """The largest tensor made is one chunk's logits, not all tokens' (measured by torch's own profiler of memory)."""
    hidden, weight = torch.randn(2048, 8, requires_grad=True), torch.randn(4000, 8)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        token_nll(hidden, weight, torch.randint(0, 4000, (2048,))).sum().backward()
    largest = max((e.self_cpu_memory_usage for e in profile.events()), default=0)
    assert 0 < largest < 2048 * 4000 * 4 / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_heads_have_the_gradient_of_float32_to_their_rounding(dtype):
    torch.manual_seed(0)
    hidden = torch.randn(5, 16).to(dtype)
    weight = (0.02 * torch.randn(70000, 16)).to(dtype)  # a flat softmax: its normaliser is past float16's range
    targets = torch.randint(0, 70000, (5,))
    gradients = []
    for cast in (dtype, torch.float32):
        h = hidden.detach().to(cast, copy=True).requires_grad_()
        token_nll(h, weight.to(cast), targets).sum().backward()
        gradients.append(h.grad.float())
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_a_confident_token_keeps_its_gradient_in_sixteen_bits(dtype, tolerance):
    """Its 1 - p is 0.02: softmax·W and W_target nearly cancel."""
    torch.manual_seed(0)
    weight = torch.randn(512, 64).to(dtype)
    targets = torch.randint(0, 512, (64,))
    hidden = (0.13 * weight[targets]).requires_grad_()
    token_nll(hidden, weight, targets).sum().backward()
    wide = hidden.detach().double().requires_grad_()
    probability = torch.softmax(wide @ weight.double().T, dim=-1).gather(-1, targets[:, None])
    assert 0.5 < probability.median() < 0.999
    F.cross_entropy(wide @ weight.double().T, targets, reduction="sum").backward()
    error = (hidden.grad.double() - wide.grad).norm(dim=-1) / wide.grad.norm(dim=-1)
    assert error.median() < tolerance


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("wrong", [-100, 7])
def test_a_target_that_is_no_token_is_refused(wrong, is_trained):
    weight = torch.randn(7, 4, requires_grad=is_trained)
    with pytest.raises(ValueError, match="targets: .* must be within 0 to 6"):
        token_nll(torch.randn(2, 4), weight, torch.tensor([1, wrong]))


def test_a_second_derivative_under_a_frozen_head_is_refused():
    hidden, weight = torch.randn(2, 4, requires_grad=True), torch.randn(7, 4)
    loss = token_nll(hidden, weight, torch.tensor([1, 2])).sum()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)
