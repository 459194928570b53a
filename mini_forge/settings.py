"""What a configuration means to the loops: objective, documents of each step, settings, optimizer."""

import math
from dataclasses import replace

import torch

from mini_forge.config import Plan, TrainingConfig
from mini_forge.data.chat import Template
from mini_forge.data.pairs import collate_pairs
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.forms import LABELLED, PAIRS, form_of
from mini_forge.inference.generate import spelled_end, until
from mini_forge.prepare import Prepared
from mini_forge.training.dpo import preference_objective
from mini_forge.training.kto import KTOOptions, kto_objective
from mini_forge.training.loop import LoopSettings
from mini_forge.training.losses import Objective
from mini_forge.training.optim import make_optimizer, parameter_groups
from mini_forge.training.preferences import LossOptions
from mini_forge.training.rlhf import PPOSettings
from mini_forge.training.rollouts import Sampling
from mini_forge.training.schedule import warmup_steps
from mini_forge.training.sft import SFT
from mini_forge.training.windows import Windows

OBJECTIVES = {"sft": SFT, "qlora": SFT}  # of strategies whose objective has no settings


def objective_of(config: TrainingConfig) -> Objective:
    """What the run's strategy minimises."""
    if config.strategy != "dpo":
        return OBJECTIVES[config.strategy]
    if form_of(config) is LABELLED:
        return kto_objective(KTOOptions(config.beta, config.desirable_weight, config.undesirable_weight))
    return preference_objective(config.loss_type, LossOptions(config.beta, config.label_smoothing, config.simpo_gamma))


def windows(prepared: Prepared) -> Windows:
    """The run's training documents, cut into optimizer steps."""
    config = prepared.config
    if config.strategy == "rlhf":  # as many rows as an update of PPO asks; the reward stage has windows of its own
        asked = config.rollout_batch_size // responses_to_each(config)
        size = min(config.per_device_train_batch_size, asked)
        return Windows(prepared.train, size, asked // size, False, False, 0, config.seed, prepared.collate)
    capacity = prepared.max_length * (2 if prepared.form is PAIRS else 1)  # a bin has room for the longest pair
    return Windows(
        prepared.train, config.per_device_train_batch_size, config.gradient_accumulation_steps, config.group_by_length,
        config.packing, capacity, config.seed, prepared.collate,
    )  # fmt: skip


def reward_windows(prepared: Prepared) -> Windows:
    """The pairs that a reward model is trained on, cut likewise; each response is whole."""
    config = prepared.config
    return Windows(
        prepared.train, config.per_device_train_batch_size, config.gradient_accumulation_steps, config.group_by_length,
        config.packing, 2 * prepared.max_length, config.seed, collate_pairs,
    )  # fmt: skip


def responses_to_each(config: TrainingConfig) -> int:
    """How often an update of rlhf answers a prompt."""
    return config.group_size if config.advantage == "group" else 1


def sampling_of(config: TrainingConfig, template: Template, tokenizer: Tokenizer) -> Sampling:
    """How the run's rollouts are drawn, and where they end."""
    allowed = until(spelled_end(template, tokenizer), tokenizer)
    is_ended = None if allowed is None else lambda tokens: allowed(0, tokens) == []
    return Sampling(config.max_new_tokens, config.temperature, frozenset(template.stop_ids(tokenizer)), is_ended)


def ppo_settings(config: TrainingConfig, prompts: int) -> PPOSettings:
    """The configuration's keys for a number of prompts to train on."""
    same = ("logging_steps", "rollout_batch_size", "ppo_epochs", "num_mini_batches", "learning_rate", "max_grad_norm",
            "kl_coef", "kl_estimator", "kl_target", "target_kl", "gamma", "gae_lambda", "clip_range",
            "value_clip_range", "value_coef", "advantage", "group_size", "seed")  # fmt: skip
    per_epoch = math.ceil(prompts / (config.rollout_batch_size // responses_to_each(config)))
    total = config.max_steps if config.max_steps > 0 else per_epoch * config.num_train_epochs
    return PPOSettings(
        total_steps=total,
        steps_per_epoch=per_epoch,
        eval_steps=config.eval_steps,
        save_steps={"no": None, "steps": config.save_steps, "epoch": per_epoch}[config.save_strategy],
        micro_batch_size=config.per_device_train_batch_size,
        schedule=config.lr_scheduler_type,
        warmup_steps=warmup_steps(total * config.ppo_epochs * config.num_mini_batches, config.warmup_ratio),
        **{name: getattr(config, name) for name in same},
    )


def loop_settings(config: TrainingConfig, steps_per_epoch: int, has_eval: bool) -> LoopSettings:
    """The configuration's keys for an epoch of so many steps."""
    total = config.max_steps if config.max_steps > 0 else steps_per_epoch * config.num_train_epochs
    save_steps = {"no": None, "steps": config.save_steps, "epoch": steps_per_epoch}[config.save_strategy]
    return LoopSettings(
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps(total, config.warmup_ratio),
        learning_rate=config.learning_rate,
        schedule=config.lr_scheduler_type,
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logging_steps,
        eval_steps=config.eval_steps if has_eval else None,
        save_steps=save_steps,
        patience=config.early_stopping_patience,
        keep_best=config.load_best_model_at_end and has_eval,
    )


def reward_settings(config: TrainingConfig, steps_per_epoch: int) -> LoopSettings:
    """Those of the reward model's training."""
    own = {"num_train_epochs": config.reward_epochs, "learning_rate": config.reward_learning_rate}
    of_the_policy = {"max_steps": -1, "early_stopping_patience": None, "load_best_model_at_end": False}
    return loop_settings(replace(config, **own, **of_the_policy), steps_per_epoch, has_eval=True)


def optimizer_of(config: TrainingConfig, plan: Plan, named: list, learning_rate: float) -> torch.optim.Optimizer:
    """named: (name, parameter) of all that is trained."""
    groups = parameter_groups(named, config.weight_decay)
    return make_optimizer(config.optim, groups, learning_rate, config.weight_decay, plan.device)
