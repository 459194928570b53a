"""Pairs of responses to one prompt, as tokens and as batches.

The run's template spells the prompt once, and the chosen and the rejected response continue it: the same prompt text,
cut in the same place where it is too long. Each side is a document of its own, so a batch of P pairs is one row of 2P
documents without padding: chosen, rejected, chosen, rejected, …

What both sides begin with is computed once (`prefixes.py`). That saves P/(2P + C + R) of the tokens of prompt, chosen
and rejected: 21 % on right and wrong solutions of GSM8K's problems (P 89, C 126, R 123 on average, with SmolLM2's
template and its system prompt), 44 % on the quickstart's one-line responses to a paragraph (102, 14, 13).
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mini_forge.data.batches import Batch, Document, TokenStats, collate, show_example, touches
from mini_forge.data.chat import Template
from mini_forge.data.rows import first_problems
from mini_forge.data.tasks import Example, Pair
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import DataError

_ENCODED_AT_ONCE = 2048  # pairs


@dataclass(frozen=True, eq=False)
class PairDocument:
    """One pair as tokens. `is_trained` of each side marks its response. `reference`: (2,) float32, the reference's
    log-probabilities of chosen and rejected, where they were computed beforehand."""

    chosen: Document
    rejected: Document
    reference: np.ndarray | None = None

    @property
    def sides(self) -> tuple[Document, Document]:
        return self.chosen, self.rejected

    @property
    def line(self) -> int:
        return self.chosen.line

    @property
    def inputs(self) -> int:
        return self.chosen.inputs + self.rejected.inputs


@dataclass(frozen=True)
class PairBatch:
    """P pairs as one row of 2P documents: 0 the first chosen, 1 the first rejected, and so on."""

    row: Batch
    pairs: int
    reference: torch.Tensor | None  # (P, 2) float32: log π_ref of chosen and rejected; None: to be computed

    @property
    def tokens(self) -> int:
        return self.row.tokens

    @property
    def lines(self) -> tuple[int, ...]:
        return self.row.lines[::2]

    def to(self, device) -> "PairBatch":
        reference = None if self.reference is None else self.reference.to(device, non_blocking=True)
        return replace(self, row=self.row.to(device), reference=reference)


def tokenize_pairs(
    pairs: Sequence[Pair],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    system_prompt: str | None = None,
) -> tuple[list[PairDocument], TokenStats]:
    """The pairs as documents of at most `max_length` tokens a side, and what that took; a row counts once, its tokens
    on both sides.

    Each side's text is encoded whole, once; a token that holds a character of the response is the response's. Raises
    DataError for every row that the template refuses, or whose prompt it spells in two ways."""
    texts = _render(pairs, template, system_prompt)
    documents, truncated = [], 0
    for start in range(0, len(texts), _ENCODED_AT_ONCE):
        part = texts[start : start + _ENCODED_AT_ONCE]
        encoded = iter(tokenizer.encode_batch([text for sides in part for text, _ in sides]))
        for pair, sides in zip(pairs[start:], part, strict=False):
            whole = [(ids, touches(offsets, spans)) for (_, spans), (ids, offsets) in zip(sides, encoded, strict=False)]
            cut = cut_sides(whole, max_length, tokenizer.bos_id)
            if all(is_response.any() for _, is_response in cut):
                documents.append(PairDocument(*(Document(*side, pair.line) for side in cut)))
                truncated += any(len(ids) < len(before[0]) for (ids, _), before in zip(cut, whole, strict=True))
    sides = flatten(documents)
    tokens, trained = (sum(len(d.ids) for d in sides), sum(int(d.is_trained.sum()) for d in sides))
    return documents, TokenStats(len(pairs), len(documents), len(pairs) - len(documents), truncated, tokens, trained)


def collate_pairs(pairs: Sequence[PairDocument], share_prefixes: bool = False) -> PairBatch:
    """Pairs end to end, or as a tree whose branches begin together."""
    known = [pair.reference for pair in pairs]
    reference = None if any(each is None for each in known) else torch.from_numpy(np.stack(known))
    return PairBatch(collate(flatten(pairs), share_prefixes), len(pairs), reference)


def flatten(documents: Sequence[Document | PairDocument]) -> list[Document]:
    """Every single document: of a pair, chosen then rejected."""
    return list(each(documents))


def each(documents: Iterable[Document | PairDocument]) -> Iterator[Document]:
    """The same one by one: of documents on disk, none is kept."""
    return (side for d in documents for side in (d.sides if isinstance(d, PairDocument) else (d,)))


def show_pair(pair: PairDocument, tokenizer: Tokenizer) -> str:
    """Both sides' text with the responses between ⟦ and ⟧."""
    return f"chosen: {show_example(pair.chosen, tokenizer)}\nrejected: {show_example(pair.rejected, tokenizer)}"


def data_fingerprint(documents: Sequence[Document | PairDocument]) -> int:
    """A checksum of every token of documents or pairs, by which a resumed run knows that its data are the same."""
    checksum = 0
    for document in each(documents):
        checksum = zlib.crc32(document.is_trained.tobytes(), zlib.crc32(document.ids.tobytes(), checksum))
    return checksum


Side = tuple[str, list[tuple[int, int]]]  # a text, and the (start, end) of what is a response in it


def _render(pairs: Sequence[Pair], template: Template, system_prompt: str | None) -> list[tuple[Side, Side]]:
    rendered, problems = [], []
    for pair in pairs:
        try:
            rendered.append(_two_continuations(pair, template, system_prompt))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*first_problems(problems))
    return rendered


def _two_continuations(pair: Pair, template: Template, system_prompt: str | None) -> tuple[Side, Side]:
    """Chosen and rejected as text, each with the spans of its response: its assistant turns, but none of the prompt's.

    Where the template opens one response otherwise than the other (with thinking, or without), what both share is the
    prompt, and the rest of the opening belongs to the responses."""
    sides = []
    for turns in (pair.chosen, pair.rejected):
        rendered = template.render(Example((*pair.prompt, *turns), line=pair.line, file=pair.file), system_prompt)
        responses = sum(message["role"] == "assistant" for message in turns)
        sides.append((rendered.text, rendered.trained[-responses:]))
    (chosen, chosen_spans), (rejected, rejected_spans) = sides
    start = min(chosen_spans[0][0], rejected_spans[0][0])
    if chosen[:start] != rejected[:start]:
        raise DataError(
            f"{pair.file}:{pair.line}: the {template.name} chat template spells the prompt before chosen otherwise "
            "than before rejected; put the turns that both share into prompt"
        )
    return tuple((text, [(start, spans[0][1]), *spans[1:]]) for text, spans in sides)


def cut_sides(
    whole: Sequence[tuple[np.ndarray, np.ndarray]], max_length: int | None, bos_id: int | None
) -> list[tuple]:
    """(ids, is_response) of both sides, each at most `max_length` tokens.

    The prompt loses its left (behind a BOS) by what the longer side has too much, the same on both sides, down to the
    one token that predicts the response's first; what is still too much goes from a response's right end."""
    prompts = [int(np.argmax(is_response)) for _, is_response in whole]
    excess = max(len(ids) - (max_length or len(ids)) for ids, _ in whole)
    left = max(0, min(excess, min(prompts) - 1))
    cut = []
    for ids, is_response in whole:
        first = int(len(ids) > 0 and ids[0] == bos_id)
        keep = np.r_[0:first, first + left : len(ids)][:max_length]
        is_response = is_response[keep]
        is_response[:1] = False  # nothing precedes it to predict it from
        cut.append((ids[keep], is_response))
    return cut
