"""Preference losses: from the log-probabilities of a pair's two responses to the pair's loss.

Notation: s_w and s_l are the log-ratios log π(y|x) - log π_ref(y|x) of the chosen ("winning") and the rejected
response, Δ = s_w - s_l, r = β·s the implicit rewards, ε the label smoothing, |y| a response's tokens. Every loss takes
(Scores, LossOptions) and returns (P,) float32, in nats where it is a log-likelihood, differentiable in the policy's
log-probabilities. `LOSSES` holds them all; `REFERENCE_FREE` those that never look at the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

DISCOPOP_TEMPERATURE = 0.05  # τ of DiscoPOP (2406.08414) Eq. 5


@dataclass(frozen=True)
class Scores:
    """What a model and its reference say of P pairs; every field (P,) float32.

    Log-probabilities are sums over a response's tokens, in nats; the reference's carry no gradient, and are None for
    losses without one. `*_tokens` count what was summed."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    ref_chosen: torch.Tensor | None
    ref_rejected: torch.Tensor | None
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def chosen_logratio(self) -> torch.Tensor:
        return self.chosen - self.ref_chosen

    @property
    def rejected_logratio(self) -> torch.Tensor:
        return self.rejected - self.ref_rejected

    @property
    def chosen_mean(self) -> torch.Tensor:
        return self.chosen / self.chosen_tokens

    @property
    def rejected_mean(self) -> torch.Tensor:
        return self.rejected / self.rejected_tokens


@dataclass(frozen=True)
class LossOptions:
    """beta: β of each paper (τ of IPO, λ of ORPO). label_smoothing: ε, the share of flipped labels. target_margin: γ of
    SimPO, in units of the reward."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    target_margin: float = 0.5


def dpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, ref_chosen: torch.Tensor, ref_rejected: torch.Tensor, beta: float
) -> torch.Tensor:
    """Preference loss of each pair, in nats. DPO (2305.18290) Eq. 7.

    All (P,) float32 summed log-probabilities of response tokens; returns (P,), differentiable in the first two."""
    chosen_logratio = chosen - ref_chosen
    rejected_logratio = rejected - ref_rejected
    return -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))


def sigmoid(s: Scores, options: LossOptions) -> torch.Tensor:
    """-(1-ε) log σ(βΔ) - ε log σ(-βΔ). DPO (2305.18290) Eq. 7; with ε > 0 conservative DPO (E. Mitchell, "A
    note on DPO with noisy preferences & relationship to IPO", 2023)."""
    as_labelled = dpo_loss(s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, options.beta)
    if not options.label_smoothing:
        return as_labelled
    flipped = dpo_loss(s.rejected, s.chosen, s.ref_rejected, s.ref_chosen, options.beta)
    return (1 - options.label_smoothing) * as_labelled + options.label_smoothing * flipped


def robust(s: Scores, options: LossOptions) -> torch.Tensor:
    """[-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1-2ε), the unbiased estimate of the DPO loss where a share ε of the labels
    is flipped. Robust DPO (2403.00409)."""
    epsilon = options.label_smoothing
    as_labelled = dpo_loss(s.chosen, s.rejected, s.ref_chosen, s.ref_rejected, options.beta)
    flipped = dpo_loss(s.rejected, s.chosen, s.ref_rejected, s.ref_chosen, options.beta)
    return ((1 - epsilon) * as_labelled - epsilon * flipped) / (1 - 2 * epsilon)


def ipo(s: Scores, options: LossOptions) -> torch.Tensor:
    """(s_w/|y_w| - s_l/|y_l| - 1/(2β))². IPO (2310.12036) Eq. 17, with per-token means, as its authors computed it: of
    sums, the square would grow with the responses' lengths."""
    difference = s.chosen_logratio / s.chosen_tokens - s.rejected_logratio / s.rejected_tokens
    return (difference - 1 / (2 * options.beta)) ** 2


def hinge(s: Scores, options: LossOptions) -> torch.Tensor:
    """max(0, 1 - βΔ). The hinge of SLiC-HF (2305.10425), of log-ratios: the "hinge-norm" of RSO (2309.06657)."""
    return F.relu(1 - options.beta * (s.chosen_logratio - s.rejected_logratio))


def exo_pair(s: Scores, options: LossOptions) -> torch.Tensor:
    """σ(βΔ)[log σ(βΔ) - log(1-ε)] + σ(-βΔ)[log σ(-βΔ) - log ε], the reverse KL between the model's preference and the
    label's (1-ε, ε); needs ε > 0. EXO (2402.00856) Eq. 16."""
    margin = options.beta * (s.chosen_logratio - s.rejected_logratio)
    label = torch.tensor([1 - options.label_smoothing, options.label_smoothing]).log()
    return margin.sigmoid() * (F.logsigmoid(margin) - label[0]) + (-margin).sigmoid() * (
        F.logsigmoid(-margin) - label[1]
    )


def nca_pair(s: Scores, options: LossOptions) -> torch.Tensor:
    """-log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l). NCA (2402.05369), its loss on preferences of K = 2 responses."""
    won, lost = options.beta * s.chosen_logratio, options.beta * s.rejected_logratio
    return -F.logsigmoid(won) - 0.5 * F.logsigmoid(-won) - 0.5 * F.logsigmoid(-lost)


def bco_pair(s: Scores, options: LossOptions) -> torch.Tensor:
    """-log σ(r_w) - log σ(-r_l). BCO (2404.04656) on pairs, without its running shift of the rewards: each side is
    classified by itself."""
    return -F.logsigmoid(options.beta * s.chosen_logratio) - F.logsigmoid(-options.beta * s.rejected_logratio)


def sppo_hard(s: Scores, options: LossOptions) -> torch.Tensor:
    """(s_w - 1/(2β))² + (s_l + 1/(2β))². SPPO (2405.00675) Eq. 4.7 with win rates of 1 and 0."""
    target = 0.5 / options.beta
    return (s.chosen_logratio - target) ** 2 + (s.rejected_logratio + target) ** 2


def apo_zero(s: Scores, options: LossOptions) -> torch.Tensor:
    """1 - σ(r_w) + σ(r_l): chosen up, rejected down. APO (2408.06266) Eq. 7."""
    return 1 - (options.beta * s.chosen_logratio).sigmoid() + (options.beta * s.rejected_logratio).sigmoid()


def apo_down(s: Scores, options: LossOptions) -> torch.Tensor:
    """σ(r_w) + 1 - σ(βΔ): both down, the rejected further, for a model that is better than its data. APO (2408.06266)
    Eq. 8."""
    margin = options.beta * (s.chosen_logratio - s.rejected_logratio)
    return (options.beta * s.chosen_logratio).sigmoid() + 1 - margin.sigmoid()


def aot(s: Scores, options: LossOptions) -> torch.Tensor:
    """cDPO of the differences between sorted log π(y_w) - log π(y_l) and sorted log π_ref(y_w) - log π_ref(y_l): one
    distribution of margins dominates the other. AOT (2406.05882), paired, with the logistic loss.

    The only loss in which pairs meet: they are sorted within a microbatch, so the batch size is part of it."""
    margins = (s.chosen - s.rejected).sort().values
    difference = options.beta * (margins - (s.ref_chosen - s.ref_rejected).sort().values)
    epsilon = options.label_smoothing
    return -(1 - epsilon) * F.logsigmoid(difference) - epsilon * F.logsigmoid(-difference)


def discopop(s: Scores, options: LossOptions) -> torch.Tensor:
    """-log σ(l)(1-m) + exp(-l) m with l = βΔ, m = σ(l/τ), a loss found by a language model. DiscoPOP (2406.08414)
    Eq. 5. Not convex: near Δ = 0 it falls towards negative margins."""
    margin = options.beta * (s.chosen_logratio - s.rejected_logratio)
    scaled = margin / DISCOPOP_TEMPERATURE
    exponential = (F.logsigmoid(scaled) - margin).exp()  # exp(-l) m, of which neither may overflow alone
    return -F.logsigmoid(margin) * (1 - scaled.sigmoid()) + exponential


def simpo(s: Scores, options: LossOptions) -> torch.Tensor:
    """-log σ(β log π(y_w)/|y_w| - β log π(y_l)/|y_l| - γ), without a reference. SimPO (2405.14734) Eq. 6."""
    return -F.logsigmoid(options.beta * (s.chosen_mean - s.rejected_mean) - options.target_margin)


def orpo(s: Scores, options: LossOptions) -> torch.Tensor:
    """-log p_w - λ log σ(log odds(p_w) - log odds(p_l)), p the geometric mean of a response's token probabilities,
    odds(p) = p/(1-p), without a reference. ORPO (2403.07691) Eq. 6 and 7."""
    log_odds = s.chosen_mean - _log1mexp(s.chosen_mean) - s.rejected_mean + _log1mexp(s.rejected_mean)
    return -s.chosen_mean - options.beta * F.logsigmoid(log_odds)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - eˣ) for x < 0, exact to rounding near zero too; x is held below -1e-7, a probability of 1 in float32."""
    return torch.log(-torch.expm1(x.clamp(max=-1e-7)))


def implicit_rewards(s: Scores, options: LossOptions, loss_type: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(chosen, rejected), each (P,), without gradient: β·s (DPO Eq. 5 up to a constant of the prompt); of a
    loss without a reference, β times the mean log-probability of a token."""
    if loss_type in REFERENCE_FREE:
        return options.beta * s.chosen_mean.detach(), options.beta * s.rejected_mean.detach()
    return options.beta * s.chosen_logratio.detach(), options.beta * s.rejected_logratio.detach()


LOSSES: dict[str, Callable[[Scores, LossOptions], torch.Tensor]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "discopop": discopop,
    "simpo": simpo,
    "orpo": orpo,
}
REFERENCE_FREE = ("simpo", "orpo")
