"""Reinforcement learning from a reward: PPO (1707.06347) as InstructGPT (2203.02155) uses it, and GRPO (2402.03300).

An update samples responses from the policy, scores them, and takes a few optimizer steps on them:

    prompts → rollouts → Experience (log-probabilities, reference, values, advantages) → ppo_epochs × num_mini_batches

There is one backbone. The policy is its adapter; the reference is the same weights with the adapter off, or with
the run's first one on; the value is a linear head on the policy's hidden states; a reward model is another adapter,
swapped in by its `Scorer`. What differs
with advantage "group" (GRPO) is where advantages come from (no values) and where the KL penalty goes (into the loss).
The loop over updates is in `ppo_loop.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mini_forge.data.batches import Batch, Document, collate
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.model.decoder import Decoder, evaluating
from mini_forge.model.transfer import to_device
from mini_forge.training.adapters_swap import as_reference
from mini_forge.training.losses import model_nll
from mini_forge.training.ppo_math import (
    KL_ESTIMATORS,
    gae,
    group_advantages,
    kl_k3,
    masked_sum,
    policy_loss,
    policy_ratio,
    token_rewards,
    value_loss,
    whiten,
)
from mini_forge.training.reward import Scorer
from mini_forge.training.rollouts import Prompt, Rollout, Sampling, sample_rollouts

ROLLOUT, SHUFFLE, EVALUATION = range(3)  # what a seed is for


class ValueHead(nn.Module):
    """A linear map from a hidden state to the reward that is still to come. float32, as all of PPO's arithmetic."""

    def __init__(self, size: int):
        """Begins at zero: before it has learnt anything the value of every state is 0."""
        super().__init__()
        self.value = nn.Linear(size, 1, dtype=torch.float32)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) → (…,) float32."""
        return self.value(hidden.float()).squeeze(-1)


@dataclass(frozen=True)
class PPOSettings:
    """What an update needs of the configuration, by its keys. A run's step is an update: `total_steps`, `eval_steps`,
    `save_steps` (None: never) and `logging_steps` count these. `warmup_steps` counts the optimizer's steps in them."""

    total_steps: int
    steps_per_epoch: int
    eval_steps: int | None
    save_steps: int | None
    logging_steps: int
    rollout_batch_size: int
    micro_batch_size: int  # rollouts in one forward pass
    ppo_epochs: int
    num_mini_batches: int
    learning_rate: float
    schedule: str
    warmup_steps: int
    max_grad_norm: float
    kl_coef: float
    kl_estimator: str = "k1"
    kl_target: float | None = None  # nats a response that kl_coef adapts to; None: kl_coef is fixed
    target_kl: float | None = None  # nats a token from the rollouts' policy, at which an update stops; None: never
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    advantage: str = "gae"
    group_size: int = 1
    seed: int = 0

    @property
    def is_grouped(self) -> bool:
        return self.advantage == "group"

    @property
    def prompts_per_update(self) -> int:
        return self.rollout_batch_size // (self.group_size if self.is_grouped else 1)


@dataclass(frozen=True)
class Experience:
    """B rollouts, their responses padded on the right to T. `scores` (B,) float32, all others (B, T): `is_response`
    bool, the rest float32 and 0 where there is no response token. `logps` are those of the policy that sampled, at its
    temperature, but made by the forward pass that training makes."""

    documents: list[Document]
    scores: torch.Tensor
    is_response: torch.Tensor
    logps: torch.Tensor
    ref_logps: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @property
    def tokens(self) -> int:
        return sum(document.inputs for document in self.documents)


def policy_outputs(
    model: Decoder, batch: Batch, temperature: float, value_head: ValueHead | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(token) and V(before token) of the batch's N response tokens, both (N,) float32; zeros without a head."""
    rows, targets, _ = batch.trained()
    hidden = model(batch.input_ids, batch.position, batch.document, parents=batch.parents, rows=rows)
    logps = -model_nll(model, hidden / temperature, targets)
    return logps, torch.zeros_like(logps) if value_head is None else value_head(hidden)


@torch.no_grad()
def policy_and_reference(
    model: Decoder, documents: Sequence[Document], parts: Sequence[range], temperature: float, value_head=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(is_response, logps, ref_logps, values), each (B, T), of the documents, a forward pass for each of `parts`."""
    columns: tuple[list, list, list] = ([], [], [])
    with evaluating(model):
        for part in parts:
            batch = collate([documents[i] for i in part], share_prefixes=True)
            logps, values = policy_outputs(model, batch, temperature, value_head)
            with as_reference(model):
                reference, _ = policy_outputs(model, batch, temperature)
            for column, new in zip(columns, (logps, reference, values), strict=True):
                column.append(new)
    is_response = _is_response(documents, model.device)
    return is_response, *(padded(torch.cat(column), is_response) for column in columns)


def experience_of(
    model: Decoder, value_head: ValueHead | None, rollouts: Sequence[Rollout], scores: torch.Tensor,
    settings: PPOSettings, temperature: float, kl_coef: float,
) -> Experience:  # fmt: skip
    """Rollouts and their scores (B,), with everything that the loss needs of them."""
    documents = [document_of(rollout) for rollout in rollouts]
    parts = [part for rows in minibatches(len(rollouts), settings, 0, 0) for part in microbatches(rows, settings)]
    is_response, logps, ref_logps, values = policy_and_reference(model, documents, parts, temperature, value_head)
    scores = scores.to(logps.device)
    if settings.is_grouped:
        advantages = torch.where(is_response, group_advantages(scores, settings.group_size)[:, None], 0.0)
        returns = torch.zeros_like(advantages)
    else:
        kl = KL_ESTIMATORS[settings.kl_estimator](logps, ref_logps)
        rewards = token_rewards(scores, kl, is_response, kl_coef)
        advantages, returns = gae(rewards, values, is_response, settings.gamma, settings.gae_lambda)
        advantages = whiten(advantages, is_response)
    return Experience(documents, scores, is_response, logps, ref_logps, values, advantages, returns)


def ppo_loss(
    model: Decoder, value_head: ValueHead | None, experience: Experience, rows: Sequence[int], settings: PPOSettings,
    temperature: float, kl_coef: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """The loss of some rollouts, summed over their response tokens, and sums of what is worth watching.

    policy + value_coef·value (1707.06347 Eq. 9 without its entropy); of groups, policy + kl_coef·k3 (2402.03300 Eq. 3,
    with every token weighing the same whatever its response's length). Differentiable in adapter and head."""
    batch = collate([experience.documents[i] for i in rows], share_prefixes=True)
    names = ("is_response", "logps", "ref_logps", "values", "advantages", "returns")
    chosen = to_device(torch.tensor(rows), model.device)
    is_response, old, ref, old_values, advantages, returns = (getattr(experience, name)[chosen] for name in names)
    flat, flat_values = policy_outputs(model, batch, temperature, value_head)
    logps = padded(flat, is_response)
    total = policy_loss(logps, old, advantages, is_response, settings.clip_range)
    sums = {"policy_loss": total}
    if settings.is_grouped:
        total = total + kl_coef * masked_sum(kl_k3(logps, ref), is_response)
    else:
        values = padded(flat_values, is_response)
        sums["value_loss"] = value_loss(values, old_values, returns, is_response, settings.value_clip_range)
        total = total + settings.value_coef * sums["value_loss"]
    with torch.no_grad():
        ratio = policy_ratio(logps, old, is_response)
        sums["ratio_mean"] = masked_sum(ratio, is_response)
        sums["clip_fraction"] = masked_sum(((ratio - 1).abs() > settings.clip_range).float(), is_response)
        sums["approx_kl"] = 0.5 * masked_sum((logps - old).square(), is_response)
    return total, {"loss": total.detach(), **{name: value.detach() for name, value in sums.items()}}


def minibatches(count: int, settings: PPOSettings, update: int, epoch: int) -> list[list[int]]:
    """Rollouts 0…count-1 in mini-batches of nearly equal size. The first epoch keeps their order, which is random
    already, so its forward passes are those that made the experience, and the first ratios are exactly 1 (to rounding
    with `recompute: "selective"` and more than 1,024 tokens, which it cuts into tiles where there are gradients)."""
    order = np.arange(count)
    if epoch:
        order = np.random.default_rng([settings.seed, update, SHUFFLE, epoch]).permutation(count)
    return [part.tolist() for part in np.array_split(order, settings.num_mini_batches) if len(part)]


def microbatches(rows: Sequence[int], settings: PPOSettings) -> Iterator[Sequence[int]]:
    """The rows of one forward pass after another."""
    size = settings.micro_batch_size
    return (rows[start : start + size] for start in range(0, len(rows), size))


def document_of(rollout: Rollout) -> Document:
    """Prompt and response as a document of which the response is trained on."""
    ids = np.array([*rollout.prompt_ids, *rollout.response_ids], dtype=np.int32)
    return Document(ids, np.arange(len(ids)) >= len(rollout.prompt_ids), rollout.line)


def padded(flat: torch.Tensor, is_response: torch.Tensor) -> torch.Tensor:
    """(N,) values of the response tokens, row after row → (B, T), zeros elsewhere; differentiable."""
    return torch.zeros_like(is_response, dtype=flat.dtype).masked_scatter(is_response, flat)


def rollout_metrics(rollouts: Sequence[Rollout], experience: Experience, kl: torch.Tensor) -> dict[str, float]:
    """Means over the rollouts: `reward_mean` the score alone, `kl` nats a response (k3: never negative), entropy nats a
    token (by the sampled ones). `logp_gap`: the furthest that a token's log-probability was, when sampled, from what
    the training's forward pass says: rounding, or a fault."""
    is_response, tokens = experience.is_response, int(experience.is_response.sum())
    sampled = padded(torch.tensor([x for r in rollouts for x in r.logps], device=kl.device), is_response)
    return {
        "reward_mean": float(experience.scores.mean()),
        "reward_std": float(experience.scores.std(unbiased=False)),
        "kl": float(kl.mean()),
        "entropy": float(-masked_sum(experience.logps, is_response) / tokens),
        "response_tokens": tokens / len(rollouts),
        "logp_gap": float((sampled - experience.logps).abs().max()),
    }


def response_kl(logps: torch.Tensor, ref_logps: torch.Tensor, is_response: torch.Tensor) -> torch.Tensor:
    """(B,) float32: k3 summed over each response, in nats."""
    return torch.where(is_response, kl_k3(logps, ref_logps), 0.0).sum(-1)


def evaluate_policy(
    model: Decoder, prompts: Sequence[Prompt], tokenizer: Tokenizer, sampling: Sampling, score: Scorer, seed: int,
    batch_size: int,
) -> tuple[dict[str, float | int], list[dict]]:  # fmt: skip
    """Mean reward, KL to the reference and length of one response to each prompt, and the responses.

    Sampled as in training but with the same draws each time, so that two evaluations differ by the policy alone."""
    draws = draws_of(seed, 0, EVALUATION)
    rollouts = sample_rollouts(model, prompts, tokenizer, sampling, draws, batch_size)
    documents, scores = [document_of(rollout) for rollout in rollouts], score(rollouts)
    parts = [range(i, min(i + batch_size, len(rollouts))) for i in range(0, len(rollouts), batch_size)]
    is_response, logps, ref_logps, _ = policy_and_reference(model, documents, parts, sampling.temperature)
    kl = response_kl(logps, ref_logps, is_response)
    means = {
        "eval_reward_mean": float(scores.mean()),
        "eval_kl": float(kl.mean()),
        "eval_response_tokens": float(is_response.sum()) / len(rollouts),
        "eval_rows": len(rollouts),
    }
    return means, samples_of(rollouts, scores, kl)


def samples_of(rollouts: Sequence[Rollout], scores: torch.Tensor, kl: torch.Tensor) -> list[dict]:
    """Rollouts as a person reads them."""
    return [
        {"prompt": rollout.prompt, "response": rollout.response, "reward": reward, "kl": nats}
        for rollout, reward, nats in zip(rollouts, scores.tolist(), kl.tolist(), strict=False)
    ]


def draws_of(seed: int, update: int, purpose: int) -> torch.Generator:
    """Draws for one purpose in one update: a function of these numbers, so there is no state to save."""
    state = np.random.SeedSequence([seed, update, purpose]).generate_state(2, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def _is_response(documents: Sequence[Document], device: torch.device) -> torch.Tensor:
    """(B, T) bool: response tokens to the left, padding behind."""
    lengths = torch.tensor([document.trained_tokens for document in documents])
    return to_device(torch.arange(int(lengths.max())) < lengths[:, None], device)
