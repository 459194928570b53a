"""The training configuration: the JSON a user writes, in either dialect, as one frozen dataclass.

A key is declared once, below, with default, values, limits and description; checks and JSON Schema are read off it.
What the user leaves out is filled, first hit wins: by what other keys imply (strategy, use_8bit, dtype), by the
hardware profile `compute_specs` names, by the default. `provenance` says which.

    config_keys    one key: its rule, and reading a value by it
    config_rules   rules between keys
    config_plan    hardware profiles; `resolve(config, machine) -> Plan`
    config_json    strict reading of the file
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mini_forge.config_json import read_object
from mini_forge.config_keys import REQUIRED, Broken, key, nearest, plain, rules_of, show
from mini_forge.config_plan import PROFILES, Machine, Plan, detect_machine, profile_of, resolve
from mini_forge.config_rules import PRECISION_FLAGS, contradictions, warnings
from mini_forge.errors import ConfigError

__all__ = ["ALIASES", "PROFILES", "Machine", "Plan", "TrainingConfig", "detect_machine", "json_schema", "resolve"]

ALIASES = {  # the second dialect's name -> ours
    "base_model": "model_name",
    "lora_rank": "lora_r",
    "load_in_4bit": "use_4bit",
    "load_in_8bit": "use_8bit",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "optimizer": "optim",
    "bnb_4bit_use_double_quant": "use_nested_quant",
}
# A file with one of these is in the second dialect (or in both), where `task` and `compute_specs` may be left out.
SECOND_DIALECT = {*ALIASES, "dtype", "chat_template", "system_prompt", "comment", "notes"}
LEARNING_RATES = {"sft": 2e-4, "qlora": 2e-4, "rlhf": 1.41e-5, "dpo": 5e-7}
PATHS = ("model_name", "dataset", "eval_dataset", "init_adapter", "reward_model")

TASKS = ("text-generation", "summarization", "extractive-question-answering")
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd")
PREFERENCE_LOSSES = (  # on pairs
    "sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot",
    "discopop", "simpo", "orpo",
)  # fmt: skip
UNPAIRED_LOSSES = ("kto",)  # on single responses with a label
LOSS_SUGGESTIONS = {  # loss_type -> what its paper works with, where our defaults would not
    "exo_pair": {"label_smoothing": 1e-3},
    "simpo": {"beta": 2.0},
    "kto": {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
}
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Every setting of a run; the fields are the JSON keys. `from_file` and `from_dict` check and fill them."""

    # What to train
    task: str = key(REQUIRED, "The training task type", choices=TASKS)
    model_name: str = key(REQUIRED, "Model folder, or hub ID", minLength=1)
    provider: str = key("huggingface", "Model loading provider: plain or fused ops", choices=("huggingface", "unsloth"))
    strategy: str = key("sft", "Training strategy", choices=tuple(LEARNING_RATES))
    dataset: str = key(REQUIRED, "Path to the JSONL dataset file", minLength=1)
    compute_specs: str = key(REQUIRED, "Hardware profile; fills what is left out", choices=tuple(PROFILES))
    chat_template: str | None = key(
        None, "Chat format; model: the checkpoint's own; auto: by the model's name; left out: its own if it "
        "has one, else the plain task prompts", choices=("harmony", "chatml", "llama", "auto", "model"),
    )  # fmt: skip
    system_prompt: str | None = key(None, "System message put before every example")
    template_date: str | None = key(
        None, "The date, YYYY-MM-DD, for a template that tells it; left out: the day on which the run begins",
        pattern=r"^\d{4}-\d{2}-\d{2}$", because='"YYYY-MM-DD"',
    )  # fmt: skip

    # LoRA
    lora_r: int = key(16, "LoRA rank (dimensionality of the adapter)", minimum=1, maximum=256)
    lora_alpha: int = key(32, "LoRA alpha scaling parameter, usually 2 x lora_r", exclusiveMinimum=0)
    lora_dropout: float = key(0.1, "Dropout probability for LoRA layers", minimum=0, maximum=1)
    target_modules: str | tuple[str, ...] = key("all-linear", "Linear modules that get an adapter, by name")
    use_rslora: bool = key(False, "Scale by lora_alpha / sqrt(lora_r) (2312.03732)")
    adapter_format: str = key(
        "peft", "How a finished run writes adapters of experts: fused as PEFT does, or one for each expert",
        choices=("peft", "per-expert"),
    )  # fmt: skip
    init_adapter: str | None = key(None, "Start from this adapter folder (PEFT format)", minLength=1)

    # How the frozen weights are stored
    use_4bit: bool = key(True, "Store frozen weights in 4 bits")
    use_8bit: bool = key(False, "Store frozen weights in 8 bits; turns use_4bit off where that is left out")
    bnb_4bit_compute_dtype: str = key(
        "float16", "Dtype of 4-bit products; the training dtype, unless other than the profile's", choices=DTYPES
    )
    bnb_4bit_quant_type: str = key("nf4", "4-bit code: NormalFloat4 or Float4", choices=("nf4", "fp4"))
    use_nested_quant: bool = key(False, "Quantize the 4-bit statistics too")

    # Precision: neither flag nor dtype lets the device decide
    fp16: bool = key(False, "Train in float16 with a gradient scaler (older GPUs)")
    bf16: bool = key(False, "Train in bfloat16 (Ampere GPUs and later)")
    dtype: str | None = key(None, "Training precision; says the same as fp16 or bf16", choices=DTYPES)

    # Optimisation
    num_train_epochs: int = key(1, "Number of training epochs", minimum=1)
    max_steps: int = key(-1, "Optimizer steps; overrides epochs, -1 is off", also=(-1,), minimum=1)
    per_device_train_batch_size: int = key(1, "Training batch size per device", minimum=1)
    per_device_eval_batch_size: int = key(1, "Evaluation batch size per device", minimum=1)
    gradient_accumulation_steps: int = key(4, "Batches per optimizer step", minimum=1)
    gradient_checkpointing: bool = key(True, "Recompute activations: less memory, slightly slower")
    recompute: str = key(
        "full", "What gradient_checkpointing computes again: the MLPs, whole layers (slower, leaner), or whole "
        "layers whose inputs wait in host memory (CUDA)",
        choices=("selective", "full", "offload"),
    )  # fmt: skip
    learning_rate: float = key(2e-4, "Peak learning rate; left out: the strategy's", exclusiveMinimum=0, maximum=1)
    lr_scheduler_type: str = key(
        "cosine", "Learning rate schedule after warmup", choices=("linear", "cosine", "constant", "polynomial")
    )
    warmup_ratio: float = key(0.03, "Share of the steps in which the rate rises from 0", minimum=0, maximum=1)
    optim: str = key("paged_adamw_32bit", "Optimizer", choices=OPTIMIZERS)
    weight_decay: float = key(0.001, "Weight decay", minimum=0)
    max_grad_norm: float = key(0.3, "Gradients are scaled down to this norm; 0 is off", minimum=0)
    neftune_noise_alpha: float | None = key(None, "Noise on the embeddings (2310.05914)", exclusiveMinimum=0)
    seed: int = key(42, "Seed of split, order, adapter init, dropout", minimum=0, maximum=2**32 - 1)

    # Sequences
    max_seq_length: int | None = key(
        None, "Maximum sequence length in tokens; -1 and null are the model's own", also=(-1,), minimum=2
    )
    group_by_length: bool = key(True, "Batch sequences of similar length")
    packing: bool = key(False, "Fill rows with several sequences, isolated from each other")
    train_on_prompt: bool = key(False, "Train on prompts too, not on responses only")

    # Evaluation
    eval_split: float = key(
        0.2, "Share of the rows kept for evaluation; 0 is off", minimum=0, exclusiveMaximum=1,
        because=", and 1 leaves nothing to train on",
    )  # fmt: skip
    eval_dataset: str | None = key(None, "Evaluate on this file, and train on every row of dataset", minLength=1)
    eval_steps: int = key(100, "Evaluate every so many steps", minimum=1)
    early_stopping_patience: int | None = key(None, "Stop after so many evaluations without gain", minimum=1)
    load_best_model_at_end: bool = key(False, "Leave the adapter of the best evaluation, not of the last step")

    # The run
    output_dir: str = key("runs/config", "Folder of the run; left out: runs/<name of the file>", minLength=1)
    device: str = key("auto", "Device to train on", choices=("auto", "cpu", "cuda", "mps"))
    logging_steps: int = key(10, "A line of metrics every so many steps", minimum=1)
    save_strategy: str = key("epoch", "When checkpoints are saved", choices=("no", "steps", "epoch"))
    save_steps: int = key(500, 'Steps between checkpoints with save_strategy "steps"', minimum=1)
    save_total_limit: int | None = key(None, "Checkpoints kept; null is all", minimum=1)
    comment: object = key(None, "Kept in the record; no effect")
    notes: object = key(None, "Kept in the record; no effect")

    # DPO, and RLHF as to the reference
    reference: str = key(
        "base", "What the policy is tied to: the model without adapters, or as init_adapter makes it",
        choices=("base", "init_adapter"),
    )  # fmt: skip
    beta: float = key(0.1, "Strength of the tie to the reference model", exclusiveMinimum=0)
    loss_type: str = key("sigmoid", "Preference loss", choices=PREFERENCE_LOSSES + UNPAIRED_LOSSES)
    label_smoothing: float = key(0.0, "Expected share of flipped preferences", minimum=0, maximum=0.5)
    simpo_gamma: float = key(0.5, "Margin that simpo asks of the chosen reward", minimum=0)
    desirable_weight: float = key(1.0, "Weight of rows with label true in kto", exclusiveMinimum=0)
    undesirable_weight: float = key(1.0, "Weight of rows with label false in kto", exclusiveMinimum=0)
    precompute_reference: bool = key(False, "Compute the reference once, before training, and keep it on disk")

    # RLHF (PPO)
    reward_model: str | None = key(None, "Reward model folder; left out: trained from the pairs", minLength=1)
    reward_function: str | None = key(
        None, "Python function (prompts, responses, rows) -> list of numbers, a reward for each response",
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", because='"module:function"',
    )  # fmt: skip
    reward_epochs: int = key(1, "Epochs over the pairs for a reward model trained from them", minimum=1)
    reward_learning_rate: float = key(1e-4, "Peak learning rate of that reward model", exclusiveMinimum=0, maximum=1)
    advantage: str = key(
        "gae", "Where advantages come from: a value head (PPO), or groups of responses (GRPO)", choices=("gae", "group")
    )
    group_size: int = key(4, 'Responses to each prompt with advantage "group"', minimum=2)
    kl_coef: float = key(0.05, "Weight of the KL penalty towards the reference", minimum=0)
    kl_estimator: str = key("k1", "Estimator of the penalty on each token", choices=("k1", "k3"))
    kl_target: float | None = key(None, "KL in nats a response that kl_coef adapts to; null: fixed", exclusiveMinimum=0)
    target_kl: float | None = key(
        None, "Squared change of log-probabilities, halved, at which an update stops; null: never", exclusiveMinimum=0
    )
    ppo_epochs: int = key(4, "Passes over each batch of rollouts", minimum=1)
    num_mini_batches: int = key(1, "Mini-batches per pass", minimum=1)
    rollout_batch_size: int = key(16, "Responses per update", minimum=1)
    max_new_tokens: int = key(64, "Longest rollout in tokens", minimum=1)
    temperature: float = key(0.7, "Sampling temperature of rollouts", exclusiveMinimum=0)
    gamma: float = key(1.0, "Reward discount per token", minimum=0, maximum=1)
    gae_lambda: float = key(0.95, "Advantage estimation, bias against variance", minimum=0, maximum=1)
    clip_range: float = key(0.2, "Policy ratio clipped to 1 ± this", exclusiveMinimum=0, maximum=1)
    value_clip_range: float = key(0.2, "Value change clipped to ± this", exclusiveMinimum=0)
    value_coef: float = key(0.1, "Weight of the value loss", minimum=0)

    # Not JSON keys: where each value came from, and what the user should know
    provenance: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    warnings: list[str] = field(default_factory=list, compare=False, repr=False)

    @classmethod
    def from_dict(cls, document: Mapping, /, *, name: str = "config", **overrides) -> "TrainingConfig":
        """Check `document` and fill what it leaves out. `overrides`: keys or aliases, as if written there instead.

        `name` gives the default output_dir. Raises ConfigError with a line for every problem."""
        if not isinstance(document, Mapping):
            raise ConfigError(f"{name}: Must be a JSON object (got {show(document)}); give keys and values")
        return _Reader(document, overrides, name).config()

    @classmethod
    def from_file(cls, path: str | Path, /, **overrides) -> "TrainingConfig":
        """`from_dict` of a JSON file. Relative paths in it that exist only relative to its folder are taken from there.

        Raises ConfigError; syntax errors name FILE:LINE."""
        path = Path(path).expanduser()
        document = {name: _located(name, value, path.parent) for name, value in read_object(path).items()}
        return cls.from_dict(document, name=path.stem, **overrides)

    def checked(self) -> "TrainingConfig":
        """The same by its rules, which one made by hand or by `dataclasses.replace` may break. Raises ConfigError."""
        again = self.from_dict(self.to_dict())
        return replace(again, provenance=self.provenance, warnings=self.warnings)

    def to_dict(self) -> dict:
        """Every key with its value: JSON, and itself a valid configuration that means the same."""
        return {name: plain(getattr(self, name)) for name in RULES}


RULES = rules_of(TrainingConfig)
DEFAULTS = {name: rule.default for name, rule in RULES.items()}


def json_schema() -> dict:
    """JSON Schema (draft 2020-12) of a configuration file, for editors. Rules between keys are not in it."""
    properties = {name: rule.schema() for name, rule in RULES.items()}
    for name, property_ in properties.items():
        suggested = [f"{profile} {show(values[name])}" for profile, values in PROFILES.items() if name in values]
        if suggested:
            property_["description"] += f". Left out: {', '.join(suggested)}"
    for alias, name in ALIASES.items():
        description = f"Second name of {name}. {properties[name]['description']}"
        properties[alias] = {**properties[name], "description": description}
    second = [{"required": [name]} for name in sorted(SECOND_DIALECT)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mini_forge training configuration",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "allOf": [
            {"anyOf": [{"required": ["model_name"]}, {"required": ["base_model"]}]},
            {"anyOf": [{"required": ["task", "dataset", "compute_specs"]}, *second]},
        ],
    }


class _Reader:
    """One reading of a configuration: collects problems and, where there are none, values with their sources."""

    def __init__(self, document: Mapping, overrides: Mapping, name: str):
        self.problems: list[str] = []
        self.labels: dict[str, str] = {}  # field -> how the user named it
        self.sources: dict[str, str] = {}
        self.written = self._canonical(document, "file")
        self.written |= self._canonical(overrides, "override")
        self.is_second_dialect = not SECOND_DIALECT.isdisjoint([*document, *overrides])
        self.name = name

    def config(self) -> TrainingConfig:
        values = self._checked()
        written, usual = set(values), {}
        for source, suggestion in self._suggestions(values):
            self._fill(values, source, suggestion)
            usual = suggestion | usual
        self.problems += [self._missing(name) for name in RULES if name not in values and name not in self.written]
        complete = {**DEFAULTS, **values}
        self.problems += contradictions(complete, written)
        if self.problems:
            raise ConfigError(*self.problems)
        provenance = {name: self.sources[name] for name in RULES}
        return TrainingConfig(
            **complete, provenance=provenance, warnings=list(warnings(complete, written, DEFAULTS | usual))
        )

    def _canonical(self, document: Mapping, source: str) -> dict:
        """Values by our names; unknown keys, and a key and its alias that differ, become problems."""
        found: dict = {}
        for given, value in document.items():
            name = ALIASES.get(given, given) if isinstance(given, str) else given
            if name not in RULES:
                known = nearest(given, [*RULES, *ALIASES])
                self.problems.append(f"{_one_line(given)}: unknown key; the nearest known key is {show(known)}")
            elif name in found and (type(value), value) != (type(found[name]), found[name]):
                self.problems.append(
                    f"{given}: {show(value)} contradicts {self.labels[name]}: {show(found[name])}; "
                    f"they are one key, {name}: keep one of them"
                )
            else:
                found[name] = value
                self.labels[name] = given if given == name else f"{given} (= {name})"
                self.sources[name] = source if given == name else f"{source} as {given}"
        return found

    def _checked(self) -> dict:
        """The written values that keep their rules, as the configuration holds them."""
        values = {}
        for name, value in self.written.items():
            try:
                values[name] = RULES[name].read(value)
            except Broken as broken:
                rule, remedy = broken.args
                self.problems.append(f"{self.labels[name]}: {rule} (got {show(value)}); {remedy}")
        if values.get("max_seq_length") == -1:
            values["max_seq_length"] = None
        return values

    def _suggestions(self, values: dict):
        """(source, values) for what is left out, in order of precedence. Reads `values` as they fill."""
        strategy = values.get("strategy", DEFAULTS["strategy"])
        yield f"strategy {strategy}", {"learning_rate": LEARNING_RATES[strategy]}
        if strategy == "rlhf":  # a step is a whole update
            yield "strategy rlhf", {"logging_steps": 1}
        if strategy == "dpo" and values.get("loss_type") in LOSS_SUGGESTIONS:
            yield f"loss_type {values['loss_type']}", LOSS_SUGGESTIONS[values["loss_type"]]
        if strategy == "qlora":
            yield "strategy qlora", {"use_4bit": True}
        if values.get("use_8bit"):
            yield "use_8bit", {"use_4bit": False}
        if values.get("dtype"):
            said = PRECISION_FLAGS[values["dtype"]]
            yield f"dtype {values['dtype']}", {flag: flag == said for flag in ("fp16", "bf16")}
        if self.is_second_dialect:
            yield "default", {"task": "text-generation"}
            if "compute_specs" not in self.written:
                seen_as = "cpu" if values.get("device") == "cpu" else "auto"
                yield "machine", {"compute_specs": profile_of(detect_machine(seen_as))}
        if "compute_specs" in values:
            yield f"profile {values['compute_specs']}", PROFILES[values["compute_specs"]]
        yield "default", {"output_dir": f"runs/{self.name}"}
        yield "default", {name: value for name, value in DEFAULTS.items() if value is not REQUIRED}

    def _fill(self, values: dict, source: str, suggestion: dict):
        for name, value in suggestion.items():
            if name not in values:
                values[name] = value
                self.sources[name] = source

    def _missing(self, name: str) -> str:
        also = {"model_name": " (or base_model)", "dataset": " in the file, or --dataset FILE"}
        return f"{name}: {RULES[name].text()} (not given); it is required, give {name}{also.get(name, '')}"


def _one_line(name) -> str:
    is_plain = isinstance(name, str) and name.isprintable() and name == name.strip() != ""
    return name if is_plain else show(name)


def _located(name: str, value, folder: Path):
    """A path in the file: from the current folder if it exists there, else from the file's own folder if there."""
    is_path = ALIASES.get(name, name) in PATHS and isinstance(value, str) and value.strip()
    beside = os.path.join(folder, value) if is_path else ""
    return beside if beside and not os.path.exists(value) and os.path.exists(beside) else value
