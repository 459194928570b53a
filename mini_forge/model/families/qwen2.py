"""Qwen2 and Qwen2.5: biases on q, k, v but not on the output; upper layers may slide."""

from mini_forge.model.families.common import base_spec, windowed_layers


def spec(config):
    return base_spec(config, windowed_layers(config), qkv_bias=True)
