"""Mixtral: Mistral with experts in every layer. On disk: w1 is gate, w3 up, w2 down, under `block_sparse_moe`.

In memory that is `mlp`, as in adapters of whole stacks: PEFT names modules as transformers does, which renames it too.
"""

from mini_forge.model.families.common import balance_coef, base_spec
from mini_forge.model.families.layout import PerExpert
from mini_forge.model.spec import ExpertsSpec, LayerSpec

LAYOUT = PerExpert(("w1", "w3", "w2"), mlp="block_sparse_moe")


def spec(config):
    layer = LayerSpec(config.get("sliding_window"), experts=True)
    experts = ExpertsSpec(
        count=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        size=config["intermediate_size"],
        balance_coef=balance_coef(config),
    )
    config = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, **config}
    return base_spec(config, [layer] * config["num_hidden_layers"], experts=experts)
