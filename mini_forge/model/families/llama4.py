"""Llama-4, its text part: interleaved RoPE with chunked attention, and every few layers none of both; sigmoid experts.

Layers without RoPE see the whole document and warm their queries with the position (2501.19399). A layer has experts
iff its number is in `moe_layers`; each token passes one of them, its input scaled, and the shared expert. On disk the
experts are stacks (E, D, 2F) and (E, F, D). The vision part of a multimodal checkpoint is not read.
"""

from mini_forge.model.families.common import base_spec
from mini_forge.model.families.layout import TransposedStacks
from mini_forge.model.spec import ExpertsSpec, LayerSpec

LAYOUT = TransposedStacks()


def spec(config):
    config = {"rope_theta": 5e5, "rms_norm_eps": 1e-5, **config.get("text_config", config)}
    count = config["num_hidden_layers"]
    has_rope = config.get("no_rope_layers") or [(i + 1) % config.get("no_rope_layer_interval", 4) for i in range(count)]
    kinds = config.get("layer_types") or ["chunked_attention" if turns else "full_attention" for turns in has_rope]
    step = config.get("interleave_moe_layer_step", 1)
    moe = config.get("moe_layers")
    moe = range(step - 1, count, step) if moe is None else moe
    layers = [
        LayerSpec(
            chunk=config.get("attention_chunk_size", 8192) if kinds[i] == "chunked_attention" else None,
            rope="global" if has_rope[i] else None,
            temperature=bool(config.get("attn_temperature_tuning", True)) and not has_rope[i],
            experts=i in moe,
        )
        for i in range(count)
    ]
    experts = ExpertsSpec(
        count=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        size=config["intermediate_size"],
        router="sigmoid",
        router_name="router",
        shared_size=config["intermediate_size"],
    )
    bias = config.get("attention_bias", False)
    return base_spec(
        config, layers, mlp_size=config.get("intermediate_size_mlp", 16384), experts=experts, qkv_bias=bias,
        out_bias=bias, rope_interleaved=True, mlp_name="feed_forward",
        qk_norm="weightless" if config.get("use_qk_norm", True) else None,
        temperature=(config.get("attn_scale", 0.1), config.get("floor_scale", 8192)),
    )  # fmt: skip
