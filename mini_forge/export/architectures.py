"""A `DecoderSpec` in llama.cpp's words: which of its architectures computes it, with which numbers, and where not.

llama.cpp takes less from the file than a config.json can say: much is fixed by the architecture's name. What it would
compute otherwise is therefore looked for here, and refused; but for two things, with which its own converter's files of
published models live too, and which a note tells: a sliding window that it does not have, and YaRN's ramp rounded to
whole channels.
"""

import math
from dataclasses import dataclass

import torch

from mini_forge.model.rope import RopeSpec, inverse_frequencies, yarn_magnitude
from mini_forge.model.spec import DecoderSpec


@dataclass(frozen=True)
class Architecture:
    """swaps_rows: the channels that it rotates together are neighbours (2i, 2i + 1), and the rows of q and k are to lie
    so. takes: what it has besides the bare decoder: "out_bias", "mlp_bias", "rope_factors" (divisors of frequencies, as
    a tensor), "part_turned" (rotations of a part of each head), "windows", "wide_heads" (heads · head size is not the
    hidden size), "experts"."""

    name: str
    swaps_rows: bool = False
    takes: frozenset[str] = frozenset()


def _architecture(name: str, *takes: str, swaps_rows: bool = False) -> Architecture:
    return Architecture(name, swaps_rows, frozenset(takes))


_LLAMA = _architecture("llama", "out_bias", "mlp_bias", "rope_factors", "wide_heads", "experts", swaps_rows=True)
_LLAMA4 = _architecture("llama4", "rope_factors", "windows", "wide_heads", "experts")
_GEMMA3 = _architecture("gemma3", "windows", "wide_heads")
ARCHITECTURES = {  # by the model_type of config.json
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "granite": _architecture("granite", "out_bias", "mlp_bias", "rope_factors", "wide_heads", swaps_rows=True),
    "smollm3": _architecture("smollm3", "wide_heads", swaps_rows=True),
    "qwen2": _architecture("qwen2"),
    "qwen3": _architecture("qwen3", "wide_heads"),
    "qwen3_moe": _architecture("qwen3moe", "wide_heads", "experts"),
    "phi3": _architecture("phi3", "part_turned"),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt_oss": _architecture("gpt-oss", "out_bias", "windows", "wide_heads", "experts"),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
}
LLAMA4_CHUNK, LLAMA4_TEMPERATURE, LLAMA4_ROPE_STEP = 8192, (0.1, 8192), 4
SMOLLM3_ROPE_STEP = 4
GPT_OSS_CLAMP = (7.0, 1.702)
GEMMA3_27B_LAYERS = 62  # of so many layers it takes the model for the one with a scale of its own


def metadata(arch: Architecture, spec: DecoderSpec) -> dict[str, int | float | str | list]:
    """The numbers by their GGUF keys."""
    rope, name = spec.rope, arch.name
    values = {
        "block_count": len(spec.layers),
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": spec.mlp_size,
        "vocab_size": spec.vocab_size,
        "attention.head_count": spec.heads,
        "attention.head_count_kv": spec.kv_heads,
        "attention.key_length": spec.head_size,
        "attention.value_length": spec.head_size,
        "attention.layer_norm_rms_epsilon": float(spec.norm_eps),
        "rope.dimension_count": spec.rope.channels(spec.head_size),
        "rope.freq_base": float(rope.theta),
    }
    if rope.kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope.kind, "rope.scaling.factor": float(rope.get("factor"))}
    if rope.kind == "yarn":
        values |= {
            "rope.scaling.original_context_length": int(rope.get("original_max_position_embeddings")),
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast", 32)),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow", 1)),
            "rope.scaling.attn_factor": _unusual_magnitude(spec),
        }
    if spec.local_rope is not None:
        values["rope.freq_base_swa"] = float(spec.local_rope.theta)
    windows = [layer.window for layer in spec.layers]
    if "windows" in arch.takes and any(windows):
        values["attention.sliding_window"] = next(window for window in windows if window)
        values["attention.sliding_window_pattern"] = [window is not None for window in windows]
    if spec.experts is not None:
        values |= {
            "expert_count": spec.experts.count,
            "expert_used_count": spec.experts.top_k,
            "expert_feed_forward_length": spec.experts.size,
        }
    if name == "llama4":
        values["interleave_moe_layer_step"] = _expert_step(spec)
    if name == "granite":
        values |= {
            "embedding_scale": float(spec.embed_scale),
            "residual_scale": float(spec.residual_scale),
            "attention.scale": float(spec.attention_scale),
            "logit_scale": 1 / spec.hidden_scale,
        }
    return {f"{name}.{key}": value for key, value in values.items()}


def _unusual_magnitude(spec: DecoderSpec) -> float:
    """YaRN's factor on cos and sin over the usual one, which llama.cpp makes of it by itself."""
    magnitude = inverse_frequencies(spec.rope, spec.rope.channels(spec.head_size))[1]
    return magnitude / yarn_magnitude(spec.rope.get("factor"))


def rope_factors(spec: DecoderSpec) -> torch.Tensor | None:
    """What the llama3 rule divides each frequency by, (C/2,) float32; None for other rules."""
    if spec.rope.kind != "llama3":
        return None
    channels = spec.rope.channels(spec.head_size)
    plain, scaled = (inverse_frequencies(rope, channels)[0] for rope in (RopeSpec(spec.rope.theta), spec.rope))
    return plain / scaled


def problems(arch: Architecture, spec: DecoderSpec) -> list[str]:
    """What makes llama.cpp compute another model than this one, or none at all."""
    rope, layers, has_experts = spec.rope, spec.layers, any(layer.experts for layer in spec.layers)
    heads = f"{spec.heads} heads of {spec.head_size} channels beside {spec.hidden_size} hidden ones"
    needs = {
        "out_bias": (spec.out_bias, "a bias on attention's output"),
        "mlp_bias": (spec.mlp_bias, "biases in the MLP"),
        "rope_factors": (rope.kind == "llama3", "the llama3 scaling of rotations"),
        "part_turned": (rope.channels(spec.head_size) != spec.head_size, "rotations of a part of each head"),
        "wide_heads": (spec.heads * spec.head_size != spec.hidden_size, heads),
        "experts": (has_experts, "experts"),
    }
    found = [words for name, (is_there, words) in needs.items() if is_there and name not in arch.takes]
    if arch.name in ("llama", "qwen3moe") and has_experts and not all(layer.experts for layer in layers):
        found.append("experts in some layers only")
    if spec.experts is not None and spec.experts.router == "softmax" and not spec.experts.normalized:
        found.append("probabilities of experts that are not divided by their sum")
    return [*found, *SPECIAL.get(arch.name, lambda spec: [])(spec)]


def _smollm3(spec: DecoderSpec) -> list[str]:
    usual = all((layer.rope is None) == _is_nth(i, SMOLLM3_ROPE_STEP) for i, layer in enumerate(spec.layers))
    return [] if usual else [f"layers without rotation other than every {SMOLLM3_ROPE_STEP}th"]


def _llama4(spec: DecoderSpec) -> list[str]:
    found = []
    for i, layer in enumerate(spec.layers):
        turns = not _is_nth(i, LLAMA4_ROPE_STEP)
        if (layer.rope is not None) != turns or layer.chunk != (LLAMA4_CHUNK if turns else None):
            found.append(
                f"layer {i}: other than chunks of {LLAMA4_CHUNK} with rotation, and every {LLAMA4_ROPE_STEP}th layer "
                "without both"
            )
            break
    if any(layer.temperature != (layer.rope is None) for layer in spec.layers):
        found.append("attention's temperature on other layers than those without rotation")
    if spec.temperature != LLAMA4_TEMPERATURE:
        found.append(f"attention's temperature {spec.temperature} in place of {LLAMA4_TEMPERATURE}")
    if _expert_step(spec) is None:
        found.append("experts in other than every nth layer")
    if (spec.qk_norm is not None) != (spec.experts.count != 128):
        found.append(f"norms of queries and keys {spec.qk_norm!r} with {spec.experts.count} experts")
    return found


def _gemma3(spec: DecoderSpec) -> list[str]:
    found = []
    is_largest = len(spec.layers) == GEMMA3_27B_LAYERS
    scale = (spec.hidden_size // spec.heads if is_largest else spec.head_size) ** -0.5
    if not math.isclose(spec.attention_scale, scale):
        found.append(f"query_pre_attn_scalar {spec.attention_scale**-2:g} in place of {scale**-2:g}")
    if spec.local_rope.kind != "default":
        found.append("scaled rotations in sliding layers")
    if spec.rope.kind == "yarn" and not math.isclose(_unusual_magnitude(spec), 1.0):
        found.append("an attention_factor that is YaRN's alone, not the sliding layers'")
    if any((layer.window is None) != (layer.rope == "global") for layer in spec.layers):
        found.append("local rotations in other layers than those that slide")
    return found


def _gpt_oss(spec: DecoderSpec) -> list[str]:
    found = []
    if spec.clamp != GPT_OSS_CLAMP:
        found.append(f"a unit clamped by {spec.clamp} in place of {GPT_OSS_CLAMP}")
    if spec.tied_head:
        found.append("a head that is the embedding")
    if not spec.out_bias:
        found.append("attention without biases")
    if not any(layer.window for layer in spec.layers):
        found.append("a model without sliding layers")
    return found


SPECIAL = {"smollm3": _smollm3, "llama4": _llama4, "gemma3": _gemma3, "gpt-oss": _gpt_oss}


def notes(arch: Architecture, spec: DecoderSpec) -> list[str]:
    """What llama.cpp computes otherwise though the file is written."""
    told = []
    windows = sorted({layer.window for layer in spec.layers if layer.window})
    if windows and "windows" not in arch.takes:
        told.append(f"llama.cpp has no sliding window for {arch.name}: texts of more than {windows[0]} tokens differ")
    if spec.rope.kind == "yarn" and not spec.rope.get("truncate", True):
        told.append("llama.cpp rounds the ramp of YaRN to whole channels, unlike this model: logits differ")
    return told


def _is_nth(i: int, step: int) -> bool:
    return (i + 1) % step == 0


def _expert_step(spec: DecoderSpec) -> int | None:
    """n, where it is every nth layer that has experts."""
    count = len(spec.layers)
    kinds = [layer.experts for layer in spec.layers]
    steps = (n for n in range(1, count + 1) if kinds == [_is_nth(i, n) for i in range(count)])
    return next(steps, None)
