"""The keys that all Llama-shaped config.json files share."""

from mini_forge.errors import CheckpointError
from mini_forge.model.decoder import DecoderSpec, LayerSpec
from mini_forge.model.rope import rope_spec


def base_spec(config: dict, layers: list[LayerSpec] | None = None, **options) -> DecoderSpec:
    """The shared part of a spec; `layers` by default all alike, `options` are DecoderSpec fields that differ."""
    if "activation" not in options and config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act {config['hidden_act']!r} is not supported; supported: silu")
    heads = config["num_attention_heads"]
    shared = {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "mlp_size": config["intermediate_size"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "layers": tuple(layers or [LayerSpec()] * config["num_hidden_layers"]),
        "rope": options.get("rope") or rope_spec(config),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "max_positions": config.get("max_position_embeddings", 2048),
        "tied_head": config.get("tie_word_embeddings", False),
    }
    return DecoderSpec(**{**shared, **options})


def balance_coef(config: dict) -> float:
    """The weight of the balance loss; a config.json asks for the loss by `output_router_logits`."""
    return config.get("router_aux_loss_coef", 0.001) if config.get("output_router_logits") else 0.0


def windowed_layers(config: dict) -> list[LayerSpec]:
    return [LayerSpec(window) for window in layer_windows(config)]


def layer_windows(config: dict) -> list[int | None]:
    """Each layer's window: from `layer_types` where present, else layers from `max_window_layers` on slide."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    layers = config["num_hidden_layers"]
    first_sliding = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= first_sliding else "full_attention" for i in range(layers)
    ]
    return [window if kind == "sliding_attention" else None for kind in kinds]
