"""Tiny checkpoints of families with experts, in the layouts in which the hub has them, made on the spot."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec, expert_layout
from mini_forge.model.families.layout import PerExpert, Place
from mini_forge.model.mxfp4 import quantize_mxfp4
from tests.tiny import CONFIG, tokenizer_files

SHARED = {**CONFIG, "hidden_size": 64, "head_dim": 16}
CONFIGS = {
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "norm_topk_prob": True, "num_hidden_layers": 2},
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8,
                "swiglu_limit": 7.0, "rope_theta": 150000,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
                                 "truncate": False, "original_max_position_embeddings": 128}},
    "llama4_text": {"model_type": "llama4_text", "num_local_experts": 4, "num_experts_per_tok": 1,
                    "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 16,
                    "num_hidden_layers": 4},
}  # fmt: skip


def write_checkpoint(folder: Path, kind: str, mxfp4: bool = False) -> Path:
    """A random model of CONFIGS[kind] as its family stores it; mxfp4: its experts in MXFP4 (gpt_oss)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SHARED, **CONFIGS[kind]}
    model, layout = Decoder(decoder_spec(config)), expert_layout(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in model.named_parameters():
        center = 1.0 if name.endswith("norm.weight") else 0.0
        value = center + 0.08 * torch.randn(parameter.shape, generator=generator)
        tensors |= _stored(name, value.detach(), layout, mxfp4)
    if mxfp4:
        config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_files(folder)
    return folder


def _stored(name: str, value: torch.Tensor, layout, mxfp4: bool) -> dict[str, torch.Tensor]:
    if ".experts." not in name:
        return {name: value}
    if isinstance(layout, PerExpert):
        owner, _, leaf = name.rpartition(".")
        gate, up, down = layout.names
        parts = {down: value} if leaf == "down_proj" else dict(zip((gate, up), value.chunk(2, dim=1), strict=True))
        return {f"{owner}.{e}.{part}.weight": m for part, stack in parts.items() for e, m in enumerate(stack)}
    if mxfp4 and not name.endswith("_bias"):
        packed = [quantize_mxfp4(matrix) for matrix in value]
        return {
            name + part: torch.stack([layout.stored(Place(name, None, part), p[i]) for p in packed])
            for i, part in enumerate(("_blocks", "_scales"))
        }
    return {name: torch.stack([layout.stored(Place(name), matrix) for matrix in value])}
