"""The training loop: one optimizer step after another, evaluated, saved, resumable bit for bit.

All state that a step depends on is the parameters, the optimizer, the scaler, the random generators and one number, the
step: learning rate and data are pure functions of it. The loop knows nothing of what is trained: it is given a function
from batch to `LossSum`.
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch

from mini_forge.errors import SignalExit, TrainingError
from mini_forge.training.losses import LossSum
from mini_forge.training.optim import Optimizer, clip_grad_norm
from mini_forge.training.schedule import lr_at

PATIENCE_SECONDS = 2.0
MAX_SKIPPED_STEPS = 50  # float16: so many steps in a row without a finite gradient cannot be cured by a smaller scale


class Interrupted(BaseException):
    """A signal asked the run to stop; a checkpoint has been saved if a step was made. Like KeyboardInterrupt it is no
    Exception: what handles faults, of a user's reward function for one, must not take it for one."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal_number = number


@dataclass(frozen=True)
class LoopSettings:
    """What the loop needs of the configuration. `save_steps`, `eval_steps`: None is never (but at the end)."""

    total_steps: int
    steps_per_epoch: int
    warmup_steps: int
    learning_rate: float
    schedule: str
    max_grad_norm: float
    logging_steps: int
    eval_steps: int | None
    save_steps: int | None
    patience: int | None = None
    keep_best: bool = False


@dataclass
class Progress:
    """Where the run stands; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0  # wall time since the first step began, evaluations and checkpoints included
    step_seconds: float = 0.0  # wall time within steps
    window_loss: float = 0.0
    window_count: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0
    window_metrics: dict = field(default_factory=dict)
    skipped_steps: int = 0  # fp16: in a row, without a finite gradient
    skipped: int = 0  # fp16: in all
    optimizer_steps: int = 0  # fp16: those skipped among them
    evaluated_step: int = -1
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False


class Resumable:
    """What both loops have in common: checkpoints, and how the optimizer steps. They have `progress`, `settings`,
    `parameters`, `optimizer`, `scaler`, `save` and `_saved_step`; `unit` is what one of their steps is called."""

    unit = "step"

    def state(self) -> dict:
        """Progress and scaler, as plain values; the checkpoint's other half is adapter, optimizer and generators."""
        return {"progress": asdict(self.progress), "scaler": self.scaler.state_dict() if self.scaler else None}

    def restore(self, state: dict):
        self.progress = type(self.progress)(**state["progress"])
        self._saved_step = self.progress.step
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])

    def _save_once(self):
        """A checkpoint of this step, unless it has one."""
        if self._saved_step != self.progress.step:
            self.save(self.progress)
            self._saved_step = self.progress.step

    def _check_trained(self):
        """Raise TrainingError at the end of a run in fp16 of which no step counted."""
        if self.progress.skipped and self.progress.skipped == self.progress.optimizer_steps:
            raise TrainingError(
                f"{self.unit} {self.progress.step}: no step had a finite fp16 gradient, nothing was trained; "
                "use bf16 or float32"
            )

    def _save_is_due(self, finished: bool) -> bool:
        step, every = self.progress.step, self.settings.save_steps
        return bool(every) and step > 0 and (finished or step % every == 0)

    def _optimizer_step(self, learning_rate: float) -> float:
        """Unscale, clip, step. Returns the gradient's norm before clipping. A group of parameters with "lr_scale" has
        that much of the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = float(clip_grad_norm(self.parameters, self.settings.max_grad_norm))
        if self.scaler is not None:
            self.scaler.step(self.optimizer)  # skips the update by itself when a gradient is not finite
            self.scaler.update()
            self.progress.optimizer_steps += 1
            self.progress.skipped += not math.isfinite(norm)
            self.progress.skipped_steps = 0 if math.isfinite(norm) else self.progress.skipped_steps + 1
            if self.progress.skipped_steps >= MAX_SKIPPED_STEPS:
                raise TrainingError(
                    f"{self.unit} {self.progress.step + 1}: {MAX_SKIPPED_STEPS} steps in a row had no finite fp16 "
                    "gradient; use bf16 or float32"
                )
        elif not math.isfinite(norm):
            raise TrainingError(
                f"{self.unit} {self.progress.step + 1}: the gradient's norm is {norm}, not a finite number; "
                "lower learning_rate or max_grad_norm"
            )
        else:
            self.optimizer.step()
        # The same memory again. New gradients amid a backward's large blocks leave holes: 6 % of a run's peak.
        self.optimizer.zero_grad(set_to_none=False)
        return norm


@dataclass
class Loop(Resumable):
    """One run in progress. The callables are its only ties to the outside:

    `window(step)` the microbatches of an optimizer step, `count(batch)` what its loss is divided by, `loss(batch)` its
    LossSum, `evaluate()` a dict with `eval_loss` (None: no evaluation), `save(progress)` a checkpoint, `log(record)` a
    line of metrics, `on_step(done, total)` is told how far it is."""

    settings: LoopSettings
    parameters: list[torch.nn.Parameter]
    optimizer: Optimizer
    scaler: torch.amp.GradScaler | None
    window: Callable[[int], list]
    count: Callable[[object], int]
    loss: Callable[[object], LossSum]
    evaluate: Callable[[], dict] | None
    save: Callable[[Progress], None]
    log: Callable[[dict], None]
    on_step: Callable[[int, int], None]
    progress: Progress = field(default_factory=Progress)
    _began: float | None = None  # on the process's clock, when the first step began
    _saved_step: int = -1
    _last_update: tuple[float, float] = (0.0, 0.0)  # learning rate and gradient norm

    def run(self) -> Progress:
        """Train to the end. Raises Interrupted after saving on SIGINT or SIGTERM, TrainingError when training fails."""
        progress, last = self.progress, self.settings.total_steps
        with stop_signals() as stop:
            try:
                while True:
                    self.on_step(progress.step, last)
                    self._evaluate_if_due()
                    finished = progress.step >= last or progress.stopped_early
                    if finished and progress.window_count:
                        self._log_window()
                    if finished:
                        self._check_trained()
                    if self._save_is_due(finished):
                        stop.hold(self._save_once)
                    if finished:
                        return progress
                    stop.hold(self._step)
            except Interrupted:
                self._save_once()
                raise

    def _step(self):
        progress, settings = self.progress, self.settings
        began = time.perf_counter()
        if self._began is None:
            self._began = began - progress.seconds
        batches = self.window(progress.step)
        learning_rate = lr_at(
            settings.schedule, progress.step, settings.total_steps, settings.warmup_steps, settings.learning_rate
        )
        loss, count, metrics = self._accumulate(batches)
        self._last_update = learning_rate, self._optimizer_step(learning_rate)
        progress.step += 1
        now = time.perf_counter()
        tokens = sum(batch.tokens for batch in batches)
        progress.seconds = now - self._began
        progress.step_seconds += now - began
        progress.tokens += tokens
        progress.trained_tokens += count
        progress.window_loss += loss
        progress.window_count += count
        progress.window_tokens += tokens
        progress.window_seconds += now - began
        for name, value in metrics.items():
            progress.window_metrics[name] = progress.window_metrics.get(name, 0.0) + value
        if progress.step == 1 or progress.step % settings.logging_steps == 0 or progress.step == settings.total_steps:
            self._log_window()

    def _accumulate(self, batches) -> tuple[float, int, dict]:
        """Backward through every microbatch, each divided by the whole step's count. Returns the sums."""
        count = sum(self.count(batch) for batch in batches)
        total, metrics = 0.0, {}
        for batch in batches:
            loss = self.loss(batch)
            share = loss.total / count
            (share if self.scaler is None else self.scaler.scale(share)).backward()
            total = total + loss.total.detach()
            for name, value in loss.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + float(value)
        value = float(total)
        if not math.isfinite(value):
            lines = sorted(line for batch in batches for line in batch.lines)
            raise TrainingError(
                f"step {self.progress.step + 1}: the loss is {value / count}, not a finite number (dataset lines "
                f"{', '.join(map(str, lines[:8]))}{' …' if len(lines) > 8 else ''}); lower learning_rate, or use "
                "bf16 or float32 instead of fp16"
            )
        return value, count, metrics

    def _log_window(self):
        progress, (learning_rate, norm) = self.progress, self._last_update
        record = {
            "step": progress.step,
            "epoch": round(progress.step / self.settings.steps_per_epoch, 4),
            "loss": progress.window_loss / max(progress.window_count, 1),
            "learning_rate": learning_rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "tokens": progress.tokens,
            "tokens_per_second": round(progress.window_tokens / max(progress.window_seconds, 1e-9), 2),
            "peak_memory_bytes": peak_memory_bytes(self.parameters[0].device),
            "seconds": round(progress.seconds, 4),
        }
        for name, value in progress.window_metrics.items():
            record[name] = value / max(progress.window_count, 1)
        progress.window_loss, progress.window_seconds = 0.0, 0.0
        progress.window_count = progress.window_tokens = 0
        progress.window_metrics = {}
        self.log(record)

    def _evaluate_if_due(self):
        progress, settings = self.progress, self.settings
        step, last = progress.step, settings.total_steps
        is_due = step in (0, last) or (settings.eval_steps and step % settings.eval_steps == 0)
        if self.evaluate is None or not is_due or progress.evaluated_step == step:
            return
        record = self.evaluate()
        self.log({"step": step, "epoch": round(step / settings.steps_per_epoch, 4), **record})
        progress.evaluated_step = step
        if progress.best_loss is None or record["eval_loss"] < progress.best_loss:
            progress.best_loss, progress.best_step = record["eval_loss"], step
            progress.evaluations_without_gain = 0
            if settings.keep_best:
                self._save_once()
        else:
            progress.evaluations_without_gain += 1
            if settings.patience and progress.evaluations_without_gain >= settings.patience:
                progress.stopped_early = True


class StopSignals:
    """Turns SIGINT and SIGTERM into `Interrupted`, at once, or after what `hold` runs: a step is never cut in two.

    Wrappers often deliver a signal twice, so a second one counts only some seconds later; it leaves without saving."""

    def __init__(self):
        self._holding, self._first, self._first_time = False, None, 0.0

    def __call__(self, number, frame):
        if self._first is not None:
            if time.monotonic() - self._first_time > PATIENCE_SECONDS:
                raise SignalExit(128 + number)  # the last checkpoint stands
            return
        self._first, self._first_time = number, time.monotonic()
        if not self._holding:
            raise Interrupted(number)
        print("stopping after this step …", file=sys.stderr)

    def hold(self, action: Callable[[], None]):
        self._holding = True
        try:
            action()
        finally:
            self._holding = False
        if self._first is not None:
            raise Interrupted(self._first)


@contextmanager
def stop_signals():
    """StopSignals in force, the former handlers back afterwards. Outside the main thread signals cannot be caught."""
    stop = StopSignals()
    try:
        former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        former = {}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: on CUDA what torch allocated there, elsewhere the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
