"""Losses return a sum and a count; only the training loop divides, once per optimizer step.

Dividing each microbatch by its own count and averaging would weight tokens by their microbatch's length: the
gradient-accumulation error that many trainers had.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 256  # float32 logits of a 128k vocabulary: 131 MB; 512 is no faster (measured at 49k, 2 cores)


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

    def total_and_count(self, model, batch) -> tuple[torch.Tensor, int]:
        """The form in which evaluation takes a loss; the batch is brought to the model's device."""
        loss = self.loss(model, batch.to(model.device))
        return loss.total, loss.count

    def sums(self, model, batch) -> tuple[torch.Tensor, int, dict]:
        """`total_and_count` with the sums of the loss's metrics."""
        loss = self.loss(model, batch.to(model.device))
        return loss.total, loss.count, loss.metrics


def nll_of(model) -> Callable[..., torch.Tensor]:
    """`token_nll`, or what the model's ops have in its place."""
    return model.ops.token_nll or token_nll


def token_nll(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(hidden Wᵀ)[target] of each token, in nats; the (N, V) logits never exist, only chunks of them.

    hidden (N, D), weight (V, D), targets (N,) int64 in [0, V). Returns (N,) float32, differentiable in `hidden` and,
    where it is trained, `weight`. For a frozen weight the gradient is made in the forward pass: row i of the loss
    depends on row i of `hidden` alone, so dh_i = (softmax(z_i) - onehot_i) W is complete but for the factor that
    arrives from above, and no logits need to be kept or made again."""
    if weight.requires_grad and torch.is_grad_enabled():
        parts = [
            checkpoint(_plain_nll, h, weight, t, use_reentrant=False)
            for h, t in zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        ]
        return torch.cat(parts)
    return _FrozenHeadNLL.apply(hidden, weight, targets)


def _plain_nll(hidden, weight, targets):
    return torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")


class _FrozenHeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        wants_grad = ctx.needs_input_grad[0]
        grad = torch.empty_like(hidden) if wants_grad else None
        for start in range(0, len(targets), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            index = targets[rows, None]
            logits = (hidden[rows] @ weight.t()).float()  # float32: a sum of V exponentials in 16 bits loses the tail
            largest = logits.amax(-1, keepdim=True)
            wanted = logits.gather(-1, index)
            exponentials = logits.sub_(largest).exp_()
            normaliser = exponentials.sum(-1, keepdim=True)
            nll[rows] = (normaliser.log() + largest - wanted).squeeze(-1)
            if wants_grad:  # softmax·W − W[target], divided by the normaliser once there are D columns instead of V
                expected = torch.mm(exponentials.to(weight.dtype), weight)
                grad[rows] = expected / normaliser - weight[index.squeeze(-1)]
            del logits, exponentials  # before the next chunk's are made
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, grad_nll):
        (grad,) = ctx.saved_tensors
        return grad * grad_nll[:, None].to(grad.dtype), None, None
