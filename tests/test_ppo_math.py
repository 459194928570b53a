"""PPO's arithmetic: hand-worked numbers, and slow float64 loops over ragged lists that know no mask."""

import math
import statistics

import pytest
import torch

import mini_forge
from mini_forge.training.ppo_math import (
    KL_ESTIMATORS,
    adapted_kl_coef,
    gae,
    group_advantages,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)

LENGTHS = [7, 1, 4, 12, 3]


def ragged(seed: int, scale: float = 1.0) -> list[list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(n, generator=generator)).tolist() for n in LENGTHS]


def padded(rows: list[list[float]], filler: float = math.nan) -> torch.Tensor:
    """(B, T) float32; the padding is NaN, so that reading it anywhere shows."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows])


def mask() -> torch.Tensor:
    return padded([[1.0] * n for n in LENGTHS], 0.0).bool()


def close(found: torch.Tensor, rows: list[list[float]], tolerance: float = 2e-6):
    """Equal at the response tokens, exactly 0 at all others. 2e-6: a dozen float32 additions of numbers near 1."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, padded(rows, 0.0), rtol=tolerance, atol=tolerance)
    assert not found[~mask()].any()


def slow_gae(rewards, values, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l}, 1506.02438 Eq. 16 as it is written."""
    advantages = []
    for r, v in zip(rewards, values, strict=True):
        v = [*v, 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
        advantages.append([sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(r))) for t in range(len(r))])
    returns = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(advantages, values, strict=True)]
    return advantages, returns


def test_gae_by_hand():
    assert mini_forge.gae is gae
    advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.5]]), None, 1.0, 0.5)
    assert advantages.tolist() == [[0.0, 0.5, 0.5]] and returns.tolist() == [[0.5, 0.75, 1.0]]
    # γ = ½, λ = ½: δ = (-0.375, 0, 0.5), A = (-0.375 + ¼·0.125, 0 + ¼·0.5, 0.5)
    advantages, _ = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.5]]), None, 0.5, 0.5)
    assert advantages.tolist() == [[-0.34375, 0.125, 0.5]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_sum_on_ragged_responses_whatever_the_padding_holds(gamma, lam):
    rewards, values = ragged(1), ragged(2)
    found = gae(padded(rewards), padded(values), mask(), gamma, lam)
    for tensor, expected in zip(found, slow_gae(rewards, values, gamma, lam), strict=True):
        close(tensor, expected, 1e-5)


def test_gae_passes_over_holes_and_padding_on_the_left():
    rewards, values = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([[0.5, 0.1, 0.2]])
    is_response = torch.tensor([[False, True, False, True, True, False]])
    wide = [torch.full((1, 6), math.nan).masked_scatter(is_response, x) for x in (rewards, values)]
    for found, expected in zip(gae(*wide, is_response, 0.9, 0.7), gae(rewards, values, None, 0.9, 0.7), strict=True):
        assert torch.equal(found[is_response], expected[0])


def test_kl_estimators_by_hand():
    """π = 0.8, π_ref = 0.4, and the other way: log ratios ± ln 2 = ± 0.693147."""
    logps, ref = torch.tensor([0.8, 0.4]).log(), torch.tensor([0.4, 0.8]).log()
    assert KL_ESTIMATORS["k1"](logps, ref).tolist() == pytest.approx([0.693147, -0.693147], abs=1e-6)
    assert KL_ESTIMATORS["k3"](logps, ref).tolist() == pytest.approx([0.5 - 1 + 0.693147, 2 - 1 - 0.693147], abs=1e-6)


@pytest.mark.parametrize("name", KL_ESTIMATORS)
def test_kl_estimators_have_the_divergence_as_their_mean(name):
    policy, ref = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    exact = 0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3)
    assert float((policy * KL_ESTIMATORS[name](policy.log(), ref.log())).sum()) == pytest.approx(exact, abs=1e-12)


def test_k3_keeps_what_is_left_of_nearly_equal_probabilities():
    """r = 1e-4: e^r - 1 - r = r²/2 = 5e-9, of which exp(r) - 1 - r in float32 leaves nothing right."""
    assert KL_ESTIMATORS["k3"](torch.tensor(0.0), torch.tensor(1e-4)).item() == pytest.approx(5e-9, rel=0.01)


def test_token_rewards_are_the_penalty_and_the_score_at_the_last_token():
    kl = torch.tensor([[0.5, -1.0, math.nan], [2.0, 1.0, 0.0], [math.nan] * 3])
    is_response = torch.tensor([[True, True, False], [True, True, True], [False] * 3])
    found = token_rewards(torch.tensor([3.0, -1.0, 7.0]), kl, is_response, 0.1)
    assert found.flatten().tolist() == pytest.approx([-0.05, 3.1, 0, -0.2, -0.1, -1, 0, 0, 0], abs=1e-7)


def test_whitening_by_hand():
    """1, 2 and 6 have mean 3 and unbiased variance (4 + 1 + 9)/2 = 7."""
    found = whiten(torch.tensor([[1.0, 2.0], [6.0, math.nan]]), torch.tensor([[True, True], [True, False]]))
    root = math.sqrt(7)
    assert found.flatten().tolist() == pytest.approx([-2 / root, -1 / root, 3 / root, 0], abs=1e-6)


def test_whitening_looks_at_response_tokens_only():
    rows = ragged(3, scale=5.0)
    tokens = [x for row in rows for x in row]
    mean, deviation = statistics.fmean(tokens), math.sqrt(statistics.variance(tokens) + 1e-8)
    close(whiten(padded(rows), mask()), [[(x - mean) / deviation for x in row] for row in rows])


def test_one_token_is_whitened_to_zero():
    assert whiten(torch.tensor([[5.0, 1.0]]), torch.tensor([[True, False]])).tolist() == [[0.0, 0.0]]


def test_the_clipped_policy_loss_by_hand():
    """clip_range 0.2. Ratios 2, 2, ½, ½ and advantages 1, -1, 1, -1: -1.2 (clipped), 2, -½, 0.8 (clipped). Sum 1.1."""
    logps = torch.tensor([[2.0, 2.0, 0.5, 0.5, math.nan]]).log()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, math.nan]])
    is_response = torch.tensor([[True, True, True, True, False]])
    total = policy_loss(logps, torch.zeros(1, 5), advantages, is_response, 0.2)
    assert total.item() == pytest.approx(1.1, abs=1e-6)


def test_the_clipped_policy_loss_is_its_loop_and_its_gradient_stays_out_of_the_padding():
    new, old, advantages = ragged(4, 0.3), ragged(5, 0.3), ragged(6)
    logps = padded(new).requires_grad_()
    total = policy_loss(logps, padded(old), padded(advantages), mask(), 0.2)
    total.backward()
    expected, gradient = 0.0, []
    for row in zip(new, old, advantages, strict=True):
        gradient.append([])
        for n, o, a in zip(*row, strict=True):
            ratio = math.exp(n - o)
            plain, clipped = -ratio * a, -min(max(ratio, 0.8), 1.2) * a
            expected += max(plain, clipped)
            gradient[-1].append(-ratio * a if plain >= clipped else 0.0)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    close(logps.grad, gradient)


def test_the_clipped_value_loss_by_hand():
    """clip_range 0.2, V_old = 0. V 1, R 1: the clipped 0.2 is worse, ½·0.64. V 1, R 0: ½·1. V 0.1, R 1: ½·0.81."""
    is_response = torch.tensor([[True, True, True, False]])
    values, returns = torch.tensor([[1.0, 1.0, 0.1, math.nan]]), torch.tensor([[1.0, 0.0, 1.0, 5.0]])
    total = value_loss(values, torch.zeros(1, 4), returns, is_response, 0.2)
    assert total.item() == pytest.approx(0.32 + 0.5 + 0.405, abs=1e-6)


def test_the_clipped_value_loss_is_its_loop_and_its_gradient_stays_out_of_the_padding():
    new, old, returns = ragged(7), ragged(8), ragged(9)
    values = padded(new).requires_grad_()
    total = value_loss(values, padded(old), padded(returns), mask(), 0.5)
    total.backward()
    expected, gradient = 0.0, []
    for row in zip(new, old, returns, strict=True):
        gradient.append([])
        for v, o, r in zip(*row, strict=True):
            held = o + min(max(v - o, -0.5), 0.5)
            expected += 0.5 * max((v - r) ** 2, (held - r) ** 2)
            gradient[-1].append(v - r if held == v or (v - r) ** 2 > (held - r) ** 2 else 0.0)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    close(values.grad, gradient)


def test_group_advantages_by_hand():
    """1, 2, 6: mean 3, unbiased deviation √7. Equal scores: zeros, though the mean of seven times 0.1 is not 0.1."""
    found = group_advantages(torch.tensor([1.0, 2.0, 6.0, 0.1, 0.1, 0.1]), 3).tolist()
    deviation = math.sqrt(7) + 1e-4
    assert found == [*(pytest.approx(x / deviation, abs=1e-6) for x in (-2, -1, 3)), 0, 0, 0]
    assert group_advantages(torch.full((7,), 0.1), 7).tolist() == [0] * 7


def test_the_kl_coefficient_follows_the_error_up_to_a_fifth():
    assert adapted_kl_coef(0.2, 6.6, 6.0) == pytest.approx(0.2 * 1.01)  # error 0.1
    assert adapted_kl_coef(0.2, 60.0, 6.0) == pytest.approx(0.2 * 1.02)  # clipped to 0.2
    assert adapted_kl_coef(0.2, 0.0, 6.0) == pytest.approx(0.2 * 0.98)
    assert adapted_kl_coef(0.2, 6.0, 6.0) == 0.2
