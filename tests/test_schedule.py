"""Learning-rate schedules against the values other libraries use (n = 10 steps, warm-up 2, peak 1e-3)."""

import math

import pytest

from mini_forge.errors import ConfigError
from mini_forge.training.schedule import SCHEDULES, lr_at, polynomial, warmup_steps

GOLDEN = {
    "cosine": [0, 5e-4, 1e-3, 9.6194e-4, 8.53553e-4, 6.91342e-4, 5e-4, 3.08658e-4, 1.46447e-4, 3.80602e-5, 0],
    "linear": [0, 5e-4, 1e-3, 8.75e-4, 7.5e-4, 6.25e-4, 5e-4, 3.75e-4, 2.5e-4, 1.25e-4, 0],
    "polynomial": [0, 5e-4, 1e-3, 8.750125e-4, 7.50025e-4, 6.250375e-4, 5.0005e-4, 3.750625e-4, 2.50075e-4,
                   1.250875e-4, 1e-7],
    "constant": [1e-3] * 11,
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_values_of_the_reference_at_every_step(name):
    values = [lr_at(name, step, 10, 2, 1e-3) for step in range(11)]
    assert values == pytest.approx(GOLDEN[name], rel=6e-6, abs=1e-12)


def test_polynomial_of_power_two():
    values = [polynomial(step, 10, 2, 1e-3, power=2.0) for step in range(3, 11)]
    expected = [7.65648e-4, 5.62544e-4, 3.90686e-4, 2.50075e-4, 1.40711e-4, 6.25938e-5, 1.57234e-5, 1e-7]
    assert values == pytest.approx(expected, rel=4e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rate_stays_at_its_end_past_the_last_step(name):
    assert {lr_at(name, step, 10, 2, 1e-3) for step in range(10, 40)} == {lr_at(name, 10, 10, 2, 1e-3)}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (3, 3), (2, 5), (0, 0)])
def test_short_runs_have_finite_rates_between_zero_and_the_peak(name, total, warmup):
    for step in range(8):
        assert 0 <= lr_at(name, step, total, warmup, 2e-4) <= 2e-4


def test_rate_never_rises_after_warmup_even_from_a_peak_below_the_polynomial_end():
    for name in SCHEDULES:
        values = [lr_at(name, step, 50, 0, 5e-8) for step in range(60)]
        assert all(a >= b for a, b in zip(values, values[1:], strict=False)), name
        assert math.isclose(values[0], 5e-8)


@pytest.mark.parametrize(
    ("total", "ratio", "steps"),
    [
        (100, 0.03, 3),
        (33, 0.03, 1),
        (10, 0.03, 1),
        (100, 0.07, 8),
        (10, 0.0, 0),
        (7, 1.0, 7),
        (1, 0.03, 0),
        (1, 1.0, 0),
    ],
)
def test_warmup_steps_round_up_in_float_arithmetic(total, ratio, steps):
    assert warmup_steps(total, ratio) == steps


def test_an_unknown_schedule_is_an_error():
    with pytest.raises(ConfigError, match="'triangle' must be one of linear, cosine"):
        lr_at("triangle", 0, 10, 2, 1e-3)
