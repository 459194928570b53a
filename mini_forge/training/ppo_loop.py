"""The loop of PPO and GRPO: one update after another, evaluated, saved, resumable bit for bit.

Its unit is the update: a batch of rollouts and the optimizer steps on it. Between two updates the state is the adapter,
the value head, the optimizer and `Progress`; prompts, draws and mini-batches are functions of seed and update alone.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from mini_forge.data.batches import plan_epoch
from mini_forge.data.tokenizer import Tokenizer
from mini_forge.errors import TrainingError
from mini_forge.model.decoder import Decoder
from mini_forge.training.loop import Interrupted, Resumable, peak_memory_bytes, stop_signals
from mini_forge.training.optim import Optimizer
from mini_forge.training.ppo_math import adapted_kl_coef
from mini_forge.training.reward import Scorer
from mini_forge.training.rlhf import (
    ROLLOUT,
    Experience,
    PPOSettings,
    ValueHead,
    draws_of,
    experience_of,
    microbatches,
    minibatches,
    ppo_loss,
    response_kl,
    rollout_metrics,
    samples_of,
)
from mini_forge.training.rollouts import Prompt, Rollout, Sampling, sample_rollouts
from mini_forge.training.schedule import lr_at

SAMPLES_PER_UPDATE = 4  # rollouts kept as text


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0  # updates done
    kl_coef: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0  # wall time since the first update began, evaluations and checkpoints included
    step_seconds: float = 0.0  # wall time within updates
    window: list[dict] = field(default_factory=list)  # metrics of the updates not yet logged
    window_tokens: int = 0
    window_seconds: float = 0.0
    evaluated_step: int = -1
    skipped_steps: int = 0  # fp16: optimizer steps in a row without a finite gradient
    skipped: int = 0  # fp16: in all
    optimizer_steps: int = 0  # fp16: those skipped among them
    # A run's summary asks these of every loop; this one neither stops early nor looks for a best step.
    stopped_early: bool = False
    best_loss: float | None = None
    best_step: int | None = None


@dataclass
class PPO(Resumable):
    """One run in progress. `sampling` is how rollouts are drawn; the callables are its ties to the outside:

    `score(rollouts)` their rewards, `evaluate()` a dict (None: no evaluation), `save(progress)` a checkpoint, `log` and
    `log_sample` a line of metrics and of samples, `on_step(done, total)` is told how far it is."""

    unit = "update"

    settings: PPOSettings
    model: Decoder
    value_head: ValueHead | None
    parameters: list[torch.nn.Parameter]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler | None
    prompts: Sequence[Prompt]
    tokenizer: Tokenizer
    sampling: Sampling
    score: Scorer
    evaluate: Callable[[], dict] | None
    save: Callable[[Progress], None]
    log: Callable[[dict], None]
    log_sample: Callable[[dict], None]
    on_step: Callable[[int, int], None]
    progress: Progress | None = None
    _began: float | None = None
    _saved_step: int = -1

    def __post_init__(self):
        self.progress = self.progress or Progress(kl_coef=self.settings.kl_coef)

    def run(self) -> Progress:
        """Train to the end. Raises Interrupted after saving on SIGINT or SIGTERM, TrainingError when training fails."""
        progress, last = self.progress, self.settings.total_steps
        with stop_signals() as stop:
            try:
                while True:
                    self.on_step(progress.step, last)
                    stop.hold(self._evaluate_if_due)
                    if progress.step >= last:
                        self._check_trained()
                    if self._save_is_due(progress.step == last):
                        stop.hold(self._save_once)
                    if progress.step >= last:
                        return progress
                    began = time.perf_counter()
                    self._began = began - progress.seconds if self._began is None else self._began
                    rollouts = self._rollouts()  # no weight changes yet: a signal is heard at once
                    stop.hold(lambda: self._update(rollouts, began))  # noqa: B023
            except Interrupted:
                self._save_once()
                raise

    def prompts_of(self, update: int) -> list[Prompt]:
        """The prompts of one update, each as often as it is answered. The last update of an epoch may have fewer."""
        settings = self.settings
        epoch, index = divmod(update, self.settings.steps_per_epoch)
        lengths = [len(prompt.ids) for prompt in self.prompts]
        chosen = plan_epoch(lengths, settings.prompts_per_update, seed=settings.seed, epoch=epoch)[index]
        return [self.prompts[i] for i in chosen for _ in range(settings.group_size if settings.is_grouped else 1)]

    def _rollouts(self) -> list[Rollout]:
        step = self.progress.step
        draws = draws_of(self.settings.seed, step, ROLLOUT)
        return sample_rollouts(self.model, self.prompts_of(step), self.tokenizer, self.sampling, draws)

    def _update(self, rollouts: list[Rollout], began: float):
        """Score the rollouts and learn from them; then all that is told of the update."""
        progress, settings = self.progress, self.settings
        temperature, kl_coef = self.sampling.temperature, progress.kl_coef
        scores = self.score(rollouts)
        experience = experience_of(self.model, self.value_head, rollouts, scores, settings, temperature, kl_coef)
        kl = response_kl(experience.logps, experience.ref_logps, experience.is_response)
        metrics = rollout_metrics(rollouts, experience, kl) | {"kl_coef": kl_coef}
        metrics |= self._learn(experience)
        if settings.kl_target is not None:
            progress.kl_coef = adapted_kl_coef(kl_coef, metrics["kl"], settings.kl_target)
        progress.step += 1
        now = time.perf_counter()
        progress.seconds = now - self._began
        progress.step_seconds += now - began
        progress.tokens += experience.tokens
        progress.trained_tokens += int(experience.is_response.sum())
        progress.window.append(metrics)
        progress.window_tokens += experience.tokens
        progress.window_seconds += now - began
        for sample in samples_of(rollouts[:SAMPLES_PER_UPDATE], scores, kl):
            self.log_sample({"step": progress.step, **sample})
        if progress.step == 1 or progress.step % settings.logging_steps == 0 or progress.step == settings.total_steps:
            self._log_window()

    def _learn(self, experience: Experience) -> dict[str, float]:
        """ppo_epochs × num_mini_batches optimizer steps, or fewer; returns means over the tokens of all of them."""
        settings, update = self.settings, self.progress.step
        self.model.train()
        sums: dict[str, float] = {}
        tokens = done = 0
        rate = norm = 0.0
        for epoch in range(settings.ppo_epochs):
            for rows in minibatches(len(experience.documents), settings, update, epoch):
                rate = self._learning_rate(update, done)
                new, count = self._backward(experience, rows)
                for name, value in new.items():
                    sums[name] = sums.get(name, 0.0) + value
                tokens += count
                if settings.target_kl is not None and new["approx_kl"] / count > settings.target_kl:
                    self.optimizer.zero_grad(set_to_none=False)
                    return self._told(sums, tokens, done, rate, norm)
                norm = self._optimizer_step(rate)
                done += 1
        return self._told(sums, tokens, done, rate, norm)

    @staticmethod
    def _told(sums: dict[str, float], tokens: int, done: int, rate: float, norm: float) -> dict[str, float]:
        means = {name: value / tokens for name, value in sums.items()}
        return {**means, "learning_rate": rate, "grad_norm": norm, "optimizer_steps": done}

    def _learning_rate(self, update: int, done: int) -> float:
        """The schedule counts optimizer steps, as if no update had stopped early."""
        settings = self.settings
        steps = settings.ppo_epochs * settings.num_mini_batches
        return lr_at(settings.schedule, update * steps + done, settings.total_steps * steps, settings.warmup_steps,
                     settings.learning_rate)  # fmt: skip

    def _backward(self, experience: Experience, rows: Sequence[int]) -> tuple[dict[str, float], int]:
        """Backward through a mini-batch, every token of it weighing the same. Returns metrics' sums and the tokens."""
        count = sum(experience.documents[i].trained_tokens for i in rows)
        sums: dict[str, torch.Tensor] = {}
        for part in microbatches(rows, self.settings):
            total, new = ppo_loss(
                self.model, self.value_head, experience, part, self.settings, self.sampling.temperature,
                self.progress.kl_coef,
            )  # fmt: skip
            share = total / count
            (share if self.scaler is None else self.scaler.scale(share)).backward()
            sums = {name: sums[name] + value if name in sums else value for name, value in new.items()}
        values = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))  # one wait for the device
        if not math.isfinite(values["loss"]):
            raise TrainingError(
                f"update {self.progress.step + 1}: the loss is {values['loss'] / count}, not a finite number; lower "
                "learning_rate, or use bf16 or float32 instead of fp16"
            )
        return values, count

    def _log_window(self):
        """One line: means over the updates since the last, of rate and norm the last."""
        progress, window = self.progress, self.progress.window
        last = window[-1]
        means = {name: sum(metrics[name] for metrics in window) / len(window) for name in last}
        record = {
            "step": progress.step,
            "epoch": round(progress.step / self.settings.steps_per_epoch, 4),
            "loss": means["loss"],
            "learning_rate": last["learning_rate"],
            "grad_norm": last["grad_norm"] if math.isfinite(last["grad_norm"]) else None,
            "tokens": progress.tokens,
            "tokens_per_second": round(progress.window_tokens / max(progress.window_seconds, 1e-9), 2),
            "peak_memory_bytes": peak_memory_bytes(self.parameters[0].device),
            "seconds": round(progress.seconds, 4),
        }
        self.log(record | {name: value for name, value in means.items() if name not in record})
        progress.window, progress.window_tokens, progress.window_seconds = [], 0, 0.0

    def _evaluate_if_due(self):
        progress, settings = self.progress, self.settings
        step, every = progress.step, settings.eval_steps
        is_due = step in (0, settings.total_steps) or (every and step % every == 0)
        if self.evaluate is None or not is_due or progress.evaluated_step == step:
            return
        self.log({"step": step, "epoch": round(step / self.settings.steps_per_epoch, 4), **self.evaluate()})
        progress.evaluated_step = step
