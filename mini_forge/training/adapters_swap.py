"""Several adapters on one backbone: a set of factors takes the place of the live ones for a while, without a copy.

`LoRALinear` and `LoRAStack` hold one adapter. Another one is a dict of its factors; `swapped` points the layers'
parameters at its memory and back again. Nothing is copied, and the parameters stay the same objects, so an optimizer
that holds them is not disturbed. Do not swap between a forward pass and its backward: autograd keeps the parameters
themselves, and would find the other adapter's values in them.
"""

from contextlib import contextmanager

import torch

from mini_forge.errors import ConfigError
from mini_forge.model.decoder import Decoder
from mini_forge.model.lora import Factors, LoRALinear, LoraSpec, LoRAStack, disabled, lora_layers


def live_factors(model: Decoder) -> Factors:
    """The model's adapter as it stands; the tensors share its memory, so they follow its training."""
    return {name: (layer.lora_A.data, layer.lora_B.data, layer.scaling) for name, layer in lora_layers(model)}


def copied_factors(model: Decoder) -> Factors:
    """The model's adapter as it stands, in memory of its own."""
    return {name: (A.clone(), B.clone(), scaling) for name, (A, B, scaling) in live_factors(model).items()}


@torch.no_grad()
def copy_factors(model: Decoder, factors: Factors):
    """Give the model's adapter the values of these factors, which stay apart."""
    for name, layer in lora_layers(model):
        layer.lora_A.copy_(factors[name][0])
        layer.lora_B.copy_(factors[name][1])


def fresh_factors(model: Decoder, spec: LoraSpec, generator: torch.Generator | None = None) -> Factors:
    """A new adapter for the layers that the model adapts, with the values that `inject` draws from this generator."""
    layers = sorted(lora_layers(model), key=lambda item: isinstance(item[1], LoRAStack))  # stacks last, as in `inject`
    factors = {}
    for name, layer in layers:
        kind = LoRAStack if isinstance(layer, LoRAStack) else LoRALinear
        made = kind(layer.base, spec, generator)  # beside the same base, and dropped again
        factors[name] = (made.lora_A.data, made.lora_B.data, made.scaling)
    return factors


def put_factors(model: Decoder, factors: Factors):
    """Point the model's layers at these factors; a layer that they lack is switched off. Raises ConfigError for factors
    of a layer that the model does not adapt, or of another shape."""
    layers = dict(lora_layers(model))
    _check(factors, layers)
    for name, layer in layers.items():
        layer.enabled = name in factors
        if layer.enabled:
            layer.lora_A.data, layer.lora_B.data, layer.scaling = factors[name]


@contextmanager
def swapped(model: Decoder, factors: Factors | None):
    """The model with another adapter (None: with its own) for as long as the context lasts."""
    if factors is None:
        yield model
        return
    before = live_factors(model)
    enabled = {name: layer.enabled for name, layer in lora_layers(model)}
    put_factors(model, factors)
    try:
        yield model
    finally:
        put_factors(model, before)
        for name, layer in lora_layers(model):
            layer.enabled = enabled[name]


def as_reference(model: Decoder):
    """A context with the model as its reference, π_ref: as `model.reference` adapts it, or without adapters."""
    return disabled(model) if model.reference is None else swapped(model, model.reference)


def _check(factors: Factors, layers: dict[str, LoRALinear | LoRAStack]):
    unknown = sorted(factors.keys() - layers.keys())
    if unknown:
        raise ConfigError(
            f"target_modules: the other adapter has {unknown[0]} and {len(unknown) - 1} more layers that this run does "
            "not adapt; name the same target_modules"
        )
    for name, (A, B, _) in factors.items():
        wanted = [*layers[name].lora_A.shape[:-2], A.shape[-2], layers[name].lora_A.shape[-1]]
        if list(A.shape) != wanted or list(B.shape) != [*wanted[:-2], layers[name].lora_B.shape[-2], wanted[-2]]:
            raise ConfigError(
                f"{name}: factors of shape {list(A.shape)} and {list(B.shape)} do not fit a layer of "
                f"{layers[name].lora_A.shape[-1]} to {layers[name].lora_B.shape[-2]} features; is it the same model?"
            )
