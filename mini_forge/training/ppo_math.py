"""The arithmetic of PPO (1707.06347) and GRPO (2402.03300): pure functions of tensors, no model, no loop.

Tokens of a batch of responses lie in (B, T) tensors, `is_response` (B, T) bool says which places hold one. A place that
does not is never read, so padding (even NaN) changes no result, and gives 0 wherever a result has a place for it.
Everything is float32: these are sums and differences of log-probabilities, in which 16 bits would leave noise.
"""

from collections.abc import Callable

import torch

GROUP_EPS = 1e-4  # of GRPO's standard deviation: rewards of a group are often equal
WHITEN_EPS = 1e-8
KL_GAIN, KL_ERROR_LIMIT = 0.1, 0.2  # K_β and the clip of the error in 1909.08593, section 2.2


def kl_k1(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """log π - log π_ref of each sampled token: unbiased for KL(π, π_ref), of either sign. k1 in J. Schulman,
    "Approximating KL divergence", 2020."""
    return logps - ref_logps


def kl_k3(logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """π_ref/π - 1 - log(π_ref/π): unbiased too, and never negative. k3 in Schulman's note; GRPO (2402.03300) Eq. 4."""
    logratio = ref_logps - logps
    return torch.expm1(logratio) - logratio  # expm1: near 0 the exponential's 1 would swallow what is left


KL_ESTIMATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"k1": kl_k1, "k3": kl_k3}


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, is_response: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """-kl_coef·kl_t for every token, and the response's score on top at its last. InstructGPT (2203.02155) Eq. 2
    without its last term.

    scores (B,), kl (B, T) → (B, T) float32. A row without a response token gets no reward."""
    rewards = torch.where(is_response, -kl_coef * kl, 0.0)
    place = torch.arange(is_response.shape[-1], device=is_response.device)
    last = torch.where(is_response, place, -1).amax(-1, keepdim=True)  # (B, 1)
    return rewards + torch.where(is_response & (place == last), scores[:, None], 0.0)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    is_response: torch.Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantages and the returns they imply. GAE (1506.02438) Eq. 16.

        δ_t = r_t + γ V_{t+1} - V_t,   A_t = δ_t + γλ A_{t+1},   R_t = A_t + V_t

    rewards and values (B, T) float32, values[t] the value before token t; is_response (B, T) bool, None for all. V and
    A are 0 after a row's last response token; places that hold none are passed over. Returns (advantages, returns),
    both (B, T), 0 where there is no response token. By hand, γ = 1, λ = ½, r = (0, 0, 1), V = (0.5, 0.25, 0.5):

        δ = (-0.25, 0.25, 0.5)     A = (0, 0.5, 0.5)     R = (0.5, 0.75, 1)"""
    if is_response is None:
        is_response = torch.ones_like(rewards, dtype=torch.bool)
    values = values if values.is_floating_point() else values.float()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        here = is_response[..., t]
        delta = rewards[..., t] + gamma * next_value - values[..., t]
        advantage = delta + gamma * lam * next_advantage
        advantages[..., t] = torch.where(here, advantage, 0.0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[..., t], next_value)
    return advantages, torch.where(is_response, advantages + values, 0.0)


def whiten(x: torch.Tensor, is_response: torch.Tensor) -> torch.Tensor:
    """(x - mean)/√(var + 1e-8) over the response tokens of the whole batch, the variance unbiased.

    x (B, T) → (B, T). One token alone has no variance: it becomes 0."""
    count = is_response.sum()
    mean = masked_sum(x, is_response) / count.clamp(min=1)
    centred = torch.where(is_response, x - mean, 0.0)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + WHITEN_EPS)


def group_advantages(scores: torch.Tensor, group_size: int) -> torch.Tensor:
    """(r - mean)/(std + 1e-4) within each group of responses to one prompt, std unbiased. GRPO (2402.03300), 4.1.2.

    scores (B,) float32, groups of `group_size` one after another → (B,). A group of equal scores gets zeros."""
    groups = scores.view(-1, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    # Equal scores stay exactly 0: their mean may round, and 1e-8/1e-4 would be a signal.
    is_level = (groups == groups[:, :1]).all(-1, keepdim=True)
    advantages = centred / (groups.std(-1, keepdim=True) + GROUP_EPS)
    return torch.where(is_level, 0.0, advantages).flatten()


def policy_loss(
    logps: torch.Tensor,
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    is_response: torch.Tensor,
    clip_range: float,
) -> torch.Tensor:
    """The sum over response tokens of max(-ρA, -clip(ρ, 1 ± clip_range)A), ρ = π/π_old. PPO (1707.06347) Eq. 7.

    All (B, T) float32; the sum is differentiable in `logps`."""
    ratio = policy_ratio(logps, old_logps, is_response)
    plain, clipped = -ratio * advantages, -ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    return masked_sum(torch.maximum(plain, clipped), is_response)


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    is_response: torch.Tensor,
    clip_range: float,
) -> torch.Tensor:
    """The sum over response tokens of ½ max((V - R)², (clip(V, V_old ± clip_range) - R)²): a value may move only
    so far on one batch. The value loss of OpenAI's PPO, described in 2005.12729, section 3.

    All (B, T) float32; the sum is differentiable in `values`."""
    values, old_values, returns = (torch.where(is_response, x, 0.0) for x in (values, old_values, returns))
    held = old_values + (values - old_values).clamp(-clip_range, clip_range)
    worse = torch.maximum((values - returns).square(), (held - returns).square())
    return 0.5 * worse.sum()


def policy_ratio(logps: torch.Tensor, old_logps: torch.Tensor, is_response: torch.Tensor) -> torch.Tensor:
    """π/π_old of each token, (B, T), 1 where there is no response token, so that no gradient comes from there."""
    return torch.where(is_response, logps - old_logps, 0.0).exp()


def masked_sum(x: torch.Tensor, is_response: torch.Tensor) -> torch.Tensor:
    """The sum over response tokens, ()."""
    return torch.where(is_response, x, 0.0).sum()


def adapted_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The KL penalty's weight after a batch whose KL was `kl`, in nats a response as `target`. 1909.08593, section 2.2:

    e = clip((KL - target)/target, ±0.2),   β ← β(1 + 0.1·e)"""
    error = max(-KL_ERROR_LIMIT, min(KL_ERROR_LIMIT, (kl - target) / target))
    return kl_coef * (1 + KL_GAIN * error)
