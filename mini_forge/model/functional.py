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


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents, window: int | None
) -> torch.Tensor:
    """softmax(QKᵀ/√C)V within each document, causal, at most `window` keys back. Attention (1706.03762) Eq. 1.

    query (N, H, C), key and value (N, K, C), tokens of all documents end to end. Returns (N, H, C).
    Key j is visible to query i of the same document iff 0 <= i - j < window."""
    if documents.use_varlen(query):
        return _varlen_attention(query, key, value, documents, window)
    lengths = documents.lengths
    if len(set(lengths)) == 1:  # equal documents are one batched call
        parts = [x.unflatten(0, (len(lengths), lengths[0])) for x in (query, key, value)]
        return _causal_sdpa(*parts, documents, window).flatten(0, 1)
    # split, not slices: the backward of a slice fills a gradient of the whole batch with zeros, once per document
    parts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    return torch.cat([_causal_sdpa(q[None], k[None], v[None], documents, window)[0] for q, k, v in parts])


def _causal_sdpa(query, key, value, documents: Documents, window: int | None) -> torch.Tensor:
    """`attention` for (P, L, heads, C) tensors of P documents of one length."""
    length = query.shape[1]
    mask = documents.window_mask(length, window) if window is not None and length > window else None
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


def _varlen_attention(query, key, value, documents: Documents, window: int | None) -> torch.Tensor:
    """`attention` as one CUDA kernel over all documents (torch's FlashAttention-2 with cumulative lengths)."""
    from torch.nn.attention.varlen import varlen_attn

    longest, starts = documents.longest, documents.starts
    reach = (-1, 0) if window is None else (window - 1, 0)
    grouped = query.shape[1] != key.shape[1]
    return varlen_attn(query, key, value, starts, starts, longest, longest, window_size=reach, enable_gqa=grouped)


def cached_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attends: torch.Tensor
) -> torch.Tensor:
    """Attention of new tokens over a key/value cache.

    query (B, T, H, C), key and value (B, S, K, C), attends (B, T, S) bool, True where a query may look.
    Returns (B, T, H, C)."""
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=attends[:, None],
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)
