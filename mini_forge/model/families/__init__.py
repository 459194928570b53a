"""From a checkpoint's config.json to a `DecoderSpec`: one file per family, holding only what differs.

To add a family: write `families/NAME.py` with `def spec(config: dict) -> DecoderSpec`, and name it here under the
`model_type` its config.json carries. If it needs something the decoder cannot do, add an option to `DecoderSpec`
named for what it does.
"""

from mini_forge.errors import CheckpointError
from mini_forge.model.families import (
    gemma3,
    gpt_oss,
    granite,
    llama,
    llama4,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from mini_forge.model.spec import DecoderSpec

MODULES = {
    "llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3, "qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss,
    "llama4": llama4, "llama4_text": llama4, "mixtral": mixtral, "gemma3": gemma3, "gemma3_text": gemma3, "phi3": phi3,
    "smollm3": smollm3, "granite": granite,
}  # fmt: skip
FAMILIES = {kind: module.spec for kind, module in MODULES.items()}


def expert_layout(config: dict):
    """How this checkpoint's experts lie on disk (`mini_forge.model.families.layout`), None for a model without."""
    return getattr(MODULES[config["model_type"]], "LAYOUT", None)


def decoder_spec(config: dict) -> DecoderSpec:
    """config: the parsed config.json. Raises CheckpointError for an unsupported model_type or a missing key."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise CheckpointError(f"config.json: model_type {kind!r} is not supported; supported: {supported}")
    try:
        return FAMILIES[kind](config)
    except KeyError as missing:
        raise CheckpointError(f"config.json: model_type {kind!r} needs the key {missing}, which is absent") from None
    except CheckpointError:
        raise
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # a text where a number belongs, a zero
        raise CheckpointError(f"config.json: a key has a value of the wrong kind ({error})") from None
