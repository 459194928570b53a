"""The numbers of a config.json, of whichever family: each must be of the kind that the decoder computes with."""

import math

from mini_forge.errors import CheckpointError
from mini_forge.model.spec import DecoderSpec

COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "max_position_embeddings")  # fmt: skip
MOST_LAYERS = 10_000  # what is made before a tensor is looked for
QUANT_METHODS = (None, "bitsandbytes", "mxfp4")
OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim")  # null as if absent


def check_written(config: dict):
    """Refuses what no family can work with, by its name; raises CheckpointError."""
    for key in ("quantization_config", "text_config"):
        record = config.get(key, {})
        if not isinstance(record, dict) and (record is not None or key == "text_config"):
            raise CheckpointError(f"config.json: {key} {record!r} must be an object, or left out")
    text = config.get("text_config", config)
    for record in (config, text):
        method = (record.get("quantization_config") or {}).get("quant_method")
        if method not in QUANT_METHODS:
            raise CheckpointError(
                f"config.json: quantization_config is {method!r}, which is not supported; take the model unquantized, "
                "or in bitsandbytes' 4 or 8 bits"
            )
    counts = {key: text[key] for key in COUNTS if key in text}
    _refuse_numbers(counts | {key: text[key] for key in OPTIONAL_COUNTS if text.get(key) is not None}, {})
    if counts.get("num_hidden_layers", 0) > MOST_LAYERS:
        raise CheckpointError(
            f"config.json: num_hidden_layers {counts['num_hidden_layers']} must be at most {MOST_LAYERS}; copy the "
            "file again from its source"
        )


def _refuse_numbers(counts: dict, sizes: dict):
    """Raises CheckpointError for counts that are no whole numbers from 1, and sizes that are no numbers above 0."""
    wrong = [f"{key} {n!r} must be a whole number, at least 1" for key, n in counts.items() if not _is_count(n)]
    wrong += [f"{key} {x!r} must be a finite number above 0" for key, x in sizes.items() if not _is_size(x)]
    if wrong:
        raise CheckpointError(*[f"config.json: {text}; copy the file again from its source" for text in wrong])


def _is_count(value) -> bool:
    return type(value) is int and value >= 1


def _is_size(value) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def check_numbers(spec: DecoderSpec):
    """Refuses a spec whose numbers are of the wrong kind, wherever its family has them from."""
    counts = {
        "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size, "intermediate_size": spec.mlp_size,
        "num_attention_heads": spec.heads, "num_key_value_heads": spec.kv_heads, "head_dim": spec.head_size,
        "max_position_embeddings": spec.max_positions,
    }  # fmt: skip
    optional = {"sliding_window": {layer.window for layer in spec.layers},
                "attention_chunk_size": {layer.chunk for layer in spec.layers}}  # fmt: skip
    if spec.experts is not None:
        counts |= {"number of experts": spec.experts.count, "num_experts_per_tok": spec.experts.top_k,
                   "width of an expert": spec.experts.size}  # fmt: skip
        optional["width of the shared expert"] = {spec.experts.shared_size}
    counts |= {key: value for key, values in optional.items() for value in values if value is not None}
    sizes = {
        "rms_norm_eps": spec.norm_eps, "rope_theta": spec.rope.theta, "embedding multiplier": spec.embed_scale,
        "residual_multiplier": spec.residual_scale, "logits multiplier": spec.hidden_scale,
    }  # fmt: skip
    if spec.local_rope is not None:
        sizes["local rope_theta"] = spec.local_rope.theta
    if spec.attention_scale is not None:
        sizes["attention multiplier"] = spec.attention_scale
    if any(layer.temperature for layer in spec.layers):
        sizes["floor_scale"] = spec.temperature[1]
    _refuse_numbers(counts, sizes)
    for name, pair in {"attn_scale, floor_scale": spec.temperature, "swiglu_limit, swiglu_alpha": spec.clamp}.items():
        if not all(type(x) in (int, float) and math.isfinite(x) for x in pair):
            raise CheckpointError(f"config.json: {name} {pair!r} must be finite numbers; copy the file again")
