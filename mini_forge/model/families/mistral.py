"""Mistral: Llama without biases; every layer slides where `sliding_window` is set."""

from mini_forge.model.families.common import base_spec


def spec(config):
    return base_spec(config, windows=[config.get("sliding_window")] * config["num_hidden_layers"])
