"""Llama 2, 3, 3.1-3.3 and its many namesakes (SmolLM2, TinyLlama): the base case, biases by config."""

from mini_forge.model.families.common import base_spec


def spec(config):
    bias = config.get("attention_bias", False)
    return base_spec(config, qkv_bias=bias, out_bias=bias, mlp_bias=config.get("mlp_bias", False))
