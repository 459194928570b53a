"""A model on a dataset: loss and perplexity, and the scores of what it generates."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mini_forge.data.batches import Batch, Document, collate, cut_left
from mini_forge.data.chat import Template
from mini_forge.data.labelled import LabelledBatch, LabelledDocument, collate_labelled
from mini_forge.data.pairs import PairBatch, PairDocument, collate_pairs
from mini_forge.data.tasks import Example
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.durable import json_text, write_together
from mini_forge.errors import ConfigError, DataError, TrainingError, is_disk_full
from mini_forge.inference.generate import generate, spelled_end, until
from mini_forge.inference.metrics import answer_f1, exact_match, perplexity, rouge
from mini_forge.inference.spans import ContextSpans, TokenBytes
from mini_forge.io.runs import EVAL_FILE, PREDICTIONS_FILE
from mini_forge.model.decoder import Decoder, evaluating

SAMPLES = 8  # rows generated for a task without scores: enough to look at


def evaluate_loss(
    model: Decoder,
    documents: Sequence[Document],
    batch_sums: Callable[[Decoder, Batch], tuple[torch.Tensor, int, dict[str, float]]],
    *,
    batch_size: int,
) -> dict[str, float | int]:
    """`eval_loss` in nats per trained-on token, `eval_perplexity` and `eval_tokens`, over all documents.

    `batch_sums(model, batch)` gives the summed loss, its count and the metrics' sums; only the totals are divided, so
    every token weighs the same whatever its batch. Longest documents go first, so that too little memory shows at once.
    Raises DataError without documents, TrainingError for a loss that is not finite."""
    means, count = _means(model, documents, batch_sums, batch_size, collate)
    return {**means, "eval_perplexity": perplexity(means["eval_loss"]), "eval_tokens": count}


def evaluate_pairs(
    model: Decoder,
    pairs: Sequence[PairDocument],
    pair_sums: Callable[[Decoder, PairBatch], tuple[torch.Tensor, int, dict[str, float]]],
    *,
    batch_size: int,
) -> dict[str, float | int]:
    """`eval_loss` per pair, `eval_pairs`, and each metric's mean over all pairs as `eval_…`.

    `pair_sums(model, batch)` gives the summed loss, its count and the metrics' sums. Raises DataError without pairs,
    TrainingError for a loss that is not finite."""
    means, count = _means(model, pairs, pair_sums, batch_size, collate_pairs)
    return {**means, "eval_pairs": count}


def evaluate_labelled(
    model: Decoder,
    documents: Sequence[LabelledDocument],
    row_sums: Callable[[Decoder, LabelledBatch], tuple[torch.Tensor, int, dict[str, float]]],
    *,
    batch_size: int,
    max_length: int,
) -> dict[str, float | int]:
    """`eval_loss` per row, `eval_rows`, and each metric's mean over all rows as `eval_…`; as `evaluate_pairs`.

    `max_length`: of the prompts with each other's completions that KTO compares with, in tokens. Rows meet in batches
    of `batch_size`, longest first, so that is part of the loss."""
    collate_rows = partial(collate_labelled, max_length=max_length)
    means, count = _means(model, documents, row_sums, batch_size, collate_rows)
    return {**means, "eval_rows": count}


def _means(model: Decoder, documents: Sequence, batch_sums, batch_size: int, together) -> tuple[dict[str, float], int]:
    """The mean loss and metrics over all documents, and how many were counted; `together` makes batches of them."""
    if not documents:
        raise DataError("evaluation: no rows to evaluate on; give a dataset with at least one row with a response")
    ordered = sorted(documents, key=lambda document: document.inputs, reverse=True)
    total, count, sums = 0.0, 0, {}
    with evaluating(model):
        for start in range(0, len(ordered), batch_size):
            batch_total, batch_count, metrics = batch_sums(model, together(ordered[start : start + batch_size]))
            total, count = total + float(batch_total), count + batch_count
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
    if not math.isfinite(total):
        raise TrainingError(f"evaluation: the loss is {total}; the weights are damaged or overflow in this precision")
    return {"eval_loss": total / count, **{f"eval_{name}": value / count for name, value in sums.items()}}, count


def evaluate_generation(
    model: Decoder,
    tokenizer: Tokenizer,
    template: Template,
    examples: Sequence[Example],
    task: str,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    constrained: bool = True,
    system_prompt: str | None = None,
    limit: int | None = None,
) -> tuple[dict[str, float | int], list[dict]]:
    """Greedy answers to the examples' prompts: mean scores, and per row the prompt as the model saw it, the prediction,
    the reference and the row's scores.

    Scores are fractions of 1: rouge1, rouge2 and rougeL (F1) for summarization, exact_match and f1 for extractive
    question answering, none for text-generation, where only the first `SAMPLES` rows are generated unless `limit` says
    otherwise. `text` rows have no prompt and are passed over. `constrained` holds extractive answers to spans of
    their context. Prompts too long for the model lose their left part, and are counted. Raises DataError without
    examples."""
    if not examples:
        raise DataError("evaluation: no rows to generate from; give a dataset with at least one")
    score = SCORES[task]
    limit = SAMPLES if limit is None and score is None else limit
    asked = [example for example in examples if example.text is None][:limit]
    is_held = constrained and task == "extractive-question-answering"
    opening = template.opening if is_held and template.opening.strip() else ""  # the model shall not have to spell it
    room = _room(model, max_new_tokens)
    prompts = [_prompt(example, template, tokenizer, system_prompt, opening, room) for example in asked]
    answer = (_held_answers if is_held else _free_answers)(model, tokenizer, template, max_new_tokens)
    answers = [""] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: len(prompts[i].ids), reverse=True)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, text in zip(chosen, answer([prompts[i].ids for i in chosen], [asked[i] for i in chosen]), strict=True):
            answers[i] = text
    scored = [score(answer, example.reference) if score else {} for answer, example in zip(answers, asked, strict=True)]
    predictions = [
        {"prompt": prompt.text, "prediction": answer, "reference": example.reference, **scores}
        for prompt, answer, example, scores in zip(prompts, answers, asked, scored, strict=True)
    ]
    means = {name: sum(row[name] for row in scored) / len(scored) for name in (scored[0] if scored else ())}
    counts = {"generated_rows": len(asked), "truncated_prompts": sum(prompt.is_cut for prompt in prompts)}
    return counts | means, predictions


def rouge_scores(prediction: str, reference: str) -> dict[str, float]:
    return {name: score.f1 for name, score in rouge(prediction, reference).items()}


def answer_scores(prediction: str, reference: str | list[str]) -> dict[str, float]:
    references = [reference] if isinstance(reference, str) else reference
    return {"exact_match": exact_match(prediction, references), "f1": answer_f1(prediction, references)}


SCORES = {
    "text-generation": None,
    "summarization": rouge_scores,
    "extractive-question-answering": answer_scores,
}


def write_eval(folder: str | Path, metrics: dict, predictions: Sequence[dict]):
    """Write eval.json and, if text was generated, predictions.jsonl, each whole or not at all; an earlier evaluation's
    predictions do not stay beside new metrics. Raises ConfigError where the folder cannot be written."""
    folder = Path(folder).expanduser()
    try:
        lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in predictions)
        write_together(folder, {PREDICTIONS_FILE: "".join(lines) or None, EVAL_FILE: json_text(metrics)})
    except OSError as error:
        if is_disk_full(error):
            raise
        raise ConfigError(
            f"{folder}: cannot write the evaluation here ({error.strerror}); make it writable, or copy "
            "it to where it can be"
        ) from error


def format_table(metrics: dict) -> str:
    """Two aligned columns, a line per metric."""
    shown = {name: f"{value:,}" if isinstance(value, int) else f"{value:.4g}" for name, value in metrics.items()}
    left, right = max(map(len, shown), default=0), max(map(len, shown.values()), default=0)
    return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in shown.items())


Answers = Callable[[list[list[int]], list[Example]], list[str]]  # prompts' ids, their examples → what is answered


@dataclass(frozen=True)
class _Prompt:
    text: str
    ids: list[int]
    is_cut: bool


def _room(model: Decoder, max_new_tokens: int) -> int:
    """Tokens that a prompt may have."""
    positions = model.spec.max_positions
    if max_new_tokens >= positions:
        raise ConfigError(
            f"max_new_tokens: {max_new_tokens} leaves no room for a prompt in the model's {positions} positions; "
            "give fewer"
        )
    return positions - max_new_tokens


def _prompt(example, template: Template, tokenizer: Tokenizer, system_prompt, opening: str, room: int) -> _Prompt:
    """The example as the template spells it, `opening` behind it, cut on the left (but for a BOS) to `room` tokens."""
    text = template.render_prompt(example, system_prompt) + opening
    ids = tokenizer.encode(text)
    kept = cut_left(ids, room, tokenizer.bos_id)
    return _Prompt(text, kept, len(kept) < len(ids))


def _free_answers(model, tokenizer: Tokenizer, template: Template, max_new_tokens: int) -> Answers:
    """Greedy generation, without thinking and end token."""
    allowed = until(spelled_end(template, tokenizer), tokenizer)
    stops = template.stop_ids(tokenizer)

    def answers(ids, _examples):
        rows = generate(model, ids, max_new_tokens=max_new_tokens, stop_ids=stops, allowed=allowed)
        return [template.answer(tokenizer.decode(row, skip_special=False)) for row in rows]

    return answers


def _held_answers(model, tokenizer: Tokenizer, template: Template, max_new_tokens: int) -> Answers:
    """Greedy generation of spans of the examples' contexts."""
    tokens = TokenBytes(tokenizer)
    stops = [*template.stop_ids(tokenizer), *_beginnings(spelled_end(template, tokenizer), tokenizer, tokens)]

    def answers(ids, examples):
        spans = [ContextSpans(example.context, tokens, stops, max_new_tokens) for example in examples]
        rows = generate(
            model, ids, max_new_tokens=max_new_tokens, stop_ids=stops,
            allowed=lambda row, new_tokens: spans[row].allowed(new_tokens),
        )  # fmt: skip
        return [span.text(row) for span, row in zip(spans, rows, strict=True)]

    return answers


def _beginnings(end: str, tokenizer: Tokenizer, tokens: TokenBytes) -> list[int]:
    """Every token with which an end that is not a single token can begin; whichever comes tells that it follows."""
    specials = [tokenizer.token_id(special) for special in tokenizer.special_tokens if end.startswith(special)]
    return [*specials, *(i for i, spelling in tokens.spelling.items() if end.encode().startswith(spelling))]
