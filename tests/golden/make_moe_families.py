"""The families with experts for make_families.py: their options, MXFP4 storage, and a guard on the router's choices.

Expert tensors lie as on the hub: one by one for Qwen3-MoE and Mixtral, fused and transposed for gpt-oss and Llama 4.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DROPPED = object()  # a key of config.json that the hub's form lacks, so that its default counts

# gpt-oss's own, over other lengths: with 8 channels and theta 500, a blend that starts and ends between two channels.
GPT_OSS_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 8.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 64}  # fmt: skip
GPT_OSS_HUB = {"rope_theta": 500.0, "rope_scaling": GPT_OSS_YARN, "initial_context_length": 64,
               "layer_types": ["sliding_attention", "full_attention"], "swiglu_alpha": DROPPED}  # fmt: skip
# Scout's own has both factors 1.0 too: wavelengths are divided or kept, and nothing is blended.
SCOUT = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
         "original_max_position_embeddings": 32}  # fmt: skip
VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
          "patch_size": 4, "vision_output_dim": 8, "projector_input_dim": 8, "projector_output_dim": 8}  # fmt: skip

CHECKPOINTS = {  # as in make_families.py
    "qwen3_moe_hub": ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 8,
                                    "norm_topk_prob": True, "head_dim": 16},
                      {"rope_theta": 1000.0, "rope_scaling": None, "num_experts": 8, "num_local_experts": DROPPED,
                       "max_window_layers": 2}),
    # Dense, dense by the list (where the step says experts), dense, experts.
    "qwen3_moe_step": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                                     "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [1],
                                     "num_hidden_layers": 4, "intermediate_size": 24, "head_dim": 8,
                                     "tie_word_embeddings": True, "attention_bias": True,
                                     "use_sliding_window": True, "sliding_window": 6}, None),
    "mixtral_hub": ("mixtral", {"num_local_experts": 4, "intermediate_size": 24},
                    {"rope_theta": 1000.0, "head_dim": DROPPED}),
    "mixtral_sliding": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 16,
                                    "sliding_window": 7, "head_dim": 16, "tie_word_embeddings": True}, None),
    "gpt_oss_hub": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16,
                                "num_key_value_heads": 1, "sliding_window": 6, "head_dim": 12, "swiglu_limit": 1.0},
                    {**GPT_OSS_HUB, "experts_per_token": 2}),
    "gpt_oss_sharded": ("gpt_oss", {"num_local_experts": 6, "num_experts_per_tok": 4, "intermediate_size": 8,
                                    "sliding_window": 5, "head_dim": 8, "swiglu_alpha": 1.2,
                                    "layer_types": ["full_attention", "sliding_attention"],
                                    "rope_parameters": {**GPT_OSS_YARN, "rope_theta": 300.0}}, None),
    "gpt_oss_mxfp4": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 3, "intermediate_size": 64,
                                  "num_key_value_heads": 1, "sliding_window": 6, "head_dim": 8},
                      {**GPT_OSS_HUB, "experts_per_token": 3}),
    # Layer 3 of 4 is without rope and chunks, by default; the empty list is the hub's.
    "llama4_text_hub": ("llama4_text", {"num_local_experts": 4, "intermediate_size": 8, "intermediate_size_mlp": 24,
                                        "num_hidden_layers": 4, "head_dim": 8, "attention_chunk_size": 8,
                                        "num_key_value_heads": 1, "floor_scale": 4, "attn_scale": 0.5,
                                        "rms_norm_eps": 1e-2},
                        {"rope_theta": 500.0, "rope_scaling": SCOUT, "no_rope_layers": [], "moe_layers": DROPPED,
                         "no_rope_layer_interval": DROPPED, "tie_word_embeddings": DROPPED}),
    "llama4_text_dense": ("llama4_text", {"vocab_size": 48, "num_local_experts": 5, "intermediate_size": 8,
                                          "intermediate_size_mlp": 16,
                                          "num_hidden_layers": 3, "head_dim": 12, "interleave_moe_layer_step": 2,
                                          "no_rope_layers": [1, 0, 1], "attention_chunk_size": 5,
                                          "use_qk_norm": False, "attn_temperature_tuning": False,
                                          "attention_bias": True}, None),
    "llama4_multimodal": ("llama4", {"vision_config": VISION, "text_config": {
                              "vocab_size": 48, "num_local_experts": 4, "intermediate_size": 8,
                              "intermediate_size_mlp": 16, "num_key_value_heads": 1, "head_dim": 8,
                              "interleave_moe_layer_step": 2, "no_rope_layers": [0, 1], "attention_chunk_size": 7,
                              "floor_scale": 5, "attn_scale": 0.4}},
                          {"rope_theta": 500.0, "rope_scaling": None, "moe_layers": DROPPED}),
}  # fmt: skip
SEEDS: dict[str, int] = {}  # where the length of the name gives a choice of experts that is nearly a draw
SHARD_SIZES = {"gpt_oss_sharded": "20KB"}
MXFP4 = ("gpt_oss_mxfp4",)
NOT_PACKED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
BLOCK = 32  # values of one MXFP4 scale
MARGIN = 5e-4  # of router logits, a hundred times what float32 sums in another order move them


def pack_experts(folder: Path, seed: int):
    """Replace gpt-oss's expert matrices by random MXFP4 ones: `_blocks` uint8 (E, out, in/32, 16), two values a byte,
    and `_scales` uint8 (E, out, in/32), exponents biased by 127 and here 2^-5 to 2^-2: values of about ±0.3."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name in sorted(name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))):
        E, inputs, outputs = tensors.pop(name).shape
        shape = (E, outputs, inputs // BLOCK)
        blocks = torch.randint(0, 256, (*shape, BLOCK // 2), generator=generator)
        tensors[name + "_blocks"] = blocks.to(torch.uint8)
        tensors[name + "_scales"] = torch.randint(122, 126, shape, generator=generator).to(torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    record = json.loads((folder / "config.json").read_text())
    record["quantization_config"] = {"modules_to_not_convert": NOT_PACKED, "quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


@contextmanager
def recorded_routers(model):
    """A list that fills with (router logits (N, E), k) of each router while `model` runs."""
    routers, handles = [], []

    def record(module, _, output):
        E = module.weight.shape[0]
        # Llama 4's scores have the shape of its logits, but nothing negative.
        logits = next(tensor for tensor in output if tensor.shape[-1] == E and bool((tensor < 0).any()))
        routers.append((logits, module.top_k))

    for module in model.modules():
        if type(module).__name__.endswith("Router"):
            handles.append(module.register_forward_hook(record))
    yield routers
    for handle in handles:
        handle.remove()


def check_choices(name: str, routers: list[tuple[torch.Tensor, int]]):
    """No token's last chosen expert may be nearly a draw: another order of sums would choose another one."""
    for logits, k in routers:
        if k < logits.shape[-1]:
            ordered = logits.sort(dim=-1, descending=True).values
            gap = float((ordered[:, k - 1] - ordered[:, k]).min())
            assert gap > MARGIN, f"{name}: the choice of experts hangs on {gap:.1e}: give it another seed in SEEDS"
