"""Qwen3 (dense): a weighted RMSNorm on every query and key head before RoPE, explicit head width."""

from mini_forge.model.families.common import base_spec, layer_windows


def spec(config):
    bias = config.get("attention_bias", False)
    return base_spec(config, windows=layer_windows(config), qkv_bias=bias, out_bias=bias, qk_norm="weighted")
