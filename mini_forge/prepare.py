"""From a configuration to what a run starts from: device plan, tokenizer, template, tokenised documents.

`train` and `check` share this, so what `check` reports is what `train` does.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from mini_forge.config import Plan, TrainingConfig, detect_machine, resolve
from mini_forge.data.batches import Document, TokenStats, split, tokenize
from mini_forge.data.chat import Template, choose_template
from mini_forge.data.tasks import Example, load_examples
from mini_forge.data.tokenizer import Tokenizer, load_tokenizer
from mini_forge.errors import ConfigError, DataError, UserError
from mini_forge.io.adapters import read_adapter_config
from mini_forge.io.weights import read_json, resolve_model
from mini_forge.model.decoder import DecoderSpec
from mini_forge.model.families import decoder_spec
from mini_forge.model.lora import LoraSpec

AVAILABLE_STRATEGIES = ("sft", "qlora")


@dataclass(frozen=True)
class Prepared:
    """Everything decided and read before a weight is touched."""

    config: TrainingConfig
    plan: Plan
    folder: Path
    spec: DecoderSpec
    tokenizer: Tokenizer
    template: Template
    max_length: int
    train: list[Document]
    train_stats: TokenStats
    train_examples: list[Example]
    eval: list[Document]
    eval_stats: TokenStats | None
    eval_examples: list[Example]
    notes: list[str]


def prepare(config: TrainingConfig) -> Prepared:
    """Read and check everything `config` names. Raises the UserErrors of all parts that can be checked, together."""
    problems: list[str] = []

    def attempt(part, *arguments):
        try:
            return part(*arguments)
        except UserError as error:
            problems.extend(error.problems)
            return None

    config = attempt(with_init_adapter, config) or config
    attempt(check_strategy, config)
    plan = attempt(lambda: resolve(config, detect_machine(config.device)))
    train_rows = attempt(load_examples, config.dataset, config.task, config.strategy)
    eval_rows = attempt(load_examples, config.eval_dataset, config.task, config.strategy) if config.eval_dataset else []
    opened = attempt(_open_model, config)
    if problems:
        raise UserError.many(problems)
    return _tokenise(config, plan, opened, train_rows, eval_rows)


def check_strategy(config: TrainingConfig):
    if config.strategy not in AVAILABLE_STRATEGIES:
        raise ConfigError(
            f"strategy: {config.strategy!r} is not available in this release; available: "
            f"{', '.join(AVAILABLE_STRATEGIES)}"
        )


def _open_model(config: TrainingConfig):
    folder = resolve_model(config.model_name)
    spec = decoder_spec(read_json(folder / "config.json"))
    tokenizer = load_tokenizer(folder)
    return folder, spec, tokenizer, choose_template(config.chat_template, config.model_name, tokenizer, config.task)


def adapter_spec(config: TrainingConfig) -> LoraSpec:
    """The run's LoRA."""
    targets = None if config.target_modules == "all-linear" else tuple(config.target_modules)
    return LoraSpec(config.lora_r, config.lora_alpha, config.lora_dropout, targets, config.use_rslora)


def with_init_adapter(config: TrainingConfig) -> TrainingConfig:
    """The configuration with rank, alpha and targets of its initial adapter, which has them already.

    Raises ConfigError where the user wrote another rank or alpha."""
    if not config.init_adapter:
        return config
    asked, (found, _) = adapter_spec(config), read_adapter_config(Path(config.init_adapter).expanduser())
    written = {key for key, source in config.provenance.items() if source.startswith(("file", "override"))}
    clashes = [
        f"{key}: {getattr(asked, own)!r} differs from {getattr(found, own)!r} in init_adapter {config.init_adapter!r}; "
        f"leave {key} out, or give the adapter's value"
        for key, own in (("lora_r", "rank"), ("lora_alpha", "alpha"))
        if key in written and getattr(asked, own) != getattr(found, own)
    ]
    if clashes:
        raise ConfigError(*clashes)
    targets = "all-linear" if found.targets is None else found.targets
    alpha, use_rslora = found.alpha, found.use_rslora
    if not float(alpha).is_integer():  # as we write an rsLoRA adapter: alpha·√rank with the plain scaling
        alpha, use_rslora = round(alpha / math.sqrt(found.rank), 6), not use_rslora
    if not float(alpha).is_integer():
        raise ConfigError(f"init_adapter: {config.init_adapter!r} has lora_alpha {found.alpha}; it must be an integer")
    shape = {"lora_r": found.rank, "lora_alpha": int(alpha), "target_modules": targets, "use_rslora": use_rslora}
    sources = {**config.provenance, **dict.fromkeys(shape, "init_adapter")}
    return replace(config, **shape, provenance=sources)


def _tokenise(config, plan, opened, train_rows, eval_rows) -> Prepared:
    folder, spec, tokenizer, template = opened
    notes = [*config.warnings, *plan.notes, *template.notes]
    limit = config.max_seq_length or spec.max_positions
    if limit > spec.max_positions:
        notes.append(f"max_seq_length {limit} is more than the {spec.max_positions} positions the model was made for")
    if config.eval_dataset:
        if config.provenance.get("eval_split", "default") != "default":
            notes.append("eval_dataset is given: eval_split is not used, every row of dataset is trained on")
    else:
        train_index, eval_index = split(len(train_rows), config.eval_split, config.seed)
        eval_rows = [train_rows[i] for i in eval_index]
        train_rows = [train_rows[i] for i in train_index]
    options = (template, tokenizer, limit, config.train_on_prompt, config.system_prompt)
    train, train_stats = tokenize(train_rows, *options)
    evaluation, eval_stats = tokenize(eval_rows, *options) if eval_rows else ([], None)
    if not train:
        raise DataError(
            f"{config.dataset}: no row has a token to train on within max_seq_length {limit}; raise max_seq_length"
        )
    if config.eval_split and not evaluation:
        notes.append(f"{config.dataset}: no row is left to evaluate on; the run is not evaluated")
    if len(train) < 10:
        notes.append(f"{config.dataset}: only {len(train)} rows to train on; the adapter will memorise them")
    if train_stats.truncated or train_stats.dropped:
        notes.append(
            f"{config.dataset}: {train_stats.truncated} rows truncated to {limit} tokens, "
            f"{train_stats.dropped} dropped because no token to train on was left"
        )
    return Prepared(config, plan, folder, spec, tokenizer, template, limit, train, train_stats, train_rows, evaluation,
                    eval_stats, eval_rows, notes)  # fmt: skip
