"""Examples to tokens, tokens to batches: which tokens are trained on, what is cut, and which documents go together.

A batch is one row of whole documents, end to end, with no padding: `document` says which one a token belongs to and
`position` where in it, and nothing looks across documents. Targets are the inputs moved one on, so a document of L
tokens is L - 1 inputs and its first token is never a target. A document ends with its last trained token (a causal
model's loss cannot depend on what follows), because a rendered example does.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mini_forge.data.chat import Rendered, Template
from mini_forge.data.packing import pack
from mini_forge.data.rows import first_problems
from mini_forge.data.tasks import Example
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import DataError

IGNORED = -100  # a target that is not trained on
_ENCODED_AT_ONCE = 4096  # texts: enough for all cores, and offsets of a whole dataset never in memory


@dataclass(frozen=True, eq=False)
class Document:
    """One example as tokens, cut to length."""

    ids: np.ndarray  # (L,) int32, L >= 2
    is_trained: np.ndarray  # (L,) bool; the first is False, the last True
    line: int

    @property
    def inputs(self) -> int:
        return len(self.ids) - 1


@dataclass(frozen=True)
class TokenStats:
    """Counts over a dataset. rows = kept + dropped; tokens and trained_tokens are those of the rows kept."""

    rows: int
    kept: int
    dropped: int  # rows with no token left to train on
    truncated: int  # rows kept that lost tokens to max_length
    tokens: int
    trained_tokens: int


@dataclass(frozen=True)
class Batch:
    """One row of documents, each (1, T) int64."""

    input_ids: torch.Tensor
    targets: torch.Tensor  # -100 where not trained on
    position: torch.Tensor  # 0, 1, … from each document's beginning
    document: torch.Tensor  # 0, 0, …, 1, 1, …
    documents: int
    tokens: int
    lines: tuple[int, ...]  # of the dataset file, to name a document that does harm

    def to(self, device) -> "Batch":
        names = ("input_ids", "targets", "position", "document")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


def tokenize(
    examples: Sequence[Example],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    train_on_prompt: bool = False,
    system_prompt: str | None = None,
) -> tuple[list[Document], TokenStats]:
    """The examples as documents of at most `max_length` tokens, and what that took.

    Each text is encoded whole, once. A token is trained on if it holds a character of a response, so one that straddles
    the boundary is. Raises DataError for every row the template refuses."""
    rendered = _render(examples, template, system_prompt)
    documents, truncated = [], 0
    for start in range(0, len(rendered), _ENCODED_AT_ONCE):
        part = range(start, min(start + _ENCODED_AT_ONCE, len(rendered)))
        encoded = tokenizer.encode_batch([rendered[i].text for i in part])
        for i, (ids, offsets) in zip(part, encoded, strict=True):
            is_trained = np.ones(len(ids), dtype=bool) if train_on_prompt else touches(offsets, rendered[i].trained)
            keep = _keep(is_trained, max_length, len(ids) > 0 and ids[0] == tokenizer.bos_id)
            is_trained = is_trained[keep]
            is_trained[:1] = False  # nothing precedes it to predict it from
            if is_trained.any():
                documents.append(Document(ids[keep], is_trained, examples[i].line))
                truncated += len(keep) < len(ids)
    tokens = sum(len(document.ids) for document in documents)
    trained = sum(int(document.is_trained.sum()) for document in documents)
    kept = len(documents)
    return documents, TokenStats(len(rendered), kept, len(rendered) - kept, truncated, tokens, trained)


def collate(documents: Sequence[Document]) -> Batch:
    """Documents end to end as one row of T = sum of (L - 1) tokens."""
    ids = np.concatenate([document.ids[:-1] for document in documents])
    targets = np.concatenate([np.where(d.is_trained[1:], d.ids[1:], IGNORED) for d in documents])
    lengths = [document.inputs for document in documents]
    position = np.concatenate([np.arange(length) for length in lengths])
    index = np.repeat(np.arange(len(documents)), lengths)
    rows = (torch.from_numpy(row.astype(np.int64))[None] for row in (ids, targets, position, index))
    lines = tuple(document.line for document in documents)
    return Batch(*rows, documents=len(documents), tokens=len(ids), lines=lines)


def split(n: int, eval_split: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, evaluation) row indices, each in file order, drawn by the seed. Any share above 0 gives at least one
    evaluation row, and one training row always stays."""
    held_out = 0 if eval_split <= 0 else min(max(1, round(n * eval_split)), n - 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[held_out:]), sorted(order[:held_out])


def plan_epoch(
    lengths: Sequence[int],
    batch_size: int,
    accumulation: int = 1,
    group_by_length: bool = False,
    packing: bool = False,
    capacity: int = 0,
    seed: int = 0,
    epoch: int = 0,
) -> list[list[int]]:
    """The microbatches of one epoch as lists of document indices; a function of its arguments alone.

    `lengths` are documents' inputs. With packing a microbatch is `batch_size` bins of at most `capacity` tokens, the
    bins in random order, and `group_by_length` has no effect. The last microbatch may be short."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    units = pack(lengths, capacity) if packing else [[index] for index in range(len(lengths))]
    if group_by_length and not packing:
        order = group_lengths(lengths, batch_size * accumulation, generator)
    else:
        order = torch.randperm(len(units), generator=generator).tolist()
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [[index for unit in group for index in units[unit]] for group in groups]


def group_lengths(lengths: Sequence[int], batch_size: int, generator: torch.Generator) -> list[int]:
    """A random order in which neighbours are alike in length; the longest document comes first, so that too little
    memory shows at once. The order of transformers' `get_length_grouped_indices`."""
    n = len(lengths)
    mega = batch_size * max(1, min(n // (4 * batch_size), 50))  # sorted within stretches of up to 50 batches
    order = torch.randperm(n, generator=generator).tolist()
    stretches = [sorted(order[i : i + mega], key=lambda d: lengths[d], reverse=True) for i in range(0, n, mega)]
    longest = max(range(len(stretches)), key=lambda s: lengths[stretches[s][0]], default=0)
    if stretches:
        stretches[0][0], stretches[longest][0] = stretches[longest][0], stretches[0][0]
    return [index for stretch in stretches for index in stretch]


def show_example(document: Document, tokenizer: Tokenizer) -> str:
    """The document's text with what is trained on between ⟦ and ⟧."""
    edges = [0, *(np.flatnonzero(np.diff(document.is_trained)) + 1).tolist(), len(document.ids)]
    shown, done = "", ""
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        text = tokenizer.decode(document.ids[:end], skip_special=False)  # whole, for decoders that trim each piece
        piece, done = text[len(done) :], text
        shown += f"⟦{piece}⟧" if document.is_trained[start] else piece
    return shown


def _render(examples: Sequence[Example], template: Template, system_prompt: str | None) -> list[Rendered]:
    """Every example's text. Raises DataError with every row the template refuses."""
    rendered, problems = [], []
    for example in examples:
        try:
            rendered.append(template.render(example, system_prompt))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*first_problems(problems))
    return rendered


def touches(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """(L,) bool: the tokens, given by character offsets (L, 2), that hold a character of a span."""
    start = offsets[:, 0]
    end = np.maximum(offsets[:, 1], start + 1)  # a token of no characters belongs to the one it stands before
    touches = np.zeros(len(offsets), dtype=bool)
    for span_start, span_end in spans:
        touches |= (start < span_end) & (end > span_start)
    return touches


def _keep(is_trained: np.ndarray, max_length: int | None, begins_with_bos: bool) -> np.ndarray:
    """The indices of the tokens to keep, at most `max_length` of a text that ends with a response.

    The excess is taken from what precedes the last response, at its left but behind a BOS, down to the one token that
    predicts the response's first; what is still too much, from the response's right end."""
    length = len(is_trained)
    excess = max(0, length - (max_length or length))
    left = min(excess, np.flatnonzero(~is_trained).max(initial=0))  # all but one of the tokens before the last response
    first = int(begins_with_bos)
    return np.r_[0:first, first + left : length][:max_length]
