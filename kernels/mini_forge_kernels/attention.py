"""Attention of documents that share their beginnings, without copies, on the CPU.

    o_i = Σ_j softmax_j(s·q_i·k_j) v_j,   j over the ancestors' tokens and, up to i, the segment's own

The keys of a query lie in several pieces. torch's flash kernel gives each piece's output o_p and log-sum ℓ_p; together

    ℓ = log Σ_p exp(ℓ_p)          o = Σ_p exp(ℓ_p − ℓ) o_p

and, because the gradient of a softmax needs nothing of the other pieces but ℓ and o, the kernel's own backward, given
these two in place of its piece's, makes each piece's part of dq, dk, dv. Flash attention (2205.14135), in pieces as in
ring attention (2310.01889). Saves q, k, v, o and ℓ. A document without ancestors is one piece; documents' outputs are
written where they belong, not put together afterwards.
"""

import torch
from torch.autograd.function import once_differentiable

from mini_forge.model.functional import attention as reference

__all__ = ["attention", "reference"]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(query, key, value, documents, window, scale=None, sinks=None) -> torch.Tensor:
    """Equals `reference`, which it calls where this kernel does not serve: other devices, windows, chunks, sinks."""
    whole = documents if documents.tree is None else documents.tree.whole
    is_plain = sinks is None and (window is None or whole.longest <= window)
    is_chunked = documents.tree is not None and documents.tree.is_chunked
    if query.device.type != "cpu" or not is_plain or is_chunked:
        return reference(query, key, value, documents, window, scale, sinks)
    return _SegmentAttention.apply(*map(_channels_dense, (query, key, value)), documents, scale)


def _channels_dense(x: torch.Tensor) -> torch.Tensor:
    """The kernel reads a head's channels one after another, and does not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def pieces(documents) -> list[tuple[slice, slice, bool]]:
    """(queries, keys, is_causal) of every kernel call: each segment with itself, and with it all that continues it.

    A parent's descendants lie right behind it, so their queries are one slice."""
    ends = documents.starts[1:].tolist()
    own = [slice(end - length, end) for length, end in zip(documents.lengths, ends, strict=True)]
    calls = [(rows, rows, True) for rows in own]
    if documents.tree is None:
        return calls
    parents = documents.tree.parents
    last = list(range(len(parents)))  # of each segment, the last one that descends from it
    for i in range(len(parents) - 1, -1, -1):
        if parents[i] >= 0:
            last[parents[i]] = max(last[parents[i]], last[i])
    return calls + [
        (slice(ends[i], ends[last[i]]), rows, False) for i, rows in enumerate(own) if last[i] > i
    ]  # fmt: skip


def _heads_first(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """(N, H, C) → (1, H, L, C), a view."""
    return x[rows].transpose(0, 1)[None]


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, documents, scale):
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        logsum = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))  # (N, H)
        calls = pieces(documents)
        for queries, keys, is_causal in calls:
            piece, piece_logsum = _forward(
                _heads_first(query, queries), _heads_first(key, keys), _heads_first(value, keys), 0.0, is_causal,
                scale=scale,
            )  # fmt: skip
            piece, piece_logsum = piece[0].transpose(0, 1), _rows_first(piece_logsum)
            if is_causal:  # each row's first piece
                out[queries], logsum[queries] = piece, piece_logsum
            else:
                _merge(out[queries], logsum[queries], piece, piece_logsum)
        ctx.save_for_backward(query, key, value, out, logsum)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = _channels_dense(grad)
        query, key, value, out, logsum = ctx.saved_tensors
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
        for queries, keys, is_causal in ctx.calls:
            parts = _backward(
                _heads_first(grad, queries), _heads_first(query, queries), _heads_first(key, keys),
                _heads_first(value, keys), _heads_first(out, queries), logsum[queries].t()[None], 0.0,
                is_causal, scale=ctx.scale,
            )  # fmt: skip
            for total, part, rows in zip(grads, parts, (queries, keys, keys), strict=True):
                part = part[0].transpose(0, 1)
                if is_causal:
                    total[rows] = part
                else:
                    total[rows] += part
        return *grads, None, None


def _rows_first(logsum: torch.Tensor) -> torch.Tensor:
    """(1, H, L) → (L, H)."""
    return logsum[0].t()


def _merge(out, logsum, piece, piece_logsum):
    """Add a piece to what is there, in place: (L, H, C) and (L, H)."""
    together = torch.logaddexp(logsum, piece_logsum)
    out.mul_(torch.exp(logsum - together)[..., None]).add_(piece * torch.exp(piece_logsum - together)[..., None])
    logsum.copy_(together)
