"""From a configuration to what a run starts from: device plan, tokenizer, template, tokenised documents.

`train` and `check` share this, so what `check` reports is what `train` does.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from itertools import compress
from pathlib import Path

import torch
from torch import nn

from mini_forge.config import Plan, TrainingConfig, detect_machine, resolve
from mini_forge.data.batches import Document, TokenStats, encode, held_out
from mini_forge.data.chat import Template, choose_template
from mini_forge.data.labelled import LabelledDocument
from mini_forge.data.pairs import PairDocument
from mini_forge.data.rows import read_rows
from mini_forge.data.tasks import Datum, Example, Labelled, Pair, load_examples, read_examples
from mini_forge.data.token_store import StoredRows, TokenCache, TokenStore, highest_token, is_large, recipe
from mini_forge.data.tokenizer import Tokenizer, load_tokenizer
from mini_forge.errors import CheckpointError, ConfigError, DataError, UserError
from mini_forge.forms import LABELLED, PAIRS, Form, form_of, trains_reward
from mini_forge.inputs import adapter_spec, has_reference, ties_to_init_adapter, with_absolute_paths, with_init_adapter
from mini_forge.io.adapters import WEIGHTS_FILE
from mini_forge.io.fitting import check_weights
from mini_forge.io.hub import resolve_model
from mini_forge.io.models import is_adapter
from mini_forge.io.records import read_spec, spec_of
from mini_forge.io.rewards import load_function
from mini_forge.io.storage import multiplies_stored
from mini_forge.io.weights import bfloat16_matrices, other_parts, weight_files
from mini_forge.json_faults import read_json
from mini_forge.model.decoder import Decoder, DecoderSpec
from mini_forge.model.lora import target_names
from mini_forge.providers import PROVIDERS
from mini_forge.training.rollouts import Prompt, encode_prompts, prompt_document


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
    train: TokenStore | list[Document] | list[PairDocument] | list[LabelledDocument]
    train_stats: TokenStats
    eval: TokenStore | list[Document] | list[PairDocument] | list[LabelledDocument]
    eval_stats: TokenStats | None
    notes: list[str]
    prompts: list[Prompt] = field(default_factory=list)  # of rlhf, to answer
    eval_prompts: list[Prompt] = field(default_factory=list)

    @property
    def base_name(self) -> str:
        """What adapter_config.json calls the base: the hub ID, or a local folder's absolute path."""
        local = Path(self.config.model_name).expanduser()
        return str(local.resolve()) if local.is_dir() else self.config.model_name

    @property
    def form(self) -> Form:
        """Of the rows in `train` and `eval`."""
        return form_of(self.config)

    @property
    def collate(self) -> Callable[[list], object]:
        """What makes a microbatch of some of `train`."""
        return partial(self.form.batch, share=shares_prefixes(self.config, self.spec), limit=self.max_length)

    @property
    def stored_form(self) -> str:
        """What the linear layers of the base are held in: how they are quantized, or their dtypes."""
        with torch.device("meta"):
            modules = Decoder(self.spec).named_modules()
        linears = {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}
        kept = linears & in_bfloat16(self, self.folder)
        dtypes = ["bfloat16"] * bool(kept) + [self.plan.dtype] * (kept != linears)
        return self.plan.quantization or " and ".join(dtypes)

    def fingerprint(self) -> int:
        """A checksum of all that is trained on, by which a resumed run knows that its data are the same."""
        return self.form.fingerprint(self.train)


def shares_prefixes(config: TrainingConfig, spec: DecoderSpec) -> bool:
    """Whether what a microbatch's documents begin with is computed once: where that changes no result, so not with
    noise that is drawn for each token, nor where a balance loss counts tokens."""
    if has_reference(config):  # neither noise nor a balance loss
        return True
    has_balance = spec.experts is not None and spec.experts.balance_coef
    return not (config.lora_dropout or config.neftune_noise_alpha or has_balance)


def prepare(config: TrainingConfig) -> Prepared:
    """Read and check everything `config` names. Raises the UserErrors of all parts that can be checked, together."""
    problems: list[str] = []

    def attempt(part, *arguments):
        try:
            return part(*arguments)
        except UserError as error:
            problems.extend(error.problems)
            return None

    config = with_absolute_paths(config)
    adapted = attempt(with_init_adapter, config)
    config = adapted or config
    plan = attempt(lambda: resolve(config, detect_machine(config.device)))
    if config.reward_function and config.strategy == "rlhf":
        attempt(load_function, config.reward_function)
    opened = attempt(_open_model, config)
    if opened is not None and plan is not None:
        fitting = config if adapted else replace(config, init_adapter=None)  # its fault is told already
        attempt(check_weights, fitting, plan, opened[0], adapter_spec(config))
    train_rows = attempt(_dataset, config, config.dataset, opened)
    if train_rows is None and trains_reward(config):
        problems.append(
            "reward_model: not given, so a reward model is trained and every row must be a pair; for prompts alone "
            "give reward_model or reward_function"
        )
    eval_rows = attempt(_dataset, config, config.eval_dataset, opened) if config.eval_dataset else []
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return _tokenise(config, plan, opened, train_rows, eval_rows)


def load_rows(config: TrainingConfig, path: str) -> list[Example] | list[Pair] | list[Labelled]:
    """The rows of a dataset in the form that the run trains on. Raises DataError with every problem."""
    return load_examples(path, config.task, config.strategy, form_of(config) is PAIRS, form_of(config) is LABELLED)


def _dataset(config: TrainingConfig, path: str, opened):
    """The rows of a dataset, all checked. Of a large one for sft only the place of its tokens: it is read anew to make
    them, if they are not there."""
    if config.strategy not in ("sft", "qlora") or not is_large(path):
        return load_rows(config, path)
    cache = None
    if opened is not None:
        _, spec, tokenizer, template = opened
        limit = config.max_seq_length or spec.max_positions
        facts = recipe(template, tokenizer, limit, config.train_on_prompt, config.system_prompt, config.task)
        cache = TokenCache(path, facts)
    if cache is None or cache.stored is None:
        for _ in read_examples(path, config.task):  # a fault is told before minutes of tokenising
            pass
    return cache


def in_bfloat16(prepared: Prepared, folder: Path) -> frozenset[str]:
    """The matrices of a checkpoint that the run keeps in bfloat16, where they are not quantized."""
    plan = prepared.plan
    if not multiplies_stored(
        PROVIDERS[prepared.config.provider](plan.device).ops, getattr(torch, plan.dtype), plan.device
    ):
        return frozenset()
    with torch.device("meta"):
        return bfloat16_matrices(folder, Decoder(read_spec(folder)))


def model_identity(prepared: Prepared) -> str:
    """A digest of what the reference's log-probabilities depend on: its files and how they are computed with."""
    config, plan = prepared.config, prepared.plan
    files = [prepared.folder / "config.json", *weight_files(prepared.folder)]
    if ties_to_init_adapter(config):
        files.append(Path(config.init_adapter).expanduser() / WEIGHTS_FILE)
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    computed = (plan.device, plan.dtype, plan.quantization, plan.nested, plan.compute_dtype, config.provider)
    return hashlib.sha256(repr((facts, computed)).encode()).hexdigest()


def _open_model(config: TrainingConfig):
    folder = resolve_model(config.model_name)
    if is_adapter(folder) and not (folder / "config.json").exists():
        raise ConfigError(
            f"model_name: {config.model_name!r} is the folder of an adapter, not of a model; give its base with this "
            "folder as init_adapter, or `merge` it first"
        )
    record = read_json(folder / "config.json")
    spec = spec_of(record, folder)
    tokenizer = load_tokenizer(folder)
    weight_files(folder)
    with torch.device("meta"):  # the names of the layers, without their weights
        target_names(Decoder(spec), adapter_spec(config).targets)
    template = template_of(config, tokenizer)
    if "text_config" in record and (other := other_parts(folder)):
        template.notes.append(f"{config.model_name}: only its text model is read, not {other} tensors of other parts")
    return folder, spec, tokenizer, template


def template_of(config: TrainingConfig, tokenizer: Tokenizer) -> Template:
    """The template of a run, on its own day."""
    today = date.fromisoformat(config.template_date) if config.template_date else None
    return choose_template(config.chat_template, config.model_name, tokenizer, config.task, today)


def _documents(rows, config: TrainingConfig, template: Template, tokenizer: Tokenizer, limit: int):
    """Rows as documents, and what that took; of those on disk, it was told when they were written."""
    if isinstance(rows, StoredRows):
        return rows.documents()
    return form_of(config).tokenize(rows, config, template, tokenizer, limit)


def _with_tokens(config: TrainingConfig, template: Template, tokenizer: Tokenizer, limit: int, notes: list[str], rows):
    """A cache's tokens, made now if need be; other rows as they are."""
    if not isinstance(rows, TokenCache):
        return rows
    if rows.stored is None:
        examples = read_examples(rows.path, config.task)
        rows.make(encode(examples, template, tokenizer, limit, config.train_on_prompt, config.system_prompt))
    notes += rows.notes
    return rows.stored


def _part(rows, chosen):
    """The rows where `chosen`, booleans, is true."""
    return rows.part(chosen) if isinstance(rows, StoredRows) else list(compress(rows, chosen))


def _prompts(config: TrainingConfig, template: Template, tokenizer: Tokenizer, limit: int, train_rows, eval_rows):
    """(prompts, prompts to evaluate on, notes) of rlhf; of other strategies, none."""
    if config.strategy != "rlhf":
        return [], [], []
    if config.max_new_tokens >= limit:
        is_models = config.max_seq_length is None or config.max_seq_length > limit
        raise ConfigError(
            f"max_new_tokens: {config.max_new_tokens} leaves no room for a prompt in "
            + (f"the model's {limit} positions; give fewer" if is_models else
               f"{limit} tokens; give fewer, or raise max_seq_length")
        )  # fmt: skip
    sides, cut = [], 0
    for rows, path in ((train_rows, config.dataset), (eval_rows, config.eval_dataset or config.dataset)):
        fields = {row.line: row.fields for row in read_rows(path)} if rows else {}
        room = limit - config.max_new_tokens
        prompts, cut_here = encode_prompts(rows, fields, template, tokenizer, room, config.system_prompt)
        sides.append(prompts)
        cut += cut_here
    notes = []
    if cut:
        notes.append(f"{cut} prompts cut on the left to leave max_new_tokens {config.max_new_tokens} of {limit} tokens")
    return *sides, notes


def _documents_of(prompts: list[Prompt]) -> tuple[list[Document], TokenStats]:
    """The prompts as documents without a token to train on, which rollouts will bring."""
    documents = [prompt_document(prompt) for prompt in prompts]
    return documents, TokenStats.of(len(prompts), len(prompts), 0, documents)


def _adapted_stacks(config: TrainingConfig, spec: DecoderSpec) -> set[str]:
    """The last names of the stacks of experts that are adapted."""
    with torch.device("meta"):
        names = target_names(Decoder(spec), adapter_spec(config).targets)
    return {name.rpartition(".")[2] for name in names if ".experts." in name}


def _template_notes(config: TrainingConfig, template: Template, rows) -> list[str]:
    """What the user gave and the template does not spell."""
    notes = []
    if config.template_date and not template.date:
        notes.append("template_date: no effect, the chat template tells no date")
    if config.system_prompt and template.leaves_out("system"):
        notes.append("system_prompt: the chat template leaves it out of a conversation that ends in a response; put it "
                     "into the rows' first user messages")  # fmt: skip
    first = {} if not isinstance(rows, list) else {_first_role(row): row for row in reversed(rows)}
    for role in ("system", "developer"):
        if (told := first.get(role)) is not None and template.leaves_out(role):
            notes.append(f"{told.file}:{told.line}: the chat template leaves out {role} messages; put what they say "
                         "into the first user message, or give chat_template another format")  # fmt: skip
    return notes


def _first_role(row: Datum) -> str | None:
    messages = row.messages if isinstance(row, Example) else row.prompt
    return messages[0]["role"] if messages else None


def _preference_notes(config: TrainingConfig) -> list[str]:
    if not has_reference(config):
        return []
    notes = []
    if config.lora_dropout:
        notes.append(
            f"lora_dropout: {config.lora_dropout} is not used; policy and reference are compared without noise"
        )
    if config.init_adapter and config.reference == "base":
        notes.append(
            'init_adapter: the reference is the model without it; give reference "init_adapter" to tie the training to '
            "the adapted model"
        )
    return notes


def _label_notes(config: TrainingConfig, documents: list[LabelledDocument]) -> list[str]:
    """Whether the weights balance the labels: λ_D n_D / (λ_U n_U) from 1 to 4/3, KTO (2402.01306) Eq. 8."""
    desirable = sum(document.is_desirable for document in documents)
    undesirable = len(documents) - desirable
    counts = f"{config.dataset}: {desirable} desirable and {undesirable} undesirable rows"
    if not desirable or not undesirable:
        return [f"{counts}; with rows of one label alone the model learns to give more, or less, of anything"]
    ratio = config.desirable_weight * desirable / (config.undesirable_weight * undesirable)
    if 0.95 < ratio < 1.4:  # a few rows more or less are no matter
        return []
    return [
        f"{counts}, weighed {ratio:.2f} to 1; KTO's authors advise 1 to 1.33 (2402.01306, Eq. 8): desirable_weight "
        f"{config.desirable_weight / ratio:.3g} to {config.desirable_weight / ratio * 4 / 3:.3g}"
    ]


def _tokenise(config, plan, opened, train_rows, eval_rows) -> Prepared:
    folder, spec, tokenizer, template = opened
    notes = [*config.warnings, *plan.notes, *template.notes, *_template_notes(config, template, train_rows)]
    if template.date:  # recorded, so that the run is told the same day whenever it goes on and is used
        told = config.provenance if config.template_date else {**config.provenance, "template_date": "today"}
        config = replace(config, template_date=template.date.isoformat(), provenance=told)
    limit = config.max_seq_length or spec.max_positions
    if limit > spec.max_positions:
        notes.append(f"max_seq_length {limit} is more than the {spec.max_positions} positions the model was made for")
    if config.adapter_format == "per-expert" and spec.experts is None:
        notes.append("adapter_format: no effect on a model without experts")
    elif config.adapter_format == "per-expert" and _adapted_stacks(config, spec) == {"gate_up_proj"}:
        notes.append('adapter_format "per-expert": PEFT leaves out adapters of experts.gate_up_proj without '
                     "experts.down_proj; name both, or leave adapter_format out")  # fmt: skip
    train_rows, eval_rows = (
        _with_tokens(config, template, tokenizer, limit, notes, rows) for rows in (train_rows, eval_rows)
    )
    if config.eval_dataset:
        if config.provenance.get("eval_split", "default") != "default":
            notes.append("eval_dataset is given: eval_split is not used, every row of dataset is trained on")
    else:
        is_held_out = held_out(len(train_rows), config.eval_split, config.seed)
        train_rows, eval_rows = _part(train_rows, ~is_held_out), _part(train_rows, is_held_out)
    prompts, eval_prompts, prompt_notes = _prompts(config, template, tokenizer, min(limit, spec.max_positions),
                                                   train_rows, eval_rows)  # fmt: skip
    if config.strategy == "rlhf" and not trains_reward(config):
        train, train_stats = _documents_of(prompts)
        evaluation, eval_stats = _documents_of(eval_prompts)
    else:
        train, train_stats = _documents(train_rows, config, template, tokenizer, limit)
        evaluation, eval_stats = _documents(eval_rows, config, template, tokenizer, limit) if eval_rows else ([], None)
    highest = max(highest_token(train), highest_token(evaluation))
    if highest >= spec.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has a token {highest}, the model only {spec.vocab_size} embeddings; "
            "they do not belong together"
        )
    if not train:
        raise DataError(
            f"{config.dataset}: no row has a token to train on within max_seq_length {limit}; raise max_seq_length"
        )
    if config.eval_split and not evaluation:
        notes.append(f"{config.dataset}: no row is left to evaluate on; the run is not evaluated")
    if len(train) < 10:
        rows = "1 row" if len(train) == 1 else f"{len(train)} rows"
        notes.append(f"{config.dataset}: only {rows} to train on; the adapter will memorise them")
    if train_stats.truncated or train_stats.dropped:
        notes.append(
            f"{config.dataset}: {train_stats.truncated} rows cut to {limit} tokens, prompts first, from the left; "
            f"{train_stats.dropped} dropped because no token to train on was left"
        )
    notes += [
        *prompt_notes,
        *_preference_notes(config),
        *(_label_notes(config, train) if form_of(config) is LABELLED else []),
    ]
    return Prepared(config, plan, folder, spec, tokenizer, template, limit, train, train_stats, evaluation, eval_stats,
                    notes, prompts, eval_prompts)  # fmt: skip
