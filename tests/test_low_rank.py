"""LoRA's own products, in C++: equal to the formula, with dropout under the masks it draws, and these are what they
should be."""

import math

import pytest
import torch

from mini_forge.model.low_rank import IN_TORCH
from mini_forge_kernels import low_rank
from mini_forge_kernels.low_rank import IN_CPP, reason_not

pytestmark = pytest.mark.skipif(reason_not() is not None, reason=str(reason_not()))
# N, in, out of each projection, R: one of all; odd ones; several tiles and blocks, ranks off and beyond a vector.
SHAPES = [(1, 1, (1,), 1), (1, 5, (3,), 2), (7, 33, (10, 20), 8), (9, 48, (16,), 16), (131, 576, (64, 48, 48), 16),
          (300, 100, (70, 8), 24), (129, 144, (5,), 130), (40, 33, (10, 20), 2), (64, 48, (16,), 4),
          (0, 8, (4,), 2)]  # fmt: skip


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask(N, K, seed):
    """The mask of an (N, K) input, as zeros and ones: what `up` gives of ones."""
    return IN_CPP.up(torch.ones(N, 1, 1), [torch.ones(1, K)], [seed])


def seeds_of(count, rate=0.3):
    return [(rate, 2**61 + 12345 * i) for i in range(count)]


@pytest.mark.parametrize("N, K, outs, R", SHAPES)
@pytest.mark.parametrize("mixed", [False, True])
def test_the_products_are_those_of_the_masked_input(N, K, outs, R, mixed):
    seeds = seeds_of(len(outs))
    if mixed:
        seeds[-1] = None if len(outs) > 1 else seeds[-1]
    x, As = drawn(N, 2 * K)[:, :K], [drawn(R, K, seed=i + 1) for i in range(len(outs))]
    masks = [torch.ones(N, K) if seed is None else mask(N, K, seed) for seed in seeds]
    close = {"rtol": 1e-5, "atol": 1e-5 * math.sqrt(K)}

    lows = IN_CPP.down(x, As, seeds)
    assert lows.shape[:2] == (N, len(outs)) and not lows[..., R:].any()
    expected = torch.stack([(x * m).double() @ A.double().t() for m, A in zip(masks, As, strict=True)], 1)
    torch.testing.assert_close(lows[..., :R].double(), expected, **close)

    dl = drawn(N, len(outs), R, seed=9)
    for i, grad in enumerate(IN_CPP.outer(dl, x, seeds)):
        assert grad.is_contiguous() and grad.shape == (R, K)
        torch.testing.assert_close(grad.double(), dl[:, i].double().t() @ (x * masks[i]).double(),
                                   rtol=1e-5, atol=1e-5 * max(1, math.sqrt(N)))  # fmt: skip

    dx = IN_CPP.up(dl, As, seeds)
    expected = sum((dl[:, i].double() @ A.double()) * masks[i] for i, A in enumerate(As))
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-5 * math.sqrt(R))


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("is_padded", [False, True], ids=["lows as wide as the rank", "lows with zeros behind"])
@pytest.mark.parametrize("N, K, outs, R", SHAPES)
def test_a_gradient_is_pulled_back_in_one_pass(N, K, outs, R, is_padded, threads, monkeypatch):
    """dY of odd widths, some of them parts of a wider tensor; more threads than there are pieces of rows."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    grads = [drawn(N, out + 3 * (i % 2), seed=i)[:, :out] for i, out in enumerate(outs)]
    Bs = [drawn(R, out, seed=10 + i).t() if i % 2 else drawn(out, R, seed=10 + i) for i, out in enumerate(outs)]
    lows = drawn(N, len(outs), R, seed=20)
    given = torch.cat((lows, torch.zeros(N, len(outs), -R % 16)), 2) if is_padded else lows
    dl, dBs = IN_CPP.pull_back(grads, Bs, given)
    again, dBs_again = IN_CPP.pull_back(grads, Bs, given)
    assert torch.equal(dl, again) and all(map(torch.equal, dBs, dBs_again))
    assert dl.shape == lows.shape and dl.is_contiguous()
    for i, (dY, B, dB) in enumerate(zip(grads, Bs, dBs, strict=True)):
        assert dB.shape == B.shape and dB.is_contiguous()
        torch.testing.assert_close(dl[:, i].double(), dY.double() @ B.double(),
                                   rtol=1e-5, atol=1e-5 * math.sqrt(outs[i]))  # fmt: skip
        torch.testing.assert_close(dB.double(), dY.double().t() @ lows[:, i].double(),
                                   rtol=1e-5, atol=1e-5 * max(1, math.sqrt(N)))  # fmt: skip


@pytest.mark.parametrize("N", [1, 8, 37])
def test_threads_share_the_work_and_change_no_bit(N, monkeypatch):
    seeds, x, As = seeds_of(2), drawn(N, 100), [drawn(4, 100, seed=i) for i in (1, 2)]
    results = []
    for threads in (1, 2, 3, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        lows = IN_CPP.down(x, As, seeds)
        results.append([lows, *IN_CPP.outer(lows[..., :4], x, seeds), IN_CPP.up(lows[..., :4], As, seeds)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_mask_has_the_rate_and_knows_nothing_of_its_neighbours(rate):
    N, K = 501, 403
    keep, deviation = mask(N, K, (rate, 7)), math.sqrt(rate * (1 - rate) / (N * K))
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert abs(keep.mean().item() - (1 - rate)) < 5 * deviation
    assert torch.equal(keep, mask(N, K, (rate, 7)))
    centred = (keep - (1 - rate)) / math.sqrt(rate * (1 - rate))
    others = [(mask(N, K, (rate, seed)) - (1 - rate)) / math.sqrt(rate * (1 - rate)) for seed in (8, 7 + 2**32)]
    pairs = [(centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1]), (centred[:, 16:], centred[:, :-16]),
             *((centred, other) for other in others)]  # fmt: skip
    for a, b in pairs:  # of independent numbers of variance 1 the mean product is 0 ± 1/√n
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
    for seed, shift in ((7 + 2**32, 1), (7 + 2**32, 5), (8, 1)):  # nor is another's mask this one, some rows further
        other = (mask(N, K, (rate, seed)) - (1 - rate)) / math.sqrt(rate * (1 - rate))
        for a, b in ((centred[shift:], other[:-shift]), (centred[:-shift], other[shift:])):
            assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
    for dim in (0, 1):  # and rows and columns have the rate, each within its own deviation
        spread = keep.mean(dim).std().item() / math.sqrt(rate * (1 - rate) / keep.shape[dim])
        assert 0.85 < spread < 1.15


def test_the_default_dtype_is_another():
    seeds, x, As = seeds_of(1), drawn(40, 100), [drawn(4, 100, seed=1)]
    expected = [IN_CPP.down(x, As, seeds), *IN_CPP.outer(drawn(40, 1, 4), x, seeds)]
    torch.set_default_dtype(torch.bfloat16)
    try:
        dl = torch.randn(40, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        found = [IN_CPP.down(x, As, seeds), *IN_CPP.outer(dl, x, seeds)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_rates_at_the_ends():
    assert mask(20, 50, (1e-12, 3)).all()
    assert not mask(20, 50, (1.0, 3)).any()


def test_other_types_and_no_dropout_are_torch_s(monkeypatch):
    calls = []
    monkeypatch.setattr(low_rank, "_library", lambda: calls.append(1))
    x, A = drawn(6, 20), drawn(2, 20, seed=1)
    assert torch.equal(IN_CPP.down(x, [A], [None]), IN_TORCH.down(x, [A], [None]))
    for dtype in (torch.float64, torch.bfloat16):
        seeds = seeds_of(1)
        args = x.to(dtype), [A.to(dtype)], seeds
        lows = IN_CPP.down(*args)
        assert torch.equal(lows, IN_TORCH.down(*args)) and lows.dtype == dtype
        assert torch.equal(IN_CPP.outer(lows, args[0], seeds)[0], IN_TORCH.outer(lows, args[0], seeds)[0])
        assert torch.equal(IN_CPP.up(lows, args[1], seeds), IN_TORCH.up(lows, args[1], seeds))
        found, expected = (of.pull_back([args[0]], [args[1][0].t()], lows) for of in (IN_CPP, IN_TORCH))
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1][0], expected[1][0])
    assert not calls
