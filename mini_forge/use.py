"""Use a trained run or a plain model: the same template, system prompt and precision it was trained with."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mini_forge.checkpoints import read_reference
from mini_forge.config import TrainingConfig, detect_machine, resolve
from mini_forge.data.batches import split, tokenize
from mini_forge.data.chat import Template, choose_template
from mini_forge.data.pairs import flatten, tokenize_pairs
from mini_forge.data.rows import read_rows
from mini_forge.data.tasks import Labelled, Pair, load_examples, user_message
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import ConfigError
from mini_forge.forms import LABELLED, form_of
from mini_forge.inference.evaluate import evaluate_generation, evaluate_loss
from mini_forge.inference.generate import TextStream, generate, spelled_end, until
from mini_forge.inputs import has_reference, ties_to_init_adapter
from mini_forge.io.models import load_model, load_tokenizer
from mini_forge.io.runs import CONFIG_FILE, RunFolder
from mini_forge.model.decoder import Decoder
from mini_forge.prepare import template_of
from mini_forge.providers import PROVIDERS
from mini_forge.settings import objective_of, sampling_of
from mini_forge.stages import scorer_of
from mini_forge.training.reward import Scorer
from mini_forge.training.rlhf import evaluate_policy
from mini_forge.training.rollouts import encode_prompts, rollout_of
from mini_forge.training.sft import SFT


@dataclass
class Session:
    """A loaded model with everything needed to talk to it. `config` is None for a model that is not a run of ours."""

    model: Decoder
    tokenizer: Tokenizer
    template: Template
    system_prompt: str | None
    config: TrainingConfig | None

    @classmethod
    def open(cls, path: str, system_prompt: str | None = None) -> "Session":
        """path: a run or adapter folder, a model folder, or a hub ID. A run computes with its provider's ops."""
        config, tokenizer, template = spelling_of(path)
        if config is not None:
            config = replace(config, device="auto")  # where it is used, not where it was trained
            plan = resolve(config, detect_machine("auto"))
            ops = PROVIDERS[config.provider](plan.device).ops
            options = {"nested": plan.nested, "compute_dtype": getattr(torch, plan.compute_dtype), "ops": ops}
            model = load_model(path, getattr(torch, plan.dtype), plan.device, plan.quantization, **options)
        else:
            machine = detect_machine("auto")
            dtype = torch.bfloat16 if machine.device == "cuda" and machine.has_bf16 else torch.float32
            model = load_model(path, dtype, machine.device)
        if system_prompt is None and config is not None:
            system_prompt = config.system_prompt
        return cls(model, tokenizer, template, system_prompt, config)

    def prompt_ids(self, text: str, raw: bool = False) -> list[int]:
        """Token ids of a user's message in the template, or of the text as it is."""
        if raw:
            ids = self.tokenizer.encode(text)
            needs_bos = self.tokenizer.adds_bos and ids[:1] != [self.tokenizer.bos_id]
            return [self.tokenizer.bos_id, *ids] if needs_bos else ids
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        takes_task = self.config is not None and not has_reference(self.config)  # a pair's prompt is what the user says
        task = self.config.task if takes_task else "text-generation"
        return self.tokenizer.encode(self.template.render_prompt([*system, user_message(task, text)]))

    def print_reply(self, text: str, raw: bool = False, write=print, **sampling):
        """Stream the model's continuation of one prompt, with a final line break. `write` is called as `print`."""
        end = spelled_end(self.template, self.tokenizer)
        stream = TextStream(self.tokenizer, end)
        ids = self.prompt_ids(text, raw)
        limit = self.model.spec.max_positions
        if len(ids) >= limit:
            raise ConfigError(f"--prompt: {len(ids)} tokens; the model has {limit} positions; shorten the prompt")
        if sampling["max_new_tokens"] > limit - len(ids):
            sampling["max_new_tokens"] = limit - len(ids)
            print(f"note: at most {limit - len(ids)} new tokens: the model has {limit} positions", file=sys.stderr)
        stops = self.template.stop_ids(self.tokenizer)
        generate(
            self.model, [ids], stop_ids=stops, allowed=until(end, self.tokenizer),
            on_token=lambda _, token: write(stream.push(token), end="", flush=True), **sampling,
        )  # fmt: skip
        write(stream.finish())


def run_folder(path: str) -> Path:
    """Of a checkpoint, its run's folder; any other path as it is."""
    given = Path(os.path.expanduser(path))
    run = RunFolder(given.absolute().parent.parent)
    return run.path if given.absolute() in map(run.checkpoint, run.steps()) else given


def spelling_of(path: str) -> tuple[TrainingConfig | None, Tokenizer, Template]:
    """The configuration of a run, or of a checkpoint's run (None for any other model), and the tokenizer and template
    that model is used with."""
    record, config = run_folder(path) / CONFIG_FILE, None
    if os.path.isfile(record):
        try:
            config = TrainingConfig.from_file(record)
        except ConfigError as error:
            told = (text if text.startswith(str(record)) else f"{record}: {text}" for text in error.problems)
            raise ConfigError(*(f"{text}; or put the run's own back" for text in told)) from None
    tokenizer = load_tokenizer(path)
    if config is None:
        return None, tokenizer, choose_template(None, str(path), tokenizer, "text-generation")
    return config, tokenizer, template_of(config, tokenizer)


def evaluate_run(
    path: str,
    *,
    dataset: str | None = None,
    limit: int | None = None,
    constrained: bool = True,
    max_new_tokens: int = 128,
) -> tuple[dict, list[dict]]:
    """Metrics and predictions of a run or adapter on a dataset: loss and perplexity, and the task's own scores; of a
    run on pairs or labelled responses, by how much it prefers the good ones; of rlhf, the mean reward of responses to
    the prompts, sampled as in training with draws that are always the same, and their KL to the reference, and of pairs
    how often the reward prefers the chosen response.

    Without `dataset`: the run's eval_dataset, else the very rows it held out."""
    session = Session.open(path)
    examples = _evaluation_examples(session.config, dataset)
    examples = examples[:limit] if limit else examples
    config = session.config
    if config is not None and ties_to_init_adapter(config):
        session.model.reference = read_reference(run_folder(path), session.model)
    length = (config.max_seq_length if config else None) or session.model.spec.max_positions
    if config is not None and config.strategy == "rlhf":
        return _reward_metrics(session, path, examples, min(length, session.model.spec.max_positions))
    if config is not None and config.strategy == "dpo":
        return _preference_metrics(session, examples, length), []
    documents, stats = tokenize(
        examples, session.template, session.tokenizer, length, bool(config and config.train_on_prompt),
        session.system_prompt,
    )  # fmt: skip
    metrics = {"rows": len(examples), "rows_dropped": stats.dropped}
    metrics |= evaluate_loss(session.model, documents, SFT.sums,
                             batch_size=config.per_device_eval_batch_size if config else 1)  # fmt: skip
    scores, predictions = evaluate_generation(
        session.model, session.tokenizer, session.template, examples, config.task if config else "text-generation",
        max_new_tokens=max_new_tokens, constrained=constrained, system_prompt=session.system_prompt,
    )  # fmt: skip
    return metrics | scores, predictions


def _preference_metrics(session: Session, rows: list[Pair] | list[Labelled], max_length: int) -> dict:
    config, form = session.config, form_of(session.config)
    documents, stats = form.tokenize(rows, config, session.template, session.tokenizer, max_length)
    sums, batch_size = objective_of(config).sums, config.per_device_eval_batch_size
    metrics = form.evaluate(session.model, documents, sums, batch_size, max_length)
    return {"rows": len(rows), "rows_dropped": stats.dropped} | metrics


def _reward_metrics(session: Session, path: str, pairs: list[Pair], max_length: int) -> tuple[dict, list[dict]]:
    config, model, tokenizer = session.config, session.model, session.tokenizer
    rows = {row.line: row.fields for row in read_rows(pairs[0].file)}
    room = max_length - config.max_new_tokens
    prompts, cut = encode_prompts(pairs, rows, session.template, tokenizer, room, session.system_prompt)
    score = scorer_of(config, resolve(config, detect_machine(config.device)), model, run_folder(path))
    sampling = sampling_of(config, session.template, tokenizer)
    metrics, samples = evaluate_policy(
        model, prompts, tokenizer, sampling, score, config.seed, config.per_device_eval_batch_size
    )
    predictions = [
        {"prompt": sample["prompt"], "prediction": sample["response"],
         "reference": None if pair.chosen is None else pair.chosen[-1].get("content"),
         "reward": sample["reward"], "kl": sample["kl"]}
        for pair, sample in zip(pairs, samples, strict=True)
    ]  # fmt: skip
    if all(pair.chosen is not None for pair in pairs):
        metrics |= _reward_of_pairs(session, pairs, rows, max_length, score)
    return {"rows": len(pairs), "truncated_prompts": cut} | metrics, predictions


def _reward_of_pairs(session: Session, pairs: list[Pair], rows: dict, max_length: int, score: Scorer) -> dict:
    """How often, and by how much, the run's reward prefers the chosen responses that the dataset has."""
    documents, _ = tokenize_pairs(pairs, session.template, session.tokenizer, max_length, session.system_prompt)
    responses = [rollout_of(side, session.tokenizer, rows[side.line]) for side in flatten(documents)]
    if not responses:
        return {}
    chosen, rejected = score(responses).float().view(-1, 2).unbind(1)
    return {"eval_reward_accuracy": float((chosen > rejected).float().mean()),
            "eval_reward_margin": float((chosen - rejected).mean()), "eval_pairs": len(documents)}  # fmt: skip


def _holds_pairs(path: str) -> bool:
    return all(row.fields.get(key) is not None for row in read_rows(path) for key in ("chosen", "rejected"))


def _evaluation_examples(config: TrainingConfig | None, dataset: str | None):
    task, strategy = (config.task, config.strategy) if config else ("text-generation", "sft")
    takes_labels = config is not None and form_of(config) is LABELLED

    def load(path: str):
        needs_pairs = strategy == "dpo" or (strategy == "rlhf" and _holds_pairs(path))
        return load_examples(path, task, strategy, needs_pairs, takes_labels)

    if dataset is not None:
        return load(dataset)
    if config is None:
        raise ConfigError("--dataset: this folder has no training_config.json, so a dataset must be named")
    if config.eval_dataset:
        return load(config.eval_dataset)
    rows = load(config.dataset)
    held_out = split(len(rows), config.eval_split, config.seed)[1]
    if not held_out:
        raise ConfigError("--dataset: the run held no rows out; name a dataset to evaluate on")
    return [rows[i] for i in held_out]
