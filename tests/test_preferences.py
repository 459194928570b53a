"""Every preference loss against its formula, worked by hand on two pairs."""

import math

import pytest
import torch

import mini_forge
from mini_forge.config import LOSS_SUGGESTIONS, PREFERENCE_LOSSES, TrainingConfig
from mini_forge.config_rules import REFERENCE_FREE_LOSSES, SMOOTHED_LOSSES
from mini_forge.errors import ConfigError
from mini_forge.training.preferences import LOSSES, REFERENCE_FREE, LossOptions, Scores, implicit_rewards

# With β = 1/2. Pair A: s_w = 2, s_l = -1, so r_w = 1, r_l = -1/2, βΔ = 3/2. Pair B: s_w = -1, s_l = 0, so r_w = -1/2,
# r_l = 0, βΔ = -1/2. Means per token: A -3/2 and -5/2, B -3/2 and -1.
CHOSEN, REF_CHOSEN, CHOSEN_TOKENS = [-6.0, -3.0], [-8.0, -2.0], [4.0, 2.0]
REJECTED, REF_REJECTED, REJECTED_TOKENS = [-5.0, -5.0], [-4.0, -5.0], [2.0, 5.0]
# log σ: ±1: -0.313262, -1.313262; ±3/2: -0.201413, -1.701413; ±1/2: -0.474077, -0.974077; 0: -0.693147
# σ: 1: 0.731059, 3/2: 0.817574, 1/2: 0.622459
BY_HAND = {
    ("sigmoid", 0.0): [0.201413, 0.974077],
    ("sigmoid", 0.2): [0.8 * 0.201413 + 0.2 * 1.701413, 0.8 * 0.974077 + 0.2 * 0.474077],
    ("robust", 0.2): [(0.8 * 0.201413 - 0.2 * 1.701413) / 0.6, (0.8 * 0.974077 - 0.2 * 0.474077) / 0.6],
    ("robust", 0.0): [0.201413, 0.974077],
    ("ipo", 0.0): [(2 / 4 + 1 / 2 - 1) ** 2, (-1 / 2 - 0 / 5 - 1) ** 2],
    ("hinge", 0.0): [0, 1.5],
    # ln 0.8 = -0.223144, ln 0.2 = -1.609438
    ("exo_pair", 0.2): [
        0.817574 * (-0.201413 + 0.223144) + 0.182426 * (-1.701413 + 1.609438),
        0.377541 * (-0.974077 + 0.223144) + 0.622459 * (-0.474077 + 1.609438),
    ],
    ("nca_pair", 0.0): [0.313262 + 0.5 * 1.313262 + 0.5 * 0.474077, 0.974077 + 0.5 * 0.474077 + 0.5 * 0.693147],
    ("bco_pair", 0.0): [0.313262 + 0.474077, 0.974077 + 0.693147],
    ("sppo_hard", 0.0): [(2 - 1) ** 2 + (-1 + 1) ** 2, (-1 - 1) ** 2 + (0 + 1) ** 2],
    ("apo_zero", 0.0): [1 - 0.731059 + 0.377541, 1 - 0.377541 + 0.5],
    ("apo_down", 0.0): [0.731059 + 1 - 0.817574, 0.377541 + 1 - 0.377541],
    # margins of the policy -1 and 2, of the reference -4 and 3, both in order already
    ("aot", 0.0): [0.201413, 0.974077],
    ("aot", 0.2): [0.8 * 0.201413 + 0.2 * 1.701413, 0.8 * 0.974077 + 0.2 * 0.474077],
    # m = σ(30) = 1 and σ(-10) = 0.0000454; e^-1.5 = 0.223130, e^0.5 = 1.648721
    ("discopop", 0.0): [0.223130, 0.974077 * (1 - 0.0000454) + 1.648721 * 0.0000454],
    # margins 1/2·(-3/2 + 5/2) - 0.3 = 0.2 and 1/2·(-3/2 + 1) - 0.3 = -0.55; e^-0.2 = 0.818731, e^0.55 = 1.733253
    ("simpo", 0.0): [math.log(1.818731), math.log(2.733253)],
    # log odds of e^-1.5, e^-2.5, e^-1: -1.247519, -2.414350, -0.541325; differences 1.166831 and -0.706194
    ("orpo", 0.0): [1.5 + 0.5 * math.log(1.311352), 1.5 + 0.5 * math.log(3.026266)],
}


def scores(dtype=torch.float32, requires_grad=False) -> Scores:
    values = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS)
    tensors = [torch.tensor(value, dtype=dtype) for value in values]
    return Scores(*(t.requires_grad_() if requires_grad and i < 2 else t for i, t in enumerate(tensors)))


@pytest.mark.parametrize(("loss_type", "epsilon"), BY_HAND, ids=lambda value: str(value))
def test_a_loss_is_its_formula(loss_type, epsilon):
    losses = LOSSES[loss_type](scores(), LossOptions(beta=0.5, label_smoothing=epsilon, target_margin=0.3))
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(BY_HAND[loss_type, epsilon], abs=3e-6)


def test_every_loss_is_worked_by_hand_and_can_be_configured():
    assert {name for name, _ in BY_HAND} == set(LOSSES) == set(PREFERENCE_LOSSES)
    assert set(REFERENCE_FREE) == set(REFERENCE_FREE_LOSSES)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_gradient_is_the_difference_quotient(loss_type):
    exact = scores(torch.float64, requires_grad=True)
    options = LossOptions(beta=0.5, label_smoothing=0.1, target_margin=0.3)

    def loss(chosen, rejected):
        others = (exact.ref_chosen, exact.ref_rejected, exact.chosen_tokens, exact.rejected_tokens)
        return LOSSES[loss_type](Scores(chosen, rejected, *others), options)

    assert torch.autograd.gradcheck(loss, (exact.chosen, exact.rejected))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_label_smoothing_moves_the_losses_that_say_so_and_no_other(loss_type):
    plain, smoothed = (LOSSES[loss_type](scores(), LossOptions(0.5, epsilon)) for epsilon in (0.1, 0.3))
    assert torch.equal(plain, smoothed) != (loss_type in SMOOTHED_LOSSES)


@pytest.mark.parametrize("loss_type", REFERENCE_FREE)
def test_losses_without_a_reference_do_not_look_at_it(loss_type):
    s = scores()
    alone = Scores(s.chosen, s.rejected, None, None, s.chosen_tokens, s.rejected_tokens)
    assert torch.equal(LOSSES[loss_type](alone, LossOptions()), LOSSES[loss_type](s, LossOptions()))
    assert implicit_rewards(alone, LossOptions(0.5), loss_type)[0].tolist() == [-0.75, -0.75]


def test_aot_compares_the_sorted_margins():
    """Policy 2 and -1, reference -4 and 3: sorted, the differences are 3 and -1; pair by pair they would be 6, -4."""
    numbers = [torch.tensor(v) for v in ([2.0, -1.0], [0.0, 0.0], [-4.0, 3.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0])]
    assert LOSSES["aot"](Scores(*numbers), LossOptions(0.5)).tolist() == pytest.approx([0.201413, 0.974077], abs=1e-6)


def test_rewards_are_beta_times_the_log_ratio():
    chosen, rejected = implicit_rewards(scores(requires_grad=True), LossOptions(0.5), "sigmoid")
    assert chosen.tolist() == [1, -0.5] and rejected.tolist() == [-0.5, 0] and not chosen.requires_grad


def test_orpo_and_its_gradient_are_finite_for_a_response_that_is_certain():
    chosen, *others = [torch.tensor([v]) for v in (0.0, -1.0, 0.0, 0.0, 1.0, 1.0)]
    loss = LOSSES["orpo"](Scores(chosen.requires_grad_(), *others), LossOptions())
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


def test_the_public_loss_is_dpo():
    arguments = (torch.tensor(v) for v in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED))
    assert mini_forge.dpo_loss(*arguments, 0.5).tolist() == pytest.approx([0.201413, 0.974077], abs=1e-6)
    zeros = torch.zeros(3)
    assert mini_forge.dpo_loss(zeros, zeros, zeros, zeros, 0.1).tolist() == pytest.approx([math.log(2)] * 3, abs=1e-7)


def config(**keys) -> TrainingConfig:
    needed = {"task": "text-generation", "model_name": "m", "dataset": "d", "compute_specs": "low_end"}
    return TrainingConfig.from_dict({**needed, "strategy": "dpo", **keys})


def test_settings_that_a_loss_cannot_have_or_does_not_use_are_told():
    assert config().learning_rate == 5e-7 and config().beta == 0.1 and config().warnings == []
    with pytest.raises(ConfigError, match='label_smoothing: Must be > 0 with loss_type "exo_pair"'):
        config(loss_type="exo_pair", label_smoothing=0)
    assert config(loss_type="exo_pair").label_smoothing == LOSS_SUGGESTIONS["exo_pair"]["label_smoothing"] > 0
    assert config(loss_type="simpo").provenance["beta"] == "loss_type simpo" and config(loss_type="simpo").beta == 2
    assert config(loss_type="simpo", beta=0.3).beta == 0.3
    for keys, name in [
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing"),
        ({"simpo_gamma": 1}, "simpo_gamma"),
        ({"loss_type": "orpo", "precompute_reference": True}, "precompute_reference"),
        ({"train_on_prompt": True}, "train_on_prompt"),
        ({"neftune_noise_alpha": 5}, "neftune_noise_alpha"),
    ]:
        assert [warning.split(":")[0] for warning in config(**keys).warnings] == [name]


def test_discopop_stays_finite_where_its_exponential_alone_would_not():
    chosen = torch.tensor([-90.0, -800.0, 800.0], requires_grad=True)
    zeros = torch.zeros(3)
    loss = LOSSES["discopop"](Scores(chosen, zeros, zeros, zeros, 1, 1), LossOptions(1.0))
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([90, 800, 0]) and chosen.grad.tolist() == pytest.approx([-1, -1, 0])
