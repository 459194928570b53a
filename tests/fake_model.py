"""A model whose next token follows from the last one alone, by a table: what it generates is worked out by hand."""

from types import SimpleNamespace

import torch
from torch import nn


class TableModel(nn.Module):
    """`logits[a, b]`: how much id b is liked after id a. Has a Decoder's interface; its hidden state is the last id.

    Keeps what it was called with: `calls` of (input_ids, position, training), `heads` the shapes given to the head."""

    def __init__(self, logits: torch.Tensor, max_positions: int = 10_000):
        super().__init__()
        self.table = logits.float()
        self.dropout = nn.Dropout(0.5)  # a module whose mode can be looked at
        self.spec = SimpleNamespace(layers=(), max_positions=max_positions)
        self.device, self.dtype = logits.device, torch.float32
        self.calls, self.heads = [], []

    def forward(self, input_ids, position=None, document=None, cache=None):
        if cache is not None:
            assert int(position.max()) < cache.capacity
        self.calls.append((input_ids.clone(), None if position is None else position.clone(), self.training))
        return input_ids[..., None].float()

    def head(self, hidden):
        self.heads.append(tuple(hidden.shape))
        return self.table[hidden[..., 0].long()].clone()


def chain(size: int, **follows: int) -> TableModel:
    """After id a comes follows["_a"]; every other id is as unlikely as any."""
    logits = torch.zeros(size, size)
    for before, after in follows.items():
        logits[int(before[1:]), after] = 10.0
    return TableModel(logits)


class ScriptModel(TableModel):
    """Likes `script[k]` best as the token after position k, whatever came before; further ids in order of `then`."""

    def __init__(self, size: int, script: dict[int, int], then: dict[int, float] | None = None, max_positions=10_000):
        logits = torch.zeros(max_positions, size)
        for token, liking in (then or {}).items():
            logits[:, token] = liking
        for position, token in script.items():
            logits[position, token] = 10.0
        super().__init__(logits, max_positions)

    def forward(self, input_ids, position=None, document=None, cache=None):
        super().forward(input_ids, position, document, cache)
        return position[..., None].float()


def says(prompt_length: int, ids: list[int], size: int, then: dict[int, float] | None = None, **options) -> ScriptModel:
    """A model that after a prompt of this length wants to say `ids`."""
    return ScriptModel(size, {prompt_length - 1 + k: token for k, token in enumerate(ids)}, then, **options)
