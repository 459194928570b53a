"""Single responses with a label, as tokens and as batches: what KTO (2402.01306) is trained on.

A document is a row's prompt and completion, spelled by the run's template. KTO's reference point also needs completions
that do not belong to their prompt; they are made here from the tokens of one microbatch: row i's prompt with the
completion of row i + 1, the last row's with that of the first.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mini_forge.data.batches import Batch, Document, RowBatch, TokenStats, collate, encode_rows, show_example
from mini_forge.data.chat import Rendered, Template
from mini_forge.data.pairs import continuation, cut_sides, data_fingerprint
from mini_forge.data.tasks import Labelled
from mini_forge.data.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class LabelledDocument(Document):
    """One prompt with its completion. `is_trained` marks the completion, from its first token on."""

    is_desirable: bool


@dataclass(frozen=True)
class LabelledBatch(RowBatch):
    """N prompts with their own completions and, in `mismatched`, with each other's, in rows of N documents each.

    The mismatched documents are computed beside the others and not counted."""

    mismatched: Batch | None  # None for a single row, which has nobody to swap with
    is_desirable: torch.Tensor  # (N,) bool

    @property
    def rows(self) -> int:
        return self.row.documents


def tokenize_labelled(
    rows: Sequence[Labelled],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    system_prompt: str | None = None,
) -> tuple[list[LabelledDocument], TokenStats]:
    """The rows as documents of at most `max_length` tokens, and what that took.

    Each text is encoded whole, once; a token that holds a character of the completion is the completion's. Raises
    DataError for every row that the template refuses."""

    def render(row: Labelled) -> list[Rendered]:
        return [continuation(row, row.completion, template, system_prompt)]

    documents, truncated = [], 0
    for row, [whole] in encode_rows(rows, render, tokenizer):
        [(ids, is_trained)] = cut_sides([whole], max_length, tokenizer.bos_id)
        if is_trained.any():
            documents.append(LabelledDocument(ids, is_trained, row.line, row.is_desirable))
            truncated += len(ids) < len(whole[0])
    return documents, TokenStats.of(len(rows), len(documents), truncated, documents)


def collate_labelled(
    documents: Sequence[LabelledDocument], max_length: int, share_prefixes: bool = False
) -> LabelledBatch:
    """Documents end to end; beside them each prompt with the next one's completion, cut at its right end where both
    together have more than `max_length` tokens."""
    following = [*documents[1:], documents[0]]
    swapped = [_swapped(one, other, max_length) for one, other in zip(documents, following, strict=True)]
    mismatched = collate(swapped, share_prefixes) if len(documents) > 1 else None
    return LabelledBatch(
        collate(documents, share_prefixes), mismatched, torch.tensor([d.is_desirable for d in documents])
    )


def labelled_fingerprint(documents: Sequence[LabelledDocument]) -> int:
    """`data_fingerprint` of tokens and labels."""
    return zlib.crc32(bytes(document.is_desirable for document in documents), data_fingerprint(documents))


def show_labelled(document: LabelledDocument, tokenizer: Tokenizer) -> str:
    """The text with the completion between ⟦ and ⟧, behind what the label says of it."""
    return f"{'desirable' if document.is_desirable else 'undesirable'}: {show_example(document, tokenizer)}"


def _swapped(one: Document, other: Document, max_length: int) -> Document:
    """`one`'s prompt with `other`'s completion."""
    prompt, completion = slice(0, one.prompt_tokens), slice(other.prompt_tokens, None)
    ids = np.concatenate([one.ids[prompt], other.ids[completion]])[:max_length]
    is_trained = np.concatenate([one.is_trained[prompt], other.is_trained[completion]])[:max_length]
    return Document(ids, is_trained, one.line)
