"""Losses return a sum and a count; only the training loop divides, once per optimizer step.

Dividing each microbatch by its own count and averaging would weight tokens by their microbatch's length: the
gradient-accumulation error that many trainers had.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils.checkpoint import checkpoint

from mini_forge.model.frozen import IN_TORCH, FrozenProducts
from mini_forge.model.transfer import to_device

CHUNK_TOKENS = 256  # under a trained head: float32 logits of a 128k vocabulary are 131 MB
# Under a frozen one a tile of logits is all there is: on the CPU small enough to stay in the cache between the product
# that makes it and the one that uses it, elsewhere large enough to fill the device.
TILE_TOKENS = 1024
TILE_BYTES_CPU, TILE_BYTES = 1 << 22, 1 << 27


@dataclass(frozen=True)
class LossSum:
    """`total`: the summed loss, a scalar float32 with gradient; `count`: what it is to be divided by."""

    total: torch.Tensor
    count: int
    metrics: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """What is trained: `loss(model, batch)` gives a LossSum, `count(batch)` its count before any model has run."""

    loss: Callable[..., LossSum]
    count: Callable[..., int]

    def sums(self, model, batch) -> tuple[torch.Tensor, int, dict]:
        """The form in which evaluation takes a loss."""
        loss = self.loss(model, batch)
        return loss.total, loss.count, loss.metrics


def model_nll(model, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`token_nll` of a decoder's own head, by its ops: the same numbers as by `Decoder.head`, without its logits."""
    return (model.ops.token_nll or token_nll)(hidden, model.head_weight, to_device(targets, hidden.device))


def token_nll(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, products: FrozenProducts = IN_TORCH
) -> torch.Tensor:
    """-log softmax(hidden Wᵀ)[target] of each token, in nats; the (N, V) logits never exist, only chunks of them.

    hidden (N, D), weight (V, D) of one dtype, or of two that `products` multiply (for a model's own head:
    `model_nll`); targets (N,) int64 in [0, V). Returns (N,) float32, differentiable in `hidden` and, where it is
    trained, `weight`. For a frozen weight the gradient is made in the forward pass: row i of the loss
    depends on row i of `hidden` alone, so dh_i = (softmax(z_i) - onehot_i) W is complete but for the factor that
    arrives from above, and no logits need to be kept or made again. products: those of a frozen one. Raises
    ValueError on the CPU for a target that is no row of `weight`, such as the -100 of tokens that are not trained on:
    these are to be left out."""
    if targets.device.type == "cpu" and len(targets):  # elsewhere it would wait for the device
        least, most = torch.stack(targets.aminmax()).tolist()
        if least < 0 or most >= len(weight):
            raise ValueError(f"targets: {least} to {most} must be within 0 to {len(weight) - 1}")
    if weight.requires_grad and torch.is_grad_enabled():
        parts = [
            checkpoint(_plain_nll, h, weight, t, use_reentrant=False)
            for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        ]
        return torch.cat(parts)
    return _FrozenHeadNLL.apply(hidden, weight, targets, products)


def _plain_nll(hidden, weight, targets):
    return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")


class _FrozenHeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, products):
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), TILE_TOKENS):
            rows = slice(start, start + TILE_TOKENS)
            nll[rows], part = _nll_in_tiles(hidden[rows], weight, targets[rows], grad is not None, products)
            if grad is not None:
                grad[rows] = part
            del part  # before the next tokens' is made
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (grad,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # by create_graph; `once_differentiable` would pass this over under a plain sum
            raise RuntimeError(
                "token_nll under a frozen head has no second derivative: its gradient is a constant here"
            )
        return grad * grad_nll[:, None].to(grad.dtype), None, None, None


def _nll_in_tiles(hidden, weight, targets, wants_grad: bool, products: FrozenProducts):
    """nll (N,) and its gradient by hidden (N, D), or None, over tiles of the vocabulary: the online softmax (1805.02867
    Alg. 3), which scales the sums so far down whenever a larger logit comes.

    With e_j = exp(z_j − max) and the target t: dh = (Σ_{j≠t} e_j W_j − W_t Σ_{j≠t} e_j) / Σ_j e_j. That the target's
    own term is in neither sum keeps the digits of 1 − p_t, which softmax·W − W_t loses in 16 bits where p_t is near 1.
    Sums over tiles are float32."""
    N, width = len(targets), tile_width(len(targets), hidden.device)
    index = targets[:, None]
    largest = hidden.new_full((N, 1), -torch.inf, dtype=torch.float32)
    others, wanted = torch.zeros_like(largest), torch.zeros_like(largest)
    grad = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if wants_grad else None
    for start in range(0, len(weight), width):
        tile = weight[start : start + width]
        logits = products.product_t(hidden, tile).float()
        column = index - start
        is_here, column = (column >= 0) & (column < len(tile)), column.clamp(0, len(tile) - 1)
        wanted += torch.where(is_here, logits.gather(-1, column), 0)
        before, largest = largest, torch.maximum(largest, logits.amax(-1, keepdim=True))
        shrink = torch.exp(before - largest)
        exponentials = logits.sub_(largest).exp_()
        exponentials.scatter_(-1, column, torch.where(is_here, 0, exponentials.gather(-1, column)))
        others.mul_(shrink).add_(exponentials.sum(-1, keepdim=True))
        if wants_grad:
            grad.mul_(shrink).add_(products.product(exponentials.to(hidden.dtype), tile))
        del logits, exponentials  # before the next tile's are made
    normaliser = others + torch.exp(wanted - largest)
    nll = (normaliser.log() + largest - wanted).squeeze(-1)
    if wants_grad:
        grad = grad.sub_(others * weight[targets]).div_(normaliser).to(hidden.dtype)
    return nll, grad


def tile_width(tokens: int, device: torch.device) -> int:
    """How many logits of each of `tokens` are made at a time: a multiple of 256."""
    size = TILE_BYTES_CPU if device.type == "cpu" else TILE_BYTES
    return max(256, size // (4 * tokens) // 256 * 256)
