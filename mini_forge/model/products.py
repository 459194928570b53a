"""Products of one input with several adapted layers, and their gradients, written by hand.

    y_i = x W_iᵀ + b_i + l_i B_iᵀ      l_i = s_i x̃_i A_iᵀ         x = make(sources), x̃_i = dropout(x)

    dB = dYᵀ l        dl = s dY B        dA = dlᵀ x̃        dX = dY W + mask ⊙ dl A

LoRA (2106.09685) Eq. 3. Autograd on the plain formula would keep x and dropout(x) for every projection. This keeps the
narrow l and neither: a dropout mask is drawn again from its seed, a 4-bit weight made again from its bits, and x
itself made again from what it was made of, which is kept anyway: the residual stream under a norm, gate and up under
their product. Of a Llama layer's 8,400 numbers a token (SmolLM2) that leaves 5,800, for 1 % of a step's time.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mini_forge.model.frozen import Update
from mini_forge.model.low_rank import Seed, kept_scale
from mini_forge.model.ops import Differentiable
from mini_forge.model.quant import frozen_gradient, frozen_products, is_used_as_stored


def adapted_products(
    make: Differentiable | nn.Module | None,
    sources: Sequence[torch.Tensor],
    layers: Sequence[nn.Module],
    seeds: Sequence[Seed],
    factors: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """layer(make(*sources)) of each LoRALinear in `layers`; make None is the identity on one source.

    make is called in the forward, and in the backward its `vjp` (`ops.vjp`), or make again where no source needs
    a gradient. What it reads beside `sources` gets none, and its result (…, in) is not kept. factors: the layers' A, B,
    A, B, … where they are not to be read from the layers. An autocast around it has no effect. Returns (…, out) each,
    in the dtype of make's result."""
    factors = lora_factors(layers) if factors is None else factors
    if torch.is_autocast_enabled(sources[0].device.type):  # dtypes are chosen here, product by product
        with torch.autocast(sources[0].device.type, enabled=False):
            return adapted_products(make, sources, layers, seeds, factors)
    if not torch.is_grad_enabled():  # as in generation, token by token: a function of autograd's costs more than a norm
        return _products(make, sources, layers, seeds, factors, keeps_lows=False)[0]
    return _AdaptedProducts.apply(make, layers, seeds, len(sources), *sources, *factors)


def lora_factors(layers: Sequence[nn.Module]) -> list[nn.Parameter]:
    return [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]


def _products(
    make, sources, layers, seeds, factors, keeps_lows: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """What the layers give, and l (N, layers, G) if it is to be kept."""
    x = make(*sources) if make else sources[0]
    flat, scales, bases = x.reshape(-1, x.shape[-1]), _scales(layers, seeds), [layer.base for layer in layers]
    As, Bs = factors[::2], [B.to(x.dtype) for B in factors[1::2]]
    are_made = not any(seeds) and all(_makes_low(base, flat) for base in bases)
    lows = None
    if keeps_lows or not are_made:
        lows = layers[0].low_rank.down(flat, _scaled(As, scales, x.dtype), seeds)
    if are_made:
        added = [Update(A.to(x.dtype), B, scale) for A, B, scale in zip(As, Bs, scales, strict=True)]
    else:
        added = [(low[:, : B.shape[1]], B) for low, B in zip(lows.unbind(1), Bs, strict=True)]
    outs = frozen_products(flat, bases, added)
    return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outs), lows


def _makes_low(base: nn.Module, x: torch.Tensor) -> bool:
    """Whether the product of x (N, in) with a layer's weight as stored makes the l of an `Update` itself."""
    return is_used_as_stored(base, x) and x.shape[0] <= base.stored_products.few


def _scales(layers, seeds) -> list[float]:
    rates = [seed[0] if seed else 0.0 for seed in seeds]
    return [layer.scaling * kept_scale(rate) for layer, rate in zip(layers, rates, strict=True)]


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make, layers, seeds, count, *tensors):
        ctx.make, ctx.seeds, ctx.count, ctx.low_rank = make, seeds, count, layers[0].low_rank
        ctx.scales, ctx.bases = _scales(layers, seeds), [layer.base for layer in layers]
        outs, lows = _products(make, tensors[:count], layers, seeds, tensors[count:], keeps_lows=True)
        ctx.save_for_backward(*tensors, lows)
        return outs

    @staticmethod
    @once_differentiable  # it overwrites what it makes
    def backward(ctx, *grads):
        *tensors, lows = ctx.saved_tensors
        sources, As, Bs = tensors[: ctx.count], tensors[ctx.count :: 2], tensors[ctx.count + 1 :: 2]
        needs, shape, dtype = ctx.needs_input_grad[4:], grads[0].shape[:-1], grads[0].dtype
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_lows, grad_Bs = ctx.low_rank.pull_back(grads, _scaled(Bs, ctx.scales, dtype), lows)
        grad_sources = [None] * ctx.count
        if any(needs[: ctx.count]):
            grad_x = _input_gradient(ctx, grads, grad_lows, [A.to(dtype) for A in As])
            grad_x = grad_x.view(*shape, ctx.bases[0].in_features)
            x, grad_sources = ctx.make.vjp(grad_x, *sources) if ctx.make else (sources[0], [grad_x])
            del grad_x  # which vjp may have overwritten
        else:
            x = ctx.make(*sources) if ctx.make else sources[0]
        grad_factors = [None] * (2 * len(As))
        if any(needs[ctx.count :]):
            grad_As = ctx.low_rank.outer(grad_lows, x.reshape(-1, x.shape[-1]), ctx.seeds)
            grad_factors[::2] = [grad.to(A.dtype) for grad, A in zip(grad_As, As, strict=True)]
            grad_factors[1::2] = [grad.to(B.dtype) for grad, B in zip(grad_Bs, Bs, strict=True)]
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


def _scaled(factors, scales: Sequence[float], dtype: torch.dtype) -> list[torch.Tensor]:
    """Each layer's s A or s B: of many rows the scale is put on the thin factor, not on the long l or dl it makes."""
    return [(factor * scale).to(dtype) for factor, scale in zip(factors, scales, strict=True)]
