"""LoRA: a low-rank update beside any frozen linear layer. LoRA (2106.09685) Eq. 3; rsLoRA (2312.03732) for the scaling.

    y = base(x) + s · (dropout(x) Aᵀ) Bᵀ        A (R, in), B (out, R), s = alpha/R, or alpha/√R for rsLoRA

The gradients are written by hand, in `products.py`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import nn

from mini_forge.errors import ConfigError
from mini_forge.model.grouped import blocks, grouped, grouped_products, is_groupable
from mini_forge.model.low_rank import IN_TORCH, draw_seeds
from mini_forge.model.ops import PLAIN, Differentiable
from mini_forge.model.products import adapted_products, lora_factors
from mini_forge.model.quant import Linear, Linear16bit, frozen_products

# An adapter by name of layer: A (R, in) or (E, R, in), B (out, R) or (E, out, R), both float32, and the scaling s.
Factors = dict[str, tuple[torch.Tensor, torch.Tensor, float]]

STACK_NAMES = ("gate_up_proj", "down_proj")  # of experts, whose module is named `experts`


@dataclass(frozen=True)
class LoraSpec:
    """What PEFT's adapter_config.json says of an adapter. `targets`: module name endings, or None for all linears."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    use_rslora: bool = False

    def __post_init__(self):
        if self.rank < 1 or not 0 <= self.dropout <= 1:
            raise ConfigError(f"rank: {self.rank} must be at least 1, and dropout, {self.dropout}, from 0 to 1")
        if isinstance(self.targets, str):
            raise ConfigError(
                f"targets: {self.targets!r} must be a tuple of names, ({self.targets!r},), or None for all"
            )

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Module):
    """A frozen linear layer, of `quant.Linear`'s kinds, with a trainable float32 update beside it."""

    low_rank = IN_TORCH  # what makes the update's products: `Ops.low_rank`

    def __init__(self, base: nn.Module, spec: LoraSpec, generator: torch.Generator | None = None):
        """A starts uniform in ±1/√in (Kaiming uniform with a = √5), B at zero: the adapted layer begins as its base.

        Raises ConfigError for another layer, and for a kind of nn.Linear with a forward of its own: products are made
        from the weight."""
        super().__init__()
        _check_kind(base)
        self.base = base.requires_grad_(False)
        self.scaling, self.dropout, self.enabled = spec.scaling, spec.dropout, True
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        bound = 1 / math.sqrt(base.in_features)
        start = torch.empty(spec.rank, base.in_features, dtype=torch.float32).uniform_(
            -bound, bound, generator=generator
        )
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, spec.rank, dtype=torch.float32, device=device))

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
        if _is_as_made(self.base):
            return adapted_products(None, (x,), (self,), draw_seeds((self,)))[0]
        low = F.dropout(x, self.dropout, self.training) @ self.lora_A.to(x.dtype).t()
        return self.base(x) + self.scaling * (low @ self.lora_B.to(x.dtype).t())

    def delta(self) -> torch.Tensor:
        """s·BA, the (out, in) float32 matrix that merging adds to the weight."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())


def _check_kind(base: nn.Module):
    """Raise ConfigError for what is no linear layer whose products are those of its weight."""
    if not isinstance(base, Linear) or isinstance(base, nn.Linear) and type(base).forward is not nn.Linear.forward:
        kinds = ", ".join(kind.__name__ for kind in get_args(Linear))
        raise ConfigError(f"base: {type(base).__name__} cannot be adapted; give one of {kinds}")


class LoRAStack(nn.Module):
    """A frozen stack of expert matrices (E, out, in), each with a trained update: A (E, R, in), B (E, out, R).

    Two products for each expert's rows, s·(x̃ A_eᵀ) B_eᵀ; no ΔW is formed, and experts without rows cost nothing.
    `update(out, x̃, A, B, s, counts)` gives out with these added, where a provider has a faster form."""

    update: Callable | None = None

    def __init__(self, base: nn.Parameter | nn.Module, spec: LoraSpec, generator: torch.Generator | None = None):
        super().__init__()
        self.base = base
        self.shape, self.scaling, self.dropout, self.enabled = base.shape, spec.scaling, spec.dropout, True
        E, out, width = base.shape
        device = base.device if isinstance(base, torch.Tensor) else next(base.buffers()).device
        bound = 1 / math.sqrt(width)
        start = torch.empty(E, spec.rank, width, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(start.to(device))
        self.lora_B = nn.Parameter(torch.zeros(E, out, spec.rank, dtype=torch.float32, device=device))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None, counts: list[int]) -> torch.Tensor:
        """x (M, in) sorted by expert, `counts[e]` rows each; bias (E, out) or None → (M, out)."""
        out = grouped_products(x, self.base, bias, counts)
        if not self.enabled:
            return out
        dropped = F.dropout(x, self.dropout, self.training)
        if self.update is not None:
            return self.update(out, dropped, self.lora_A, self.lora_B, self.scaling, counts)
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
KINDS = (LoRALinear, *get_args(Linear))  # whose products may be made from their weights


def project(x: torch.Tensor, *layers: nn.Module, make: nn.Module | None = None) -> Sequence[torch.Tensor]:
    """[layer(make(x)) for layer in layers], as one function where all are adapted: q, k, v share x, and so do gate, up.

    Together they keep x once, not make(x), read it once for all low-rank products, and add their gradients up in one
    buffer. make: a module with a `vjp`, as a norm has; None is the identity. A layer with hooks, or of a subclass
    with a forward of its own, is called as any module is."""
    if is_adapted(*layers) and is_frozen(make):
        return adapted_products(make, (x,), layers, draw_seeds(layers))
    x = make(x) if make else x
    if torch.is_grad_enabled() or any(is_adapted(layer) or not _is_as_made(layer) for layer in layers):
        return [layer(x) for layer in layers]
    layers = [layer.base if isinstance(layer, LoRALinear) else layer for layer in layers]
    outs = frozen_products(x.reshape(-1, x.shape[-1]), layers)
    return [out.view(*x.shape[:-1], out.shape[1]) for out in outs]


def project_unit(gate: torch.Tensor, up: torch.Tensor, layer: nn.Module, unit: Differentiable) -> torch.Tensor:
    """layer(unit(gate, up)), without keeping what `unit` gives."""
    if is_adapted(layer):
        return adapted_products(unit, (gate, up), (layer,), draw_seeds((layer,)))[0]
    return project(unit(gate, up), layer)[0]


def project_again(
    x: torch.Tensor, norm: nn.Module, inner: Sequence[LoRALinear], outer: LoRALinear, unit: Differentiable
) -> torch.Tensor:
    """outer(unit(*(layer(norm(x)) for layer in inner))), of which only x is kept: the backward makes the rest again."""
    seeds, factors = draw_seeds(inner), lora_factors(inner)

    def make(x, *factors):
        return unit(*adapted_products(norm, (x,), inner, seeds, factors))

    return adapted_products(Differentiable.of(make), (x, *factors), (outer,), draw_seeds((outer,)))[0]


def is_adapted(*layers: nn.Module) -> bool:
    """Whether the products of all may be made here, with their updates: of LoRALinear that is switched on."""
    return all(isinstance(layer, LoRALinear) and layer.enabled and _is_as_made(layer) for layer in layers)


def _is_as_made(layer: nn.Module) -> bool:
    """Whether a layer does what its weights say and nobody is told of its calls: no hooks, no forward of another."""
    for kind in KINDS:
        if isinstance(layer, kind):
            is_ours = type(layer).forward is kind.forward and not _is_hooked(layer)
            return is_ours and (kind is not LoRALinear or _is_as_made(layer.base))
    return False


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or "forward" in module.__dict__)  # fmt: skip


def is_frozen(module: nn.Module | None) -> bool:
    """Whether its `vjp` says all of its gradient: no weight of it is trained, and no hook changes what it gives."""
    return module is None or not (any(p.requires_grad for p in module.parameters()) or _is_hooked(module))


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers but the head, which stays as it is (it may be the embedding)."""
    names = [name for name, module in model.named_modules() if isinstance(module, Linear | LoRALinear)]
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
    """Freeze the model and put a LoRA layer around each target, in place, with the update's products of the model's
    `ops`. Returns their names, in order.

    Raises ConfigError, and changes nothing, where a target has one already or cannot have one."""
    names, adapted = target_names(model, spec.targets), dict(lora_layers(model))
    stacks = set(stack_names(model))
    for name in names:
        if name in adapted:
            raise ConfigError(f"target_modules: {name} has an adapter already; merge it, or load the model anew")
        if name not in stacks:
            _check_kind(model.get_submodule(name))
    model.requires_grad_(False)
    ops = getattr(model, "ops", PLAIN)
    for name in names:
        if name in stacks:
            layer = _replace(model, name, lambda base: LoRAStack(base, spec, generator))
            layer.update = ops.grouped_lora
        else:
            layer = LoRALinear(model.get_submodule(name), spec, generator)
            layer.low_rank = ops.low_rank
            model.set_submodule(name, layer)
    return names


def _replace(model: nn.Module, name: str, make):
    """Put make(what is there) under `name`, be it parameter or module, and return it."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    new = make(getattr(owner, leaf))
    delattr(owner, leaf)
    setattr(owner, leaf, new)
    return new


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

    The sum is made in float32 and rounded once to the training dtype. Raises ConfigError for a quantized base:
    rounding W + s·BA to 4 bits again would lose the update; merge into the full-precision checkpoint instead."""
    for name, layer in list(lora_layers(model)):
        base = layer.base.dense() if isinstance(layer.base, Linear16bit) else layer.base
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
