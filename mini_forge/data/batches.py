"""Examples to tokens, tokens to batches: which tokens are trained on, what is cut, and which documents go together.

A batch is one row of whole documents, end to end, with no padding: `document` says which one a token belongs to and
`position` where in it, and nothing looks across documents. Targets are the inputs moved one on, so a document of L
tokens is L - 1 inputs and its first token is never a target. A document ends with its last trained token (a causal
model's loss cannot depend on what follows), because a rendered example does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from mini_forge.data.chat import Rendered, Template
from mini_forge.data.packing import best_fit
from mini_forge.data.prefixes import Segment, plan_segments
from mini_forge.data.rows import first_problems
from mini_forge.data.tasks import Datum, Example
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import DataError

IGNORED = -100  # a target that is not trained on
_ENCODED_AT_ONCE = 2**20  # characters: texts enough for all cores, and 40 MB of tokens, offsets and their spelling


@dataclass(frozen=True, eq=False)
class Document:
    """One example as tokens, cut to length."""

    ids: np.ndarray  # (L,) int32, L >= 2
    is_trained: np.ndarray  # (L,) bool; the first is False, the last True
    line: int

    @property
    def inputs(self) -> int:
        return len(self.ids) - 1

    @property
    def trained_tokens(self) -> int:
        return int(self.is_trained.sum())

    @property
    def prompt_tokens(self) -> int:
        """Those before the first that is trained on."""
        return int(np.argmax(self.is_trained))


@dataclass(frozen=True)
class TokenStats:
    """Counts over a dataset. rows = kept + dropped; tokens and trained_tokens are those of the rows kept."""

    rows: int
    kept: int
    dropped: int  # rows with no token left to train on
    truncated: int  # rows kept that lost tokens to max_length
    tokens: int
    trained_tokens: int

    @classmethod
    def of(cls, rows: int, kept: int, truncated: int, documents: Sequence[Document]) -> "TokenStats":
        """documents: all of the rows that were kept."""
        tokens = sum(len(document.ids) for document in documents)
        return cls(rows, kept, rows - kept, truncated, tokens, sum(document.trained_tokens for document in documents))


@dataclass(frozen=True)
class Batch:
    """One row of documents, each (1, T) int64, in host memory, where its boundaries can be read without a wait for the
    device; the decoder and the objectives take there what they compute with.

    tokens: of all documents, also where T is less because some begin alike: then `parents` names, of every run of equal
    `document`, the one that it continues (-1: none), and what several documents share has a number from `documents`
    on."""

    input_ids: torch.Tensor
    targets: torch.Tensor  # IGNORED where not trained on
    position: torch.Tensor  # 0, 1, … from each document's beginning
    document: torch.Tensor  # 0, 0, …, 1, 1, …
    documents: int
    tokens: int
    lines: tuple[int, ...]  # of the dataset file, to name a document that does harm
    parents: tuple[int, ...] | None = None

    @property
    def computed_tokens(self) -> int:
        """T: what documents begin with alike counts once."""
        return self.input_ids.numel()

    @property
    def trained_tokens(self) -> int:
        """How many tokens are trained on; `trained` says which."""
        return int((self.targets != IGNORED).sum())

    def trained(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(rows, targets, document) of the tokens that are trained on, each (M,) int64, document after document."""
        targets, document = self.targets.flatten(), self.document.flatten()
        rows = (targets != IGNORED).nonzero().squeeze(-1)
        if self.parents is not None:  # documents that share a beginning lie together, whatever their numbers
            rows = rows[document[rows].argsort(stable=True)]
        return rows, targets[rows], document[rows]


@dataclass(frozen=True)
class RowBatch:
    """The documents of an objective that needs more than these, in `row`: what is counted of it is counted of them."""

    row: Batch

    @property
    def tokens(self) -> int:
        return self.row.tokens

    @property
    def computed_tokens(self) -> int:
        return self.row.computed_tokens

    @property
    def trained_tokens(self) -> int:
        return self.row.trained_tokens

    @property
    def lines(self) -> tuple[int, ...]:
        return self.row.lines


def tokenize(
    examples: Sequence[Example],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    train_on_prompt: bool = False,
    system_prompt: str | None = None,
) -> tuple[list[Document], TokenStats]:
    """The examples as documents of at most `max_length` tokens, and what that took.

    Raises DataError for every row the template refuses."""
    rows = list(encode(examples, template, tokenizer, max_length, train_on_prompt, system_prompt))
    documents = [document for document, _ in rows if document is not None]
    truncated = sum(is_truncated for _, is_truncated in rows)
    return documents, TokenStats.of(len(rows), len(documents), truncated, documents)


def encode(
    examples: Iterable[Example],
    template: Template,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    train_on_prompt: bool = False,
    system_prompt: str | None = None,
) -> Iterator[tuple[Document | None, bool]]:
    """Each example's document, None if no token to train on is left, and whether it lost tokens to `max_length`.

    Raises DataError, after the last, for every row the template refuses."""

    def render(example: Example) -> list[Rendered]:
        return [template.render(example, system_prompt)]

    for example, [(ids, is_trained)] in encode_rows(examples, render, tokenizer):
        keep = _keep(is_trained, max_length, len(ids) > 0 and ids[0] == tokenizer.bos_id)
        is_trained = is_trained[keep] | train_on_prompt  # prompts are cut first, trained on or not
        is_trained[:1] = False  # nothing precedes it to predict it from
        is_kept = bool(is_trained.any())
        yield Document(ids[keep], is_trained, example.line) if is_kept else None, is_kept and len(keep) < len(ids)


def encode_rows(
    rows: Iterable[Datum], render: Callable[[Datum], Sequence[Rendered]], tokenizer: Tokenizer
) -> Iterator[tuple[Datum, list[tuple[np.ndarray, np.ndarray]]]]:
    """Each row with the texts that `render` makes of it as tokens: of each, ids (L,) int32 and is_trained (L,) bool.

    Each text is encoded whole, once. A token is trained on if it holds a character of a response, so one that straddles
    the boundary is. Only some rows' texts are in memory at a time. Raises DataError, after the last, for every row that
    `render` refuses; none is encoded after the first of them."""
    problems: list[str] = []
    for group in _groups(_rendered(rows, render, problems)):
        if problems:
            continue
        encoded = iter(tokenizer.encode_batch([text.text for _, texts in group for text in texts]))
        for row, texts in group:
            tokens = zip(texts, islice(encoded, len(texts)), strict=True)
            yield row, [(ids, touches(offsets, text.trained)) for text, (ids, offsets) in tokens]
    if problems:
        raise DataError(*first_problems(problems))


def collate(documents: Sequence[Document], share_prefixes: bool = False) -> Batch:
    """Documents end to end as one row of T = sum of (L - 1) tokens, or fewer where they share their beginnings."""
    inputs = [document.ids[:-1] for document in documents]
    targets = [np.where(d.is_trained[1:], d.ids[1:], IGNORED) for d in documents]
    segments = [Segment(i, 0, len(ids), -1, i) for i, ids in enumerate(inputs)]
    if share_prefixes:
        planned = plan_segments(inputs, [int(np.argmax(row != IGNORED)) for row in targets])
        if len(planned) > len(segments):  # else nothing is shared, and the documents stay in their order
            segments = planned
    names = [s.document if s.document >= 0 else len(documents) + i for i, s in enumerate(segments)]
    columns = (
        [inputs[s.source][s.start : s.end] for s in segments],
        [targets[s.source][s.start : s.end] for s in segments],
        [np.arange(s.start, s.end) for s in segments],
        [np.full(s.end - s.start, name) for s, name in zip(segments, names, strict=True)],
    )
    rows = (torch.from_numpy(np.concatenate(column).astype(np.int64))[None] for column in columns)
    parents = tuple(s.parent for s in segments) if len(segments) > len(documents) else None
    tokens, lines = sum(map(len, inputs)), tuple(document.line for document in documents)
    return Batch(*rows, documents=len(documents), tokens=tokens, lines=lines, parents=parents)


def split(n: int, eval_split: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, evaluation) row indices, each in file order, drawn by the seed. Any share above 0 gives at least one
    evaluation row, and one training row always stays."""
    is_held_out = held_out(n, eval_split, seed)
    return np.flatnonzero(~is_held_out).tolist(), np.flatnonzero(is_held_out).tolist()


def held_out(n: int, eval_split: float, seed: int) -> np.ndarray:
    """The same split as (n,) bool: the evaluation rows."""
    count = 0 if eval_split <= 0 else min(max(1, round(n * eval_split)), n - 1)
    is_held_out = np.zeros(n, dtype=bool)
    is_held_out[torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()[:count]] = True
    return is_held_out


@dataclass(frozen=True, eq=False)
class Epoch(Sequence):
    """The microbatches of one epoch as lists of document indices. Two arrays, because a million lists take 100 MB."""

    documents: np.ndarray  # int64, those of the first microbatch, then those of the second, …
    starts: np.ndarray  # (microbatches + 1,) int64: where in `documents` each begins, and the end

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"microbatch {index} of {len(self)}")
        index %= len(self)
        return self.documents[self.starts[index] : self.starts[index + 1]].tolist()

    def tokens(self, lengths: np.ndarray) -> np.ndarray:
        """(microbatches,) int64: the tokens of each, of documents with these lengths."""
        return np.add.reduceat(lengths[self.documents], self.starts[:-1], dtype=np.int64)


def plan_epoch(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    accumulation: int = 1,
    group_by_length: bool = False,
    packing: bool = False,
    capacity: int = 0,
    seed: int = 0,
    epoch: int = 0,
) -> Epoch:
    """The microbatches of one epoch; a function of its arguments alone.

    `lengths` are documents' inputs. With packing a microbatch is `batch_size` bins of at most `capacity` tokens, the
    bins in random order, and `group_by_length` has no effect. The last microbatch may be short."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))
    lengths = np.asarray(lengths, dtype=np.int64)
    if not packing:
        if group_by_length:
            order = group_lengths(lengths, batch_size * accumulation, generator)
        else:
            order = torch.randperm(len(lengths), generator=generator).numpy()
        return Epoch(order, np.append(np.arange(0, len(order), batch_size), len(order)))
    documents, starts = best_fit(lengths, capacity)
    order = torch.randperm(len(starts) - 1, generator=generator).numpy()
    begins, sizes = starts[order], np.diff(starts)[order]
    ends = np.cumsum(sizes)
    within = np.arange(len(lengths)) - np.repeat(ends - sizes, sizes)  # 0, 1, … in each bin
    documents = documents[np.repeat(begins, sizes) + within]
    return Epoch(documents, np.r_[0, ends[batch_size - 1 : -1 : batch_size], ends[-1:]])


def group_lengths(lengths: Sequence[int] | np.ndarray, batch_size: int, generator: torch.Generator) -> np.ndarray:
    """A random order, (n,) int64, in which neighbours are alike in length; the longest document comes first, so that
    too little memory shows at once. The order of transformers' `get_length_grouped_indices`."""
    n, lengths = len(lengths), np.asarray(lengths, dtype=np.int64)
    mega = batch_size * max(1, min(n // (4 * batch_size), 50))  # sorted within stretches of up to 50 batches
    order = torch.randperm(n, generator=generator).numpy()
    for start in range(0, n, mega):
        stretch = order[start : start + mega]
        order[start : start + mega] = stretch[np.argsort(-lengths[stretch], kind="stable")]
    if n:
        longest = mega * np.argmax(lengths[order[::mega]])
        order[[0, longest]] = order[[longest, 0]]
    return order


def show_example(document: Document, tokenizer: Tokenizer) -> str:
    """The document's text with what is trained on between ⟦ and ⟧."""
    edges = [0, *(np.flatnonzero(np.diff(document.is_trained)) + 1).tolist(), len(document.ids)]
    shown, done = "", ""
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        text = tokenizer.decode(document.ids[:end], skip_special=False)  # whole, for decoders that trim each piece
        piece, done = text[len(done) :], text
        shown += f"⟦{piece}⟧" if document.is_trained[start] else piece
    return shown


def _rendered(
    rows: Iterable[Datum], render: Callable[[Datum], Sequence[Rendered]], problems: list[str]
) -> Iterator[tuple[Datum, Sequence[Rendered]]]:
    """Every row with its texts; what `render` refuses goes to `problems`."""
    for row in rows:
        try:
            texts = render(row)
        except DataError as error:
            problems += error.problems
        else:
            yield row, texts


def _groups(rendered: Iterable[tuple[Datum, Sequence[Rendered]]]) -> Iterator[list[tuple[Datum, Sequence[Rendered]]]]:
    """Rows to encode together: no more than `_ENCODED_AT_ONCE` characters of texts, or a longer row alone."""
    group, characters = [], 0
    for row, texts in rendered:
        length = sum(len(text.text) for text in texts)
        if group and characters + length > _ENCODED_AT_ONCE:
            yield group
            group, characters = [], 0
        group.append((row, texts))
        characters += length
    if group:
        yield group


def touches(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """(L,) bool: the tokens, given by character offsets (L, 2), that hold a character of a span."""
    start = offsets[:, 0]
    end = np.maximum(offsets[:, 1], start + 1)  # a token of no characters belongs to the one it stands before
    touches = np.zeros(len(offsets), dtype=bool)
    for span_start, span_end in spans:
        touches |= (start < span_end) & (end > span_start)
    return touches


def cut_left(ids: list[int], room: int, bos_id: int | None) -> list[int]:
    """The last `room` ids of a prompt, behind its BOS if it has one."""
    first = int(ids[:1] == [bos_id] and room > 1)
    return ids if len(ids) <= room else ids[:first] + ids[len(ids) - room + first :]


def _keep(is_trained: np.ndarray, max_length: int | None, begins_with_bos: bool) -> np.ndarray:
    """The indices of the tokens to keep, at most `max_length` of a text that ends with a response.

    The excess is taken from what precedes the last response, at its left but behind a BOS, down to the one token that
    predicts the response's first; what is still too much, from the response's right end."""
    length = len(is_trained)
    excess = max(0, length - (max_length or length))
    left = min(excess, np.flatnonzero(~is_trained).max(initial=0))  # all but one of the tokens before the last response
    first = int(begins_with_bos)
    return np.r_[0:first, first + left : length][:max_length]
