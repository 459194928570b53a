"""gpt-oss: a sink in every head, every other layer slides, experts with biases and a clamped unit, norms in float32.

On disk the experts are MXFP4 (blocks and scales), or bfloat16 stacks (E, D, 2F) with gate and up columns interleaved.
"""

from mini_forge.model.families.common import balance_coef, base_spec
from mini_forge.model.families.layout import InterleavedStacks
from mini_forge.model.spec import ExpertsSpec, LayerSpec

LAYOUT = InterleavedStacks()
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096}  # fmt: skip


def spec(config):
    config = {"rope_theta": 150000.0, "rms_norm_eps": 1e-5, **config}
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config["rope_parameters"] = YARN
    kinds = config.get("layer_types") or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(config["num_hidden_layers"])
    ]
    windows = [config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds]
    experts = ExpertsSpec(
        count=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        size=config["intermediate_size"],
        router_name="router",
        router_bias=True,
        balance_coef=balance_coef(config),
        bias=True,
    )
    bias = config.get("attention_bias", True)
    return base_spec(
        config, [LayerSpec(window, experts=True) for window in windows], experts=experts, activation="clamped",
        clamp=(config.get("swiglu_limit", 7.0), config.get("swiglu_alpha", 1.702)), sinks=True, qkv_bias=bias,
        out_bias=bias, norm_product="float32",
    )  # fmt: skip
