"""Which documents make up each optimizer step: a pure function of the step, so resuming needs only its number."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mini_forge.data.batches import Document, Epoch, collate, plan_epoch
from mini_forge.data.pairs import PairDocument
from mini_forge.data.token_store import inputs_of


@dataclass
class Windows:
    """The microbatches of every optimizer step of a run, epoch after epoch, each epoch in an order of its own."""

    documents: Sequence[Document | PairDocument]
    batch_size: int
    accumulation: int
    group_by_length: bool
    packing: bool
    capacity: int  # tokens of a packed row
    seed: int
    collate: Callable[[list], object] = collate  # chosen documents to a microbatch
    lengths: np.ndarray = field(init=False, repr=False)  # inputs of each document
    steps_per_epoch: int = field(init=False)
    _planned: tuple[int, Epoch] = field(init=False, repr=False)  # the last epoch asked for

    def __post_init__(self):
        self.lengths = inputs_of(self.documents)
        self._planned = (0, self._plan(0))
        self.steps_per_epoch = math.ceil(len(self._planned[1]) / self.accumulation)

    def __call__(self, step: int) -> list:
        """The microbatches of one step. The last window of an epoch may be short, and is trained whole."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._planned[0] != epoch:
            self._planned = (epoch, self._plan(epoch))
        chosen = self._planned[1][index * self.accumulation : (index + 1) * self.accumulation]
        return [self.collate([self.documents[i] for i in batch]) for batch in chosen]

    def _plan(self, epoch: int) -> Epoch:
        options = (self.group_by_length, self.packing, self.capacity, self.seed, epoch)
        return plan_epoch(self.lengths, self.batch_size, self.accumulation, *options)
