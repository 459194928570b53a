"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-Coder): Qwen3 whose MLPs are experts, but for layers that config.json keeps dense.

A layer has experts iff it is not in `mlp_only_layers` and its number, from 1, is a multiple of `decoder_sparse_step`.
On disk every expert has three matrices of its own.
"""

from mini_forge.model.families import qwen3
from mini_forge.model.families.common import balance_coef
from mini_forge.model.families.layout import PerExpert
from mini_forge.model.spec import ExpertsSpec, LayerSpec

LAYOUT = PerExpert(("gate_proj", "up_proj", "down_proj"))


def spec(config):
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    layers = [
        LayerSpec(window, experts=i not in dense and (i + 1) % step == 0) for i in range(config["num_hidden_layers"])
    ]
    experts = ExpertsSpec(
        count=config.get("num_experts") or config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        size=config["moe_intermediate_size"],
        normalized=config.get("norm_topk_prob", False),
        balance_coef=balance_coef(config),
    )
    return qwen3.spec(config, layers, experts=experts)
