"""Learning rate as a pure function of the step: nothing to save, nothing to step out of time.

`step` counts from 0; the value is what optimizer step `step` uses. But for `constant`, the rate first rises in a
straight line from 0 over `warmup_steps` (so the very first step has rate 0), then falls; past `total_steps` it stays at
its end (the usual cosine would rise again). By hand, for 10 steps of which 2 warm up, peak 1e-3, at step 4:

    progress = (4 - 2) / (10 - 2) = 1/4     linear 1e-3 · 3/4 = 7.5e-4     cosine 1e-3 · (1 + cos π/4)/2 = 8.53553e-4
"""

import math

from mini_forge.errors import ConfigError

POLYNOMIAL_END = 1e-7  # where the polynomial schedule ends, as in the transformers library


def lr_at(name: str, step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Learning rate of optimizer step `step` under the schedule `name`, a key of SCHEDULES (ConfigError otherwise)."""
    if name not in SCHEDULES:
        raise ConfigError(f"lr_scheduler_type: {name!r} must be one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](step, total_steps, warmup_steps, peak)


def warmup_steps(total_steps: int, ratio: float) -> int:
    """⌈total·ratio⌉ in float arithmetic, as others compute it: 100 · 0.07 is 7.000000000000001, hence 8.

    Not as others, 0 for a run of one step: its only step would have rate 0, and nothing would be trained."""
    return math.ceil(total_steps * ratio) if total_steps > 1 else 0


def linear(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """peak · (1 − progress). The end is 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * (1 - _progress(step, total_steps, warmup_steps))


def cosine(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """peak · (1 + cos(π·progress)) / 2: half a wave down to 0."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * _progress(step, total_steps, warmup_steps)))


def constant(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """peak, from the first step: this schedule has no warm-up, whatever `warmup_steps` says."""
    return peak


def polynomial(
    step: int, total_steps: int, warmup_steps: int, peak: float, power: float = 1.0, end: float = POLYNOMIAL_END
) -> float:
    """(peak − end) · (1 − progress)^power + end. A peak below `end` stays: a rate never rises after warm-up."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    end = min(end, peak)
    return (peak - end) * (1 - _progress(step, total_steps, warmup_steps)) ** power + end


SCHEDULES = {"linear": linear, "cosine": cosine, "constant": constant, "polynomial": polynomial}


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """How much of the way after warm-up is done, in [0, 1]."""
    return min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
