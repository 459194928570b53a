"""KTO (2402.01306): preferences from single responses, each labelled desirable or undesirable.

A response is compared with a reference point, z0, the mean reward of any response: an estimate of KL(π‖π_ref). The
paper's practical one is taken: the mean log-ratio of prompts with each other's completions, within a microbatch, not
below 0, which no KL is, and without gradient. So the batch size is part of the loss, and a row that is alone in its
microbatch (the last of an epoch may be) has z0 = 0.

The reference is `dpo.py`'s; no pass has dropout. At a fresh adapter all rewards and z0 are
0 and the loss of every row is half its weight, exactly or to rounding as `dpo.py` says.
"""

from dataclasses import dataclass

import torch

from mini_forge.data.labelled import LabelledBatch
from mini_forge.model.decoder import Decoder
from mini_forge.model.transfer import to_device
from mini_forge.training.dpo import reference_logps, response_logps
from mini_forge.training.losses import LossSum, Objective


@dataclass(frozen=True)
class KTOOptions:
    """beta: β. desirable_weight, undesirable_weight: λ_D and λ_U of Eq. 8."""

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


def kto_loss(logratio, is_desirable, z0, options: KTOOptions) -> torch.Tensor:
    """λ_D (1 - σ(β (r - z0))) of a desirable response, λ_U (1 - σ(β (z0 - r))) of another. KTO (2402.01306) Eq. 7, 8.

    logratio: r = log π(y|x) - log π_ref(y|x), (N,) float32 in nats. is_desirable: (N,) bool. z0: a scalar in nats.
    Returns (N,) float32, differentiable in `logratio`."""
    gain = options.beta * (logratio - z0)
    desirable = options.desirable_weight * (1 - gain.sigmoid())
    undesirable = options.undesirable_weight * (1 - (-gain).sigmoid())
    return torch.where(is_desirable, desirable, undesirable)


@torch.no_grad()
def reference_point(model: Decoder, batch: LabelledBatch) -> torch.Tensor:
    """z0 = max(0, mean of log π - log π_ref over the mismatched documents), a float32 scalar in nats."""
    if batch.mismatched is None:
        return torch.zeros((), device=model.device)
    logps, _ = response_logps(model, batch.mismatched)
    return (logps - reference_logps(model, batch.mismatched)).mean().clamp(min=0)


def kto_objective(options: KTOOptions) -> Objective:
    """The sum of `kto_loss` over a batch's rows, to be divided by the rows of a whole step."""

    def loss(model: Decoder, batch: LabelledBatch) -> LossSum:
        z0 = reference_point(model, batch)  # first, as the reference: no activations are kept of these passes
        reference = reference_logps(model, batch.row)
        logps, _ = response_logps(model, batch.row)
        is_desirable = to_device(batch.is_desirable, model.device)
        total = kto_loss(logps - reference, is_desirable, z0, options).sum()
        metrics = label_sums(logps.detach(), reference, is_desirable, z0, options.beta)
        return LossSum(total, batch.rows, metrics)

    return Objective(loss, lambda batch: batch.rows)


def label_sums(logps, reference, is_desirable, z0, beta: float) -> dict[str, float]:
    """Sums over a batch's rows; divided by all rows, `label_means` turns them into what is logged."""
    sums = {"desirable": is_desirable.float()}
    for name, values in (("rewards", beta * (logps - reference)), ("logps", logps)):
        sums[f"{name}_desirable"] = values * is_desirable
        sums[f"{name}_undesirable"] = values * ~is_desirable
    sums["kl"] = z0.expand(len(logps))
    values = torch.stack([value.sum() for value in sums.values()]).tolist()  # one wait for the device, not six
    return dict(zip(sums, values, strict=True))


def label_means(record: dict, prefix: str = "") -> dict:
    """A record of metrics with the means of `label_sums` over all rows made means over the rows of each label.

    `rewards_desirable` and `rewards_undesirable` are β times the log-ratio, `reward_margin` is their difference;
    `logps_…` are log-probabilities of whole completions in nats; `kl` is z0, in nats; `desirable` is the share of
    desirable rows. What is said of a label is left out where no row had it."""
    shares = {"desirable": record[f"{prefix}desirable"], "undesirable": 1 - record[f"{prefix}desirable"]}
    means = dict(record)
    for label, share in shares.items():
        for name in (f"{prefix}rewards_{label}", f"{prefix}logps_{label}"):
            total = means.pop(name)
            if share > 0:
                means[name] = total / share
    if 0 < shares["desirable"] < 1:
        margin = means[f"{prefix}rewards_desirable"] - means[f"{prefix}rewards_undesirable"]
        means[f"{prefix}reward_margin"] = margin
    return means
