"""What a configuration names beside itself: local files, an adapter to start from, and the LoRA of both."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mini_forge.config import PATHS, TrainingConfig
from mini_forge.config_rules import REFERENCE_FREE_LOSSES
from mini_forge.errors import ConfigError
from mini_forge.io.adapters import read_adapter_config, read_adapter_tensors
from mini_forge.io.expert_adapters import stack_targets
from mini_forge.io.hub import resolve_model
from mini_forge.io.models import is_adapter
from mini_forge.io.records import read_spec
from mini_forge.model.decoder import Decoder
from mini_forge.model.lora import LoraSpec, target_names


def with_absolute_paths(config: TrainingConfig) -> TrainingConfig:
    """The configuration with the local files it names given from the root, so that the run can be used anywhere."""
    named = {name: os.path.expanduser(value) for name in PATHS if (value := getattr(config, name))}
    return replace(config, **{name: os.path.abspath(path) for name, path in named.items() if os.path.exists(path)})


def has_reference(config: TrainingConfig) -> bool:
    """Whether the run compares the model with itself before training, and so has neither dropout nor noise."""
    return config.strategy in ("dpo", "rlhf")


def ties_to_init_adapter(config: TrainingConfig) -> bool:
    """Whether the reference is the model as `init_adapter` makes it."""
    is_free = config.strategy == "dpo" and config.loss_type in REFERENCE_FREE_LOSSES
    return config.reference == "init_adapter" and has_reference(config) and not is_free


def adapter_spec(config: TrainingConfig) -> LoraSpec:
    """The run's LoRA. Against a reference it has no dropout: noise on one side is no preference."""
    dropout = 0.0 if has_reference(config) else config.lora_dropout
    targets = None if config.target_modules == "all-linear" else tuple(config.target_modules)
    return LoraSpec(config.lora_r, config.lora_alpha, dropout, targets, config.use_rslora)


def with_init_adapter(config: TrainingConfig) -> TrainingConfig:
    """The configuration with its initial adapter's rank, alpha and targets. ConfigError where others are given."""
    if not config.init_adapter:
        return config
    folder = Path(os.path.expanduser(config.init_adapter))
    if not folder.is_dir():
        raise ConfigError(f"init_adapter: {config.init_adapter!r} is not a folder; give a run's or an adapter's folder")
    if not is_adapter(folder):
        raise ConfigError(
            f"init_adapter: {config.init_adapter!r} has no adapter_config.json; give a run's or an adapter's folder"
        )
    asked, (found, _) = adapter_spec(config), read_adapter_config(folder)
    targets = "all-linear" if found.targets is None else stack_targets(found.targets, read_adapter_tensors(folder))
    alpha, use_rslora = found.alpha, found.use_rslora
    if not float(alpha).is_integer():  # as we write an rsLoRA adapter: alpha·√rank with the plain scaling
        alpha, use_rslora = round(alpha / math.sqrt(found.rank), 6), not use_rslora
    if not float(alpha).is_integer():
        raise ConfigError(f"init_adapter: {config.init_adapter!r} has lora_alpha {found.alpha}; it must be an integer")
    shape = {"lora_r": found.rank, "lora_alpha": int(alpha), "target_modules": targets, "use_rslora": use_rslora}
    written = {key for key, source in config.provenance.items() if source.startswith(("file", "override"))}
    same_scaling = math.isclose(asked.scaling, found.scaling, rel_tol=1e-6)
    clashes = [
        f"{key}: {getattr(config, key)!r} differs from {value!r} in init_adapter {config.init_adapter!r}; "
        f"leave {key} out, or give the adapter's value"
        for key, value in shape.items()
        if key in written and getattr(config, key) != value
        if not (key in ("lora_alpha", "use_rslora") and same_scaling)
        if not (key == "target_modules" and _name_the_same(config, config.target_modules, targets))
    ]
    if clashes:
        raise ConfigError(*clashes)
    sources = {**config.provenance, **dict.fromkeys(shape, "init_adapter")}
    return replace(config, **shape, provenance=sources)


def _name_the_same(config: TrainingConfig, *targets: str | Sequence[str]) -> bool:
    """Whether values of `target_modules` name the same layers of the model, be it in another order or in full."""
    with torch.device("meta"):
        model = Decoder(read_spec(resolve_model(config.model_name)))
    first, second = (target_names(model, None if t == "all-linear" else tuple(t)) for t in targets)
    return first == second
