"""Gemma 3, its text part: norms before and after each sublayer, their weights stored less 1; tanh-gelu.

Five of six layers slide, with a rotation of their own. The vision part of a multimodal checkpoint is not read.
"""

from mini_forge.errors import CheckpointError
from mini_forge.model.families.common import base_spec
from mini_forge.model.rope import rope_spec
from mini_forge.model.spec import LayerSpec

TEXT_MODEL = "model.language_model."  # in the multimodal class, which is what a multimodal checkpoint is loaded as


def spec(config):
    config = config.get("text_config", config)
    supported = {"final_logit_softcapping": None, "use_bidirectional_attention": False,
                 "hidden_activation": "gelu_pytorch_tanh"}  # fmt: skip
    for key, value in supported.items():
        if (config.get(key) or value) != value:
            raise CheckpointError(f"config.json: {key} {config[key]!r} is not supported; supported: {value}")
    count, pattern = config["num_hidden_layers"], config.get("sliding_window_pattern", 6)
    kinds = config.get("layer_types") or [
        "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(count)
    ]
    layers = [
        LayerSpec(config.get("sliding_window", 4096), rope="local")
        if kind == "sliding_attention"
        else LayerSpec(rope="global")
        for kind in kinds
    ]
    ropes = config.get("rope_parameters") or {}
    if "full_attention" in ropes:
        old = config.get("rope_scaling") or {}
        beside = old if ropes.keys() & set(old) else {"full_attention": old}
        whole, local = (
            {**config, "rope_parameters": ropes[kind], "rope_scaling": beside.get(kind)}
            for kind in ("full_attention", "sliding_attention")
        )
        local["rope_theta"] = config.get("rope_local_base_freq", 10000.0)
    else:
        whole, local = config, {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
    bias = config.get("attention_bias", False)
    defaults = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
                "max_position_embeddings": 131072, "tie_word_embeddings": True}  # fmt: skip
    return base_spec(
        {**defaults, **config}, layers, rope=rope_spec(whole, 1e6), local_rope=rope_spec(local), qk_norm="weighted",
        norm_product="float32", norm_offset=1.0, post_norms=True, activation="gelu_tanh", qkv_bias=bias, out_bias=bias,
        attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5, embed_scale=config["hidden_size"] ** 0.5,
    )  # fmt: skip
