"""LoRA: a low-rank update beside any frozen linear layer. LoRA (2106.09685) Eq. 3; rsLoRA (2312.03732) for the scaling.

    y = base(x) + s · (dropout(x) Aᵀ) Bᵀ        A (R, in), B (out, R), s = alpha/R, or alpha/√R for rsLoRA

The backward is written by hand. Autograd on the plain formula would keep x, dropout(x) and xAᵀ for every projection;
this one keeps x alone (q, k and v share it), makes a 4-bit weight anew, and draws the dropout mask again from its seed:

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
from mini_forge.model.quant import Linear4bit, Linear8bit, dequantized_weight

LINEAR_TYPES = (nn.Linear, Linear4bit, Linear8bit)


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
        if not self.enabled:
            return self.base(x)
        rate = self.dropout if self.training else 0.0
        return _LoRAProduct.apply(x, self.lora_A, self.lora_B, self.base, self.scaling, rate)

    def delta(self) -> torch.Tensor:
        """s·BA, the (out, in) float32 matrix that merging adds to the weight."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())


class _LoRAProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, A, B, base, scaling, rate):
        flat = x.reshape(-1, x.shape[-1])
        seed = int(torch.randint(2**62, ())) if rate else 0  # from the global generator, so a resumed run redraws it
        dropped = flat if not rate else flat * dropout_keep(flat.shape, rate, seed, flat.device)
        scaling = scaling * kept_scale(rate)
        out = _base_product(flat, base)
        out.addmm_(dropped @ A.to(x.dtype).t(), B.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, A, B)
        ctx.base, ctx.scaling, ctx.rate, ctx.seed = base, scaling, rate, seed
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad_out):
        x, A, B = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, grad_out.shape[-1])
        keep = dropout_keep(flat.shape, ctx.rate, ctx.seed, flat.device) if ctx.rate else None
        low_A = A.to(x.dtype)
        grad_low = (grad @ B.to(x.dtype)).mul_(ctx.scaling)  # s·(dY B), (N, R)
        grad_A = grad_B = grad_x = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dropped = flat if keep is None else flat * keep
            grad_A = (grad_low.t() @ dropped).to(A.dtype)
            grad_B = (grad.t() @ (dropped @ low_A.t()).mul_(ctx.scaling)).to(B.dtype)
        if ctx.needs_input_grad[0]:
            grad_x = _base_gradient(grad, ctx.base)
            if keep is None:
                grad_x.addmm_(grad_low, low_A)
            else:
                grad_x.add_((grad_low @ low_A).mul_(keep))
            grad_x = grad_x.view(x.shape)
        return grad_x, grad_A, grad_B, None, None, None


def _base_product(x: torch.Tensor, base: nn.Module) -> torch.Tensor:
    compute = getattr(base, "compute_dtype", x.dtype)
    bias = None if base.bias is None else base.bias.to(compute)
    return F.linear(x.to(compute), dequantized_weight(base, compute), bias).to(x.dtype)


def _base_gradient(grad: torch.Tensor, base: nn.Module) -> torch.Tensor:
    compute = getattr(base, "compute_dtype", grad.dtype)
    return (grad.to(compute) @ dequantized_weight(base, compute)).to(grad.dtype)


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


def target_names(model: nn.Module, targets: tuple[str, ...] | None) -> list[str]:
    """The linear layers that `targets` name by whole last parts of their names; None names them all.

    Raises ConfigError for a target that matches nothing."""
    names = linear_names(model)
    if targets is None:
        return names
    matches = {t: [n for n in names if n == t or n.endswith("." + t)] for t in targets}
    known = ", ".join(sorted({n.rsplit(".", 1)[-1] for n in names}))
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
    """Freeze the model and wrap its target layers in LoRALinear, in place. Returns the wrapped names, in order."""
    model.requires_grad_(False)
    names = target_names(model, spec.targets)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), spec, generator))
    return names


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


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

    The sum is made in float32 and rounded once to the weight's dtype. Raises ConfigError for a 4-bit or 8-bit base:
    rounding W + s·BA to 4 bits again would lose the update; merge into the full-precision checkpoint instead."""
    for name, layer in list(lora_layers(model)):
        if not isinstance(layer.base, nn.Linear):
            raise ConfigError(f"merge: {name} has a quantized weight; load the model with quantization=None to merge")
        weight = layer.base.weight
        weight.data = (weight.data.float() + layer.delta().to(weight.device)).to(weight.dtype)
        model.set_submodule(name, layer.base)
    return model
