"""The configuration files shipped in `configs/`: the examples of both source documents, loadable as they are."""

import json
import re
from pathlib import Path

import pytest
import torch

from mini_forge import config as config_module
from mini_forge.config import Machine, TrainingConfig
from mini_forge.inputs import adapter_spec
from mini_forge.memory_plan import Job, MemoryPlan, is_stored_as_mxfp4, predict, sizes_of
from mini_forge.model.decoder import Decoder
from mini_forge.model.families import decoder_spec

CONFIGS = Path(__file__).parent.parent / "configs"
FIRST_DIALECT = ["low_end", "mid_range", "high_end"]
SECOND_DIALECT = ["training", "training-gpt-oss-20b", "training-qwen3-8b", "training-qwen3-coder-30b"]
SECOND_KEYS = [
    "base_model", "max_seq_length", "lora_rank", "lora_alpha", "lora_dropout", "num_train_epochs", "learning_rate",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optimizer", "load_in_4bit", "dtype",
    "use_gradient_checkpointing", "fp16", "bf16", "logging_steps", "save_strategy", "save_total_limit", "chat_template",
    "system_prompt", "comment", "notes",
]  # fmt: skip


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(config_module, "detect_machine", lambda device="auto": Machine("cpu", False, 2**35))


def load(name, **overrides) -> TrainingConfig:
    return TrainingConfig.from_file(CONFIGS / f"{name}.json", **overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_file_loads_without_a_warning_and_says_every_value_it_has(path):
    config = TrainingConfig.from_file(path, dataset="rows.jsonl")
    assert config.warnings == [] and config.output_dir.startswith("runs/")
    written = json.loads(path.read_text())
    for name in written.keys() - {"dataset", "model_name", "base_model"}:
        assert config.to_dict()[config_module.ALIASES.get(name, name)] == written[name]
    assert TrainingConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("low_end", ("qwen/Qwen2.5-3B", "huggingface", "qlora", True, True, False, 16, 0.1, 1, 16, 512, 0.2, 100)),
        ("mid_range", ("meta-llama/Llama-3.1-8B-Instruct", "unsloth", "qlora", True, False, True, 64, 0.1, 2, 4, 2048,
                       0.2, 100)),
        ("high_end", ("meta-llama/Llama-4-Maverick-17B-128E-Instruct", "unsloth", "sft", False, False, True, 64, 0.05,
                      4, 2, 4096, 0.1, 50)),
    ],
)  # fmt: skip
def test_the_first_document_s_examples(name, expected):
    c = load(name)
    assert expected == (
        c.model_name, c.provider, c.strategy, c.use_4bit, c.fp16, c.bf16, c.lora_r, c.lora_dropout,
        c.per_device_train_batch_size, c.gradient_accumulation_steps, c.max_seq_length, c.eval_split, c.eval_steps,
    )  # fmt: skip
    assert (c.dataset, c.compute_specs, c.num_train_epochs) == ("/path/to/dataset.jsonl", name, 3)
    assert c.lora_alpha == 2 * c.lora_r


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("training", ("openai/gpt-oss-20b", 2048, 8, 16, 3, 2e-4, 1, 16, "harmony")),
        ("training-gpt-oss-20b", ("openai/gpt-oss-20b", 2048, 8, 16, 3, 2e-4, 1, 16, "harmony")),
        ("training-qwen3-8b", ("Qwen/Qwen3-8B", 4096, 16, 32, 2, 1e-4, 2, 8, "chatml")),
        ("training-qwen3-coder-30b", ("unsloth/Qwen3-Coder-30B-A3B-Instruct", 2048, 8, 16, 2, 2e-4, 1, 16, "chatml")),
    ],
)
def test_the_second_document_s_files(name, expected):
    c = load(name, dataset="rows.jsonl")
    assert expected == (
        c.model_name, c.max_seq_length, c.lora_r, c.lora_alpha, c.num_train_epochs, c.learning_rate,
        c.per_device_train_batch_size, c.gradient_accumulation_steps, c.chat_template,
    )  # fmt: skip
    assert (c.optim, c.use_4bit, c.dtype, c.bf16, c.save_total_limit) == ("paged_adamw_8bit", True, "bfloat16", True, 2)
    assert c.system_prompt == "You are MetaHuman Greg, a helpful assistant." and c.comment and c.notes["model_size"]


@pytest.mark.parametrize("name", SECOND_DIALECT)
def test_the_second_document_s_files_have_all_their_keys_and_take_the_dataset_from_the_command_line(name):
    assert list(json.loads((CONFIGS / f"{name}.json").read_text())) == SECOND_KEYS
    with pytest.raises(config_module.ConfigError, match="dataset: Cannot be empty .*--dataset FILE"):
        load(name)


def test_training_json_is_the_gpt_oss_configuration():
    assert (CONFIGS / "training.json").read_bytes() == (CONFIGS / "training-gpt-oss-20b.json").read_bytes()


@pytest.mark.parametrize("name", FIRST_DIALECT)
def test_the_first_document_s_examples_take_another_dataset(name):
    assert load(name, dataset="rows.jsonl").provenance["dataset"] == "override"


# The dimensions that the models' published config.json files have.
GPT_OSS_20B = {"model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880,
               "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
               "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128,
               "quantization_config": {"quant_method": "mxfp4"}}  # fmt: skip
QWEN3_CODER_30B = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144,
                   "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
                   "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936}  # fmt: skip
MAVERICK = {"model_type": "llama4_text", "num_hidden_layers": 48, "hidden_size": 5120, "intermediate_size": 8192,
            "intermediate_size_mlp": 16384, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "num_local_experts": 128, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "use_qk_norm": False,
            "vocab_size": 202048}  # fmt: skip
QWEN3_8B = {"model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}  # fmt: skip
# Weights by hand, in bytes: attention, experts and dense MLPs by layer, then embedding and head in bfloat16. Bytes a
# weight: NF4 0.5 + 4/64, MXFP4 0.5 + 1/32. Norms, biases and routers are left out: less than 1 %.
WEIGHT_BYTES = {
    "gpt_oss": 24 * (2 * 2880 * (64 + 8) * 64 * 0.5625 + 32 * 3 * 2880**2 * 0.53125) + 2 * 201088 * 2880 * 2,
    "qwen3_moe": 48 * (2 * 2048 * (32 + 4) * 128 + 128 * 3 * 2048 * 768) * 0.5625 + 2 * 151936 * 2048 * 2,
    "maverick": 48 * 2 * 5120 * (40 + 8) * 128 + 24 * 3 * 5120 * (129 * 8192 + 16384),
    "qwen3": 36 * (2 * 4096 * (32 + 8) * 128 + 3 * 4096 * 12288) * 0.5625 + 2 * 151936 * 4096 * 2,
}
MAVERICK_ENDS = 2 * 202048 * 5120 * 2
WITH_MEMORY = {
    "gpt_oss_20b": (GPT_OSS_20B, WEIGHT_BYTES["gpt_oss"]),
    "training-gpt-oss-20b": (GPT_OSS_20B, WEIGHT_BYTES["gpt_oss"]),
    "training": (GPT_OSS_20B, WEIGHT_BYTES["gpt_oss"]),
    "qwen3_coder_30b": (QWEN3_CODER_30B, WEIGHT_BYTES["qwen3_moe"]),
    "training-qwen3-coder-30b": (QWEN3_CODER_30B, WEIGHT_BYTES["qwen3_moe"]),
    "training-qwen3-8b": (QWEN3_8B, WEIGHT_BYTES["qwen3"]),
    "high_end": (MAVERICK, WEIGHT_BYTES["maverick"] * 2 + MAVERICK_ENDS),
    "training-llama-4-maverick": (MAVERICK, WEIGHT_BYTES["maverick"] * 0.5625 + MAVERICK_ENDS),
}


def planned(name, dimensions) -> MemoryPlan:
    """What `check` would predict on a GPU with bfloat16 for rows as long as the file allows."""
    config = load(name, dataset="rows.jsonl", use_nested_quant=False)
    lora, tokens = adapter_spec(config), config.per_device_train_batch_size * config.max_seq_length
    with torch.device("meta"):
        sizes = sizes_of(Decoder(decoder_spec(dimensions)), lora.targets)
    plan = config_module.resolve(config, Machine("cuda", True, 2**40, 80 * 2**30))
    job = Job(plan, tokens, config.max_seq_length, lora.rank, config.optim,
              config.recompute if config.gradient_checkpointing else None,
              config.provider == "unsloth", lora.dropout, has_mxfp4=is_stored_as_mxfp4(dimensions))  # fmt: skip
    return predict(sizes, job)


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_notes_state_the_memory_that_the_named_model_needs(name):
    dimensions, weight_bytes = WITH_MEMORY[name]
    plan, usage = planned(name, dimensions), load(name, dataset="rows.jsonl").notes["vram_usage"]
    stated_peak = float(re.search(r"peak memory: ([\d.]+) GiB", usage).group(1)) * 2**30
    stated_weights = float(re.search(r"([\d.]+) GiB of (it )?weights", usage).group(1)) * 2**30
    stated_gpus = int(re.search(r"(\d+) GPU", usage).group(1))
    assert stated_weights == pytest.approx(weight_bytes, rel=0.02)
    assert plan.items["weights"] == pytest.approx(weight_bytes, rel=0.01)
    assert stated_peak == pytest.approx(plan.peak_bytes, rel=0.05)
    assert stated_gpus == plan.gpus()


def test_the_frozen_weights_of_gpt_oss_stay_at_12_to_13_gigabytes():
    assert 12e9 < planned("gpt_oss_20b", GPT_OSS_20B).items["weights"] < 13e9


def test_maverick_needs_more_than_the_16_gigabytes_its_profile_speaks_of():
    plan = planned("high_end", MAVERICK)
    assert plan.items["weights"] > 40 * 16e9 and plan.gpus() > 9


def test_every_named_model_is_there_in_both_dialects():
    names = {"gpt-oss-20b": set(), "Qwen3-Coder-30B-A3B": set(), "Llama-4-Maverick": set()}
    for path in CONFIGS.glob("*.json"):
        written = json.loads(path.read_text())
        for name in names:
            if name in written.get("model_name", ""):
                names[name].add("first")
            if name in written.get("base_model", ""):
                names[name].add("second")
    assert all(dialects == {"first", "second"} for dialects in names.values()), names
