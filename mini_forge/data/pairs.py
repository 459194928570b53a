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

from mini_forge.data.batches import Document, RowBatch, TokenStats, collate, encode_rows, show_example
from mini_forge.data.chat import Rendered, Template
from mini_forge.data.tasks import Example, Labelled, Pair
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import DataError


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
class PairBatch(RowBatch):
    """P pairs as one row of 2P documents: 0 the first chosen, 1 the first rejected, and so on."""

    pairs: int
    reference: torch.Tensor | None  # (P, 2) float32: log π_ref of chosen and rejected; None: to be computed

    @property
    def lines(self) -> tuple[int, ...]:
        return self.row.lines[::2]


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
    documents, truncated = [], 0
    for pair, whole in encode_rows(pairs, lambda pair: _continuations(pair, template, system_prompt), tokenizer):
        cut = cut_sides(whole, max_length, tokenizer.bos_id)
        if all(is_response.any() for _, is_response in cut):
            documents.append(PairDocument(*(Document(*side, pair.line) for side in cut)))
            truncated += any(len(ids) < len(before[0]) for (ids, _), before in zip(cut, whole, strict=True))
    return documents, TokenStats.of(len(pairs), len(documents), truncated, flatten(documents))


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


def continuation(
    row: Pair | Labelled, turns: Sequence[dict], template: Template, system_prompt: str | None
) -> Rendered:
    """The row's prompt continued by `turns`: of its assistant turns those of `turns` alone are responses."""
    whole = Example((*row.prompt, *turns), tools=row.tools, line=row.line, file=row.file)
    rendered = template.render(whole, system_prompt)
    responses = sum(message["role"] == "assistant" for message in turns)
    return replace(rendered, trained=rendered.trained[-responses:])


def _continuations(pair: Pair, template: Template, system_prompt: str | None) -> list[Rendered]:
    """The prompt with chosen and with rejected.

    Where the template opens one response otherwise than the other (with thinking, or without), what both share is the
    prompt, and the rest of the opening belongs to the responses."""
    sides = [continuation(pair, turns, template, system_prompt) for turns in (pair.chosen, pair.rejected)]
    start = min(side.trained[0][0] for side in sides)
    if len({side.text[:start] for side in sides}) > 1:
        raise DataError(
            f"{pair.file}:{pair.line}: the {template.name} chat template spells the prompt before chosen otherwise "
            "than before rejected; put the turns that both share into prompt"
        )
    return [replace(side, trained=[(start, side.trained[0][1]), *side.trained[1:]]) for side in sides]


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
