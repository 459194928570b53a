"""Products of one input with several adapted layers, and their gradients, written by hand.

    y_i = x W_iᵀ + b_i + s_i · (x̃_i A_iᵀ) B_iᵀ                    x = make(sources), x̃_i = dropout(x)

    dB = s · dYᵀ(x̃Aᵀ)     dA = s · (dY B)ᵀ x̃     dX = dY W + mask ⊙ s(dY B)A

LoRA (2106.09685) Eq. 3. Autograd on the plain formula would keep x and dropout(x) for every projection. This keeps the
narrow x̃Aᵀ and neither: a dropout mask is drawn again from its seed, a 4-bit weight made again from its bits, and x
itself made again from what it was made of, which is kept anyway: the residual stream under a norm, gate and up under
their product. Of a Llama layer's 8,400 numbers a token (SmolLM2) that leaves 5,800, for 1 % of a step's time.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from mini_forge.model.memory import fresh
from mini_forge.model.ops import Differentiable
from mini_forge.model.quant import Linear16bit, add_products_16bit, frozen_gradient, frozen_products

Seed = tuple[float, int] | None  # rate and seed of one layer's dropout; None: none


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


def draw_seeds(layers: Sequence[nn.Module]) -> list[Seed]:
    """One for each layer that drops in this pass. They come from the global generator, so that a resumed run and a
    recomputed block draw the same masks again."""
    rates = [layer.dropout if layer.training else 0.0 for layer in layers]
    return [(rate, int(torch.randint(2**62, ()))) if rate else None for rate in rates]


class _AdaptedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, make, layers, seeds, count, *tensors):
        sources, factors = tensors[:count], tensors[count:]
        x = make(*sources) if make else sources[0]
        flat = x.reshape(-1, x.shape[-1])
        ctx.make, ctx.seeds, ctx.count = make, seeds, count
        rates = [seed[0] if seed else 0.0 for seed in seeds]
        ctx.scales = [layer.scaling * kept_scale(rate) for layer, rate in zip(layers, rates, strict=True)]
        ctx.bases = [layer.base for layer in layers]
        lows = _low_products(_dropped(flat, seeds), [A.to(x.dtype) for A in factors[::2]])
        ctx.save_for_backward(*tensors, *lows)
        outs = _adapted(flat, ctx.bases, lows, factors[1::2], ctx.scales)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    @once_differentiable  # it overwrites what it makes
    def backward(ctx, *grads):
        n, saved = 2 * len(ctx.bases), ctx.saved_tensors
        sources, factors, lows = saved[: ctx.count], saved[ctx.count : ctx.count + n], saved[ctx.count + n :]
        needs = ctx.needs_input_grad[4:]
        x, pullback = ctx.make.vjp(*sources) if ctx.make else (sources[0], lambda grad: [grad])
        flat = x.reshape(-1, x.shape[-1])
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        Bs, keeps = [B.to(x.dtype) for B in factors[1::2]], _masks(flat, ctx.seeds)
        grad_lows = [(g @ B).mul_(s) for g, B, s in zip(grads, Bs, ctx.scales, strict=True)]  # s·(dY B), (N, R)
        grad_factors = [None] * n
        if any(needs[ctx.count :]):
            inputs = [flat if keep is None else flat * keep for keep in keeps]
            for i, (g, low, scale) in enumerate(zip(grads, lows, ctx.scales, strict=True)):
                # (R, N)(N, out), then turned: a product with a thin left side runs faster than one with a thin right
                grad_factors[2 * i + 1] = (low.t() @ g).mul_(scale).t().to(factors[2 * i + 1].dtype).contiguous()
            for i, grad_A in enumerate(_outer_products(grad_lows, inputs)):
                grad_factors[2 * i] = grad_A.to(factors[2 * i].dtype)
        grad_sources = [None] * ctx.count
        if any(needs[: ctx.count]):
            grad_x = _input_gradient(grads, ctx.bases, grad_lows, [A.to(x.dtype) for A in factors[::2]], keeps)
            grad_sources = pullback(grad_x.view(x.shape))
        return None, None, None, None, *grad_sources, *grad_factors


def _input_gradient(grads, bases, grad_lows, As, keeps) -> torch.Tensor:
    """dX of all layers together, (N, in), added up in one buffer."""
    grad_x = None
    for grad_low, A, keep in zip(grad_lows, As, keeps, strict=True):
        if grad_x is not None and keep is None:
            grad_x.addmm_(grad_low, A)
            continue
        part = grad_low @ A if keep is None else (grad_low @ A).mul_(keep)
        grad_x = part if grad_x is None else grad_x.add_(part)
    for grad, base in zip(grads, bases, strict=True):
        frozen_gradient(grad, base, onto=grad_x)
    return grad_x


def _adapted(x, bases, lows, Bs, scales) -> list[torch.Tensor]:
    """base(x) + s·low Bᵀ of each layer, (N, out). With B = 0 it has the bits of base(x)."""
    if all(isinstance(base, Linear16bit) for base in bases):
        wides = [(B * scale).to(x.dtype).t() for B, scale in zip(Bs, scales, strict=True)]
        outs = [_affine(low, wide, base.bias) for low, wide, base in zip(lows, wides, bases, strict=True)]
        add_products_16bit(x, bases, outs)
        return outs
    outs = frozen_products(x, bases)
    for out, low, B, scale in zip(outs, lows, Bs, scales, strict=True):
        out.addmm_(low, B.to(x.dtype).t(), alpha=scale)
    return outs


def _affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W + b."""
    out = fresh((len(x), weight.shape[1]), x.dtype, x.device)
    return torch.mm(x, weight, out=out) if bias is None else torch.addmm(bias.to(x.dtype), x, weight, out=out)


def _low_products(inputs: list[torch.Tensor], As: list[torch.Tensor]) -> list[torch.Tensor]:
    """x̃ Aᵀ of each projection, (N, R); one product for all where they share their input (no dropout)."""
    if any(x is not inputs[0] for x in inputs):
        return [x @ A.t() for x, A in zip(inputs, As, strict=True)]
    return list((inputs[0] @ torch.cat(As).t()).split([len(A) for A in As], dim=1))


def _outer_products(lows: list[torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """lowᵀ x̃ of each projection, (R, in); one product for all where they share their input."""
    if any(x is not inputs[0] for x in inputs):
        return [low.t() @ x for low, x in zip(lows, inputs, strict=True)]
    return list((torch.cat(lows, dim=1).t() @ inputs[0]).split([low.shape[1] for low in lows]))


def _masks(x: torch.Tensor, seeds: Sequence[Seed]) -> list[torch.Tensor | None]:
    return [None if seed is None else dropout_keep(x.shape, *seed, x.device) for seed in seeds]


def _dropped(x: torch.Tensor, seeds: Sequence[Seed]) -> list[torch.Tensor]:
    """x for each projection with its own dropout mask, not yet divided by 1 - rate."""
    return [x if keep is None else x * keep for keep in _masks(x, seeds)]


def kept_scale(rate: float) -> float:
    """1/(1 - rate), the factor on what dropout keeps; 0 where it keeps nothing."""
    return 1 / (1 - rate) if rate < 1 else 0.0


def dropout_keep(shape: torch.Size, rate: float, seed: int, device: torch.device) -> torch.Tensor:
    """A bool mask, True with probability 1 - rate (to within 2⁻¹⁷); the same for the same seed.

    On the CPU from 16-bit words of numpy's SFC64 generator: torch's own takes 15 times as long, more than the products
    it would be drawn for (measured on 900 × 576 elements: 2.9 ms against 0.2)."""
    if device.type != "cpu":
        generator = torch.Generator(device).manual_seed(seed)
        return torch.rand(shape, device=device, generator=generator) >= rate
    words = np.random.SFC64(seed).random_raw(-(-shape.numel() // 4)).view(np.int16)
    threshold = round(rate * 2**16) - 2**15
    return (torch.from_numpy(words)[: shape.numel()] >= threshold).view(shape)
