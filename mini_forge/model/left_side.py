"""Products of activations with frozen matrices, and what low-rank terms add to them: in torch, the reference.

An op may have a `LeftSide` of its own for matrices as they are stored (`Ops.left_side`)."""

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


class LeftSide:
    """x (N, K) of products with frozen matrices, in the form in which an op takes it.

    low: l (N, R) and a thin factor, whose product is added: l Fᵀ for F (out, R), or l F for F (R, in); or an `Update`,
    beside x Wᵀ. With l or F = 0 no bit of the result is another. onto: what all is added to, in place."""

    few = 0  # rows of x up to which an `Update` is made along with x Wᵀ

    def __init__(self, x: torch.Tensor):
        self.x = x

    def product_t(self, weight: torch.Tensor, onto: torch.Tensor | None = None, low: Low | None = None):
        """x Wᵀ, (N, out). weight (out, K)."""
        return self._multiply(weight.t(), onto, None if low is None else low_and_factor(low, self.x), True)

    def product(self, weight: torch.Tensor, onto: torch.Tensor | None = None, low: tuple | None = None):
        """x W, (N, in). weight (K, in)."""
        return self._multiply(weight, onto, low, False)

    def _multiply(self, weight, onto, low, is_transposed) -> torch.Tensor:
        out = self.x @ weight if onto is None else onto.addmm_(self.x, weight)
        return out if low is None else low_product(low, is_transposed, out)


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
