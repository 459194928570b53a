"""The functions a decoder calls, as a value: two models with different ops live in one process, and nothing is patched.

`PLAIN` is the reference: plain torch, differentiated by autograd. A provider (see `mini_forge.providers`) hands the
decoder another `Ops` whose functions have the same names, signatures and results.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from mini_forge.model import functional
from mini_forge.model.frozen import FrozenProducts
from mini_forge.model.low_rank import IN_TORCH, LowRank


@dataclass(frozen=True)
class Ops:
    """Signatures and shapes are those of the functions of the same names in `mini_forge.model.functional`, and of
    `rope_qk` here, but where another is given."""

    name: str
    rms_norm: Callable
    rms_norm_vjp: Callable  # (dy, x, weight, eps), the weight frozen: what `vjp` gives
    rope_qk: Callable
    swiglu: Callable
    swiglu_vjp: Callable  # (dh, gate, up): likewise
    clamped_swiglu: Callable
    attention: Callable
    token_nll: Callable | None = None  # of losses.py, which is used where this is None
    grouped_lora: Callable | None = None  # `LoRAStack.update`
    low_rank: LowRank = IN_TORCH  # of LoRALinear
    # Of weights in 4 bits and in MXFP4: what makes them dense, and what multiplies by them (`stacks.use_kernels`).
    four_bit: tuple[Callable, Callable] | None = None
    mxfp4: tuple[Callable, Callable] | None = None
    # Products of a float32 x on the CPU with weights as they are stored: bfloat16, 8 and 4 bits. Where this is None,
    # weights in bfloat16 are held in the training dtype, and others made dense for each product.
    stored_products: FrozenProducts | None = None


def rope_qk(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope` to query (N, H, C) and key (N, K, C); cos, sin (N, C). Returns both, in their own shapes."""
    return functional.apply_rope(query, cos, sin), functional.apply_rope(key, cos, sin)


def vjp(function: Callable, grad: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, list]:
    """function(*inputs), without a graph to the outside, and its vector-Jacobian product with `grad`, the gradient of
    that result: one of each input, None where it needs none.

    `grad` may be overwritten. This one differentiates by autograd; ops may have it written by hand."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
        out = function(*leaves)
        last = _WithGradient.apply(out, grad)
    found = iter(torch.autograd.grad(last, [leaf for leaf in leaves if leaf.requires_grad]))
    return out.detach(), [next(found) if leaf.requires_grad else None for leaf in leaves]


def applied(function: type[torch.autograd.Function], *inputs):
    """function.apply(*inputs); without gradients its forward alone. Autograd's part of a call takes a quarter of it
    where a token comes alone, as in generation."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(_KeepsNothing(), *inputs)


class _KeepsNothing:
    """A context for a forward without a backward."""

    def save_for_backward(self, *tensors: torch.Tensor):
        pass


class _WithGradient(torch.autograd.Function):
    """A number whose gradient is `grad` where `out` is asked for it: torch.autograd.grad(out, …, grad) imports SymPy to
    compare the two shapes, 0.3 s and 30 MiB of every process."""

    @staticmethod
    def forward(ctx, out, grad):
        ctx.grad = grad
        return out.new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.grad, None


@dataclass(frozen=True)
class Differentiable:
    """A function of tensors, called as such, with its vector-Jacobian product (`vjp`)."""

    function: Callable
    vjp: Callable

    @classmethod
    def of(cls, function: Callable) -> "Differentiable":
        """By autograd."""
        return cls(function, partial(vjp, function))

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def gated_unit(ops: Ops, activation: str, clamp: tuple[float, float]) -> Differentiable:
    """The function of gate and up that a spec names (`DecoderSpec.activation`); gelu has no fused form."""
    limit, slope = clamp
    units = {
        "silu": Differentiable(ops.swiglu, ops.swiglu_vjp),
        "gelu_tanh": Differentiable.of(functional.gelu_glu),
        "clamped": Differentiable.of(partial(ops.clamped_swiglu, limit=limit, slope=slope)),
    }
    return units[activation]


def _rms_norm_vjp(grad, x, weight, eps):
    return vjp(lambda x: functional.rms_norm(x, weight, eps), grad, x)


PLAIN = Ops(
    name="plain",
    rms_norm=functional.rms_norm,
    rms_norm_vjp=_rms_norm_vjp,
    rope_qk=rope_qk,
    swiglu=functional.swiglu,
    swiglu_vjp=partial(vjp, functional.swiglu),
    clamped_swiglu=functional.clamped_swiglu,
    attention=functional.attention,
)
