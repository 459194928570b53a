"""LoRA's own products: those with one thin side, and dropout between x and them.

    l_i = x̃_i A_iᵀ      dB_i = dY_iᵀ l_i      dl_i = dY_i B_i      dA_i = dl_iᵀ x̃_i      dx = Σ_i m_i ⊙ dl_i A_i

LoRA (2106.09685) Eq. 3 of projections i that share x, but for its scale, which products.py puts on A and B;
x̃_i = m_i ⊙ x, m_i the mask of dropout, drawn anew from its seed wherever it is needed. `IN_TORCH` is the reference; a
provider may have another `LowRank` (`Ops.low_rank`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Seed = tuple[float, int] | None  # rate and seed of one projection's dropout; None: none


@dataclass(frozen=True)
class LowRank:
    """Functions of `count` projections that share x (N, in), of rank R.

    down(x, As, seeds): lows (N, count, G), G ≥ R, zeros from R on; of A (R, in).
    pull_back(grads, Bs, lows): dl (N, count, R), and each dB (out, R); of dY (N, out), B (out, R).
    outer(dl, x, seeds): each dlᵀ x̃ (R, in).
    up(dl, As, seeds): the sum of all m ⊙ dl A, (N, in)."""

    down: Callable
    pull_back: Callable
    outer: Callable
    up: Callable


def down(x: torch.Tensor, As: Sequence[torch.Tensor], seeds: Sequence[Seed]) -> torch.Tensor:
    """One product for all projections where they share their input (no dropout)."""
    if not any(seeds):
        return (x @ (torch.cat(list(As)) if len(As) > 1 else As[0]).t()).unflatten(1, (len(As), -1))
    return torch.stack([dropped(x, seed) @ A.t() for A, seed in zip(As, seeds, strict=True)], dim=1)


def pull_back(grads: Sequence[torch.Tensor], Bs: Sequence[torch.Tensor], lows: torch.Tensor):
    grad_lows = torch.stack([grad @ B for grad, B in zip(grads, Bs, strict=True)], dim=1)
    # (R, N)(N, out), then turned: a product with a thin left side runs faster than one with a thin right
    thin = lows[..., : Bs[0].shape[1]].unbind(1)
    return grad_lows, [(low.t() @ grad).t().contiguous() for low, grad in zip(thin, grads, strict=True)]


def outer(grad_lows: torch.Tensor, x: torch.Tensor, seeds: Sequence[Seed]) -> list[torch.Tensor]:
    if not any(seeds):
        return list((grad_lows.flatten(1).t() @ x).split(grad_lows.shape[2]))
    return [low.t() @ dropped(x, seed) for low, seed in zip(grad_lows.unbind(1), seeds, strict=True)]


def up(grad_lows: torch.Tensor, As: Sequence[torch.Tensor], seeds: Sequence[Seed]) -> torch.Tensor:
    total = None
    for low, A, seed in zip(grad_lows.unbind(1), As, seeds, strict=True):
        part = low @ A
        if seed is not None:
            part.mul_(dropout_keep(part.shape, *seed, part.device))
        total = part if total is None else total.add_(part)
    return total


IN_TORCH = LowRank(down, pull_back, outer, up)


def draw_seeds(layers: Sequence) -> list[Seed]:
    """One for each LoRA layer that drops in this pass. They come from the global generator, so that a resumed run and a
    recomputed block draw the same masks again."""
    rates = [layer.dropout if layer.training else 0.0 for layer in layers]
    return [(rate, int(torch.randint(2**62, ()))) if rate else None for rate in rates]


def dropped(x: torch.Tensor, seed: Seed) -> torch.Tensor:
    """m ⊙ x, not yet divided by 1 - rate."""
    return x if seed is None else x * dropout_keep(x.shape, *seed, x.device)


def kept_scale(rate: float) -> float:
    """1/(1 - rate), the factor on what dropout keeps; 0 where it keeps nothing."""
    return 1 / (1 - rate) if rate < 1 else 0.0


def dropout_keep(shape: torch.Size, rate: float, seed: int, device: torch.device) -> torch.Tensor:
    """A bool mask, True with probability 1 - rate (to within 2⁻¹⁶); the same for the same seed.

    On the CPU from 16-bit words of numpy's SFC64 generator: torch's own takes 15 times as long, more than the products
    it would be drawn for (measured on 900 × 576 elements: 2.9 ms against 0.2)."""
    if device.type != "cpu":
        generator = torch.Generator(device).manual_seed(seed)
        return torch.rand(shape, device=device, generator=generator) >= rate
    words = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4)).view(np.int16)
    threshold = min(round(rate * 2**16), 2**16 - 1) - 2**15
    return (torch.from_numpy(words)[: shape.numel()] >= threshold).view(shape)
