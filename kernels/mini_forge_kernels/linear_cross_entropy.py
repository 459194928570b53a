"""Linear cross-entropy: −log softmax(h Wᵀ)[target] of each token, with its gradient made in the forward.

    nll_i = log Σ_v exp z_iv − z_i,t       z = h Wᵀ       dz_iv = g_i (softmax(z_i)_v − [v = t])       g_i = dL/dnll_i
    dh = dz W                              dW = dzᵀ h

The (N, V) logits never exist, only CHUNK_BYTES of them at a time, in one buffer. A Triton kernel turns that buffer's
rows from z into dz where they lie: one pass over the row for the largest logit and the sum of exponentials together
(the online softmax, 1805.02867 Alg. 3), one that writes. Beside the matrix products that is three passes of 2 bytes a
logit in 16 bits; torch operations make eight to ten, most of 4 bytes. Not measured on a GPU yet.

Which gradients the forward can make depends on who knows g:

    frozen W     row i of dh hangs on g_i alone: made with g = 1, multiplied in the backward    2 products with V
    trained W    dW mixes tokens and waits for g: the backward makes each chunk's dz again      4

The kernel subtracts the 1 of dz before it rounds to 16 bits, so a probability near 1 keeps its distance from it. In
float16 a softmax below 3e-8 becomes 0, of all V at most V · 3e-8 of the sum: 0.4 % where V is 128k and all are equal.

Reference: `mini_forge.training.losses.token_nll`.
"""

import torch
from torch.autograd.function import once_differentiable

from mini_forge_kernels.triton_support import jit, launch, power_of_two, tl, warps

__all__ = ["CHUNK_BYTES", "token_nll"]

CHUNK_BYTES = 1 << 28  # of logits: 1,046 rows of Llama-3's 128,256 in bfloat16, enough for a product at full rate
BLOCK = 4096  # logits of a row that a program holds at a time


def token_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(hidden Wᵀ)[target] of each token, in nats.

    hidden (N, D), weight (V, D) of one dtype, targets (N,) int64 in [0, V), on a CUDA device (or anywhere under
    Triton's interpreter). Returns (N,) float32, differentiable in `hidden` and, where it is trained, `weight`."""
    return _TokenNLL.apply(*_without_graph(hidden, weight), targets)


def _without_graph(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, cut off where no gradient will be asked for, so that none is made."""
    return tensors if torch.is_grad_enabled() else tuple(tensor.detach() for tensor in tensors)


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        ctx.is_frozen = not needs_weight
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad = hidden.new_empty(hidden.shape) if needs_hidden and ctx.is_frozen else None
        for rows, dz in _chunks(hidden, weight, targets, nll, writes=grad is not None):
            if grad is not None:
                torch.mm(dz, weight, out=grad[rows])
        ctx.save_for_backward(*([grad] if ctx.is_frozen else [hidden, weight, targets]))
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        if ctx.is_frozen:
            (grad,) = ctx.saved_tensors
            return grad * upstream[:, None].to(grad.dtype), None, None
        hidden, weight, targets = ctx.saved_tensors
        nll = torch.empty_like(upstream)
        grads = _gradients(hidden, weight, targets, nll, ctx.needs_input_grad, upstream.contiguous())
        return *grads, None


def _gradients(hidden, weight, targets, nll, needs, upstream) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dh and dW, each where it is needed, in their tensors' dtypes; fills nll."""
    grad_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    # float32: a sum over chunks in 16 bits would lose the small ones
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs[1] else None
    for rows, dz in _chunks(hidden, weight, targets, nll, writes=needs[0] or needs[1], upstream=upstream):
        if needs[0]:
            torch.mm(dz, weight, out=grad_hidden[rows])
        if needs[1] and dz.dtype == torch.float32:
            grad_weight.addmm_(dz.t(), hidden[rows])
        elif needs[1]:
            grad_weight.add_(dz.t() @ hidden[rows])
    return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _chunks(hidden, weight, targets, nll, writes: bool, upstream=None):
    """For some rows at a time, once their nll is known: the slice they are and, if `writes`, their dz (rows, V), on
    loan until the next."""
    N, V = len(hidden), len(weight)
    size = max(1, min(N, CHUNK_BYTES // (V * hidden.element_size())))
    buffer, targets, block = hidden.new_empty(size, V), targets.contiguous(), min(power_of_two(V), BLOCK)
    for start in range(0, N, size):
        rows = slice(start, min(start + size, N))
        logits = torch.mm(hidden[rows], weight.t(), out=buffer[: rows.stop - start])
        launch(_softmax, len(logits), logits, targets[rows], nll[rows], None if upstream is None else upstream[rows],
               V=V, WRITES=writes, BLOCK=block, num_warps=warps(block))  # fmt: skip
        yield rows, logits


@jit
def _softmax(logits, targets, nll, upstream, V: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row of the contiguous logits (rows, V), of which it makes dz in place."""
    row = tl.program_id(0).to(tl.int64)
    z, target = logits + row * V, tl.load(targets + row)
    # Read before the loop, whose reductions hold all threads until all are there: none writes dz over it meanwhile.
    wanted = tl.load(z + target).to(tl.float32)
    largest, total = float("-inf"), 0.0
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        part = tl.load(z + column, mask=column < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(part, axis=0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(part - new), axis=0)
        largest = new
    log_sum = largest + tl.log(total)
    tl.store(nll + row, log_sum - wanted)
    if WRITES:
        factor = 1.0
        if upstream is not None:
            factor = tl.load(upstream + row)
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            part = tl.load(z + column, mask=column < V, other=float("-inf")).to(tl.float32)
            dz = (tl.exp(part - log_sum) - tl.where(column == target, 1.0, 0.0)) * factor
            tl.store(z + column, dz.to(logits.dtype.element_ty), mask=column < V)
