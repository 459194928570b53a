"""LoRA: a low-rank update beside any frozen linear layer. LoRA (2106.09685) Eq. 3; rsLoRA (2312.03732) for the scaling.

    y = base(x) + s · (dropout(x) Aᵀ) Bᵀ        A (R, in), B (out, R), s = alpha/R, or alpha/√R for rsLoRA

The backward is written by hand. Autograd on the plain formula would keep x and dropout(x) for every projection; this
keeps x once (q, k and v share it) and the narrow x̃Aᵀ, makes a 4-bit weight anew, and draws the dropout mask again from
its seed:

    dB = s · dYᵀ(x̃Aᵀ)     dA = s · (dY B)ᵀ x̃     dX = dY W + mask ⊙ s(dY B)A        x̃ = dropout(x)
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mini_forge.errors import ConfigError
from mini_forge.model.grouped import blocks, grouped, grouped_products, is_groupable
from mini_forge.model.quant import Linear4bit, Linear8bit, dequantized_weight
from mini_forge.model.stacks import Stack4bit, Stack8bit, StackMxfp4

LINEAR_TYPES = (nn.Linear, Linear4bit, Linear8bit)
STACK_TYPES = (Stack4bit, Stack8bit, StackMxfp4)
STACK_NAMES = ("gate_up_proj", "down_proj")  # of experts, whose module is named `experts`


@dataclass(frozen=True)
class LoraSpec:
    """What PEFT's adapter_config.json says of an adapter. `targets`: module name endings, or None for all linears."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    use_rslora: bool = False

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen linear layer (dense, 4-bit or 8-bit) with a trainable float32 update beside it."""

    def __init__(self, base: nn.Module, spec: LoraSpec, generator: torch.Generator | None = None):
        """A starts uniform in ±1/√in (Kaiming uniform with a = √5), B at zero: the adapted layer begins as its base."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling, self.dropout, self.enabled = spec.scaling, spec.dropout, True
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        bound = 1 / math.sqrt(base.in_features)
        start = torch.empty(spec.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, spec.rank, device=device))

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, in) → (…, out), in x's dtype. The factors are float32 and are cast to x's dtype for the products."""
        return project(x, self)[0]

    def delta(self) -> torch.Tensor:
        """s·BA, the (out, in) float32 matrix that merging adds to the weight."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())


class LoRAStack(nn.Module):
    """A frozen stack of expert matrices (E, out, in), each with a trained update: A (E, R, in), B (E, out, R).

    Two products for each expert's rows, s·(x̃ A_eᵀ) B_eᵀ; no ΔW is formed, and experts without rows cost nothing."""

    def __init__(self, base: nn.Parameter | nn.Module, spec: LoraSpec, generator: torch.Generator | None = None):
        super().__init__()
        self.base = base
        self.shape, self.scaling, self.dropout, self.enabled = base.shape, spec.scaling, spec.dropout, True
        E, out, width = base.shape
        device = base.device if isinstance(base, torch.Tensor) else next(base.buffers()).device
        bound = 1 / math.sqrt(width)
        start = torch.empty(E, spec.rank, width).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(E, out, spec.rank, device=device))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None, counts: list[int]) -> torch.Tensor:
        """x (M, in) sorted by expert, `counts[e]` rows each; bias (E, out) or None → (M, out)."""
        out = grouped_products(x, self.base, bias, counts)
        if not self.enabled:
            return out
        dropped = F.dropout(x, self.dropout, self.training)
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if is_groupable(dropped, A) and is_groupable(dropped, B):
            low = grouped(dropped, A.transpose(1, 2), counts)
            return out + self.scaling * grouped(low, B.transpose(1, 2), counts)
        # unbind, not A[e]: the gradient of an index would be a zeroed stack for every expert
        As, Bs = A.unbind(), B.unbind()
        return out + self.scaling * torch.cat([(dropped[rows] @ As[e].t()) @ Bs[e].t() for e, rows in blocks(counts)])

    def delta(self, expert: int) -> torch.Tensor:
        """s·B_e A_e, the (out, in) float32 matrix that merging adds to the expert's weight."""
        return self.scaling * (self.lora_B[expert].detach().float() @ self.lora_A[expert].detach().float())


ADAPTED = (LoRALinear, LoRAStack)


def project(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """[layer(x) for layer in layers], as one function where all are adapted: q, k, v share x, and so do gate and up.

    Together they save x once, read it once for all low-rank products, and add their gradients up in one buffer."""
    if not all(isinstance(layer, LoRALinear) and layer.enabled for layer in layers):
        return [layer.base(x) if isinstance(layer, LoRALinear) and not layer.enabled else layer(x) for layer in layers]
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    return list(_LoRAProducts.apply(x, layers, *factors))


class _LoRAProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layers, *factors):
        flat = x.reshape(-1, x.shape[-1])
        rates = [layer.dropout if layer.training else 0.0 for layer in layers]
        # Seeds come from the global generator, so a resumed run and a recomputed block draw the same masks again.
        ctx.seeds = [(rate, int(torch.randint(2**62, ()))) if rate else None for rate in rates]
        ctx.scales = [layer.scaling * kept_scale(rate) for layer, rate in zip(layers, rates, strict=True)]
        ctx.bases = [layer.base for layer in layers]
        lows = _low_products(_dropped(flat, ctx.seeds), [A.to(x.dtype) for A in factors[::2]])
        ctx.save_for_backward(x, *factors, *lows)
        outs = [_base_product(flat, base) for base in ctx.bases]
        for out, low, B, scale in zip(outs, lows, factors[1::2], ctx.scales, strict=True):
            out.addmm_(low, B.to(x.dtype).t(), alpha=scale)
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)

    @staticmethod
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        factors, lows = saved[: 2 * len(ctx.bases)], saved[2 * len(ctx.bases) :]
        flat = x.reshape(-1, x.shape[-1])
        grads = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        As, Bs = ([factor.to(x.dtype) for factor in part] for part in (factors[::2], factors[1::2]))
        keeps = _masks(flat, ctx.seeds)
        grad_lows = [(g @ B).mul_(s) for g, B, s in zip(grads, Bs, ctx.scales, strict=True)]  # s·(dY B), (N, R)
        grad_factors = [None] * len(factors)
        if any(ctx.needs_input_grad[2:]):
            inputs = [flat if keep is None else flat * keep for keep in keeps]
            for i, (g, low, scale) in enumerate(zip(grads, lows, ctx.scales, strict=True)):
                # (R, N)(N, out), then turned: a product with a thin left side runs faster than one with a thin right
                grad_factors[2 * i + 1] = (low.t() @ g).mul_(scale).t().to(factors[2 * i + 1].dtype).contiguous()
            for i, grad_A in enumerate(_outer_products(grad_lows, inputs)):
                grad_factors[2 * i] = grad_A.to(factors[2 * i].dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _base_gradient(grads[0], ctx.bases[0])
            for grad, base in zip(grads[1:], ctx.bases[1:], strict=True):
                _base_gradient(grad, base, onto=grad_x)
            for grad_low, A, keep in zip(grad_lows, As, keeps, strict=True):
                if keep is None:
                    grad_x.addmm_(grad_low, A)
                else:
                    grad_x.add_((grad_low @ A).mul_(keep))
            grad_x = grad_x.view(x.shape)
        return grad_x, None, *grad_factors


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


def _masks(x: torch.Tensor, seeds: list[tuple[float, int] | None]) -> list[torch.Tensor | None]:
    return [None if seed is None else dropout_keep(x.shape, *seed, x.device) for seed in seeds]


def _dropped(x: torch.Tensor, seeds: list[tuple[float, int] | None]) -> list[torch.Tensor]:
    """x for each projection with its own dropout mask, not yet divided by 1 - rate."""
    return [x if keep is None else x * keep for keep in _masks(x, seeds)]


def _base_product(x: torch.Tensor, base: nn.Module) -> torch.Tensor:
    compute = getattr(base, "compute_dtype", x.dtype)
    bias = None if base.bias is None else base.bias.to(compute)
    return F.linear(x.to(compute), dequantized_weight(base, compute), bias).to(x.dtype)


def _base_gradient(grad: torch.Tensor, base: nn.Module, onto: torch.Tensor | None = None) -> torch.Tensor:
    """dY W, or that added to `onto` in place."""
    compute = getattr(base, "compute_dtype", grad.dtype)
    weight = dequantized_weight(base, compute)
    if onto is None:
        return (grad.to(compute) @ weight).to(grad.dtype)
    return onto.addmm_(grad, weight) if compute == grad.dtype else onto.add_(grad.to(compute) @ weight)


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


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers but the head, which stays as it is (it may be the embedding)."""
    kinds = (*LINEAR_TYPES, LoRALinear)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return [name for name in names if name != "lm_head" and not name.endswith(".base")]


def stack_names(model: nn.Module) -> list[str]:
    """Names of all stacks of expert matrices, gate_up before down."""
    owners = [name for name, module in model.named_modules() if name.endswith(".experts")]
    return [f"{owner}.{leaf}" for owner in owners for leaf in STACK_NAMES]


def target_names(model: nn.Module, targets: tuple[str, ...] | None) -> list[str]:
    """The linear layers and stacks of experts that `targets` name by whole last parts of their names.

    None names all linear layers (so does "all-linear" among others), no stack: experts are adapted on request, as
    `experts.gate_up_proj` and `experts.down_proj`. Raises ConfigError for a target that matches nothing."""
    linears = linear_names(model)
    if targets is None:
        return linears
    stacks = stack_names(model)
    names = linears + stacks
    # A stack is named with its `experts.`, so that `down_proj` alone stays the name of a linear layer, as in PEFT.
    matches = {
        t: [n for n in names if n == t or (n.endswith("." + t) and (n not in stacks or "experts." in t))]
        for t in targets
    }
    if "all-linear" in matches:
        matches["all-linear"] = linears
    known = ", ".join(sorted({".".join(n.split(".")[-2 if n in stacks else -1 :]) for n in names}))
    unmatched = [
        f"target_modules: {t!r} names no linear layer of this model; use 'all-linear' or a list of: {known}"
        for t, found in matches.items()
        if not found
    ]
    if unmatched:
        raise ConfigError(*unmatched)
    chosen = {name for found in matches.values() for name in found}
    return [name for name in names if name in chosen]


def inject(model: nn.Module, spec: LoraSpec, generator: torch.Generator | None = None) -> list[str]:
    """Freeze the model and put a LoRA layer around each target, in place. Returns their names, in order."""
    model.requires_grad_(False)
    names = target_names(model, spec.targets)
    stacks = set(stack_names(model))
    for name in names:
        if name in stacks:
            _replace(model, name, lambda base: LoRAStack(base, spec, generator))
        else:
            model.set_submodule(name, LoRALinear(model.get_submodule(name), spec, generator))
    return names


def _replace(model: nn.Module, name: str, make):
    """Put make(what is there) under `name`, be it parameter or module."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    new = make(getattr(owner, leaf))
    delattr(owner, leaf)
    setattr(owner, leaf, new)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear | LoRAStack]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, ADAPTED))


@contextmanager
def disabled(model: nn.Module):
    """The base model for as long as the context lasts: adapters are skipped, not removed."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield model
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.enabled = was


def merge(model: nn.Module) -> nn.Module:
    """Add every update to its dense base weight and drop the adapters, in place.

    The sum is made in float32 and rounded once to the weight's dtype. Raises ConfigError for a quantized base:
    rounding W + s·BA to 4 bits again would lose the update; merge into the full-precision checkpoint instead."""
    for name, layer in list(lora_layers(model)):
        base = layer.base
        if not isinstance(base, nn.Linear | nn.Parameter):
            raise ConfigError(
                f"merge: {name} has a quantized weight; use the merge command, which merges into full precision"
            )
        if isinstance(layer, LoRAStack):
            for e, weight in enumerate(base.data):
                weight.copy_(weight.float() + layer.delta(e).to(weight.device))
            _replace(model, name, lambda layer: layer.base)
        else:
            base.weight.data = (base.weight.data.float() + layer.delta().to(base.weight.device)).to(base.weight.dtype)
            model.set_submodule(name, base)
    return model
