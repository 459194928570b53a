"""Rotary position embedding: frequencies and their long-context scalings.

Angles of position p: p · inv_freq (C/2,), RoFormer (2104.09864) Eq. 15. Scalings change inv_freq, at construction;
YaRN also scales cos and sin by a constant. All frequencies are float32: bfloat16 cannot tell position 257 from 256.
"""

import math
from dataclasses import dataclass

import torch

from mini_forge.errors import CheckpointError


@dataclass(frozen=True)
class RopeSpec:
    """theta is the base of the geometric frequency series; `scaling` the checkpoint's own record, as sorted pairs."""

    theta: float
    kind: str = "default"
    scaling: tuple[tuple[str, float | bool], ...] = ()

    def get(self, key: str, default=None):
        return dict(self.scaling).get(key, default)

    def channels(self, head_size: int) -> int:
        """How many channels of a head are rotated, the first ones: most checkpoints rotate all."""
        return int(head_size * self.get("partial_rotary_factor", 1.0))


def inverse_frequencies(spec: RopeSpec, channels: int) -> tuple[torch.Tensor, float]:
    """(C/2,) float32 frequencies in radians a token, and the factor on cos and sin."""
    base = 1.0 / (spec.theta ** (torch.arange(0, channels, 2, dtype=torch.int64).float() / channels))
    return SCALINGS[spec.kind](spec, base, channels)


def _default(spec, base, channels):
    return base, 1.0


def _linear(spec, base, channels):
    """Position interpolation (2306.15595) Eq. 4: every position divided by the factor."""
    return base / spec.get("factor"), 1.0


def _llama3(spec, base, channels):
    """Llama 3.1's rule: slow rotations divided by `factor`, fast ones kept, a linear blend between."""
    factor, low, high = spec.get("factor"), spec.get("low_freq_factor"), spec.get("high_freq_factor")
    trained = spec.get("original_max_position_embeddings")
    wavelength = 2 * math.pi / base
    blend = (trained / wavelength - low) / (high - low)
    blended = (1 - blend) * base / factor + blend * base
    scaled = torch.where(wavelength > trained / low, base / factor, base)
    is_medium = (wavelength >= trained / high) & (wavelength <= trained / low)
    return torch.where(is_medium, blended, scaled), 1.0


def _yarn(spec, base, channels):
    """YaRN (2309.00071) Eq. 17-22: interpolate channels that turn less than beta_slow times over the trained length,
    keep those that turn more than beta_fast times, blend linearly between; scale cos and sin by 0.1·ln(factor) + 1."""
    factor, trained = spec.get("factor"), spec.get("original_max_position_embeddings")
    beta_fast, beta_slow = spec.get("beta_fast", 32), spec.get("beta_slow", 1)

    def channel_of(turns):  # the (fractional) channel pair that turns `turns` times over the trained length
        return channels * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = channel_of(beta_fast), channel_of(beta_slow)
    if spec.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    ramp = (torch.arange(channels // 2).float() - low) / (high - low or 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return base / factor * (1 - keep) + base * keep, _magnitude(spec, factor)


def yarn_magnitude(factor: float, coefficient: float = 1.0) -> float:
    """YaRN's 0.1·coefficient·ln(factor) + 1 on cos and sin, where a record names no other."""
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0


def _magnitude(spec, factor):
    if spec.get("attention_factor") is not None:
        return spec.get("attention_factor")
    if spec.get("mscale") and spec.get("mscale_all_dim"):
        return yarn_magnitude(factor, spec.get("mscale")) / yarn_magnitude(factor, spec.get("mscale_all_dim"))
    return yarn_magnitude(factor)


SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")}


def rope_spec(config: dict, default_theta: float = 10000.0, may_be_partial: bool = False) -> RopeSpec:
    """From a Hugging Face config: `rope_parameters` (new) or `rope_theta` with `rope_scaling` (old). may_be_partial:
    whether the family has rotations of a part of each head.

    Where both records stand they must mean the same: which of two counts is not the same in all versions of
    transformers."""
    records = [config.get(key) for key in ("rope_parameters", "rope_scaling")]
    specs = [_spec(record, config, default_theta) for record in records if record] or [_spec({}, config, default_theta)]
    if len(specs) == 2 and specs[0] != specs[1] and not _same(*specs):
        raise CheckpointError(
            "config.json: rope_parameters and rope_scaling mean different rotations; keep one of them"
        )
    if specs[0].get("partial_rotary_factor", 1.0) != 1 and not may_be_partial:
        raise CheckpointError(
            "config.json: partial_rotary_factor is not supported for this model_type, whose heads turn whole"
        )
    return specs[0]


def _spec(record: dict, config: dict, default_theta: float) -> RopeSpec:
    if any(isinstance(value, dict) for value in record.values()):
        raise CheckpointError("config.json: rope_parameters by kind of layer are not supported for this model_type")
    theta = record.get("rope_theta", config.get("rope_theta", default_theta))
    kind = record.get("rope_type") or record.get("type") or "default"
    if kind not in SCALINGS:
        raise CheckpointError(f"config.json: rope type {kind!r} is not supported; supported: {', '.join(SCALINGS)}")
    record = {"partial_rotary_factor": config.get("partial_rotary_factor"), **record}
    own = ("rope_theta", "rope_type", "type")
    scaling = {k: v for k, v in record.items() if k not in own and (v is not None or k == "truncate")}
    if kind in ("llama3", "yarn"):  # beside the record it has priority over that within
        trained, longest = "original_max_position_embeddings", config.get("max_position_embeddings")
        scaling[trained] = config.get(trained) or scaling.get(trained) or longest
    missing = [k for k in _REQUIRED.get(kind, ()) if scaling.get(k) is None]
    if missing:
        raise CheckpointError(
            f"config.json: rope type {kind!r} needs {', '.join(missing)}; write them beside rope_type"
        )
    _check_numbers(theta, kind, scaling)
    return RopeSpec(float(theta), kind, tuple(sorted(scaling.items())))


def _check_numbers(theta, kind: str, scaling: dict):
    """Raises CheckpointError for numbers with which there is no rotation."""
    read = (*_REQUIRED.get(kind, ()), *_OPTIONAL.get(kind, ()), "partial_rotary_factor")
    numbers = {"rope_theta": theta, **{key: scaling[key] for key in read if key in scaling}}
    wrong = [
        f"{key} {value!r} must be a finite number above 0"
        for key, value in numbers.items()
        if type(value) not in (int, float) or not 0 < value < math.inf
        if not (key in ("mscale", "mscale_all_dim") and value == 0)  # as if it were absent
    ]
    if not wrong and scaling.get("partial_rotary_factor", 1.0) > 1:
        wrong.append(f"partial_rotary_factor {scaling['partial_rotary_factor']!r} must be at most 1")
    if not wrong and kind == "yarn" and theta == 1:
        wrong.append("rope_theta 1 turns all channels alike")
    if wrong:
        raise CheckpointError(*[f"config.json: {text}; copy the file again from its source" for text in wrong])


def _same(one: RopeSpec, other: RopeSpec) -> bool:
    """Whether they turn heads of usual widths alike, however they are written."""
    if one.get("partial_rotary_factor", 1.0) != other.get("partial_rotary_factor", 1.0):
        return False
    with torch.device("cpu"):  # also while a model is made on meta
        found = [[inverse_frequencies(spec, C) for spec in (one, other)] for C in (64, 96, 128, 256)]
    return all(torch.equal(a, b) and scale == other_scale for (a, scale), (b, other_scale) in found)


class Rope(torch.nn.Module):
    """The cos and sin of a batch's positions, made once a forward pass and shared by all layers."""

    def __init__(self, spec: RopeSpec, head_size: int):
        super().__init__()
        self.spec, self.channels = spec, spec.channels(head_size)
        self._by_device: dict[torch.device, torch.Tensor] = {}

    def forward(self, position: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """position (N,) int64 → cos, sin (N, C) in `dtype`, the two halves of C alike."""
        inv_freq, magnitude = self._frequencies(position.device)
        angle = position.float()[:, None] * inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return (angle.cos() * magnitude).to(dtype), (angle.sin() * magnitude).to(dtype)

    def _frequencies(self, device):
        # Not a buffer: `.bfloat16()` on the model must not round the frequencies, and loading leaves nothing on meta.
        if device not in self._by_device:
            inv_freq, magnitude = inverse_frequencies(self.spec, self.channels)
            self._by_device[device] = (inv_freq.to(device), magnitude)
        return self._by_device[device]
