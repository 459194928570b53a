"""Keys and values kept while text is generated, and from one turn of a conversation to the next."""

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import nn

from mini_forge.model.functional import cached_attention
from mini_forge.model.masks import cache_attends
from mini_forge.model.spec import DecoderSpec, LayerSpec


class Places:
    """Where a pass's new tokens are kept and which slots they look at: the same for all layers. position (B, T)."""

    def __init__(self, position: torch.Tensor):
        self.position = position
        self.row = torch.arange(len(position), device=position.device)[:, None]
        # What is beyond is not read: where much room is left, that would cost more than all else of a token's pass.
        self.reach = int(position.max()) + 1
        self._attends = {}

    def attends(self, layer: LayerSpec) -> torch.Tensor:
        """(B, T, reach) bool: see `cache_attends`."""
        kind = layer.window, layer.chunk
        if kind not in self._attends:
            self._attends[kind] = cache_attends(self.position, self.reach, *kind)
        return self._attends[kind]


class LayerCache:
    """Keys and values of one layer, (B, S, K, C); slot s of a row holds its position s."""

    def __init__(self, batch: int, slots: int, spec: DecoderSpec, dtype: torch.dtype, device: torch.device):
        shape = (batch, slots, spec.kv_heads, spec.head_size)
        self.key, self.value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def attend(self, query, key, value, places: Places, layer: LayerSpec, scale, sinks) -> torch.Tensor:
        """Store the new keys and values (N, K, C) at their places, then attend from query (N, H, C)."""
        query, key, value = (x.unflatten(0, places.position.shape) for x in (query, key, value))
        self.key[places.row, places.position] = key
        self.value[places.row, places.position] = value
        known = (kept[:, : places.reach] for kept in (self.key, self.value))
        return cached_attention(query, *known, places.attends(layer), scale, sinks).flatten(0, 1)


class KVCache:
    """Room for `capacity` tokens in each of `batch` rows.

    Rows may differ in length: right-pad the prompts and pass every token's true position. A pad writes a slot past its
    row's end, which no query looks at before the row's own token of that position overwrites it."""

    def __init__(self, model: nn.Module, batch: int, capacity: int):
        self.capacity = capacity
        self.layers = [LayerCache(batch, capacity, model.spec, model.dtype, model.device) for _ in model.spec.layers]


class Memory:
    """What a model, whose weights stay as they are, has read of a text that goes on, as a conversation does: of the
    next prompt only what is new is read."""

    def __init__(self):
        self.ids: list[int] = []  # whose keys and values the cache holds
        self.cache: KVCache | None = None

    def read(self, model: nn.Module, prompt: Sequence[int], capacity: int) -> tuple[KVCache, torch.Tensor]:
        """A cache with at least that room, which holds the prompt, and the hidden state (1, D) of its last token, which
        is always read."""
        same = (a == b for a, b in zip(self.ids, prompt[:-1], strict=False))
        known = sum(takewhile(bool, same))
        self.ids = list(prompt[:known])
        if self.cache is None or self.cache.capacity < capacity:
            before = self.cache
            if before is not None:  # room for turns to come, so that not each has to move what is there
                capacity = max(capacity, min(2 * before.capacity, model.spec.max_positions))
            self.cache = KVCache(model, 1, capacity)
            for new, old in zip(self.cache.layers, before.layers if before else (), strict=False):
                new.key[:, :known], new.value[:, :known] = old.key[:, :known], old.value[:, :known]
        lengths = torch.tensor([len(prompt)], device=model.device)
        hidden = read_prompts(model, [prompt], lengths, self.cache, known)
        self.ids = list(prompt)
        return self.cache, hidden


def read_prompts(
    model: nn.Module, prompts: list[list[int]], lengths: torch.Tensor, cache: KVCache, known: int = 0
) -> torch.Tensor:
    """Fill a cache, of which each row holds the first `known` tokens of its prompt, with the rest of prompts of
    `lengths` (B,), padded on the right.

    Returns the hidden state of each row's last token, (B, D)."""
    longest = int(lengths.max())
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=model.device)
    position = torch.arange(longest, device=model.device).expand_as(padded)
    hidden = model(padded[:, known:], position=position[:, known:], cache=cache)  # (B, T, D)
    return hidden[torch.arange(len(prompts), device=model.device), lengths - 1 - known]
