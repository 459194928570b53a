"""Keys and values kept while text is generated."""

import torch
from torch import nn

from mini_forge.model.functional import cached_attention
from mini_forge.model.masks import cache_attends
from mini_forge.model.spec import DecoderSpec, LayerSpec


class LayerCache:
    """Keys and values of one layer, (B, S, K, C); slot s of a row holds its position s."""

    def __init__(self, batch: int, slots: int, spec: DecoderSpec, dtype: torch.dtype, device: torch.device):
        shape = (batch, slots, spec.kv_heads, spec.head_size)
        self.key, self.value = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    def attend(self, query, key, value, position, layer: LayerSpec, scale, sinks) -> torch.Tensor:
        """Store the new keys and values (N, K, C) at `position` (B, T), then attend from query (N, H, C)."""
        B, T = position.shape
        row = torch.arange(B, device=position.device)[:, None]
        self.key[row, position] = key.unflatten(0, (B, T))
        self.value[row, position] = value.unflatten(0, (B, T))
        attends = cache_attends(position, self.key.shape[1], layer.window, layer.chunk)
        query = query.unflatten(0, (B, T))
        return cached_attention(query, self.key, self.value, attends, scale, sinks).flatten(0, 1)


class KVCache:
    """Room for `capacity` tokens in each of `batch` rows.

    Rows may differ in length: right-pad the prompts and pass every token's true position. A pad writes a slot past its
    row's end, which no query looks at before the row's own token of that position overwrites it."""

    def __init__(self, model: nn.Module, batch: int, capacity: int):
        self.capacity = capacity
        self.layers = [LayerCache(batch, capacity, model.spec, model.dtype, model.device) for _ in model.spec.layers]


def read_prompts(model: nn.Module, prompts: list[list[int]], lengths: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Fill an empty cache with prompts of `lengths` (B,), padded on the right.

    Returns the hidden state of each row's last token, (B, D)."""
    longest = int(lengths.max())
    padded = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=model.device)
    position = torch.arange(longest, device=model.device).expand_as(padded)
    hidden = model(padded, position=position, cache=cache)  # (B, T, D)
    return hidden[torch.arange(len(prompts), device=model.device), lengths - 1]
