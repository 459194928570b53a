import random
import time

import numpy as np
import pytest

from mini_forge.data.packing import best_fit, pack


def slow_best_fit(lengths, capacity):
    """The same by looking at every open bin; of equal fits the one that came to that room last, as `pack` has it."""
    bins, room, touched = [], [], []
    for clock, index in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fits = [b for b in range(len(bins)) if room[b] >= lengths[index]]
        if fits:
            best = min(fits, key=lambda b: (room[b], -touched[b]))
        else:
            best = len(bins)
            bins.append([])
            room.append(capacity)
            touched.append(0)
        bins[best].append(index)
        room[best] -= lengths[index]
        touched[best] = clock
    return bins


def test_the_published_example():
    # four documents of 5 (cut to 4), 2, 3 and 1 tokens in rows of 4: [[4], [3, 1], [2]]
    assert pack([4, 2, 3, 1], 4) == [[0], [2, 3], [1]]


@pytest.mark.parametrize("seed", range(30))
def test_it_is_best_fit_decreasing(seed):
    draw = random.Random(seed)
    capacity = draw.choice([1, 2, 3, 7, 64, 100, 1000])
    lengths = [draw.randint(1, capacity) for _ in range(draw.choice([0, 1, 2, 50, 300]))]
    assert pack(lengths, capacity) == slow_best_fit(lengths, capacity)


def test_every_document_is_in_one_bin_and_no_bin_overflows():
    draw = random.Random(0)
    lengths = [min(512, int(draw.lognormvariate(4.5, 0.8)) + 1) for _ in range(20_000)]
    began = time.process_time()
    bins = pack(lengths, 512)
    assert time.process_time() - began < 5  # about 0.2 s; a search through all bins takes minutes
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 512 for b in bins)
    assert len(bins) <= -(-sum(lengths) // 512) * 1.01


@pytest.mark.parametrize("seed", range(10))
def test_many_documents_of_few_lengths_are_placed_as_if_one_by_one(seed):
    draw = random.Random(seed)
    capacity = draw.choice([10, 64, 100])
    sizes = [draw.randint(1, capacity) for _ in range(3)]
    lengths = [draw.choice(sizes) for _ in range(300)]
    assert pack(lengths, capacity) == slow_best_fit(lengths, capacity)


def test_a_million_documents_are_packed_in_seconds():
    lengths = np.minimum(2048, np.random.default_rng(0).lognormal(6, 0.8, 1_000_000).astype(np.int64) + 1)
    began = time.process_time()
    documents, starts = best_fit(lengths, 2048)
    assert time.process_time() - began < 5  # about 0.4 s; one document at a time takes 10
    assert np.array_equal(np.sort(documents), np.arange(len(lengths)))
    assert np.add.reduceat(lengths[documents], starts[:-1]).max() <= 2048


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="document 1 has 5 tokens; a bin holds 1 to 4"):
        pack([4, 5], 4)
