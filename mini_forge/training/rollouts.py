"""Rollouts: responses sampled from the policy itself, with the log-probability of every token that was sampled.

Plain sampling: no top-k, no top-p, no minimum length. Anything that moves the draws away from π makes the importance
ratios wrong and KL estimates negative. π is softmax(head(h/T)), here and wherever these tokens are scored again:
dividing the hidden state h instead of the logits is the same up to rounding, and lets the chunked head of
`losses.token_nll` do it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mini_forge.data.batches import Document, cut_left
from mini_forge.data.chat import Template
from mini_forge.data.rows import first_problems
from mini_forge.data.tasks import Pair
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import CheckpointError, DataError, TrainingError
from mini_forge.model.cache import KVCache, read_prompts
from mini_forge.model.decoder import Decoder, evaluating


@dataclass(frozen=True)
class Prompt:
    """What to respond to. `text`: without special tokens; `row`: the dataset's, for a reward function."""

    ids: list[int]
    text: str
    row: dict
    line: int


@dataclass(frozen=True)
class Rollout:
    """A prompt and a sampled response. `response_ids` ends with the stop token, if one was sampled; `response` is its
    text without special tokens. `logps`: log π(token) in nats of each of `response_ids`, as they were sampled."""

    prompt_ids: list[int]
    response_ids: list[int]
    prompt: str
    response: str
    row: dict
    line: int
    logps: list[float]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. `is_ended(tokens)`: whether a response is over for another reason than a stop id, as
    where a template's end is several tokens."""

    max_new_tokens: int
    temperature: float
    stop_ids: frozenset[int]
    is_ended: Callable[[list[int]], bool] | None = None


def encode_prompts(
    pairs: Sequence[Pair],
    rows: dict[int, dict],
    template: Template,
    tokenizer: Tokenizer,
    room: int,
    system_prompt: str | None = None,
) -> tuple[list[Prompt], int]:
    """The pairs' prompts as the template spells them, each at most `room` tokens, and how many were cut: on the left,
    but behind a BOS. `rows`: the dataset's, by line. Raises DataError for every row that the template refuses, and
    CheckpointError for the first on which it does not end."""
    prompts, problems, cut = [], [], 0
    for pair in pairs:
        try:
            ids = tokenizer.encode(template.render_prompt(pair.prompt, system_prompt, pair.tools))
        except CheckpointError as error:  # a template that does not end
            raise CheckpointError(f"{pair.file}:{pair.line}: {error}") from error
        except DataError as error:
            problems += [f"{pair.file}:{pair.line}: {problem}" for problem in error.problems]
            continue
        kept = cut_left(ids, room, tokenizer.bos_id)
        cut += len(kept) < len(ids)
        prompts.append(Prompt(kept, tokenizer.decode(kept), rows[pair.line], pair.line))
    if problems:
        raise DataError(*first_problems(problems))
    return prompts, cut


def prompt_document(prompt: Prompt) -> Document:
    """The prompt alone, with nothing to train on, for what looks at documents."""
    return Document(np.array(prompt.ids, dtype=np.int32), np.zeros(len(prompt.ids), dtype=bool), prompt.line)


def sample_rollouts(
    model: Decoder,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    sampling: Sampling,
    generator: torch.Generator,
    batch_size: int | None = None,
) -> list[Rollout]:
    """One response to each prompt, in their order, `batch_size` at a time (None: all at once)."""
    rollouts = []
    size = batch_size or max(1, len(prompts))
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        sampled = sample_responses(model, [prompt.ids for prompt in part], sampling, generator)
        rollouts += [
            Rollout(prompt.ids, ids, prompt.text, tokenizer.decode(ids), prompt.row, prompt.line, logps)
            for prompt, (ids, logps) in zip(part, sampled, strict=True)
        ]
    return rollouts


def rollout_of(document: Document, tokenizer: Tokenizer, row: dict) -> Rollout:
    """A response that somebody else wrote, as if it had been sampled: from the first token that is trained on."""
    start = document.prompt_tokens
    prompt, response = document.ids[:start].tolist(), document.ids[start:].tolist()
    texts = tokenizer.decode(prompt), tokenizer.decode(response)
    return Rollout(prompt, response, *texts, row, document.line, [0.0] * len(response))


@torch.no_grad()
def sample_responses(
    model: Decoder, prompts: Sequence[Sequence[int]], sampling: Sampling, generator: torch.Generator
) -> list[tuple[list[int], list[float]]]:
    """(ids, log-probabilities) of a response to each prompt (token ids, none empty), at most `max_new_tokens` long.

    A stop token ends a response and belongs to it: it was a choice of the policy as any other. Without dropout. Draws
    are made on the generator's device, so a CPU generator gives any device the same ones. Raises TrainingError where
    the logits are not finite."""
    B, limit = len(prompts), sampling.max_new_tokens
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    rows: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    running = set(range(B))
    with evaluating(model):
        cache = KVCache(model, B, int(lengths.max()) + limit)
        hidden = read_prompts(model, prompts, lengths, cache)  # (B, D)
        for step in range(limit):
            ids, logps = _draw(model.head(hidden / sampling.temperature), generator)
            _take(ids.tolist(), logps.tolist(), rows, running, sampling)
            if not running or step == limit - 1:
                break
            hidden = model(ids[:, None], position=(lengths + step)[:, None], cache=cache)[:, 0]
    return rows


def _draw(logits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (B, V) float32 → one id each (B,) int64, and its log-probability (B,) float32."""
    logps = logits.log_softmax(-1)
    if not torch.isfinite(logps.amax(-1)).all():
        raise TrainingError(
            "rollouts: the policy's logits are not finite numbers; lower learning_rate, or use bf16 or float32 "
            "instead of fp16"
        )
    ids = torch.multinomial(logps.exp().to(generator.device), 1, generator=generator).to(logits.device)
    return ids.squeeze(-1), logps.gather(-1, ids).squeeze(-1)


def _take(ids: list[int], logps: list[float], rows, running: set[int], sampling: Sampling):
    """Give each running row its token; a row that has ended stops running, though it is computed along."""
    for row in sorted(running):
        tokens, chances = rows[row]
        tokens.append(ids[row])
        chances.append(logps[row])
        is_over = ids[row] in sampling.stop_ids or (sampling.is_ended is not None and sampling.is_ended(tokens))
        if is_over:
            running.discard(row)
