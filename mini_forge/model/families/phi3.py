"""Phi-3: q, k, v stored as one matrix, and so gate and up; part of a head may go without rotation."""

from mini_forge.errors import CheckpointError
from mini_forge.model.families.common import base_spec
from mini_forge.model.rope import rope_spec
from mini_forge.model.spec import LayerSpec


def spec(config):
    rope = rope_spec(config, may_be_partial=True)
    if rope.kind != "default":
        raise CheckpointError(f"config.json: rope type {rope.kind!r} is not supported for phi3; supported: default")
    layers = [LayerSpec(config.get("sliding_window"))] * config["num_hidden_layers"]
    return base_spec({"rms_norm_eps": 1e-5, **config}, layers, rope=rope, fused_projections=True)
