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
from mini_forge.model.families.numbers import check_numbers, check_written
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


def text_model(config: dict) -> str:
    """What others call `model.` of this checkpoint: an adapter's names are those of the class that transformers'
    AutoModelForCausalLM makes of it, which may be a multimodal one."""
    return getattr(MODULES[config["model_type"]], "TEXT_MODEL", "model.") if "text_config" in config else "model."


def decoder_spec(config: dict) -> DecoderSpec:
    """config: the parsed config.json. Raises CheckpointError for an unsupported model_type or a missing key."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise CheckpointError(f"config.json: model_type {kind!r} is not supported; supported: {supported}")
    try:
        check_written(config)
        return _checked(FAMILIES[kind](config), config.get("text_config", config))
    except CheckpointError:
        raise
    except KeyError as missing:
        raise CheckpointError(f"config.json: model_type {kind!r} needs the key {missing}, which is absent") from None
    except (
        IndexError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
    ) as error:  # a text where a number belongs, a zero
        raise CheckpointError(f"config.json: a key has a value of the wrong kind ({error})") from None


def _checked(spec: DecoderSpec, config: dict) -> DecoderSpec:
    """The spec, if its numbers agree; raises CheckpointError where they cannot be a model's."""
    check_numbers(spec)
    kinds = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention", "chunked_attention"}
    experts = spec.experts
    wrong = {
        f"num_hidden_layers {config['num_hidden_layers']!r} but {len(spec.layers)} layers described":
            len(spec.layers) != config["num_hidden_layers"] or not spec.layers,
        f"layer_types has {sorted(map(str, kinds))}, which is not supported": bool(kinds),
        f"num_attention_heads {spec.heads} is not a multiple of num_key_value_heads {spec.kv_heads}":
            spec.heads % spec.kv_heads != 0,
        f"tie_word_embeddings {spec.tied_head!r} must be true or false": not isinstance(spec.tied_head, bool),
        "num_experts_per_tok must be at least 1 and at most the number of experts":
            experts is not None and not 1 <= experts.top_k <= experts.count,
    }  # fmt: skip
    problems = [f"config.json: {text}" for text, is_wrong in wrong.items() if is_wrong]
    if problems:
        raise CheckpointError(*problems)
    return spec
