"""Rules between configuration keys: contradictions (errors) and settings without effect (warnings).

Both take `v`, every value by key after defaults, and `written`, the keys the user gave. Only what the user said
contradicts; what was filled in for them never does.
"""

from collections.abc import Iterator
from datetime import date

PRECISION_FLAGS = {"float16": "fp16", "bfloat16": "bf16", "float32": None}  # dtype -> the flag that says the same

KTO_KEYS = ("desirable_weight", "undesirable_weight")
DPO_KEYS = ("beta", "loss_type", "label_smoothing", "simpo_gamma", "precompute_reference", *KTO_KEYS)
SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair", "aot")
REFERENCE_FREE_LOSSES = ("simpo", "orpo")
RLHF_KEYS = (
    "reward_model", "reward_function", "reward_epochs", "reward_learning_rate", "advantage", "group_size", "kl_coef",
    "kl_estimator", "kl_target", "target_kl", "ppo_epochs", "num_mini_batches", "rollout_batch_size",
    "max_new_tokens", "temperature", "gamma", "gae_lambda", "clip_range", "value_clip_range", "value_coef",
)  # fmt: skip
FOUR_BIT_KEYS = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "use_nested_quant")
GAE_KEYS = ("gamma", "gae_lambda", "value_clip_range", "value_coef", "kl_estimator")  # GRPO has no values, and k3


def contradictions(v: dict, written: set[str]) -> Iterator[str]:
    """A line for each pair of settings that cannot both hold."""
    yield from _storage(v)
    yield from _precision(v, written)
    yield from _evaluation(v)
    if v["template_date"] is not None and not _is_date(v["template_date"]):
        yield f"template_date: {v['template_date']!r} is no day of the calendar; give YYYY-MM-DD"
    if v["provider"] == "unsloth" and "max_seq_length" in written and v["max_seq_length"] is None:
        yield 'max_seq_length: Cannot be -1 or null with provider "unsloth"; give a length, or leave the key out'
    if v["num_mini_batches"] > v["rollout_batch_size"]:
        yield (
            f"num_mini_batches: Must be ≤ rollout_batch_size, {v['rollout_batch_size']} (got {v['num_mini_batches']}); "
            "a mini-batch needs at least one rollout"
        )
    if v["reference"] == "init_adapter" and v["init_adapter"] is None:
        yield 'reference: "init_adapter" needs an init_adapter; name the adapter\'s folder, or leave reference out'
    if v["strategy"] == "rlhf":
        yield from _reinforcement(v)
    if v["strategy"] == "dpo" and v["loss_type"] == "kto":
        yield from _unpaired(v)
    if v["loss_type"] == "robust" and v["label_smoothing"] == 0.5:
        yield (
            'label_smoothing: Must be < 0.5 with loss_type "robust" (got 0.5); half of the labels flipped say nothing, '
            "give the expected share of flipped labels"
        )
    if v["loss_type"] == "exo_pair" and v["strategy"] == "dpo" and v["label_smoothing"] == 0:
        yield (
            'label_smoothing: Must be > 0 with loss_type "exo_pair" (got 0), which takes its logarithm; leave the key '
            "out for 0.001"
        )


def _is_date(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def _reinforcement(v: dict) -> Iterator[str]:
    if v["reward_model"] and v["reward_function"]:
        yield "reward_function: contradicts reward_model; a response has one reward, keep one of the two keys"
    if v["advantage"] == "group" and v["rollout_batch_size"] % v["group_size"]:
        yield (
            f'rollout_batch_size: Must be a multiple of group_size, {v["group_size"]}, with advantage "group" (got '
            f"{v['rollout_batch_size']}); every group is whole"
        )


def _unpaired(v: dict) -> Iterator[str]:
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if v[name] == 1:
            yield (
                f'{name}: Must be ≥ 2 with loss_type "kto" (got 1), whose reference point comes from prompts with the '
                "completions of other rows of their batch; give at least 2, or leave the key out"
            )
    if v["precompute_reference"]:
        yield (
            'precompute_reference: true contradicts loss_type "kto", which also needs the reference of prompts with '
            "other rows' completions, and those change with every epoch; leave precompute_reference out"
        )


def _storage(v: dict) -> Iterator[str]:
    if v["strategy"] == "qlora" and v["use_8bit"]:
        yield 'use_8bit: true contradicts strategy "qlora", which is 4-bit; use strategy "sft" for 8-bit weights'
    elif v["use_4bit"] and v["use_8bit"]:
        yield "use_8bit: true contradicts use_4bit: true; weights are stored one way, set one of them to false"
    elif v["strategy"] == "qlora" and not v["use_4bit"]:
        yield 'use_4bit: false contradicts strategy "qlora", which is 4-bit; use strategy "sft", or leave use_4bit out'


def _precision(v: dict, written: set[str]) -> Iterator[str]:
    if v["fp16"] and v["bf16"] and {"fp16", "bf16"} <= written:
        yield "bf16: true contradicts fp16: true; keep one, or neither to let the device decide"
    if v["dtype"] is None:
        return
    for flag in ("fp16", "bf16"):
        said = PRECISION_FLAGS[v["dtype"]] == flag
        if flag in written and v[flag] is not said:
            value = "true" if v[flag] else "false"
            yield f'{flag}: {value} contradicts dtype "{v["dtype"]}"; keep one of the two keys'


def _evaluation(v: dict) -> Iterator[str]:
    if v["eval_split"] > 0 or v["eval_dataset"] is not None:
        return
    remedy = "give eval_split > 0 or an eval_dataset, or leave the key out"
    if v["early_stopping_patience"] is not None:
        yield f"early_stopping_patience: {v['early_stopping_patience']} needs evaluation and eval_split is 0; {remedy}"
    if v["load_best_model_at_end"]:
        yield f"load_best_model_at_end: true needs evaluation and eval_split is 0; {remedy}"


def warnings(v: dict, written: set[str], usual: dict) -> Iterator[str]:
    """A line for each setting that has no effect beside the others, where it differs from what it would be if it were
    left out, `usual`: a recorded configuration has every key, and says no more than the user did."""
    changed = {name for name in written if v[name] != usual[name]}
    for strategy, names in (("dpo", DPO_KEYS), ("rlhf", RLHF_KEYS)):
        if v["strategy"] != strategy:
            for name in names:
                if name in changed:
                    yield f'{name}: no effect with strategy "{v["strategy"]}"; it belongs to "{strategy}"'
    if "reference" in changed and v["strategy"] not in ("dpo", "rlhf"):
        yield f'reference: no effect with strategy "{v["strategy"]}"; it belongs to "dpo" and "rlhf"'
    if v["strategy"] == "dpo":
        yield from _preference_warnings(v, changed)
    if v["strategy"] == "rlhf":
        yield from _reinforcement_warnings(v, changed)
    if v["max_steps"] > 0 and "num_train_epochs" in changed:
        yield f"num_train_epochs: no effect, max_steps {v['max_steps']} decides how long training lasts"
    if v["lora_dropout"] == 1:
        yield "lora_dropout: 1 drops all that the adapter is given; it will learn nothing"
    if "save_steps" in changed and v["save_strategy"] != "steps":
        yield f'save_steps: no effect with save_strategy "{v["save_strategy"]}"; it belongs to "steps"'
    yield from _idle(v, changed)


def _idle(v: dict, changed: set[str]) -> Iterator[str]:
    """Settings of what is switched off."""
    is_evaluated = v["eval_split"] > 0 or v["eval_dataset"] is not None
    scores = v["strategy"] == "rlhf" or (v["strategy"] == "dpo" and v["precompute_reference"])  # in such batches too
    unevaluated = "while training, nothing is evaluated: eval_split is 0 and no eval_dataset is given"
    idle = [
        ("warmup_ratio", v["lr_scheduler_type"] == "constant", 'with lr_scheduler_type "constant"'),
        *((name, not v["use_4bit"], "without use_4bit") for name in FOUR_BIT_KEYS),
        ("recompute", not v["gradient_checkpointing"], "without gradient_checkpointing"),
        ("save_total_limit", v["save_strategy"] == "no" and not v["load_best_model_at_end"], 'with save_strategy "no"'),
        ("eval_steps", not is_evaluated, unevaluated),
        ("per_device_eval_batch_size", not is_evaluated and not scores, unevaluated),
    ]
    for name, is_idle, reason in idle:
        if name in changed and is_idle:
            yield f"{name}: no effect {reason}"


def _preference_warnings(v: dict, changed: set[str]) -> Iterator[str]:
    loss_type, owners = v["loss_type"], ", ".join(f'"{name}"' for name in SMOOTHED_LOSSES)
    if v["label_smoothing"] and loss_type not in SMOOTHED_LOSSES:
        yield f'label_smoothing: no effect with loss_type "{loss_type}"; it belongs to {owners}'
    if "simpo_gamma" in changed and loss_type != "simpo":
        yield f'simpo_gamma: no effect with loss_type "{loss_type}"; it belongs to "simpo"'
    for name in KTO_KEYS:
        if name in changed and loss_type != "kto":
            yield f'{name}: no effect with loss_type "{loss_type}"; it belongs to "kto"'
    for name in ("reference", "precompute_reference"):
        if name in changed and loss_type in REFERENCE_FREE_LOSSES:
            yield f'{name}: no effect with loss_type "{loss_type}", which has no reference'
    for name in ("train_on_prompt", "neftune_noise_alpha"):
        if name in changed:
            yield f'{name}: no effect with strategy "dpo", which compares responses without noise'


def _reinforcement_warnings(v: dict, changed: set[str]) -> Iterator[str]:
    for name in ("train_on_prompt", "neftune_noise_alpha", "early_stopping_patience", "load_best_model_at_end"):
        if name in changed:
            yield f'{name}: no effect with strategy "rlhf"'
    useless = ("group_size",) if v["advantage"] == "gae" else GAE_KEYS
    for name in useless:
        if name in changed:
            yield f'{name}: no effect with advantage "{v["advantage"]}"'
    given = "reward_model" if v["reward_model"] else "reward_function"
    for name in ("reward_epochs", "reward_learning_rate"):
        if name in changed and v[given]:
            yield f"{name}: no effect with {given}; it belongs to a reward model trained from pairs"
