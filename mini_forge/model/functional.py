"""The decoder's arithmetic as pure functions, in the plainest form that is exact.

Dimension key of the whole project: B rows, T tokens in a row, N = B·T tokens of a batch, D model width, V vocabulary,
H query heads, K key/value heads, C head width, F MLP width, R LoRA rank, E experts, S cache slots, L document length.
"""

import torch
import torch.nn.functional as F

from mini_forge.model.masks import Documents


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension. RMSNorm (1910.07467) Eq. 4.

    x (…, D), weight (D,). Returns (…, D) in x's dtype. The mean is taken in float32: in bfloat16 the sum of D
    squares would keep 8 bits. The product with `weight` is in x's dtype, as the reference implementations do it."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs (i, i + C/2) of every head by its position's angle. RoFormer 2104.09864 Eq. 34, halves.

    x (N, H, C); cos, sin (N, C) in x's dtype, both halves equal. Returns (N, H, C)."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos[:, None] + rotated * sin[:, None]


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, element by element. SwiGLU (2002.05202) Eq. 6. Both (…, F), returns (…, F)."""
    return F.silu(gate) * up


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, slope: float) -> torch.Tensor:
    """g·σ(slope·g)·(u + 1) with g = min(gate, limit) and u = up within ±limit, as the gpt-oss reference has it.

    Both (…, F), returns (…, F)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(slope * gate) * (up + 1)


def gelu_glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) · up, with the tanh approximation. GEGLU (2002.05202) Eq. 6."""
    return F.gelu(gate, approximate="tanh") * up


def interleaved_to_halves(x: torch.Tensor) -> torch.Tensor:
    """Channels (0, 1, 2, 3, …) → (0, 2, …, 1, 3, …): neighbouring pairs come to lie half a head apart.

    Done to queries and keys alike it leaves their products as they are, so it is never undone."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: Documents,
    window: int | None,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(scale · QKᵀ)V within each document, causal, at most `window` keys back. Attention (1706.03762) Eq. 1.

    query (N, H, C), key and value (N, K, C), tokens of all documents end to end; scale None is 1/√C. sinks (H,): one
    more logit in every softmax of a head, with no value behind it (2309.17453). Returns (N, H, C).
    Key j is visible to query i of the same document iff 0 <= i - j < window. Documents that share their beginning are
    put together whole first, at the cost of copies."""
    if documents.tree is not None:
        tree = documents.tree
        whole = (x.index_select(0, tree.rows) for x in (query, key, value))
        return attention(*whole, tree.whole, window, scale, sinks).index_select(0, tree.first)
    if sinks is None and documents.use_varlen(query):
        return _varlen_attention(query, key, value, documents, window, scale)
    if sinks is not None:
        return _sink_attention(query, key, value, documents, window, scale, sinks)
    lengths = documents.lengths
    if len(set(lengths)) == 1:  # equal documents are one batched call
        parts = [x.unflatten(0, (len(lengths), lengths[0])) for x in (query, key, value)]
        return _causal_sdpa(*parts, documents, window, scale).flatten(0, 1)
    # split, not slices: the backward of a slice fills a gradient of the whole batch with zeros, once per document
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_causal_sdpa(q[None], k[None], v[None], documents, window, scale)[0] for q, k, v in parts])


def _sink_attention(query, key, value, documents: Documents, window, scale, sinks: torch.Tensor) -> torch.Tensor:
    """Each document gets a token before its first, which all see, with a logit of s_h for a query of head h.

    One more channel does that: queries carry s_h/scale there, keys 0, the new key 1 there and 0 elsewhere."""
    scale = scale or query.shape[-1] ** -0.5
    query = torch.cat((query, (sinks.to(query.dtype) / scale)[None, :, None].expand(len(query), -1, 1)), dim=-1)
    first_key = F.pad(torch.zeros_like(key[:1]), (0, 1), value=1.0)
    parts = []
    for q, k, v in zip(*(x.split(documents.lengths) for x in (query, F.pad(key, (0, 1)), value)), strict=True):
        q, k, v = torch.cat((q[:1], q)), torch.cat((first_key, k)), F.pad(v, (0, 1, 0, 0, 1, 0))
        parts.append(_causal_sdpa(q[None], k[None], v[None], documents, window, scale, has_sink=True)[0, 1:, :, :-1])
    return torch.cat(parts)


def _causal_sdpa(query, key, value, documents: Documents, window, scale, has_sink: bool = False) -> torch.Tensor:
    """`attention` for (P, L, heads, C) tensors of P documents of one length; has_sink: all see the first key."""
    length = query.shape[1]
    mask = None
    if window is not None and length - has_sink > window:
        mask = documents.window_mask(length, window, has_sink)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


def _varlen_attention(query, key, value, documents: Documents, window, scale) -> torch.Tensor:
    """`attention` as one CUDA kernel over all documents (torch's FlashAttention-2 with cumulative lengths)."""
    from torch.nn.attention.varlen import varlen_attn

    longest, starts = documents.longest, documents.starts
    reach = (-1, 0) if window is None else (window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    return varlen_attn(
        query, key, value, starts, starts, longest, longest, window_size=reach, scale=scale, enable_gqa=grouped
    )


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attends: torch.Tensor,
    scale: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of new tokens over a key/value cache.

    query (B, T, H, C), key and value (B, S, K, C), attends (B, T, S) bool, True where a query may look; scale and
    sinks as in `attention`. Returns (B, T, H, C)."""
    if sinks is not None:
        return _cached_sink_attention(query, key, value, attends, scale or query.shape[-1] ** -0.5, sinks)
    (B, T, H, C), heads = query.shape, key.shape[2]
    # Of one token the heads that share a key are as good as so many tokens: keys and values are not repeated for them.
    shares = T == 1 and heads != H
    out = F.scaled_dot_product_attention(
        query.reshape(B, heads, -1, C) if shares else query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attends[:, None],
        scale=scale,
        enable_gqa=heads != H and not shares,
    )
    return out.reshape(B, T, H, C) if shares else out.transpose(1, 2)


def _cached_sink_attention(query, key, value, attends, scale: float, sinks: torch.Tensor) -> torch.Tensor:
    B, T, H, C = query.shape
    grouped = query.unflatten(2, (key.shape[2], -1))  # (B, T, K, H/K, C)
    logits = torch.einsum("btkgc,bskc->bkgts", grouped, key).float() * scale
    logits = logits.masked_fill(~attends[:, None, None], -torch.inf)
    sink = sinks.float().view(1, key.shape[2], -1, 1, 1).expand(B, -1, -1, T, 1)
    weights = torch.softmax(torch.cat((logits, sink), dim=-1), dim=-1)[..., :-1]
    return torch.einsum("bkgts,bskc->btkgc", weights.to(value.dtype), value).flatten(2, 3)
