"""Products of activations with frozen matrices, and what low-rank terms add to them: in torch, the reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mini_forge.model.allocation import fresh


@dataclass(frozen=True)
class Update:
    """s x Aᵀ Bᵀ, to be added to x Wᵀ: A (R, in), B (out, R) in x's dtype. Of few rows of x an op may make it along with
    x Wᵀ, and l = s x Aᵀ (N, R) nowhere else."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float


Low = tuple[torch.Tensor, torch.Tensor] | Update


@dataclass(frozen=True)
class FrozenProducts:
    """Functions of x (N, K), a frozen weight, and what their product is added to.

    product_t(x, weight, onto=None, low=None): x Wᵀ (N, out), weight (out, K).
    product(x, weight, onto=None, low=None): x W (N, in), weight (K, in).

    low: l (N, R) and a thin factor, whose product is added: l Fᵀ for F (out, R) beside x Wᵀ, l F for F (R, in) beside
    x W; or an `Update`, beside x Wᵀ. With l or F = 0 no bit of the result is another. onto: what all is added to, in
    place. few: rows of x up to which an `Update` is made along with x Wᵀ."""

    product_t: Callable[..., torch.Tensor]
    product: Callable[..., torch.Tensor]
    few: int = 0


def product_t(x: torch.Tensor, weight: torch.Tensor, onto: torch.Tensor | None = None, low: Low | None = None):
    return _multiply(x, weight.t(), onto, None if low is None else low_and_factor(low, x), True)


def product(x: torch.Tensor, weight: torch.Tensor, onto: torch.Tensor | None = None, low: tuple | None = None):
    return _multiply(x, weight, onto, low, False)


def _multiply(x, weight, onto, low, is_transposed) -> torch.Tensor:
    out = x @ weight if onto is None else onto.addmm_(x, weight)
    return out if low is None else low_product(low, is_transposed, out)


IN_TORCH = FrozenProducts(product_t, product)


def low_and_factor(low: Low, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """l, made where it is not given, and its factor."""
    if not isinstance(low, Update):
        return low
    return (x @ low.A.t()).mul_(low.scale), low.B


def low_product(low: tuple[torch.Tensor, torch.Tensor], is_transposed: bool, onto: torch.Tensor | None) -> torch.Tensor:
    """l Fᵀ, if is_transposed, or l F; or that added to `onto` in place."""
    left, factor = low[0], low[1].t() if is_transposed else low[1]
    if onto is not None:
        return onto.addmm_(left, factor)
    return torch.mm(left, factor, out=fresh((len(left), factor.shape[1]), left.dtype, left.device))
