"""Token by token: batched generation with a key/value cache, sampling, and text that appears as it is made."""

import math
from collections.abc import Callable, Sequence

import torch

from mini_forge.data.chat import Template
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import CheckpointError, ConfigError
from mini_forge.model.cache import KVCache, Memory, read_prompts
from mini_forge.model.decoder import Decoder, evaluating

Allowed = Callable[[int, list[int]], list[int] | None]


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    generator: torch.Generator | None = None,
    allowed: Allowed | None = None,
    on_token: Callable[[int, int], object] | None = None,
    memory: Memory | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, without the stop token: a row shorter than `max_new_tokens` was stopped.

    prompts: token ids, of any lengths. `allowed(row, new_tokens)` gives the ids that may come next, None for all of
    them, an empty list to end the row. `on_token(row, id)` is called for each new token as it is made. `generator`
    may live on another device than the model. Rows that have ended are computed along but ignored, so no row's draws
    depend on when another ends. memory: `model.cache.Memory` of one prompt's text that goes on from call to call; what
    of it was read or made before is not read again.

    Raises ConfigError for an option out of range, CheckpointError for logits that are not finite."""
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    if any(len(prompt) == 0 for prompt in prompts):
        raise ConfigError("prompt: has no tokens; give at least one")
    if memory is not None and len(prompts) != 1:
        raise ConfigError(f"memory: is of one text, and there are {len(prompts)} prompts; give one, or no memory")
    rows: list[list[int]] = [[] for _ in prompts]
    running, stops = set(range(len(rows))), frozenset(map(int, stop_ids))
    if not rows:
        return rows
    with evaluating(model):
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        capacity = int(lengths.max()) + max_new_tokens
        if memory is None:
            cache = KVCache(model, len(rows), capacity)
            hidden = read_prompts(model, prompts, lengths, cache)  # (B, D)
        else:
            cache, hidden = memory.read(model, prompts[0], capacity)
        for step in range(max_new_tokens):
            logits = _finite(model.head(hidden))
            if allowed is not None:
                _restrict(logits, rows, running, allowed)
            ids = sample(logits, temperature, top_k, top_p, generator)
            _take(ids.tolist(), rows, running, stops, on_token)
            if not running or step == max_new_tokens - 1:
                break
            hidden = model(ids[:, None], position=(lengths + step)[:, None], cache=cache)[:, 0]
            if memory is not None:
                memory.ids += ids.tolist()
    return rows


def sample(
    logits: torch.Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One id per row of softmax(logits / temperature), or the likeliest one where temperature is 0.

    logits (B, V) float32; returns (B,) int64 on the same device. `top_k` > 0 keeps the k likeliest; `top_p` < 1 then
    keeps the fewest that hold that much of the rest's probability (1904.09751, section 3.1). With neither, plain
    sampling. The draw is made on the generator's device: a CPU generator gives any device the same numbers.

    The smaller the temperature the nearer to greedy, without end: in the limit the likeliest ids share the draw. Only
    the distances from the likeliest are divided, so that none overflows but those whose probability is 0 anyway."""
    if temperature == 0:
        return logits.argmax(-1)
    smallest_divisor = torch.finfo(logits.dtype).tiny  # what is below may count as 0, and 0 / 0 is no number
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / max(temperature, smallest_divisor)
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(dim=-1, descending=True)
        likelier = ordered.cumsum(-1) - ordered  # what comes before a token; 0 for the first, so one always stays
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, likelier >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    probabilities = logits.softmax(-1)
    device = probabilities.device if generator is None else generator.device
    drawn = torch.multinomial(probabilities.to(device), 1, generator=generator)
    return drawn.squeeze(-1).to(logits.device)


def check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float):
    """Raises ConfigError with everything that is out of range."""
    problems = []
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens: {max_new_tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        problems.append(f"temperature: {temperature} must be a finite number, at least 0; 0 takes the likeliest token")
    if top_k < 0:
        problems.append(f"top_k: {top_k} must be at least 0; 0 keeps every token")
    if not 0 < top_p <= 1:
        problems.append(f"top_p: {top_p} must be above 0 and at most 1; 1 keeps every token")
    if problems:
        raise ConfigError(*problems)


class TextStream:
    """Turns ids into text as they come, never showing a part of a character.

    The pieces joined are the decoding of all ids, up to `end`: a text that, once spelled, ends the stream (`ended`)
    and is not shown."""

    def __init__(self, tokenizer: Tokenizer, end: str = ""):
        self.ended = False
        self._tokenizer, self._end = tokenizer, end
        self._ids: list[int] = []
        self._shown = 0  # characters

    def push(self, token: int) -> str:
        """What can be shown now; often "" while a character, or what may be the end, is incomplete."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids).rstrip("\ufffd")  # stands for bytes that make no character yet
        longest = 0 if self._end in text else max(0, len(self._end) - 1)
        held = next((n for n in range(longest, 0, -1) if text.endswith(self._end[:n])), 0)
        return self._show(text[: len(text) - held])

    def finish(self) -> str:
        """What was held back, and will not be completed any more."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        if self._end and self._end in text:
            text, self.ended = text[: text.index(self._end)], True
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece


def spelled_end(template: Template, tokenizer: Tokenizer) -> str:
    """The template's end where it is no token of this tokenizer, so that no stop id can tell it; else ""."""
    return template.end if template.end and tokenizer.token_id(template.end) is None else ""


def until(end: str, tokenizer: Tokenizer) -> Allowed | None:
    """An `allowed` for `generate` that ends a row once it has spelled `end`; None for ""."""
    if not end:
        return None
    return lambda _, tokens: [] if end in tokenizer.decode(tokens, skip_special=False) else None


def _finite(logits: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(logits).all():
        raise CheckpointError(
            "the model's logits are not finite: its weights are damaged, or overflow in this precision; "
            "use bfloat16 or float32, or an earlier checkpoint"
        )
    return logits


def _restrict(logits: torch.Tensor, rows: list[list[int]], running: set[int], allowed: Allowed):
    """Leave each running row only its allowed ids, in place; rows with none stop running."""
    for row in sorted(running):
        ids = allowed(row, rows[row])
        if ids is None:
            continue
        if not ids:
            running.discard(row)
            continue
        kept = logits[row, ids]
        logits[row] = -math.inf
        logits[row, ids] = kept


def _take(ids: list[int], rows: list[list[int]], running: set[int], stops: frozenset[int], on_token):
    """Append one sampled id to each running row; a stop id ends its row instead."""
    for row in sorted(running):
        if ids[row] in stops:
            running.discard(row)
            continue
        rows[row].append(ids[row])
        if on_token is not None:
            on_token(row, ids[row])
