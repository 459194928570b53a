"""The configuration files shipped in `configs/`: the examples of both source documents, loadable as they are."""

import json
from pathlib import Path

import pytest

from mini_forge import config as config_module
from mini_forge.config import Machine, TrainingConfig

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
