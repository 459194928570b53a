"""Packing: put documents of many lengths into few rows of a fixed capacity, by best-fit decreasing.

Longest first, each document goes into the open row with the least room that still holds it, else into a new one.
That never needs more than 11/9 of the optimal number of rows, plus a constant (Johnson et al. 1974).

Documents of one length are placed together. Where a row with room r is the best fit for length L, so it is for the next
document of that length as long as its room suffices, because no row has room from L to r: it takes r // L of them. So
the work is a sort and, at most, one step for each length and room: 1 s for a million documents in rows of 2048.
"""

from itertools import repeat

import numpy as np


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of document indices, each bin at most `capacity` tokens; every index exactly once.

    Bins come in the order they were opened, documents within one longest first; ties keep the given order."""
    documents, starts = best_fit(np.asarray(lengths, dtype=np.int64), capacity)
    return [documents[start:end].tolist() for start, end in zip(starts[:-1], starts[1:], strict=True)]


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The same bins as arrays: the documents of the first, then those of the second, … (n,), and where each begins and
    the last ends (bins + 1,), both int64."""
    wrong = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(wrong):
        raise ValueError(f"document {wrong[0]} has {lengths[wrong[0]]} tokens; a bin holds 1 to {capacity}")
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    owners = _owners(zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True), capacity)
    starts = np.append(0, np.cumsum(np.bincount(owners)))
    return order[np.argsort(owners, kind="stable")], starts


def _owners(groups, capacity: int) -> np.ndarray:
    """The bin of each document, longest document first, of (length, how many) groups in descending order."""
    owners, taken, bins = [], [], 0  # a bin, and how many documents in a row it takes
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # [r]: bins with r tokens left
    rooms = _Counts(capacity + 1)
    for length, left in groups:
        while left:
            room = rooms.smallest_at_least(length)
            each = (capacity if room is None else room) // length
            needed = -(-left // each)
            if room is None:
                room, chosen = capacity, range(bins, bins + needed)
                bins += needed
            else:
                chosen = bins_with_room[room][-needed:][::-1]
                del bins_with_room[room][-needed:]
                rooms.add(room, -len(chosen))
            placed = min(left, each * len(chosen))
            last = placed - each * (len(chosen) - 1)  # what the last of them takes
            owners.extend(chosen)
            taken.extend(repeat(each, len(chosen) - 1))
            taken.append(last)
            for rest, ended in ((room - each * length, chosen[:-1]), (room - last * length, chosen[-1:])):
                if ended:
                    bins_with_room[rest].extend(ended)
                    rooms.add(rest, len(ended))
            left -= placed
    return np.repeat(np.array(owners, dtype=np.int64), taken)


class _Counts:
    """A segment tree of counts: which values are present, and the smallest present one not below a bound."""

    def __init__(self, size: int):
        self.leaves = 1 << max(1, (size - 1).bit_length())
        self.tree = [0] * (2 * self.leaves)  # tree[i] = tree[2i] + tree[2i+1]; tree[leaves + v] counts v

    def add(self, value: int, count: int) -> None:
        node = self.leaves + value
        while node:
            self.tree[node] += count
            node >>= 1

    def smallest_at_least(self, bound: int) -> int | None:
        node = self.leaves + bound
        while not self.tree[node]:  # climb until the subtree to the right holds something
            while node & 1:  # a right child has nothing to its right below its parent
                node >>= 1
                if node <= 1:
                    return None
            node += 1
        while node < self.leaves:  # then down its leftmost occupied path
            node = 2 * node if self.tree[2 * node] else 2 * node + 1
        return node - self.leaves
