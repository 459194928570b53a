"""Qwen3 (dense): a weighted RMSNorm on every query and key head before RoPE, explicit head width."""

from mini_forge.model.families.common import base_spec, windowed_layers


def spec(config, layers=None, **options):
    bias = config.get("attention_bias", False)
    layers = layers or windowed_layers(config)
    return base_spec(config, layers, qkv_bias=bias, out_bias=bias, qk_norm="weighted", **options)
