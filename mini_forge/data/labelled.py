"""Single responses with a label, as tokens and as batches: what KTO (2402.01306) is trained on.

A document is a row's prompt and completion, spelled by the run's template. KTO's reference point also needs completions
that do not belong to their prompt; they are made here from the tokens of one microbatch: row i's prompt with the
completion of row i + 1, the last row's with that of the first.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mini_forge.data.batches import Batch, Document, TokenStats, collate, show_example, touches
from mini_forge.data.chat import Rendered, Template
from mini_forge.data.pairs import cut_sides, data_fingerprint
from mini_forge.data.rows import first_problems
from mini_forge.data.tasks import Example, Labelled
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import DataError

_ENCODED_AT_ONCE = 4096  # rows


@dataclass(frozen=True, eq=False)
class LabelledDocument(Document):
    """One prompt with its completion. `is_trained` marks the completion, from its first token on."""

    is_desirable: bool

    @property
    def prompt_tokens(self) -> int:
        return int(np.argmax(self.is_trained))


@dataclass(frozen=True)
class LabelledBatch:
    """N prompts with their own completions and, in `mismatched`, with each other's, in rows of N documents each."""

    row: Batch
    mismatched: Batch | None  # None for a single row, which has nobody to swap with
    is_desirable: torch.Tensor  # (N,) bool

    @property
    def rows(self) -> int:
        return self.row.documents

    @property
    def tokens(self) -> int:
        """Those of the rows; the mismatched documents are computed beside them and not counted."""
        return self.row.tokens

    @property
    def lines(self) -> tuple[int, ...]:
        return self.row.lines

    def to(self, device) -> "LabelledBatch":
        mismatched = None if self.mismatched is None else self.mismatched.to(device)
        is_desirable = self.is_desirable.to(device, non_blocking=True)
        return replace(self, row=self.row.to(device), mismatched=mismatched, is_desirable=is_desirable)


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
    rendered = _render(rows, template, system_prompt)
    documents, truncated = [], 0
    for start in range(0, len(rows), _ENCODED_AT_ONCE):
        part = slice(start, start + _ENCODED_AT_ONCE)
        encoded = tokenizer.encode_batch([each.text for each in rendered[part]])
        for row, text, (ids, offsets) in zip(rows[part], rendered[part], encoded, strict=True):
            whole = ids, touches(offsets, _completion_spans(row, text))
            ((kept_ids, is_trained),) = cut_sides([whole], max_length, tokenizer.bos_id)
            if is_trained.any():
                documents.append(LabelledDocument(kept_ids, is_trained, row.line, row.is_desirable))
                truncated += len(kept_ids) < len(ids)
    tokens, trained = sum(len(d.ids) for d in documents), sum(int(d.is_trained.sum()) for d in documents)
    kept = len(documents)
    return documents, TokenStats(len(rows), kept, len(rows) - kept, truncated, tokens, trained)


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


def _render(rows: Sequence[Labelled], template: Template, system_prompt: str | None) -> list[Rendered]:
    """Every row's text. Raises DataError with every row that the template refuses."""
    rendered, problems = [], []
    for row in rows:
        try:
            conversation = Example((*row.prompt, *row.completion), line=row.line, file=row.file)
            rendered.append(template.render(conversation, system_prompt))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*first_problems(problems))
    return rendered


def _completion_spans(row: Labelled, rendered: Rendered) -> list[tuple[int, int]]:
    """(start, end) of the completion's assistant turns in the text; those of the prompt are not trained on."""
    responses = sum(message["role"] == "assistant" for message in row.completion)
    return rendered.trained[-responses:]
