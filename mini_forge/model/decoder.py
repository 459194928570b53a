"""One decoder for every family: what differs between checkpoints is data in a `DecoderSpec`.

Parameter names are the checkpoint's (`model.layers.0.self_attn.q_proj.weight`). The decoder works on the flat stream of
N = B·T tokens; `position` and `document` say where each token stands, so rows without padding are the normal case and
an unpacked batch is one document per row.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mini_forge.model import functional
from mini_forge.model.lora import project
from mini_forge.model.masks import Documents, cache_attends, document_positions
from mini_forge.model.ops import PLAIN, Ops
from mini_forge.model.rope import Rope, RopeSpec


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer. `window`: keys a query sees, itself included; None is the whole document."""

    window: int | None = None


@dataclass(frozen=True)
class DecoderSpec:
    """Everything the decoder needs to know of a checkpoint. Options are named for what they do."""

    vocab_size: int
    hidden_size: int
    mlp_size: int
    heads: int
    kv_heads: int
    head_size: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec
    norm_eps: float
    max_positions: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str | None = None  # "weighted": RMSNorm with a weight on every query and key head, before RoPE
    tied_head: bool = False


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.ops = eps, ops

    def forward(self, x):
        return self.ops.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, spec: DecoderSpec, layer: LayerSpec, ops: Ops):
        super().__init__()
        D, H, K, C = spec.hidden_size, spec.heads, spec.kv_heads, spec.head_size
        self.head_size, self.window, self.ops = C, layer.window, ops
        self.q_proj = nn.Linear(D, H * C, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(D, K * C, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(D, K * C, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(H * C, D, bias=spec.out_bias)
        weighted = spec.qk_norm == "weighted"
        self.q_norm = RMSNorm(C, spec.norm_eps, ops) if weighted else None
        self.k_norm = RMSNorm(C, spec.norm_eps, ops) if weighted else None

    def forward(self, x, stream: "Stream", cache: "LayerCache | None"):
        """x (N, D) → (N, D)."""
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (p.unflatten(-1, (-1, self.head_size)) for p in projected)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = self.ops.apply_rope(query, stream.cos, stream.sin)
        key = self.ops.apply_rope(key, stream.cos, stream.sin)
        if cache is None:
            mixed = self.ops.attention(query, key, value, stream.documents, self.window)
        else:
            mixed = cache.attend(query, key, value, stream.cache_position, self.window)
        return self.o_proj(mixed.flatten(-2))


class MLP(nn.Module):
    def __init__(self, spec: DecoderSpec, ops: Ops):
        super().__init__()
        D, F = spec.hidden_size, spec.mlp_size
        self.gate_proj = nn.Linear(D, F, bias=spec.mlp_bias)
        self.up_proj = nn.Linear(D, F, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(F, D, bias=spec.mlp_bias)
        self.ops = ops

    def forward(self, x):
        return self.down_proj(self.ops.swiglu(*project(x, self.gate_proj, self.up_proj)))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, ops: Ops):
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps, ops)
        self.self_attn = Attention(spec, layer, ops)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps, ops)
        self.mlp = MLP(spec, ops)

    def forward(self, x, stream, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), stream, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class Stream:
    """What all layers share in one forward pass: rotations (N, C), and document bounds or cache positions (B, T)."""

    cos: torch.Tensor
    sin: torch.Tensor
    documents: Documents | None
    cache_position: torch.Tensor | None


class Backbone(nn.Module):
    """The part of the checkpoint under `model.`"""

    def __init__(self, spec: DecoderSpec, ops: Ops):
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size, _weight=_fresh_embedding(spec))
        self.layers = nn.ModuleList(Block(spec, layer, ops) for layer in spec.layers)
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, ops)


def _fresh_embedding(spec: DecoderSpec) -> torch.Tensor:
    """What nn.Embedding starts with. On meta nothing is drawn: `normal_` there first imports all of torch's compiler,
    a second of every start."""
    weight = torch.empty(spec.vocab_size, spec.hidden_size)
    return weight if weight.is_meta else nn.init.normal_(weight)


class Decoder(nn.Module):
    """A causal language model. `forward` gives hidden states; the head is separate, so that a loss can run it in chunks
    and only where a token is trained on."""

    def __init__(self, spec: DecoderSpec, ops: Ops = PLAIN):
        super().__init__()
        self.spec, self.ops = spec, ops
        self.model = Backbone(spec, ops)
        self.lm_head = None if spec.tied_head else nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
        self.rope = Rope(spec.rope, spec.head_size)
        self.gradient_checkpointing = False
        self.neftune_alpha: float | None = None

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D): the output matrix, which is the embedding where the checkpoint ties them."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def forward(self, input_ids, position=None, document=None, cache: "KVCache | None" = None) -> torch.Tensor:
        """Final-norm hidden states (B, T, D) in the model's dtype.

        input_ids (B, T) int64; position (B, T) int64, by default counted within each document; document (B, T), by
        default one per row. With a `cache`, new tokens of each row continue what the cache holds and `document` is
        not used."""
        B, T = input_ids.shape
        x = self.model.embed_tokens(input_ids).flatten(0, 1)
        documents = None
        if cache is None:
            documents = Documents.from_ids(torch.zeros_like(input_ids) if document is None else document)
            position = document_positions(documents).view(B, T) if position is None else position
        if self.training and self.neftune_alpha:
            x = x + neftune_noise(x, documents, self.neftune_alpha)
        cos, sin = self.rope(position.flatten(), x.dtype)
        stream = Stream(cos, sin, documents, position if cache is not None else None)
        for i, block in enumerate(self.model.layers):
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, stream, use_reentrant=False)
            else:
                x = block(x, stream, None if cache is None else cache.layers[i])
        return self.model.norm(x).view(B, T, -1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) hidden states → (…, V) float32 logits."""
        return nn.functional.linear(hidden, self.head_weight).float()

    def logits(self, input_ids, position=None, document=None) -> torch.Tensor:
        """(B, T) int64 → (B, T, V) float32. The whole tensor: for study and tests, not for training."""
        return self.head(self(input_ids, position, document))


def neftune_noise(x: torch.Tensor, documents: Documents, alpha: float) -> torch.Tensor:
    """Uniform noise in ±alpha/√(L·D), L the length of the token's document. NEFTune (2310.05914) Algorithm 1.

    x (N, D); returns (N, D) in x's dtype, without gradient."""
    lengths = torch.tensor(documents.lengths, device=x.device)
    scale = alpha / (lengths * x.shape[-1]).float().sqrt()
    per_token = scale.repeat_interleave(lengths)[:, None]
    return (torch.empty_like(x, dtype=torch.float32).uniform_(-1, 1) * per_token).to(x.dtype)


class LayerCache:
    """Keys and values of one layer, (B, S, K, C); slot s of a row holds its position s."""

    def __init__(self, batch: int, slots: int, spec: DecoderSpec, like: torch.Tensor):
        shape = (batch, slots, spec.kv_heads, spec.head_size)
        self.key, self.value = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))

    def attend(self, query, key, value, position, window) -> torch.Tensor:
        """Store the new keys and values (N, K, C) at `position` (B, T), then attend from query (N, H, C)."""
        B, T = position.shape
        row = torch.arange(B, device=position.device)[:, None]
        self.key[row, position] = key.unflatten(0, (B, T))
        self.value[row, position] = value.unflatten(0, (B, T))
        attends = cache_attends(position, self.key.shape[1], window)
        return functional.cached_attention(query.unflatten(0, (B, T)), self.key, self.value, attends).flatten(0, 1)


class KVCache:
    """Room for `capacity` tokens in each of `batch` rows.

    Rows may differ in length: right-pad the prompts and pass every token's true position. A pad writes a slot past its
    row's end, which no query looks at before the row's own token of that position overwrites it."""

    def __init__(self, model: Decoder, batch: int, capacity: int):
        like = model.model.embed_tokens.weight
        self.capacity = capacity
        self.layers = [LayerCache(batch, capacity, model.spec, like) for _ in model.spec.layers]
