"""From a checkpoint's config.json to a `DecoderSpec`: one file per family, holding only what differs.

To add a family: write `families/NAME.py` with `def spec(config: dict) -> DecoderSpec`, and name it here under the
`model_type` its config.json carries. If it needs something the decoder cannot do, add an option to `DecoderSpec`
named for what it does.
"""

from mini_forge.errors import CheckpointError
from mini_forge.model.decoder import DecoderSpec
from mini_forge.model.families import llama, mistral, qwen2, qwen3

FAMILIES = {"llama": llama.spec, "mistral": mistral.spec, "qwen2": qwen2.spec, "qwen3": qwen3.spec}


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
