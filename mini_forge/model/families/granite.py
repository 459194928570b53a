"""Granite: Llama with four constants, on embeddings, attention logits, what a sublayer adds, and the final logits."""

from mini_forge.model.families.common import base_spec


def spec(config):
    bias = config.get("attention_bias", False)
    return base_spec(
        config, qkv_bias=bias, out_bias=bias, mlp_bias=config.get("mlp_bias", False),
        embed_scale=config.get("embedding_multiplier", 1.0), attention_scale=config.get("attention_multiplier", 1.0),
        residual_scale=config.get("residual_multiplier", 1.0), hidden_scale=1 / config.get("logits_scaling", 1.0),
    )  # fmt: skip
