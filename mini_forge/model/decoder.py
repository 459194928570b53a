"""One decoder for every family: what differs between checkpoints is data in a `DecoderSpec`.

Parameter names are the checkpoint's (`model.layers.0.self_attn.q_proj.weight`). The decoder works on the flat stream of
N = B·T tokens; `position` and `document` say where each token stands, so rows without padding are the normal case and
an unpacked batch is one document per row.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mini_forge.errors import ConfigError
from mini_forge.model import functional
from mini_forge.model.cache import KVCache, LayerCache, Places
from mini_forge.model.experts import MixtureOfExperts, Routing
from mini_forge.model.lora import Factors, is_adapted, is_frozen, project, project_again, project_unit
from mini_forge.model.masks import Documents, document_positions
from mini_forge.model.offload import HostCopies, offloaded
from mini_forge.model.ops import PLAIN, Differentiable, Ops, gated_unit, vjp
from mini_forge.model.quant import Linear16bit
from mini_forge.model.rope import Rope
from mini_forge.model.spec import DecoderSpec, ExpertsSpec, LayerSpec
from mini_forge.model.transfer import to_device

__all__ = ["Decoder", "DecoderSpec", "ExpertsSpec", "KVCache", "LayerSpec", "neftune_noise"]

RECOMPUTE = (None, "selective", "full", "offload")
TILE_TOKENS = 1024  # an MLP that is recomputed runs on so many tokens at a time: enough for full-speed products


class RMSNorm(nn.Module):
    """The product with the weight is made in float32 where the checkpoint asks for it."""

    def __init__(self, size: int, spec: DecoderSpec, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.offset, self.ops = spec.norm_eps, spec.norm_offset, ops
        self.is_wide = spec.norm_product == "float32" or spec.norm_offset != 0

    def forward(self, x):
        weight = self.weight.float() + self.offset if self.offset else self.weight
        if self.is_wide:
            return self.ops.rms_norm(x.float(), weight.float(), self.eps).to(x.dtype)
        return self.ops.rms_norm(x, weight, self.eps)

    def vjp(self, grad, x):
        """This norm, its weight frozen, with its vector-Jacobian product: see `ops.vjp`."""
        if self.is_wide:
            return vjp(self, grad, x)
        return self.ops.rms_norm_vjp(grad, x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, spec: DecoderSpec, layer: LayerSpec, ops: Ops):
        super().__init__()
        D, H, K, C = spec.hidden_size, spec.heads, spec.kv_heads, spec.head_size
        self.head_size, self.layer, self.ops = C, layer, ops
        self.scale, self.eps = spec.attention_scale, spec.norm_eps
        self.sizes, self.is_fused, self.is_interleaved = (H, K, K), spec.fused_projections, spec.rope_interleaved
        if self.is_fused:
            self.qkv_proj = nn.Linear(D, (H + 2 * K) * C, bias=spec.qkv_bias)
        else:
            self.q_proj = nn.Linear(D, H * C, bias=spec.qkv_bias)
            self.k_proj = nn.Linear(D, K * C, bias=spec.qkv_bias)
            self.v_proj = nn.Linear(D, K * C, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(H * C, D, bias=spec.out_bias)
        weighted = spec.qk_norm == "weighted"
        self.q_norm = RMSNorm(C, spec, ops) if weighted else None
        self.k_norm = RMSNorm(C, spec, ops) if weighted else None
        self.norm_after_rope = spec.qk_norm == "weightless" and layer.rope is not None
        self.sinks = nn.Parameter(torch.zeros(H)) if spec.sinks else None

    def forward(self, x, norm: RMSNorm, stream: "Stream", cache: LayerCache | None, rows=None):
        """The residual stream (N, D) → what attention to norm(x) adds to it, (N, D), or to its `rows`."""
        query, key, value = self._project(x, norm)
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.layer.rope is not None:
            query, key = self._rotate(query, key, *stream.rotations[self.layer.rope])
        if self.norm_after_rope:
            ones = torch.ones_like(query[0, 0])
            query, key = self.ops.rms_norm(query, ones, self.eps), self.ops.rms_norm(key, ones, self.eps)
        if self.layer.temperature:
            query = (query * stream.temperature[:, None, None]).to(query.dtype)
        if cache is None:
            mixed = self._attend(query, key, value, stream.documents)
        else:
            mixed = cache.attend(query, key, value, stream.places, self.layer, self.scale, self.sinks)
        return self.o_proj(_rows(mixed.flatten(-2), rows))

    def _project(self, x, norm):
        """Queries (N, H, C), keys and values (N, K, C)."""
        if self.is_fused:
            return project(x, self.qkv_proj, make=norm)[0].unflatten(-1, (-1, self.head_size)).split(self.sizes, dim=1)
        projected = project(x, self.q_proj, self.k_proj, self.v_proj, make=norm)
        return (p.reshape(-1, heads, self.head_size) for p, heads in zip(projected, self.sizes, strict=True))

    def _rotate(self, query, key, cos, sin):
        """The rotation turns the first channels, as many as it has; most checkpoints turn all."""
        if self.is_interleaved:
            query, key = functional.interleaved_to_halves(query), functional.interleaved_to_halves(key)
        turned = cos.shape[-1]
        if turned == self.head_size:
            return self.ops.rope_qk(query, key, cos, sin)
        heads = self.ops.rope_qk(query[..., :turned], key[..., :turned], cos, sin)
        return (torch.cat((x, rest[..., turned:]), dim=-1) for x, rest in zip(heads, (query, key), strict=True))

    def _attend(self, query, key, value, documents: Documents):
        if self.layer.chunk is not None:
            documents = documents.chunked(self.layer.chunk)
        return self.ops.attention(query, key, value, documents, self.layer.window, self.scale, self.sinks)


class MLP(nn.Module):
    def __init__(self, spec: DecoderSpec, size: int, ops: Ops):
        super().__init__()
        D, self.is_fused = spec.hidden_size, spec.fused_projections
        if self.is_fused:
            self.gate_up_proj = nn.Linear(D, 2 * size, bias=spec.mlp_bias)
        else:
            self.gate_proj = nn.Linear(D, size, bias=spec.mlp_bias)
            self.up_proj = nn.Linear(D, size, bias=spec.mlp_bias)
        self.down_proj = nn.Linear(size, D, bias=spec.mlp_bias)
        self.unit = gated_unit(ops, spec.activation, spec.clamp)

    def forward(self, x, norm: RMSNorm | None = None, recompute: bool = False):
        """x (N, D) → the MLP of norm(x), or of x. recompute: keep x alone, and make gate and up again in the backward,
        a piece of the tokens at a time."""
        if not recompute:
            return project_unit(*self._halves(x, norm), self.down_proj, self.unit)
        return torch.cat([self._recomputed(rows, norm) for rows in x.split(TILE_TOKENS)])

    def _halves(self, x, norm):
        if self.is_fused:
            return self._split(*project(x, self.gate_up_proj, make=norm))
        return project(x, self.gate_proj, self.up_proj, make=norm)

    def _split(self, gate_up):
        return gate_up.chunk(2, dim=-1)

    def _recomputed(self, x, norm):
        inner = (self.gate_up_proj,) if self.is_fused else (self.gate_proj, self.up_proj)
        if not (is_adapted(*inner, self.down_proj) and is_frozen(norm)):
            return checkpoint(self.forward, x, norm, use_reentrant=False)
        unit = Differentiable.of(lambda both: self.unit(*self._split(both))) if self.is_fused else self.unit
        return project_again(x, norm, inner, self.down_proj, unit)


def make_mlp(spec: DecoderSpec, layer: LayerSpec, ops: Ops) -> nn.Module:
    if not layer.experts:
        return MLP(spec, spec.mlp_size, ops)
    shared = spec.experts.shared_size
    return MixtureOfExperts(spec, ops, None if shared is None else MLP(spec, shared, ops))


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x)); with post-norms, x + norm(…) of each."""

    def __init__(self, spec: DecoderSpec, layer: LayerSpec, ops: Ops):
        super().__init__()
        self.mlp_name, self.residual_scale, self.post_norms = spec.mlp_name, spec.residual_scale, spec.post_norms
        self.input_layernorm = RMSNorm(spec.hidden_size, spec, ops)
        self.self_attn = Attention(spec, layer, ops)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec, ops)
        if spec.post_norms:
            self.pre_feedforward_layernorm = RMSNorm(spec.hidden_size, spec, ops)
            self.post_feedforward_layernorm = RMSNorm(spec.hidden_size, spec, ops)
        self.add_module(spec.mlp_name, make_mlp(spec, layer, ops))
        self.has_experts = layer.experts

    def forward(self, x, stream, cache=None, rows=None):
        """(N, D) → (N, D), or only the `rows` (M,) that are asked for, (M, D)."""
        attended = self.self_attn(x, self.input_layernorm, stream, cache, rows)
        x = _rows(x, rows)
        if self.post_norms:
            x = x + self.post_attention_layernorm(attended)
            return x + self.post_feedforward_layernorm(self._mlp(x, self.pre_feedforward_layernorm, stream))
        x = self._add(x, attended)
        return self._add(x, self._mlp(x, self.post_attention_layernorm, stream))

    def _mlp(self, x, norm: RMSNorm, stream: "Stream"):
        mlp = self.get_submodule(self.mlp_name)
        if not self.has_experts:
            return mlp(x, norm, stream.recompute_mlp)

        def experts(x):
            return mlp(norm(x), stream.routings)

        return checkpoint(experts, x, use_reentrant=False) if stream.recompute_mlp else experts(x)

    def _add(self, x, update):
        return x + update if self.residual_scale == 1 else x + update * self.residual_scale


def _rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return x if rows is None else x.index_select(0, rows)


@dataclass(frozen=True)
class Stream:
    """What all layers share in one forward pass: rotations cos, sin (N, C) by name, query temperatures (N,), document
    bounds or places in a cache, in training the list to which layers with experts append their Routing, and
    whether the backward makes the MLPs' activations again."""

    rotations: dict[str, tuple[torch.Tensor, torch.Tensor]]
    temperature: torch.Tensor | None
    documents: Documents | None
    places: Places | None
    routings: list[Routing] | None = None
    recompute_mlp: bool = False


class Backbone(nn.Module):
    """The part of the checkpoint under `model.`"""

    def __init__(self, spec: DecoderSpec, ops: Ops):
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size, _weight=_fresh_embedding(spec))
        self.layers = nn.ModuleList(Block(spec, layer, ops) for layer in spec.layers)
        self.norm = RMSNorm(spec.hidden_size, spec, ops)


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
        ropes = {"global": spec.rope, "local": spec.local_rope}
        self.ropes = {name: Rope(rope, spec.head_size) for name, rope in ropes.items() if rope is not None}
        # Of the checkpoint that was loaded: how experts lie on disk (families/layout.py), and `families.text_model`.
        self.layout, self.text_model = None, "model."
        self.routings: list[Routing] = []  # of the last forward pass in training
        # What the backward makes again instead of keeping it: "selective", the MLPs (half of the layers' products, two
        # thirds of their activations); "full", whole layers; "offload", these from inputs kept in host memory; None,
        # only what is made element by element.
        self.recompute: str | None = None
        self._host_copies = HostCopies()
        self.neftune_alpha: float | None = None
        self.reference: Factors | None = None  # the adapter that a policy is tied to; None: to the model without any

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D): the output matrix, which is the embedding where the checkpoint ties them."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations. Matrices may be held in fewer bits."""
        return self.model.norm.weight.dtype

    def forward(
        self, input_ids, position=None, document=None, cache: KVCache | None = None, parents=None, rows=None
    ) -> torch.Tensor:  # fmt: skip
        """Final-norm hidden states (B, T, D) in the model's dtype, or (M, D) of the `rows` that are asked for.

        input_ids (B, T) int64; position (B, T) int64, by default counted within each document; document (B, T), by
        default one per row. With a `cache`, new tokens of each row continue what the cache holds and `document` is
        not used. parents: of each document, in their order, the earlier one that it continues, or -1 (`Batch`). rows
        (M,) int64: the tokens of the N = B·T whose states are wanted; behind its attention the last layer computes no
        others. All are taken to the model's device; a `document` that is there already is read back, with a wait."""
        x, stream = self.begin(input_ids, position, document, cache, parents)
        if self.recompute not in RECOMPUTE:
            raise ConfigError(f"recompute: {self.recompute!r} must be one of {', '.join(map(repr, RECOMPUTE))}")
        recompute = self.recompute if self.training and torch.is_grad_enabled() else None
        rows = None if rows is None else to_device(rows, x.device)
        for i, block in enumerate(self.model.layers):
            layer_cache = None if cache is None else cache.layers[i]
            wanted = rows if i == len(self.model.layers) - 1 else None
            if recompute == "full":
                x = checkpoint(block, x, stream, layer_cache, wanted, use_reentrant=False)
            elif recompute == "offload":
                x = offloaded(self._host_copies, block, x, stream, layer_cache, wanted)
            else:
                x = block(x, stream, layer_cache, wanted)
        # A copy: a checkpointed block that runs again in the backward appends again.
        self.routings = list(stream.routings or ())
        x = self.finish(x)
        return x.view(*input_ids.shape, -1) if rows is None else x

    def begin(self, input_ids, position=None, document=None, cache: KVCache | None = None, parents=None):
        """What the first block takes: embeddings (N, D) and the Stream that all blocks share."""
        B, T = input_ids.shape
        x = self.model.embed_tokens(to_device(input_ids, self.device)).flatten(0, 1).to(self.dtype)
        if self.spec.embed_scale != 1:
            x = x * torch.tensor(self.spec.embed_scale, dtype=x.dtype)
        documents = None
        if cache is None:
            if document is None:
                documents = Documents.of_lengths([T] * B, self.device, parents)
            else:
                documents = Documents.from_ids(document, parents, self.device)
            position = document_positions(documents).view(B, T) if position is None else position
        if self.training and self.neftune_alpha:
            x = x + neftune_noise(x, documents, self.neftune_alpha)
        return x, self._stream(to_device(position, self.device), x.dtype, documents, cache is not None)

    def finish(self, x: torch.Tensor) -> torch.Tensor:
        """What the last block gives → final-norm hidden states, both (N, D)."""
        x = self.model.norm(x)
        return x if self.spec.hidden_scale == 1 else x * self.spec.hidden_scale

    def _stream(self, position, dtype, documents: Documents | None, is_cached: bool) -> Stream:
        flat, temperature = position.flatten(), None
        if any(layer.temperature for layer in self.spec.layers):
            a, floor = self.spec.temperature
            temperature = 1 + a * torch.log1p(torch.floor((flat.float() + 1) / floor))
        rotations = {name: rope(flat, dtype) for name, rope in self.ropes.items()}
        routings = [] if self.training and self.spec.experts is not None else None
        recompute_mlp = self.recompute == "selective" and self.training and torch.is_grad_enabled()
        places = Places(position) if is_cached else None
        return Stream(rotations, temperature, documents, places, routings, recompute_mlp)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, D) hidden states → (…, V) float32 logits."""
        if self.head_weight.dtype != hidden.dtype and not self.head_weight.requires_grad:
            return Linear16bit(self.head_weight, None, self.ops.stored_products)(hidden).float()
        return nn.functional.linear(hidden, self.head_weight.to(hidden.dtype)).float()

    def logits(self, input_ids, position=None, document=None) -> torch.Tensor:
        """(B, T) int64 → (B, T, V) float32. The whole tensor: for study and tests, not for training."""
        return self.head(self(input_ids, position, document))


@contextmanager
def evaluating(model: nn.Module):
    """Without gradients and dropout; afterwards every module is in the mode it was in."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in trained:
            module.training = True


def neftune_noise(x: torch.Tensor, documents: Documents, alpha: float) -> torch.Tensor:
    """Uniform noise in ±alpha/√(L·D), L the length of the token's document. NEFTune (2310.05914) Algorithm 1.

    x (N, D); returns (N, D) in x's dtype, without gradient."""
    lengths = torch.tensor(documents.lengths)
    scale = alpha / (lengths * x.shape[-1]).float().sqrt()
    per_token = to_device(scale.repeat_interleave(lengths), x.device)[:, None]
    return (torch.empty_like(x, dtype=torch.float32).uniform_(-1, 1) * per_token).to(x.dtype)
