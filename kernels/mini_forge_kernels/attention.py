"""Attention of documents that share their beginnings, without copies of the stream, on the CPU.

    o_i = Σ_j p_ij v_j,  p_ij = softmax_j(s·q_i·k_j),   j over the ancestors' tokens and, up to i, the segment's own

Attention (1706.03762) Eq. 1, done in one of three ways that save q, k, v and nothing of the size of p.

In blocks of queries, by torch's ops. A block's p is made whole, and again in the backward:

    dv = pᵀdo       dp = do·vᵀ       ds = p ⊙ (dp − Σ_j p_j dp_j)       dq = s·ds·k       dk = s·dsᵀq

With a few hundred keys p stays in the cache, and large products beat the flash kernel's small ones (forward and
backward of documents of 150 to 250 tokens take 0.73 of its time, of 1,024 0.8, of 2,048 1.1).

Compiled: the same formulas in attention.cpp beside this file, for float32 and heads of a multiple of 16 channels. The
query heads of a key head go together, p stays in a core's own cache, and nothing is copied or called from Python: 0.65
to 0.72 of the time of torch's ops for short documents, and 0.76 of the flash kernel's for 1,024 tokens, 0.96 for 4,096,
1.1 for 8,192.

In pieces by torch's flash kernel (2205.14135): long documents, and 16-bit numbers. The keys of a query lie in several
segments. The kernel gives each piece's output o_p and log-sum ℓ_p; together

    ℓ = log Σ_p exp(ℓ_p)          o = Σ_p exp(ℓ_p − ℓ) o_p

and, because the gradient of a softmax needs nothing of the other pieces but ℓ and o, the kernel's own backward, given
these two in place of its piece's, makes each piece's part of dq, dk, dv, as in ring attention (2310.01889).
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from mini_forge.model.allocation import fresh
from mini_forge.model.functional import attention as reference
from mini_forge_kernels.compiled import declared, library, named, why_not

__all__ = ["attention", "reason_not_compiled", "reference"]

SHORT = 1024  # keys
BLOCK = 128  # queries
WIDTH = 16  # numbers, as in vectors.h
COMPILED_ROWS = 96  # queries of all heads that are together
TASKS = 4  # for each thread, at least

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(query, key, value, documents, window, scale=None, sinks=None) -> torch.Tensor:
    """Equals `reference`, which it calls where this does not serve: other devices, windows, chunks, sinks."""
    whole = documents if documents.tree is None else documents.tree.whole
    is_plain = sinks is None and (window is None or whole.longest <= window)
    is_chunked = documents.tree is not None and documents.tree.is_chunked
    if query.device.type != "cpu" or not is_plain or is_chunked:
        return reference(query, key, value, documents, window, scale, sinks)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if _is_compiled(query, key, value):
        way = _Compiled
    else:
        way = _InBlocks if whole.longest <= SHORT and query.dtype in (torch.float32, torch.float64) else _InPieces
    return way.apply(*map(_channels_dense, (query, key, value)), documents, scale)


def _is_compiled(query, key, value) -> bool:
    is_served = query.shape[-1] % WIDTH == 0 and key.shape == value.shape and key.shape[-1] == query.shape[-1]
    return is_served and all(x.dtype == torch.float32 for x in (query, key, value)) and reason_not_compiled() is None


def _channels_dense(x: torch.Tensor) -> torch.Tensor:
    """The kernels read a head's channels one after another, and flash does not check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _own_rows(documents) -> list[slice]:
    ends = documents.starts[1:].tolist()
    return [slice(end - length, end) for length, end in zip(documents.lengths, ends, strict=True)]


@cache
def reason_not_compiled() -> str | None:
    """Why attention is made by torch's ops; None where it is compiled."""
    return why_not(_library)


@cache
def _library() -> ctypes.CDLL:
    functions = {"attend": 6 * "p", "attend_backward": 9 * "p", "sum_parts": 3 * "p"}
    loaded = library(Path(__file__).with_suffix(".cpp"), ("-O3",))  # a fifth faster than with -O2
    return declared(loaded, functions, Work=_Work, View=_View)


class _Work(ctypes.Structure):
    """Fields as in attention.cpp's Work. One serves all layers of a forward and backward pass."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("segments", "blocks", "chains")),
        *((name, ctypes.c_long) for name in (
            "chain_count", "heads", "key_heads", "together", "channels", "most_queries", "most_keys", "per_thread",
        )),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    ]  # fmt: skip

    @classmethod
    def of(cls, query, key, documents, scale) -> "_Work":
        sizes = (*query.shape[1:], key.shape[1], torch.get_num_threads())
        return documents.once(("attention", *sizes, scale), lambda: cls(*sizes, documents, scale))

    def __init__(self, H, C, K, threads, documents, scale):
        found = chains(documents)
        # So few heads together that there is enough for all threads to do.
        together = H // K if len(found) * K >= TASKS * threads else 1
        spans, rows, ends, parts = [], [], [], 0
        for chain in found:
            those = blocks(chain, max(1, COMPILED_ROWS // together))
            keys = sum(segment.stop - segment.start for segment in chain)
            ends.append((len(rows), len(those), len(spans), len(chain), keys, parts))
            rows += [(b.start, b.stop - b.start, seen) for b, seen in those]
            spans += [(segment.start, segment.stop - segment.start) for segment in chain]
            parts += keys
        ends.sort(key=lambda chain: -chain[1])  # the longest first: the last task of a thread is short
        self.parts, self.parts_are_sums = parts, together * K == H and documents.tree is None
        self.numbers = [(ctypes.c_long * (len(x) * len(x[0])))(*sum(x, ())) for x in (spans, rows, ends)]
        most_queries = together * max(size for _, size, _ in rows)
        most_keys = -(-max(keys for *_, keys, _ in ends) // WIDTH) * WIDTH
        super().__init__(
            *map(ctypes.addressof, self.numbers), len(found), H, K, together, C, most_queries, most_keys,
            2 * (most_queries * (C + most_keys) + C * most_keys), scale, threads,
        )  # fmt: skip


class _View(ctypes.Structure):
    """Of (N, H, C) whose channels lie one after another, fields as in attention.cpp's View."""

    _fields_ = [("at", ctypes.c_void_p), ("per_row", ctypes.c_long), ("per_head", ctypes.c_long)]

    def __init__(self, x: torch.Tensor):
        super().__init__(x.data_ptr(), x.stride(0), x.stride(1))


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, documents, scale):
        ctx.save_for_backward(query, key, value)
        ctx.work = _Work.of(query, key, documents, scale)
        out = fresh(query.shape, query.dtype, query.device)
        _call("attend", ctx.work, _room(ctx.work), query, key, value, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (query, key, value), work = ctx.saved_tensors, ctx.work
        grad_query = fresh(query.shape, query.dtype, query.device)
        shape = (work.parts, work.heads // work.together, work.channels)
        parts = [fresh(shape, x.dtype, x.device) for x in (key, value)]
        _call("attend_backward", work, _room(work), query, key, value, _channels_dense(grad), grad_query, *parts)
        if work.parts_are_sums:  # each row of dk and dv has one part
            return grad_query, *parts, None, None
        grads = [fresh(x.shape, x.dtype, x.device).zero_() for x in (key, value)]
        for part, total in zip(parts, grads, strict=True):
            _call("sum_parts", work, None, part, total)
        return grad_query, *grads, None, None


def _room(work: _Work) -> torch.Tensor:
    """What the threads work in."""
    return fresh((work.threads, work.per_thread), torch.float32, torch.device("cpu"))


def _call(name: str, work: _Work, room: torch.Tensor | None, *tensors: torch.Tensor):
    views = (ctypes.byref(_View(x)) for x in tensors)
    with named(name):
        getattr(_library(), name)(ctypes.byref(work), *(() if room is None else (room.data_ptr(),)), *views)


class _InBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, documents, scale):
        ctx.save_for_backward(query, key, value)
        ctx.chains, ctx.scale = chains(documents), scale
        out = fresh(query.shape, query.dtype, query.device)
        for chain in ctx.chains:
            keys, values = (_whole(x, chain, query.shape[1]) for x in (key, value))
            for queries, seen in blocks(chain):
                weights = _weights(query[queries].transpose(0, 1), keys[:, :seen], scale)
                out[queries] = torch.bmm(weights, values[:, :seen]).transpose(0, 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value = ctx.saved_tensors
        grad, scale, H = _channels_dense(grad), ctx.scale, query.shape[1]
        grad_query = fresh(query.shape, query.dtype, query.device)
        grad_key, grad_value = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (key, value))
        for chain in ctx.chains:
            keys, values = (_whole(x, chain, H) for x in (key, value))
            grad_keys = grad_values = None
            for queries, seen in reversed(blocks(chain)):  # the first one done has seen all keys
                q, g = (x[queries].transpose(0, 1) for x in (query, grad))
                weights = _weights(q, keys[:, :seen], scale)
                grad_weights = torch.bmm(g, values[:, :seen].transpose(1, 2))
                grad_logits = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, q.dtype)
                grad_query[queries] = _scaled_product(grad_logits, keys[:, :seen], scale).transpose(0, 1)
                part_keys = _scaled_product(grad_logits.transpose(1, 2), q, scale)
                part_values = torch.bmm(weights.transpose(1, 2), g)
                if grad_keys is None:
                    grad_keys, grad_values = part_keys, part_values
                else:
                    grad_keys[:, :seen] += part_keys
                    grad_values[:, :seen] += part_values
                del weights, grad_weights, grad_logits, part_keys, part_values  # before the next block's are made
            _add_to_rows(grad_key, chain, grad_keys)
            _add_to_rows(grad_value, chain, grad_values)
        return grad_query, grad_key, grad_value, None, None


def chains(documents) -> list[list[slice]]:
    """Of each segment the rows of all that its queries see, from the first ancestor's to its own."""
    own = _own_rows(documents)
    if documents.tree is None:
        return [[rows] for rows in own]
    found = []
    for rows, parent in zip(own, documents.tree.parents, strict=True):  # parents come first
        found.append([*(found[parent] if parent >= 0 else ()), rows])
    return found


def blocks(chain: list[slice], size: int | None = None) -> list[tuple[slice, int]]:
    """(rows, keys up to the last of them) of each block of the chain's last segment, about as many rows in each."""
    own = chain[-1]
    length = own.stop - own.start
    before = sum(rows.stop - rows.start for rows in chain[:-1])
    count = -(-length // (size or BLOCK))
    edges = [length * i // count for i in range(count + 1)]
    return [(slice(own.start + a, own.start + b), before + b) for a, b in zip(edges, edges[1:], strict=False)]


def _whole(x: torch.Tensor, chain: list[slice], heads: int) -> torch.Tensor:
    """(N, K, C) → (H, S, C), the chain's S rows for every query head."""
    x = x[chain[0]] if len(chain) == 1 else torch.cat([x[rows] for rows in chain])
    S, K, C = x.shape
    return x.transpose(0, 1)[:, None].expand(K, heads // K, S, C).reshape(heads, S, C)


def _add_to_rows(total: torch.Tensor, chain: list[slice], part: torch.Tensor):
    """total (N, K, C) += part (H, S, C), summed over the query heads of a key head, at the chain's rows."""
    H, S, C = part.shape
    part = part.view(total.shape[1], -1, S, C).sum(1).transpose(0, 1)
    for rows, piece in zip(chain, part.split([rows.stop - rows.start for rows in chain]), strict=True):
        total[rows] += piece


def _weights(q: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """p, (H, B, S): queries (H, B, C) are the last B of the keys' (H, S, C) tokens."""
    logits = _scaled_product(q, keys.transpose(1, 2), scale)
    B = q.shape[1]
    logits[:, :, -B:] += _future(BLOCK, q.dtype)[:B, :B]
    return torch.softmax(logits, dim=-1)


@cache
def _future(size: int, dtype: torch.dtype) -> torch.Tensor:
    """(size, size): -inf where a key lies behind the query, else 0."""
    return torch.full((size, size), -torch.inf, dtype=dtype, device="cpu").triu_(1)


def _scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def pieces(documents) -> list[tuple[slice, slice, bool]]:
    """(queries, keys, is_causal) of every kernel call: each segment with itself, and with it all that continues it.

    A parent's descendants lie right behind it, so their queries are one slice."""
    own = _own_rows(documents)
    calls = [(rows, rows, True) for rows in own]
    if documents.tree is None:
        return calls
    parents = documents.tree.parents
    last = list(range(len(parents)))  # of each segment, the last one that descends from it
    for i in range(len(parents) - 1, -1, -1):
        if parents[i] >= 0:
            last[parents[i]] = max(last[parents[i]], last[i])
    return calls + [
        (slice(rows.stop, own[last[i]].stop), rows, False) for i, rows in enumerate(own) if last[i] > i
    ]  # fmt: skip


def _heads_first(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """(N, H, C) → (1, H, L, C), a view."""
    return x[rows].transpose(0, 1)[None]


class _InPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, documents, scale):
        out = fresh(query.shape, query.dtype, query.device)
        logsum = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))  # (N, H)
        calls = pieces(documents)
        for queries, keys, is_causal in calls:
            piece, piece_logsum = _flash(
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
        grads = [fresh(x.shape, x.dtype, x.device) for x in (query, key, value)]
        for queries, keys, is_causal in ctx.calls:
            parts = _flash_backward(
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
