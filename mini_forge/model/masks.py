"""Who may attend to whom: the documents of a batch, found once and shared by every layer.

A batch is a stream of N = B·T tokens in which documents lie end to end. A document never sees another one, so attention
needs only the documents' boundaries, not an (N, N) mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from mini_forge.model.transfer import to_device


@dataclass(frozen=True)
class Documents:
    """Boundaries of the documents in the flattened stream: `lengths` in tokens, `starts` (P + 1,) int32 on device.

    tree: where documents share their beginnings the stream holds these once, and lengths and starts are of segments."""

    lengths: list[int]
    starts: torch.Tensor
    tree: "Tree | None" = None
    _made: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def once(self, key: tuple, make: Callable):
        """make(), kept for all layers that ask for `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @classmethod
    def from_ids(cls, document: torch.Tensor, parents: tuple[int, ...] | None = None, device=None) -> "Documents":
        """document (B, T) integers; a new document begins with each row and wherever the number changes. parents: of
        each, the earlier one that it continues, or -1; None: each stands alone. device: of `starts`, `document`'s own
        unless given; numbers that lie on a GPU are waited for and read back."""
        B, T = document.shape
        begins = torch.ones(B, T, dtype=torch.bool, device=document.device)
        begins[:, 1:] = document[:, 1:] != document[:, :-1]
        edges = [*torch.nonzero(begins.flatten()).flatten().tolist(), B * T]
        lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
        return cls.of_lengths(lengths, device or document.device, parents)

    @classmethod
    def of_lengths(cls, lengths: list[int], device, parents: tuple[int, ...] | None = None) -> "Documents":
        starts = to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
        return cls(lengths, starts, None if parents is None else Tree.of(lengths, parents, device))

    def use_varlen(self, query: torch.Tensor) -> bool:
        """Whether the one-kernel CUDA path applies: it has 16-bit types only; elsewhere SDPA runs per document."""
        if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
            return False
        # FlashAttention-2: Ampere or later, head widths up to 256 in steps of 8
        is_recent = torch.cuda.get_device_capability(query.device)[0] >= 8
        return is_recent and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256

    def window_mask(self, length: int, window: int, has_sink: bool = False) -> torch.Tensor:
        """(L, L) bool, True where key j is in query i's window: 0 <= i - j < window. Made once per length.

        has_sink: key 0 is visible to all."""

        def make():
            index = torch.arange(length, device=self.starts.device)
            distance = index[:, None] - index[None, :]
            attends = (distance >= 0) & (distance < window)
            attends[:, 0] |= has_sink
            return attends

        return self.once(("window", length, window, has_sink), make)

    def chunked(self, chunk: int) -> "Documents":
        """Every document cut into pieces of `chunk` tokens: attention within chunks is attention within these."""
        if self.tree is not None:
            return replace(self, tree=replace(self.tree, whole=self.tree.whole.chunked(chunk), is_chunked=True))
        lengths = [min(chunk, n - i) for n in self.lengths for i in range(0, n, chunk)]
        return self.once(("chunks", chunk), lambda: Documents.of_lengths(lengths, self.starts.device))


@dataclass(frozen=True)
class Tree:
    """Segments that continue others, and the whole documents they make.

    parents: of each segment an earlier one, or -1. Of the stream of segments, `rows` picks the stream of the whole
    documents, each behind what it continues, and `first` picks from that the stream of segments again. is_chunked:
    `whole` has been cut further."""

    parents: tuple[int, ...]
    rows: torch.Tensor  # (M,) int64
    first: torch.Tensor  # (N,) int64
    whole: Documents
    is_chunked: bool = False

    @classmethod
    def of(cls, lengths: list[int], parents: tuple[int, ...], device) -> "Tree":
        ends = list(accumulate(lengths))
        own = [range(end - length, end) for length, end in zip(lengths, ends, strict=True)]
        inner = set(parents)
        rows, whole = [], []
        for leaf in (i for i in range(len(lengths)) if i not in inner):
            chain = [leaf]
            while (parent := parents[chain[-1]]) >= 0:
                chain.append(parent)
            rows += [row for segment in reversed(chain) for row in own[segment]]
            whole.append(sum(lengths[segment] for segment in chain))
        rows = torch.tensor(rows)
        first = torch.full((ends[-1],), len(rows)).scatter_reduce(0, rows, torch.arange(len(rows)), "amin")
        rows, first = to_device(rows, device), to_device(first, device)
        return cls(tuple(parents), rows, first, Documents.of_lengths(whole, device))


def document_positions(documents: Documents) -> torch.Tensor:
    """(N,) int64: each token's index within its own document."""
    if documents.tree is not None:
        return document_positions(documents.tree.whole)[documents.tree.first]
    return to_device(torch.cat([torch.arange(length) for length in documents.lengths]), documents.starts.device)


def cache_attends(position: torch.Tensor, slots: int, window: int | None, chunk: int | None = None) -> torch.Tensor:
    """(B, T, S) bool: which cache slots a query may look at. Slot s holds the key of position s, so s <= position.

    position (B, T) int64. Slots past a row's own tokens hold stale keys, and are always past its position too."""
    slot = torch.arange(slots, device=position.device)
    attends = slot <= position[..., None]
    if window is not None:
        attends &= slot > position[..., None] - window
    if chunk is not None:
        attends &= slot // chunk == position[..., None] // chunk
    return attends
