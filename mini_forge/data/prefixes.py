"""Prompts that documents share, computed once.

Rows of a dataset often begin alike: with the same system prompt, or, as chosen and rejected, with the same prompt. A
causal model's states of such a beginning are the same in every document, so a batch can hold it once and let each
document continue it. `plan_segments` lays a batch out as a tree: a segment is a run of tokens of one document or of
several, and continues another segment or none. Only tokens whose target is not trained on are shared: a trained one
has a loss in every document.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SAVED_TOKENS = 16  # what a shared segment must save: it costs two more attention calls a layer


@dataclass(frozen=True)
class Segment:
    """Tokens start … end - 1 of the document `source`, behind those of the segment `parent` (-1: of none).

    document: the document whose own these tokens are, or -1 where several share them."""

    source: int
    start: int
    end: int
    parent: int
    document: int


def plan_segments(inputs: Sequence[np.ndarray], limits: Sequence[int]) -> list[Segment]:
    """The documents' tokens as segments, every parent before its children and these right behind it.

    inputs: (L_i,) integers of each document; limits: how many of the first may be shared, each less than L_i."""
    segments: list[Segment] = []

    def place(members: list[int], start: int, depth: int, parent: int):
        """Lay out `members`, which are alike up to `depth` and placed up to `start`."""
        if len(members) == 1:
            document = members[0]
            segments.append(Segment(document, start, len(inputs[document]), parent, document))
            return
        depth = _common(inputs, limits, members, depth)
        if (len(members) - 1) * (depth - start) >= LEAST_SAVED_TOKENS:
            segments.append(Segment(members[0], start, depth, parent, -1))
            start, parent = depth, len(segments) - 1
        for group in _by_next_token(inputs, limits, members, depth):
            place(group, start, depth, parent)

    place(list(range(len(inputs))), 0, 0, -1)
    return segments


def _common(inputs, limits, members: list[int], depth: int) -> int:
    """How far all members are alike, knowing that they are up to `depth`."""
    first, end = inputs[members[0]], min(limits[i] for i in members)
    for i in members[1:]:
        differs = np.flatnonzero(first[depth:end] != inputs[i][depth:end])
        if len(differs):
            end = depth + int(differs[0])
    return max(depth, end)


def _by_next_token(inputs, limits, members: list[int], depth: int) -> list[list[int]]:
    """The members by their token at `depth`, in the order of first appearance; who may share no more is alone."""
    groups: dict = {}
    for i in members:
        key = int(inputs[i][depth]) if depth < limits[i] else ("alone", i)
        groups.setdefault(key, []).append(i)
    return list(groups.values())
