"""Whether what a run loads fits together, told by the headers of its files: no weight is read.

The functions are those that load, on a decoder without memory, so that a fault has the same words beforehand as later.
"""

from pathlib import Path

import torch

from mini_forge.config import Plan, TrainingConfig
from mini_forge.errors import ConfigError
from mini_forge.io.adapters import fill_adapter
from mini_forge.io.rewards import load_reward
from mini_forge.io.weights import load_base
from mini_forge.model.decoder import Decoder
from mini_forge.model.families.layout import PerExpert
from mini_forge.model.lora import LoraSpec, inject


def check_weights(config: TrainingConfig, plan: Plan, folder: Path, lora: LoraSpec):
    """Raise the UserError that loading the base, its first adapter or the reward model would raise."""
    options = {"quantization": plan.quantization, "headers_only": True}
    model = load_base(folder, **options)
    check_adapter_format(config, model)
    has_reward = config.strategy == "rlhf" and config.reward_model
    if not (config.init_adapter or has_reward):
        return
    with torch.device("meta"):
        inject(model, lora)
    if config.init_adapter:
        fill_adapter(model, Path(config.init_adapter).expanduser())
    if has_reward:
        load_reward(config.reward_model, model, config.model_name, **options)


def check_adapter_format(config: TrainingConfig, model: Decoder):
    """Raise ConfigError where adapters of the model's experts cannot be written as asked."""
    if config.adapter_format == "per-expert" and not isinstance(model.layout, PerExpert | None):
        raise ConfigError(
            'adapter_format: "per-expert" is for models whose checkpoints store each expert by itself; this one stores '
            'stacks, and other programs read its adapters only as "peft" writes them'
        )
