"""Golden logits: tiny random checkpoints of each family, and what transformers' eager attention says about them.

Two or more per family, chosen so that a decoder which ignores an option (window, rope scaling, bias, head width, tied
head, qk-norm, multipliers) is far off. Half of them carry config.json as checkpoints on the hub do (`rope_theta`,
`rope_scaling`, `torch_dtype`), half as transformers 5 writes it (`rope_parameters`, `layer_types`, `dtype`). The
families with experts are in make_moe_families.py.
"""

import json
import shutil
from pathlib import Path

import make_moe_families as moe
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# With 8 channels and theta 500 the wavelengths are 6, 30, 140 and 664 tokens; trained over 32, the first is kept, the
# second blended, the others divided: every branch of the llama3 rule is visible within 24 tokens.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0}  # 8, so that the ramp is not cut off

DROPPED = moe.DROPPED

# name -> (model_type, options in transformers 5's form, options in the hub's form instead: None keeps the first form)
CHECKPOINTS = {
    "llama3_scaling": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}, None),
    "llama3_scaling_hub": ("llama", {"tie_word_embeddings": True},
                           {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "llama_tied_bias": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
                                  "num_key_value_heads": 1, "rms_norm_eps": 1e-2}, None),
    "llama_linear_hub": ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 1},
                         {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}),
    "mistral_sliding": ("mistral", {"sliding_window": 8, "head_dim": 16}, None),
    "mistral_hub": ("mistral", {"sliding_window": None}, {"rope_theta": 1000000.0, "sliding_window": None}),
    "qwen2_sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1,
                                "num_hidden_layers": 3}, None),
    "qwen2_hub": ("qwen2", {"tie_word_embeddings": True},
                  {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}, None),
    "qwen3_yarn_sliding_hub": ("qwen3", {"head_dim": 12, "attention_bias": True},
                               {"rope_theta": 1000.0, "rope_scaling": {"rope_type": "yarn", **YARN},
                                "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    # The pattern makes layers 0 and 1 local, 2 global; a head tied by default; a scale that is not head_dim ** -0.5.
    "gemma3_text_hub": ("gemma3_text", {"pad_token_id": None, "num_hidden_layers": 3, "head_dim": 12,
                                        "sliding_window": 6, "query_pre_attn_scalar": 24, "sliding_window_pattern": 3},
                        {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "sliding_window_pattern": 3,
                         "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "tie_word_embeddings": DROPPED}),
    "gemma3_text_untied": ("gemma3_text", {"pad_token_id": None, "head_dim": 16, "sliding_window": 5,
                                           "num_key_value_heads": 1, "query_pre_attn_scalar": 8,
                                           "tie_word_embeddings": False, "attention_bias": True,
                                           "layer_types": ["full_attention", "sliding_attention"]}, None),
    "phi3_partial_hub": ("phi3", {"pad_token_id": None, "tie_word_embeddings": True, "partial_rotary_factor": 0.75},
                         {"partial_rotary_factor": 0.75, "rope_theta": 100.0, "rope_scaling": None}),
    "phi3_sliding": ("phi3", {"pad_token_id": None, "sliding_window": 7, "num_key_value_heads": 4,
                              "rope_parameters": {"rope_type": "default", "rope_theta": 50.0,
                                                  "partial_rotary_factor": 0.5}}, None),
    "smollm3_hub": ("smollm3", {"pad_token_id": None, "num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
                    {"rope_theta": 100.0, "rope_scaling": None, "layer_types": ["full_attention"] * 3,
                     "max_window_layers": 28}),
    # The window is on the layers without rope: 1 and 3.
    "smollm3_sliding": ("smollm3", {"pad_token_id": None, "num_hidden_layers": 4, "no_rope_layer_interval": 2,
                                    "intermediate_size": 24, "use_sliding_window": True, "sliding_window": 6,
                                    "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}, None),
    "granite_hub": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.15,
                                "logits_scaling": 8.0, "tie_word_embeddings": True},
                    {"rope_theta": 100.0, "rope_scaling": None}),
    "granite_bias": ("granite", {"embedding_multiplier": 0.5, "residual_multiplier": 1.5, "attention_multiplier": 0.5,
                                 "logits_scaling": 0.25, "attention_bias": True, "mlp_bias": True,
                                 "num_key_value_heads": 4}, None),
    **moe.CHECKPOINTS,
}  # fmt: skip
NEW_KEYS = ("rope_parameters", "layer_types", "dtype", "transformers_version", "_sliding_window_pattern")


def main(golden: Path):
    for name, (kind, options, hub_form) in CHECKPOINTS.items():
        folder = golden / "families" / name
        shutil.rmtree(folder, ignore_errors=True)
        save_random_model(folder, make_config(kind, options), seed=moe.SEEDS.get(name, len(name)))
        if hub_form is not None:
            rewrite_config(folder / "config.json", hub_form)
        if name in moe.MXFP4:
            moe.pack_experts(folder, seed=len(name))
        save_expected(folder)
        print(f"{folder.name}: {sum(f.stat().st_size for f in folder.iterdir()) / 1024:.0f} KiB")


def make_config(kind: str, options: dict):
    """`text_config` and `vision_config` among the options make a multimodal one; the text part has SIZES too."""
    if "text_config" in options:
        return AutoConfig.for_model(kind, **{**options, "text_config": {**SIZES, **options["text_config"]}})
    return AutoConfig.for_model(kind, **{**SIZES, **options})


def auto_class(config):
    """What opens a checkpoint with all of its tensors."""
    return AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM


def save_random_model(folder: Path, config, seed: int):
    """A bfloat16 checkpoint whose attention is far from uniform, so that positions and masks matter."""
    model = auto_class(config).from_config(config)
    randomise(model, seed)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=moe.SHARD_SIZES.get(folder.name, "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)


def randomise(model, seed: int, gain: float = 1.5):
    """Weights N(0, gain²/in), norms 1 ± 0.2 (Gemma's 0 ± 0.2), biases ± 0.3; embeddings and sinks N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        noise = torch.randn(weight.shape, generator=generator)
        if "embed_tokens" in name or "lm_head" in name:
            scale = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
            weight.data = noise * scale
        elif name.endswith("bias"):
            weight.data = noise * 0.3
        elif name.endswith("sinks"):
            weight.data = noise
        elif weight.dim() == 1:
            weight.data = float((weight == 1).all()) + noise * 0.2
        else:
            weight.data = noise * gain * weight.shape[1] ** -0.5


def rewrite_config(path: Path, hub_form: dict):
    """config.json as older transformers wrote it, which is what checkpoints on the hub carry."""
    record = json.loads(path.read_text())
    text = {key: value for key, value in record.get("text_config", record).items() if key not in NEW_KEYS} | hub_form
    text = {key: value for key, value in text.items() if value is not DROPPED}
    if "text_config" in record:
        record = {key: value for key, value in record.items() if key not in NEW_KEYS} | {"text_config": text}
    else:
        record = text
    record |= {"torch_dtype": "bfloat16", "transformers_version": "4.46.0"}
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


@torch.no_grad()
def save_expected(folder: Path):
    """`input_ids` (2, 24) int64 and `logits` (2, 24, V) float32, from the weights as saved."""
    config = AutoConfig.from_pretrained(folder)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = auto_class(config).from_pretrained(folder, dtype=torch.float32, **plain).eval()
    generator = torch.Generator().manual_seed(7)
    input_ids = torch.randint(0, config.get_text_config().vocab_size, (2, 24), generator=generator)
    with moe.recorded_routers(model) as routers:
        logits = model(input_ids).logits
    moe.check_choices(folder.name, routers)
    save_file({"input_ids": input_ids, "logits": logits}, folder / "expected.safetensors")
