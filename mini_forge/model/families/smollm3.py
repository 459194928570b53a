"""SmolLM3: Llama in which every fourth layer has no rotation; with a sliding window, those slide."""

from mini_forge.model.families.common import base_spec, layer_windows
from mini_forge.model.spec import LayerSpec


def spec(config):
    count, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval", 4)
    has_rope = config.get("no_rope_layers") or [(i + 1) % interval for i in range(count)]
    kinds = config.get("layer_types") or ["full_attention" if turns else "sliding_attention" for turns in has_rope]
    windows = layer_windows({**config, "layer_types": kinds})
    layers = [LayerSpec(w, rope="global" if turns else None) for w, turns in zip(windows, has_rope, strict=True)]
    bias = config.get("attention_bias", False)
    config = {"tie_word_embeddings": True, "rope_theta": 2e6, **config}
    return base_spec(config, layers, qkv_bias=bias, out_bias=bias, mlp_bias=config.get("mlp_bias", False))
