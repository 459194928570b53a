"""The configuration: every rule, both dialects, what fills what is left out, provenance, and the JSON Schema."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

from mini_forge import config as config_module
from mini_forge.config import ALIASES, PROFILES, Machine, TrainingConfig, json_schema, resolve
from mini_forge.errors import ConfigError

FIRST = {"task": "text-generation", "model_name": "m", "dataset": "d.jsonl", "compute_specs": "low_end"}
SECOND = {"base_model": "m", "dataset": "d.jsonl", "chat_template": "chatml"}
CPU = Machine("cpu", False, 2**35)
MACHINES = [CPU, Machine("cuda", True, 2**36, 2**34), Machine("cuda", False, 2**36, 2**34)]
KEYS = [f.name for f in fields(TrainingConfig) if f.name not in ("provenance", "warnings")]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine for `compute_specs` to be taken from, so that no test depends on this one."""
    asked = []
    monkeypatch.setattr(config_module, "detect_machine", lambda device="auto": asked.append(device) or CPU)
    return asked


def make(**keys) -> TrainingConfig:
    return TrainingConfig.from_dict({**FIRST, **keys})


def problems(document, **overrides) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig.from_dict(document, **overrides)
    assert all("\n" not in line for line in caught.value.problems)
    return caught.value.problems


BROKEN = [
    # the schema document's validation rules, in its words
    ("task", "classification", 'task: Must be in ["text-generation", "summarization", "extractive-question-answeri'),
    ("strategy", "SFT", 'strategy: Must be in ["sft", "qlora", "rlhf", "dpo"] (got "SFT"); the nearest is "sft"'),
    ("provider", "hf", 'provider: Must be in ["huggingface", "unsloth"]'),
    ("model_name", "", "model_name: Cannot be empty"),
    ("model_name", "  ", "model_name: Cannot be empty"),
    ("model_name", None, "model_name: Cannot be empty"),
    ("dataset", "", "dataset: Cannot be empty"),
    ("num_train_epochs", 0, "num_train_epochs: Must be ≥ 1 (got 0)"),
    ("per_device_train_batch_size", 0, "per_device_train_batch_size: Must be ≥ 1"),
    ("learning_rate", 0, "learning_rate: Must be > 0 and ≤ 1"),
    ("learning_rate", 1.5, "learning_rate: Must be > 0 and ≤ 1"),
    ("lora_r", 0, "lora_r: Must be between 1 and 256"),
    ("lora_r", 257, "lora_r: Must be between 1 and 256"),
    ("eval_split", -0.1, "eval_split: Must be between 0 and 1"),
    ("eval_split", 1.0, "eval_split: Must be between 0 and 1, and 1 leaves nothing to train on"),
    # ranges and lists of its field reference
    ("recompute", "mlp", 'Must be in ["selective", "full", "offload"] (got "mlp"); the nearest is "full"'),
    ("compute_specs", "midrange", 'Must be in ["low_end", "mid_range", "high_end"] (got "midrange"); the nearest is'),
    ("adapter_format", "gguf", 'Must be in ["peft", "per-expert"]'),
    ("optim", "lion", 'Must be in ["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd"]'),
    ("lr_scheduler_type", "step", 'lr_scheduler_type: Must be in ["linear", "cosine", "constant", "polynomial"]'),
    ("lora_dropout", 1.1, "lora_dropout: Must be between 0 and 1"),
    ("lora_dropout", -0.1, "lora_dropout: Must be between 0 and 1"),
    ("warmup_ratio", 2, "warmup_ratio: Must be between 0 and 1"),
    ("bnb_4bit_compute_dtype", "fp16", 'bnb_4bit_compute_dtype: Must be in ["float16", "bfloat16", "float32"]'),
    ("bnb_4bit_quant_type", "int4", 'bnb_4bit_quant_type: Must be in ["nf4", "fp4"]'),
    ("per_device_eval_batch_size", 0, "per_device_eval_batch_size: Must be ≥ 1"),
    ("gradient_accumulation_steps", 0, "gradient_accumulation_steps: Must be ≥ 1"),
    ("lora_alpha", 0, "lora_alpha: Must be > 0"),
    ("max_grad_norm", -1, "max_grad_norm: Must be ≥ 0"),
    ("weight_decay", -0.1, "weight_decay: Must be ≥ 0"),
    ("max_steps", 0, "max_steps: Must be ≥ 1, or -1 (got 0)"),
    ("max_steps", -2, "max_steps: Must be ≥ 1, or -1"),
    ("max_seq_length", 1, "max_seq_length: Must be ≥ 2, or -1 or null"),
    ("eval_steps", 0, "eval_steps: Must be ≥ 1"),
    # the second dialect's and our own keys
    ("chat_template", "alpaca", 'chat_template: Must be in ["harmony", "chatml", "llama", "auto", "model"]'),
    ("dtype", "fp32", 'dtype: Must be in ["float16", "bfloat16", "float32"]'),
    ("system_prompt", 3, "system_prompt: Must be a string (got 3); write it in quotes"),
    ("notes", float("nan"), "notes: Must be JSON"),
    ("comment", {"by": ["\ud800"]}, 'comment: Must be JSON (got {"by": ["\\ud800"]})'),
    ("system_prompt", "a\udfffb", "system_prompt: Must be text that can be written"),
    ("output_dir", "a\0b", 'output_dir: Must be text that can be written (got "a\\u0000b"); take out NUL'),
    ("target_modules", ["q_proj\0"], "target_modules: Must be text that can be written"),
    ("output_dir", "", "output_dir: Cannot be empty"),
    ("eval_dataset", "", "eval_dataset: Cannot be empty"),
    ("init_adapter", "", "init_adapter: Cannot be empty"),
    ("template_date", "24.12.2026", 'template_date: Must be of the form "YYYY-MM-DD" (got "24.12.2026")'),
    ("template_date", "2026-02-30", "template_date: '2026-02-30' is no day of the calendar; give YYYY-MM-DD"),
    ("reference", "sft", 'reference: Must be in ["base", "init_adapter"] (got "sft")'),
    ("seed", -1, "seed: Must be between 0 and 4294967295"),
    ("logging_steps", 0, "logging_steps: Must be ≥ 1"),
    ("save_strategy", "epochs", 'Must be in ["no", "steps", "epoch"] (got "epochs"); the nearest is "epoch"'),
    ("save_steps", 0, "save_steps: Must be ≥ 1"),
    ("save_total_limit", 0, "save_total_limit: Must be ≥ 1, or null"),
    ("device", "gpu", 'device: Must be in ["auto", "cpu", "cuda", "mps"]'),
    ("target_modules", [], 'target_modules: Must be "all-linear" or a list of module names'),
    ("target_modules", "q_proj", 'target_modules: Must be "all-linear" or a list of module names'),
    ("target_modules", ["q_proj", 3], 'target_modules: Must be "all-linear" or a list of module names'),
    ("neftune_noise_alpha", 0, "neftune_noise_alpha: Must be > 0, or null"),
    ("early_stopping_patience", 0, "early_stopping_patience: Must be ≥ 1, or null"),
    ("beta", 0, "beta: Must be > 0"),
    ("loss_type", "dpo", 'loss_type: Must be in ["sigmoid", "ipo", "hinge", "robust", "exo_pair"'),
    ("simpo_gamma", -1, "simpo_gamma: Must be ≥ 0"),
    ("desirable_weight", 0, "desirable_weight: Must be > 0"),
    ("undesirable_weight", 0, "undesirable_weight: Must be > 0"),
    ("label_smoothing", 0.6, "label_smoothing: Must be between 0 and 0.5"),
    ("reward_model", "", "reward_model: Cannot be empty"),
    ("reward_function", "rewards.py", 'reward_function: Must be of the form "module:function"'),
    ("reward_epochs", 0, "reward_epochs: Must be ≥ 1"),
    ("reward_learning_rate", 0, "reward_learning_rate: Must be > 0 and ≤ 1"),
    ("advantage", "grpo", 'advantage: Must be in ["gae", "group"]'),
    ("group_size", 1, "group_size: Must be ≥ 2"),
    ("kl_coef", -1, "kl_coef: Must be ≥ 0"),
    ("kl_estimator", "k2", 'kl_estimator: Must be in ["k1", "k3"]'),
    ("kl_target", 0, "kl_target: Must be > 0, or null"),
    ("target_kl", 0, "target_kl: Must be > 0, or null"),
    ("ppo_epochs", 0, "ppo_epochs: Must be ≥ 1"),
    ("num_mini_batches", 0, "num_mini_batches: Must be ≥ 1"),
    ("rollout_batch_size", 0, "rollout_batch_size: Must be ≥ 1"),
    ("max_new_tokens", 0, "max_new_tokens: Must be ≥ 1"),
    ("temperature", 0, "temperature: Must be > 0"),
    ("gamma", 1.1, "gamma: Must be between 0 and 1"),
    ("gae_lambda", -1, "gae_lambda: Must be between 0 and 1"),
    ("clip_range", 0, "clip_range: Must be > 0 and ≤ 1"),
    ("value_clip_range", 0, "value_clip_range: Must be > 0"),
    ("value_coef", -1, "value_coef: Must be ≥ 0"),
    # types are strict
    ("lora_r", True, "lora_r: Must be an integer (got true)"),
    ("num_train_epochs", 3.0, "num_train_epochs: Must be an integer (got 3.0); write 3"),
    ("num_train_epochs", "3", 'num_train_epochs: Must be an integer (got "3"); write 3'),
    ("lora_r", None, "lora_r: Must be between 1 and 256 (got null); leave the key out"),
    ("learning_rate", "2e-4", 'learning_rate: Must be a number (got "2e-4"); write 2e-4 without quotes'),
    ("learning_rate", ".5", 'learning_rate: Must be a number (got ".5"); write 0.5 without quotes'),
    ("lora_alpha", 10**400, "lora_alpha: Must be ≤ 2147483647 (got 1000"),
    ("per_device_train_batch_size", 2**31, "per_device_train_batch_size: Must be ≤ 2147483647 (got 2147483648)"),
    ("max_steps", 10**19, "max_steps: Must be ≤ 2147483647"),
    ("learning_rate", True, "learning_rate: Must be a number (got true)"),
    ("weight_decay", float("inf"), "weight_decay: Must be a finite number"),
    ("weight_decay", float("nan"), "weight_decay: Must be a finite number"),
    ("weight_decay", 10**400, "weight_decay: Must be a finite number"),
    ("use_4bit", 1, "use_4bit: Must be true or false (got 1); write true"),
    ("use_4bit", "false", 'use_4bit: Must be true or false (got "false"); write false, without quotes'),
    ("task", 3, "task: Must be a string"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), BROKEN)
def test_a_broken_value_is_reported_with_its_rule(name, value, message):
    found = problems({**FIRST, name: value})
    assert len(found) == 1 and found[0].startswith(name + ": ") and message in found[0]


def test_every_key_with_a_rule_has_a_test_that_breaks_it():
    free = {"comment"}  # any JSON, as notes
    booleans = {f.name for f in fields(TrainingConfig) if f.type is bool}
    assert {name for name, _, _ in BROKEN} | booleans | free == set(KEYS)


@pytest.mark.parametrize("name", [f.name for f in fields(TrainingConfig) if f.type is bool])
def test_booleans_take_true_and_false_only(name):
    assert problems({**FIRST, name: "yes"})[0].startswith(f"{name}: Must be true or false")


CONTRADICTIONS = [
    ({"use_4bit": True, "use_8bit": True}, "use_8bit: true contradicts use_4bit: true"),
    ({"strategy": "qlora", "use_4bit": False}, 'use_4bit: false contradicts strategy "qlora"'),
    ({"strategy": "qlora", "use_8bit": True}, 'use_8bit: true contradicts strategy "qlora"'),
    ({"fp16": True, "bf16": True}, "bf16: true contradicts fp16: true"),
    ({"dtype": "bfloat16", "fp16": True}, 'fp16: true contradicts dtype "bfloat16"'),
    ({"dtype": "float16", "fp16": False}, 'fp16: false contradicts dtype "float16"'),
    ({"dtype": "float32", "bf16": True}, 'bf16: true contradicts dtype "float32"'),
    ({"provider": "unsloth", "max_seq_length": None}, "max_seq_length: Cannot be -1 or null with provider"),
    ({"provider": "unsloth", "max_seq_length": -1}, "max_seq_length: Cannot be -1 or null with provider"),
    ({"eval_split": 0, "early_stopping_patience": 2}, "early_stopping_patience: 2 needs evaluation"),
    ({"eval_split": 0, "load_best_model_at_end": True}, "load_best_model_at_end: true needs evaluation"),
    ({"num_mini_batches": 17}, "num_mini_batches: Must be ≤ rollout_batch_size, 16 (got 17)"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, 'label_smoothing: Must be < 0.5 with loss_type "robust"'),
]


@pytest.mark.parametrize(("keys", "message"), CONTRADICTIONS)
def test_contradictions_are_reported_once(keys, message):
    found = problems({**FIRST, **keys})
    assert len(found) == 1 and found[0].startswith(message)


@pytest.mark.parametrize(
    "keys",
    [
        {"eval_split": 0, "eval_dataset": "e.jsonl", "early_stopping_patience": 2, "load_best_model_at_end": True},
        {"provider": "unsloth"},  # the profile fills max_seq_length
        {"use_4bit": False, "use_8bit": True},
        {"dtype": "bfloat16", "bf16": True, "fp16": False},
        {"dtype": "float32", "bf16": False, "fp16": False},
        {"lora_dropout": 1, "warmup_ratio": 1, "eval_split": 0, "max_grad_norm": 0, "weight_decay": 0, "lora_r": 256},
        {"max_steps": -1, "learning_rate": 1, "seed": 0, "label_smoothing": 0.5, "max_seq_length": 2},
        {"strategy": "dpo", "loss_type": "robust", "label_smoothing": 0.4, "num_mini_batches": 16},
        {"reward_function": "my.rewards:score", "comment": ["x"], "notes": {"a": [1, None]}},
    ],
)
def test_the_edges_of_the_rules_are_allowed(keys):
    config = make(**keys)
    assert all(getattr(config, name) == value for name, value in keys.items())


def test_all_problems_are_reported_at_once():
    found = problems({"task": "x", "lora_r": 0, "learning_rte": 1, "fp16": True, "bf16": True})
    starts = ["learning_rte", "task", "lora_r", "model_name", "dataset", "compute_specs", "bf16"]
    assert [line.split(":")[0] for line in found] == starts


def test_one_mistake_is_one_line():
    assert len(problems({**FIRST, "provider": "unsloth", "max_seq_length": "512"})) == 1
    assert len(problems({**FIRST, "strategy": "qlora", "use_4bit": "false"})) == 1
    assert len(problems({**FIRST, "provider": "unsloth", "compute_specs": "big"})) == 1
    assert len(problems({**FIRST, "provider": "unsloth", "compute_specs": "big", "max_seq_length": "512"})) == 2


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("lerning_rate", "learning_rate"), ("LORA_R", "lora_r"), ("loraAlpha", "lora_alpha"), ("batch-size", "batch_size"),
     ("load_in_4bits", "load_in_4bit"), ("Base_Model", "base_model"), ("Task", "task"), ("MAX-STEPS", "max_steps")],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest_known_one(wrong, right):
    (line,) = problems({**FIRST, wrong: 1})
    assert line.startswith(f"{wrong}: unknown key") and right in line


def test_an_unknown_key_is_one_line_whatever_it_is_called():
    assert problems({**FIRST, "a\nb": 1})[0].startswith('"a\\nb": unknown key')
    assert problems({**FIRST, 3: 1})[0].startswith("3: unknown key")


def test_the_first_dialect_requires_its_four_keys():
    found = problems({})
    assert [line.split(":")[0] for line in found] == ["task", "model_name", "dataset", "compute_specs"]
    assert "Cannot be empty (not given)" in found[1] and "--dataset" in found[2]


def test_the_second_dialect_requires_model_and_dataset():
    assert [line.split(":")[0] for line in problems({"lora_rank": 8})] == ["model_name", "dataset"]


def test_the_second_dialect_fills_task_and_hardware(machine):
    config = TrainingConfig.from_dict(SECOND)
    assert (config.task, config.compute_specs, machine) == ("text-generation", "mid_range", ["auto"])
    assert config.provenance["task"] == "default" and config.provenance["compute_specs"] == "machine"
    assert config.provenance["model_name"] == "file as base_model"
    assert config.per_device_train_batch_size == PROFILES["mid_range"]["per_device_train_batch_size"]


def test_the_machine_is_looked_at_only_when_needed_and_as_the_device_asked_for(machine):
    TrainingConfig.from_dict({**SECOND, "compute_specs": "low_end"})
    assert machine == []
    TrainingConfig.from_dict({**SECOND, "device": "cpu"})
    assert machine == ["cpu"]


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_sets_its_key(alias, name):
    value = {"model_name": "other", "lora_r": 7, "optim": "sgd"}.get(name, True)
    document = {key: v for key, v in FIRST.items() if key != name} | {alias: value}
    config = TrainingConfig.from_dict(document | ({"use_4bit": False} if name == "use_8bit" else {}))
    assert getattr(config, name) == value and config.provenance[name] == f"file as {alias}"


def test_a_key_and_its_alias_may_agree_but_not_differ():
    assert make(lora_r=8, lora_rank=8).lora_r == 8
    (line,) = problems({**FIRST, "lora_r": 8, "lora_rank": 16})
    assert line.startswith("lora_rank: 16 contradicts lora_r: 8")
    assert "contradicts" in problems({**FIRST, "use_4bit": True, "load_in_4bit": 1})[0]


def test_a_problem_names_the_key_as_it_was_written():
    assert problems({**SECOND, "lora_rank": 0})[0].startswith("lora_rank (= lora_r): Must be between 1 and 256")


def test_both_dialects_mix():
    config = TrainingConfig.from_dict({**SECOND, "lora_r": 4, "load_in_4bit": True, "strategy": "qlora"})
    assert (config.model_name, config.lora_r, config.chat_template) == ("m", 4, "chatml")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_fills_only_what_is_left_out(profile):
    config = make(compute_specs=profile)
    for name, value in PROFILES[profile].items():
        assert getattr(config, name) == value and config.provenance[name] == f"profile {profile}"
    given = make(compute_specs=profile, max_seq_length=77, use_4bit=True, gradient_accumulation_steps=3)
    assert (given.max_seq_length, given.use_4bit, given.gradient_accumulation_steps) == (77, True, 3)
    assert given.provenance["max_seq_length"] == "file"


def test_the_profiles_are_those_of_the_documents():
    rows = {name: list(profile.values()) for name, profile in PROFILES.items()}
    assert rows == {
        "low_end": [1, 8, 512, True, "float16", False],
        "mid_range": [2, 4, 1024, True, "bfloat16", True],
        "high_end": [4, 2, 2048, False, "bfloat16", False],
    }


@pytest.mark.parametrize(("strategy", "rate"), [("sft", 2e-4), ("qlora", 2e-4), ("rlhf", 1.41e-5), ("dpo", 5e-7)])
def test_the_strategy_recommends_the_learning_rate(strategy, rate):
    config = make(strategy=strategy)
    assert config.learning_rate == rate and config.provenance["learning_rate"] == f"strategy {strategy}"
    assert make(strategy=strategy, learning_rate=1e-3).learning_rate == 1e-3


def test_qlora_is_4_bit_whatever_the_profile():
    config = make(strategy="qlora", compute_specs="high_end")
    assert config.use_4bit and config.provenance["use_4bit"] == "strategy qlora"


def test_8_bit_turns_4_bit_off_where_that_is_left_out():
    config = make(use_8bit=True)
    assert not config.use_4bit and config.provenance["use_4bit"] == "use_8bit"


def test_dtype_sets_the_flags_that_are_left_out():
    config = make(dtype="bfloat16")
    assert (config.fp16, config.bf16) == (False, True) and config.provenance["bf16"] == "dtype bfloat16"


@pytest.mark.parametrize("auto", [None, -1])
def test_an_automatic_length_is_kept_from_the_profile(auto):
    assert make(max_seq_length=auto).max_seq_length is None


def test_overrides_count_as_written_and_win_over_key_and_alias():
    config = TrainingConfig.from_dict({**SECOND, "lora_rank": 8}, lora_r=4, base_model="n")
    assert (config.lora_r, config.model_name) == (4, "n")
    assert (config.provenance["lora_r"], config.provenance["model_name"]) == ("override", "override as base_model")
    assert problems(FIRST, lora=4)[0].startswith("lora: unknown key")
    assert TrainingConfig.from_dict({"base_model": "m"}, dataset="e.jsonl").dataset == "e.jsonl"


def test_defaults_are_those_of_the_documents():
    config = make(compute_specs="high_end", max_seq_length=None)
    expected = dict(
        provider="huggingface", strategy="sft", lora_r=16, lora_alpha=32, lora_dropout=0.1, use_8bit=False, fp16=False,
        bnb_4bit_quant_type="nf4", bf16=False, num_train_epochs=1, per_device_eval_batch_size=1, max_grad_norm=0.3,
        gradient_checkpointing=True, weight_decay=0.001, optim="paged_adamw_32bit", lr_scheduler_type="cosine",
        max_steps=-1, warmup_ratio=0.03, group_by_length=True, packing=False, eval_split=0.2, eval_steps=100,
        seed=42, logging_steps=10, save_strategy="epoch", device="auto", target_modules="all-linear", beta=0.1,
        loss_type="sigmoid", label_smoothing=0, train_on_prompt=False, output_dir="runs/config",
    )  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_whole_numbers_become_floats_where_floats_are_kept():
    config = make(learning_rate=1, eval_split=0)
    assert isinstance(config.learning_rate, float) and isinstance(config.eval_split, float)


@pytest.mark.parametrize(
    "keys",
    [{}, {"strategy": "qlora"}, {"use_8bit": True}, {"dtype": "float16"}, {"target_modules": ["q_proj"]},
     {"max_seq_length": -1}, {"notes": {"a": 1}, "comment": "x"}],
)  # fmt: skip
def test_the_resolved_configuration_is_a_configuration_that_means_the_same(keys):
    config = make(**keys)
    document = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = TrainingConfig.from_dict(document)
    assert (
        config.to_dict() == document
        and list(document) == KEYS
        and again == config
        and again.warnings == config.warnings
    )
    for machine in MACHINES:
        assert resolve(again, machine) == resolve(config, machine)


def test_the_configuration_is_frozen():
    with pytest.raises(FrozenInstanceError):
        make().lora_r = 3


@pytest.mark.parametrize(
    ("keys", "start"),
    [
        ({"beta": 0.2}, "beta: no effect with strategy"),
        ({"strategy": "dpo", "kl_coef": 1}, "kl_coef: no effect with strategy"),
        ({"strategy": "dpo", "loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing: no effect with loss_type"),
        ({"max_steps": 5, "num_train_epochs": 3}, "num_train_epochs: no effect, max_steps 5"),
        ({"lora_dropout": 1}, "lora_dropout: 1 drops all"),
        ({"save_steps": 7}, "save_steps: no effect with save_strategy"),
        ({"warmup_ratio": 0.1, "lr_scheduler_type": "constant"}, 'warmup_ratio: no effect with lr_scheduler_type "con'),
        ({"use_nested_quant": True, "use_4bit": False}, "use_nested_quant: no effect without use_4bit"),
        ({"bnb_4bit_quant_type": "fp4", "use_8bit": True}, "bnb_4bit_quant_type: no effect without use_4bit"),
        (
            {"bnb_4bit_compute_dtype": "float32", "use_4bit": False},
            "bnb_4bit_compute_dtype: no effect without use_4bit",
        ),
        ({"recompute": "selective", "gradient_checkpointing": False}, "recompute: no effect without gradient_checkp"),
        ({"save_total_limit": 2, "save_strategy": "no"}, 'save_total_limit: no effect with save_strategy "no"'),
        ({"eval_steps": 7, "eval_split": 0}, "eval_steps: no effect while training, nothing is evaluated"),
        ({"per_device_eval_batch_size": 7, "eval_split": 0}, "per_device_eval_batch_size: no effect while training"),
    ],
)
def test_settings_without_effect_are_warned_of(keys, start):
    (line,) = make(**keys).warnings
    assert line.startswith(start)


def test_defaults_and_settings_with_effect_are_not_warned_of():
    assert make(strategy="dpo", beta=0.2, max_steps=5).warnings == []
    assert make(save_strategy="steps", save_steps=7, kl_coef=0.05).warnings == []
    assert make(strategy="dpo", eval_split=0, precompute_reference=True, per_device_eval_batch_size=8).warnings == []
    assert make(warmup_ratio=0.1, use_nested_quant=True, recompute="selective", eval_steps=7).warnings == []


def test_what_a_profile_or_a_loss_suggests_is_not_warned_of_even_when_it_was_recorded():
    for keys in ({"compute_specs": "mid_range", "use_4bit": False}, {"compute_specs": "high_end"},
                 {"strategy": "dpo", "loss_type": "kto", "eval_split": 0}):  # fmt: skip
        config = make(**keys)
        assert config.warnings == [] == TrainingConfig.from_dict(config.to_dict()).warnings


def test_the_schema_knows_every_key_and_alias_and_nothing_else():
    schema = json_schema()
    assert set(schema["properties"]) == {*KEYS, *ALIASES} and schema["additionalProperties"] is False
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert all(p["description"] for p in schema["properties"].values())
    assert json.loads(json.dumps(schema)) == schema


def test_the_schema_has_types_limits_values_and_defaults():
    p = {name: {k: v for k, v in p.items() if k != "description"} for name, p in json_schema()["properties"].items()}
    assert p["lora_r"] == p["lora_rank"] == {"type": "integer", "minimum": 1, "maximum": 256, "default": 16}
    assert p["eval_split"] == {"type": "number", "minimum": 0, "exclusiveMaximum": 1, "default": 0.2}
    most = 2**31 - 1
    assert p["save_total_limit"] == {"type": ["integer", "null"], "minimum": 1, "maximum": most, "default": None}
    length = {"anyOf": [{"type": "integer", "minimum": 2, "maximum": most}, {"enum": [-1, None]}], "default": None}
    assert p["max_seq_length"] == length
    assert p["compute_specs"] == {"enum": ["low_end", "mid_range", "high_end"]}
    assert p["dtype"]["enum"][-1] is None and p["use_4bit"] == {"type": "boolean", "default": True}
    assert p["comment"] == {"default": None}
    assert "low_end 1, mid_range 2" in json_schema()["properties"]["per_device_train_batch_size"]["description"]


def test_importing_the_configuration_loads_no_torch():
    code = "import sys, mini_forge.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
