"""Mistral: Llama without biases; every layer slides where `sliding_window` is set."""

from mini_forge.model.families.common import base_spec
from mini_forge.model.spec import LayerSpec


def spec(config):
    return base_spec(config, [LayerSpec(config.get("sliding_window"))] * config["num_hidden_layers"])
