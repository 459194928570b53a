"""Mistral: Llama without biases; every layer slides where `sliding_window` is set, or those that `layer_types` says
(Ministral)."""

from mini_forge.model.families.common import base_spec
from mini_forge.model.spec import LayerSpec


def spec(config):
    window = config.get("sliding_window", 4096)
    kinds = config.get("layer_types") or ["sliding_attention"] * config["num_hidden_layers"]
    return base_spec(config, [LayerSpec(window if kind == "sliding_attention" else None) for kind in kinds])
