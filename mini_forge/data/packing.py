"""Packing: put documents of many lengths into few rows of a fixed capacity, by best-fit decreasing.

Longest first, each document goes into the open row with the least room that still holds it, else into a new one.
That never needs more than 11/9 of the optimal number of rows, plus a constant (Johnson et al. 1974).
"""


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of document indices, each bin at most `capacity` tokens; every index exactly once, O(n log capacity).

    Bins come in the order they were opened, documents within one longest first; ties keep the given order."""
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"document {index} has {length} tokens; a bin holds 1 to {capacity}")
    bins: list[list[int]] = []
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # [r]: bins with r tokens left
    rooms = _Counts(capacity + 1)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        room = rooms.smallest_at_least(length)
        if room is None:
            room = capacity
            bins.append([index])
            chosen = len(bins) - 1
        else:
            chosen = bins_with_room[room].pop()
            bins[chosen].append(index)
            rooms.add(room, -1)
        bins_with_room[room - length].append(chosen)
        rooms.add(room - length, 1)
    return bins


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
