"""Products of one input with several adapted layers, and their gradients, written by hand.

    y_i = x W_iᵀ + b_i + (x̃_i (s_i A_i)ᵀ) B_iᵀ                    x = make(sources), x̃_i = dropout(x)

    dB = dYᵀ(x̃(sA)ᵀ)     dA = s · (dY B)ᵀ x̃     dX = dY W + mask ⊙ (dY B)(sA)

LoRA (2106.09685) Eq. 3. Autograd on the plain formula would keep x and dropout(x) for every projection. This keeps the
narrow x̃Aᵀ and neither: a dropout mask is drawn again from its seed, a 4-bit weight made again from its bits, and x
itself made again from what it was made of, which is kept anyway: the residual stream under a norm, gate and up under
their product. Of a Llama layer's 8,400 numbers a token (SmolLM2) that leaves 5,800, for 1 % of a step's time.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mini_forge.model.low_rank import Seed, kept_scale
from mini_forge.model.ops import Differentiable
from mini_forge.model.quant import frozen_gradient, frozen_products


def adapted_products(
    make: Differentiable | nn.Module | None,
    sources: Sequence[torch.Tensor],
    layers: Sequence[nn.Module],
    seeds: Sequence[Seed],
    factors: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """layer(make(*sources)) of each LoRALinear in `layers`; make None is the identity on one source.

    make is called in the forward; its `vjp` (`functional.vjp`) in the backward. What it reads beside `sources` gets no
    gradient, and its result (…, in) is not kept. factors: the layers' A, B, A, B, … where they are not to be read from
    the layers. Returns (…, out) each, in the dtype of make's result."""
    factors = lora_factors(layers) if factors is None else factors
    return _AdaptedProducts.apply(make, layers, seeds, len(sources), *sources, *factors)


def lora_factors(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make, layers, seeds, count, *tensors):
        sources, factors = tensors[:count], tensors[count:]
        x = make(*sources) if make else sources[0]
        flat = x.reshape(-1, x.shape[-1])
        ctx.make, ctx.seeds, ctx.count, ctx.low_rank = make, seeds, count, layers[0].low_rank
        rates = [seed[0] if seed else 0.0 for seed in seeds]
        ctx.scales = [layer.scaling * kept_scale(rate) for layer, rate in zip(layers, rates, strict=True)]
        ctx.bases = [layer.base for layer in layers]
        lows = ctx.low_rank.down(flat, _scaled(factors[::2], ctx.scales, x.dtype), seeds)
        ctx.save_for_backward(*tensors, lows)
        pairs = [(low[:, : B.shape[1]], B.to(x.dtype)) for low, B in zip(lows.unbind(1), factors[1::2], strict=True)]
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in frozen_products(flat, ctx.bases, pairs))

    @staticmethod
    @once_differentiable  # it overwrites what it makes
    def backward(ctx, *grads):
        *tensors, lows = ctx.saved_tensors
        sources, As, Bs = tensors[: ctx.count], tensors[ctx.count :: 2], tensors[ctx.count + 1 :: 2]
        needs = ctx.needs_input_grad[4:]
        x, pullback = ctx.make.vjp(*sources) if ctx.make else (sources[0], lambda grad: [grad])
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_lows, grad_Bs = ctx.low_rank.pull_back(grads, [B.to(x.dtype) for B in Bs], lows)
        grad_factors = [None] * (2 * len(As))
        if any(needs[ctx.count :]):
            grad_As = ctx.low_rank.outer(grad_lows, x.reshape(-1, x.shape[-1]), ctx.seeds)
            for i, (A, B, scale) in enumerate(zip(As, Bs, ctx.scales, strict=True)):
                grad_factors[2 * i : 2 * i + 2] = grad_As[i].mul_(scale).to(A.dtype), grad_Bs[i].to(B.dtype)
        grad_sources = [None] * ctx.count
        if any(needs[: ctx.count]):
            grad_x = _input_gradient(ctx, grads, grad_lows, _scaled(As, ctx.scales, x.dtype))
            grad_sources = pullback(grad_x.view(x.shape))
        return None, None, None, None, *grad_sources, *grad_factors


def _input_gradient(ctx, grads, grad_lows, As) -> torch.Tensor:
    """dX of all layers together, (N, in), added up in one buffer."""
    if any(ctx.seeds):
        grad_x = ctx.low_rank.up(grad_lows, As, ctx.seeds)
        for grad, base in zip(grads, ctx.bases, strict=True):
            frozen_gradient(grad, base, grad_x)
        return grad_x
    grad_x = None
    for grad, base, low, A in zip(grads, ctx.bases, grad_lows.unbind(1), As, strict=True):
        grad_x = frozen_gradient(grad, base, grad_x, (low, A))
    return grad_x


def _scaled(As: Sequence[torch.Tensor], scales: Sequence[float], dtype: torch.dtype) -> list[torch.Tensor]:
    """s·A of each layer."""
    return [(A * scale).to(dtype) for A, scale in zip(As, scales, strict=True)]
