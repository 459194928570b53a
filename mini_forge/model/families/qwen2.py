"""Qwen2 and Qwen2.5: biases on q, k, v but not on the output; upper layers may slide."""

from mini_forge.model.families.common import base_spec, layer_windows


def spec(config):
    return base_spec(config, windows=layer_windows(config), qkv_bias=True)
