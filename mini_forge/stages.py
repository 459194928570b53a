"""Strategy rlhf as a run knows it: a reward model learnt from the pairs, unless a reward is given, and then PPO.

Both stages work on one backbone. The first leaves `reward/`, a run's folder of its own; once that is finished it is not
trained again, so each stage goes on where it was stopped. `Stages` looks to a run as a loop does.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from mini_forge.checkpoints import put_back, read_checkpoint, save_checkpoint
from mini_forge.config import Plan, TrainingConfig
from mini_forge.data.pairs import data_fingerprint
from mini_forge.durable import write_atomic, write_json
from mini_forge.forms import trains_reward
from mini_forge.inference.evaluate import evaluate_pairs
from mini_forge.io.rewards import load_function, load_reward, save_reward
from mini_forge.io.runs import (
    CONFIG_FILE,
    REWARD_FOLDER,
    SAMPLES_FILE,
    SUMMARY_FILE,
    RunFolder,
    read_records,
)
from mini_forge.io.state import check_same_data
from mini_forge.json_faults import read_json
from mini_forge.model.decoder import Decoder
from mini_forge.model.lora import LoraSpec
from mini_forge.prepare import Prepared
from mini_forge.settings import optimizer_of, ppo_settings, reward_settings, reward_windows, sampling_of
from mini_forge.training.adapters_swap import fresh_factors, live_factors, put_factors
from mini_forge.training.loop import Loop
from mini_forge.training.ppo_loop import PPO, Progress
from mini_forge.training.reward import RewardHead, Scorer, function_scorer, model_scorer, reward_objective
from mini_forge.training.rlhf import PPOSettings, ValueHead, evaluate_policy
from mini_forge.training.rollouts import prompt_document

EVAL_PROMPTS = 64  # answered at each evaluation during training; `eval` answers all
HEAD_SEED = 1  # beside the run's seed, so that reward and policy do not begin with the same adapter


@dataclass
class Stages:
    """One rlhf run in progress, with a loop's `settings`, `parameters`, `progress` and `run`."""

    prepared: Prepared
    model: Decoder
    lora: LoraSpec
    folder: RunFolder
    report: Callable[[str], None]
    on_metrics: Callable[[dict], None]
    on_step: Callable[[int, int], None]
    ppo: PPO = field(init=False)
    _running: Loop | PPO = field(init=False)

    def __post_init__(self):
        self._running = self.ppo = self._build_ppo()
        if not trains_reward(self.prepared.config):  # what is wrong with a given reward is told before any work
            self.ppo.score = self._scorer()

    @property
    def settings(self) -> PPOSettings:
        return self.ppo.settings

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return self.ppo.parameters

    @property
    def progress(self):
        return self._running.progress

    def run(self) -> Progress:
        if trains_reward(self.prepared.config):
            self._reward_stage()
            self.ppo.score = self._scorer()
        self._running = self.ppo
        return self.ppo.run()

    def _scorer(self) -> Scorer:
        return scorer_of(self.prepared.config, self.prepared.plan, self.model, self.folder.path)

    def restore(self):
        """Go on from the last checkpoint of PPO, if there is one; the reward stage looks after itself."""
        check_stages(self.folder, self.prepared)
        steps = self.folder.steps()
        self.folder.truncate_metrics(steps[-1] if steps else -1)
        truncate_samples(self.folder.path / SAMPLES_FILE, steps[-1] if steps else -1)
        if not steps:
            return
        _, source, state = read_checkpoint(self.folder, self.prepared, self._fingerprint(), "value_head")
        if self.ppo.value_head is not None:
            self.ppo.value_head.load_state_dict(state["value_head"])
        put_back(source, state, self.model, self.ppo)
        self.report(f"resuming from {source}")

    def _fingerprint(self) -> int:
        return prompts_fingerprint(self.prepared)

    def _build_ppo(self) -> PPO:
        prepared, model = self.prepared, self.model
        config, plan = prepared.config, prepared.plan
        settings = ppo_settings(config, len(prepared.prompts))
        head = None if settings.is_grouped else ValueHead(model.spec.hidden_size).to(model.device)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        named += [] if head is None else list(head.named_parameters())
        return PPO(
            settings=settings,
            model=model,
            value_head=head,
            parameters=[p for _, p in named],
            optimizer=optimizer_of(config, plan, named, config.learning_rate),
            scaler=torch.amp.GradScaler(plan.device) if plan.use_scaler else None,
            prompts=prepared.prompts,
            tokenizer=prepared.tokenizer,
            sampling=sampling_of(config, prepared.template, prepared.tokenizer),
            score=None,  # known when the reward stage is over
            evaluate=self._evaluate if prepared.eval_prompts else None,
            save=self._save_ppo,
            log=self._log,
            log_sample=partial(append_line, self.folder.path / SAMPLES_FILE),
            on_step=self.on_step,
        )

    def _log(self, record: dict):
        self.folder.append_metrics(record)
        self.on_metrics(record)

    def _save_ppo(self, progress: Progress):
        head = None if self.ppo.value_head is None else self.ppo.value_head.state_dict()
        data = self._fingerprint()
        save_checkpoint(self.folder, self.prepared, self.model, self.lora, self.ppo, data, value_head=head)

    def _evaluate(self) -> dict:
        began, prepared = time.perf_counter(), self.prepared
        metrics, _ = evaluate_policy(
            self.model, prepared.eval_prompts[:EVAL_PROMPTS], prepared.tokenizer, self.ppo.sampling, self.ppo.score,
            prepared.config.seed, prepared.config.per_device_eval_batch_size,
        )  # fmt: skip
        return {**metrics, "eval_seconds": round(time.perf_counter() - began, 3)}

    def _reward_stage(self):
        """Train the reward model in `reward/`, or what is left of it. The policy's adapter stands aside meanwhile."""
        folder = RunFolder(self.folder.path / REWARD_FOLDER)
        if folder.is_finished():
            self.report(f"reward model: {folder.path}, trained before")
            return
        policy, size = live_factors(self.model), self.model.spec.hidden_size
        draws = torch.Generator().manual_seed(self.prepared.config.seed + HEAD_SEED)
        put_factors(self.model, fresh_factors(self.model, self.lora, draws))
        head = RewardHead(size, draws).to(self.model.device)
        try:
            self._running = loop = self._reward_loop(folder, head)
            self._begin_reward(folder, loop, head)
            loop.run()
            self._finish_reward(folder, loop, head)
        finally:
            put_factors(self.model, policy)
        for parameter in self.parameters:
            parameter.grad = None  # of the reward's adapter

    def _reward_loop(self, folder: RunFolder, head: RewardHead) -> Loop:
        prepared, model = self.prepared, self.model
        config, plan = prepared.config, prepared.plan
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad] + list(head.named_parameters())
        window = reward_windows(prepared)
        objective, batch_size = reward_objective(head), config.per_device_eval_batch_size

        def evaluate():
            return evaluate_pairs(model, prepared.eval, objective.sums, batch_size=batch_size)

        def log(record: dict):
            folder.append_metrics(record)
            self.on_metrics({"stage": REWARD_FOLDER, **record})

        def save(progress):
            data = prepared.fingerprint()
            save_checkpoint(folder, prepared, model, self.lora, loop, data, head=head.state_dict())

        model.train()
        loop = Loop(
            settings=reward_settings(config, window.steps_per_epoch),
            parameters=[p for _, p in named],
            optimizer=optimizer_of(config, plan, named, config.reward_learning_rate),
            scaler=torch.amp.GradScaler(plan.device) if plan.use_scaler else None,
            window=window,
            count=objective.count,
            loss=lambda batch: objective.loss(model, batch),
            evaluate=evaluate if prepared.eval else None,
            save=save,
            log=log,
            on_step=lambda step, total: None,  # the bar is of updates
        )
        return loop

    def _begin_reward(self, folder: RunFolder, loop: Loop, head: RewardHead):
        folder.sweep()
        if not folder.steps():
            folder.start(self.prepared.config.to_dict())
            self.report(f"reward model: {len(self.prepared.train)} pairs, {loop.settings.total_steps} steps")
            return
        step, source, state = read_checkpoint(folder, self.prepared, self.prepared.fingerprint(), "head")
        head.load_state_dict(state["head"])
        put_back(source, state, self.model, loop)
        folder.truncate_metrics(step)
        self.report(f"resuming the reward model from {source}")

    def _finish_reward(self, folder: RunFolder, loop: Loop, head: RewardHead):
        def write(target: Path):
            save_reward(target, self.model, head, self.lora, self.prepared.base_name)
            self.prepared.tokenizer.save(target)

        folder.publish(write)
        accuracies = [m["eval_reward_accuracy"] for m in folder.metrics() if "eval_reward_accuracy" in m]
        first, last = (accuracies[0], accuracies[-1]) if accuracies else (None, None)
        summary = {"status": "finished", "data": self.prepared.fingerprint(), "steps": loop.progress.step,
                   "trained_pairs": loop.progress.trained_tokens,
                   "eval_reward_accuracy_first": first, "eval_reward_accuracy_last": last,
                   "seconds": round(loop.progress.seconds, 3)}  # fmt: skip
        write_json(folder.path / SUMMARY_FILE, summary)
        told = (
            "" if first is None else f"; prefers the chosen of held-out pairs in {first:.1%} before, {last:.1%} after"
        )
        self.report(f"reward model: saved in {folder.path}{told}")


def prompts_fingerprint(prepared: Prepared) -> int:
    return data_fingerprint([prompt_document(prompt) for prompt in prepared.prompts])


def check_stages(folder: RunFolder, prepared: Prepared):
    """Raise UserError where what either stage has left is damaged, or of other data; nothing is written."""
    reward = RunFolder(folder.path / REWARD_FOLDER)
    if trains_reward(prepared.config) and reward.is_finished():
        record = read_json(reward.path / SUMMARY_FILE)
        check_same_data(record, prepared.fingerprint(), prepared.config.dataset, reward.path)
    elif trains_reward(prepared.config) and reward.steps():
        read_checkpoint(reward, prepared, prepared.fingerprint(), "head")
    if folder.steps():
        read_checkpoint(folder, prepared, prompts_fingerprint(prepared), "value_head")


def clear(folder: RunFolder, reward_model: str | None):
    """Remove the reward model that an earlier rlhf run trained here, but not the one to be used."""
    reward = folder.path / REWARD_FOLDER
    is_wanted = reward_model is not None and folder.is_own_reward(reward_model)
    if (reward / CONFIG_FILE).is_file() and not is_wanted:
        shutil.rmtree(reward)


def scorer_of(config: TrainingConfig, plan: Plan, model: Decoder, run: Path) -> Scorer:
    """What gives responses their reward: the function, the reward model that was named, or the run's own."""
    if config.reward_function:
        return function_scorer(load_function(config.reward_function), config.reward_function)
    stored = load_reward(
        config.reward_model or run / REWARD_FOLDER, model, config.model_name, dtype=getattr(torch, plan.dtype),
        device=plan.device, quantization=plan.quantization, nested=plan.nested,
        compute_dtype=getattr(torch, plan.compute_dtype), ops=model.ops,
    )  # fmt: skip
    head = RewardHead.of(stored.score, stored.pad_id)
    return model_scorer(stored.model, stored.factors, head, config.per_device_eval_batch_size)


def append_line(path: Path, record: dict):
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def truncate_samples(path: Path, step: int):
    """Forget samples of updates after checkpoint `step`: the resumed run writes them again."""
    if path.exists():
        kept = [record for record in read_records(path) if record["step"] <= step]
        write_atomic(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
