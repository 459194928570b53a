"""`train(config)`: the one place that wires configuration, data, model, objective, loop and run folder together."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from mini_forge import __version__
from mini_forge.checkpoints import keep_reference, last_checkpoint, read_reference, save_checkpoint
from mini_forge.config import TrainingConfig
from mini_forge.data.pairs import data_fingerprint
from mini_forge.durable import write_json
from mini_forge.errors import ConfigError, TrainingError, is_out_of_memory
from mini_forge.forms import LABELLED, PAIRS
from mini_forge.inputs import adapter_spec, has_reference, ties_to_init_adapter
from mini_forge.io.adapters import fill_adapter, save_adapter
from mini_forge.io.card import model_card
from mini_forge.io.fitting import check_adapter_format
from mini_forge.io.models import load_model
from mini_forge.io.runs import REFERENCE_FILE, SUMMARY_FILE, RunFolder
from mini_forge.io.weights import load_base
from mini_forge.model.decoder import Decoder
from mini_forge.model.lora import LoraSpec, inject
from mini_forge.prepare import Prepared, model_identity, prepare
from mini_forge.providers import PROVIDERS
from mini_forge.resume import is_to_resume, on_its_own_day, own_inputs, restore
from mini_forge.settings import loop_settings, objective_of, optimizer_of, windows
from mini_forge.stages import Stages, clear
from mini_forge.training.adapters_swap import copied_factors, copy_factors
from mini_forge.training.dpo import fill_reference
from mini_forge.training.loop import Interrupted, Loop, peak_memory_bytes, stop_signals
from mini_forge.training.malloc import keep_freed_memory
from mini_forge.training.preferences import REFERENCE_FREE


@dataclass
class RunResult:
    """What a run leaves: its folder and the lines of metrics.jsonl."""

    output_dir: Path
    metrics: list[dict]
    _model: Decoder | None = field(default=None, repr=False)

    @property
    def model(self) -> Decoder:
        """The trained model; where this call did not train it, read from the folder, in float32 over a base that is not
        quantized (`load_model` takes more)."""
        if self._model is None:
            self._model = load_model(self.output_dir)
        return self._model


def train(
    config: TrainingConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str], None] = print,
    on_metrics: Callable[[dict], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Fine-tune as `config` says; leaves a run folder and returns a RunResult.

    resume: go on from the run's last checkpoint. overwrite: replace a run that is there. `report` takes lines for a
    person, `on_step` steps done and all, `on_metrics` each record of metrics.jsonl. Torch's global generator is seeded,
    and on glibc the process keeps freed memory from then on. Raises UserError before anything is written, TrainingError
    when training fails, Interrupted after a signal."""
    if not isinstance(config, TrainingConfig):
        raise ConfigError(f"config: {config!r} must be a TrainingConfig, as TrainingConfig.from_file(…) makes one")
    config = config.checked()
    folder = RunFolder(config.output_dir)
    if resume and folder.is_finished():
        report(f"{folder.path}: this run is finished; nothing to do")
        return RunResult(folder.path, folder.metrics())
    folder.check_usable(resume=resume, overwrite=overwrite)
    # Whatever modes the caller is in: gradients are wanted, in the dtypes that the configuration names.
    devices = [name for name in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(name)]
    modes = torch.inference_mode(False), torch.enable_grad(), *(torch.autocast(d, enabled=False) for d in devices)
    with folder.held(), ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        return _train(config, folder, resume, report, on_metrics, on_step)


def _train(config: TrainingConfig, folder: RunFolder, resume: bool, report, on_metrics, on_step) -> RunResult:
    if problems := own_inputs(folder, config, resume):
        raise ConfigError(*problems)
    prepared = prepare(on_its_own_day(folder, config) if resume else config)
    config = prepared.config
    keep_freed_memory()
    torch.manual_seed(config.seed)
    lora = adapter_spec(config)
    model = build_model(prepared, lora, report)
    if resume:
        resume = is_to_resume(folder, config, report)
    build = partial(build_stages, report=report) if config.strategy == "rlhf" else build_loop
    loop = build(prepared, model, lora, folder, on_metrics, on_step)

    def begin():
        clear(folder, config.reward_model)
        if model.reference is not None:
            keep_reference(folder, model)

    # The reference is as it was when the run began, and so is the policy before its first step.
    if resume and model.reference is not None:
        model.reference = read_reference(folder.path, model)
        copy_factors(model, model.reference)
    if not resume:  # nothing on disk is touched before this line
        folder.start(config.to_dict(), begin)
    elif config.strategy == "rlhf":
        loop.restore()
    else:
        restore(folder, loop, model, prepared, report)
    _describe(prepared, model, loop, report)
    if config.precompute_reference and prepared.form is PAIRS and config.loss_type not in REFERENCE_FREE:
        _precompute_reference(prepared, model, folder, report)
    return _run(prepared, model, lora, folder, loop, report)


def build_model(prepared: Prepared, lora: LoraSpec, report=print, load: Callable = load_base) -> Decoder:
    """The base model as the plan says, with LoRA layers, ready to train. load: where its weights come from."""
    config, plan = prepared.config, prepared.plan
    provider = PROVIDERS[config.provider](plan.device)
    report(provider.describe())
    model = load(
        prepared.folder,
        getattr(torch, plan.dtype),
        plan.device,
        plan.quantization,
        nested=plan.nested,
        compute_dtype=getattr(torch, plan.compute_dtype),
        ops=provider.ops,
    )
    inject(model, lora, torch.Generator().manual_seed(config.seed))
    check_adapter_format(config, model)
    if config.init_adapter:
        fill_adapter(model, Path(config.init_adapter).expanduser())
    if ties_to_init_adapter(config):
        model.reference = copied_factors(model)
    model.recompute = config.recompute if config.gradient_checkpointing else None
    model.neftune_alpha = None if has_reference(config) else config.neftune_noise_alpha
    return model.train()


def build_loop(
    prepared: Prepared, model: Decoder, lora: LoraSpec, folder: RunFolder, on_metrics=None, on_step=None
) -> Loop:
    config, plan = prepared.config, prepared.plan
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    window = windows(prepared)
    settings = loop_settings(config, window.steps_per_epoch, has_eval=bool(prepared.eval))
    objective, fingerprint = objective_of(config), prepared.fingerprint()

    def save(progress):
        best = progress.best_step if config.load_best_model_at_end else None
        save_checkpoint(folder, prepared, model, lora, loop, fingerprint, best)

    def log(record):
        record = prepared.form.logged(record)
        folder.append_metrics(record)
        if on_metrics is not None:
            on_metrics(record)

    def evaluate():
        began = time.perf_counter()
        result = prepared.form.evaluate(
            model, prepared.eval, objective.sums, config.per_device_eval_batch_size, prepared.max_length
        )
        return {**result, "eval_seconds": round(time.perf_counter() - began, 3)}

    loop = Loop(
        settings=settings,
        parameters=[p for _, p in trainable],
        optimizer=optimizer_of(config, plan, trainable, config.learning_rate),
        scaler=torch.amp.GradScaler(plan.device) if plan.use_scaler else None,
        window=window,
        count=objective.count,
        loss=lambda batch: objective.loss(model, batch),
        evaluate=evaluate if prepared.eval else None,
        save=save,
        log=log,
        on_step=on_step or (lambda step, total: None),
    )
    return loop


def build_stages(
    prepared: Prepared, model: Decoder, lora: LoraSpec, folder: RunFolder, on_metrics=None, on_step=None, report=print
) -> Stages:
    """What takes the loop's place with strategy rlhf."""
    on_metrics, on_step = on_metrics or (lambda record: None), on_step or (lambda step, total: None)
    return Stages(prepared, model, lora, folder, report, on_metrics, on_step)


def _precompute_reference(prepared: Prepared, model: Decoder, folder: RunFolder, report):
    """Give every pair its reference log-probabilities, from the run's folder where they were computed before."""
    began = time.perf_counter()
    pairs = [*prepared.train, *prepared.eval]
    key = {"data": data_fingerprint(pairs), "model": model_identity(prepared)}
    batch_size = prepared.config.per_device_eval_batch_size
    filled, is_new = fill_reference(folder.path / REFERENCE_FILE, key, model, pairs, batch_size)
    count = len(prepared.train)
    prepared.train[:], prepared.eval[:] = filled[:count], filled[count:]  # in place: the loop holds these lists
    source = f"computed in {time.perf_counter() - began:.0f} s" if is_new else f"from {REFERENCE_FILE}"
    report(f"reference: {len(pairs)} pairs, {source}")


def _describe(prepared: Prepared, model: Decoder, loop: Loop, report):
    config, plan, stats = prepared.config, prepared.plan, prepared.train_stats
    trainable = sum(p.numel() for p in loop.parameters)
    stored = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    form = f"{prepared.stored_form}, training in {plan.dtype}"
    report(f"model: {config.model_name}, {stored / 2**20:.0f} MiB on {plan.device} ({form})")
    report(f"adapter: {trainable:,} trained parameters, template: {prepared.template.name}")
    evaluation = f", {len(prepared.eval)} to evaluate on" if prepared.eval else ""
    rows = f"{len(prepared.train)} {'pairs' if prepared.form is PAIRS else 'rows'}"
    report(
        f"data: {rows}, {stats.tokens:,} tokens, {stats.trained_tokens:,} trained on{evaluation}; "
        f"{loop.settings.total_steps} steps, {loop.settings.steps_per_epoch} an epoch"
    )
    for note in prepared.notes:
        report(f"note: {note}")


def _run(prepared: Prepared, model: Decoder, lora: LoraSpec, folder: RunFolder, loop: Loop, report) -> RunResult:
    try:
        loop.run()
        with stop_signals() as stop:  # a signal waits until the files are whole
            stop.hold(lambda: _finish(prepared, model, lora, folder, loop, report))
    except Interrupted as stopped:
        report(f"stopped by {stopped} at step {loop.progress.step}; go on with --resume")
        raise
    except (TrainingError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, TrainingError) and not is_out_of_memory(error):
            raise  # our own mistake: its traceback is wanted
        last = last_checkpoint(folder)
        good = f"last good checkpoint: {last}" if last else "no checkpoint was saved yet"
        raise TrainingError(f"{_reason(error)}; {good}") from error
    return RunResult(folder.path, folder.metrics(), model)


def _finish(prepared: Prepared, model: Decoder, lora: LoraSpec, folder: RunFolder, loop: Loop, report):
    """Leave the adapter and its companions in the run's folder."""
    config, progress = prepared.config, loop.progress
    if config.load_best_model_at_end and progress.best_step is not None and progress.best_step != progress.step:
        fill_adapter(model, folder.checkpoint(progress.best_step))
        report(f"the best evaluation was at step {progress.best_step}: its adapter is kept")
    model.eval()
    summary = summarise(prepared, loop, folder.metrics())

    def write(target: Path):
        save_adapter(target, model, lora, prepared.base_name, config.adapter_format)
        prepared.tokenizer.save(target)
        # The very template of the training, whoever reads this folder: it may not be the checkpoint's own.
        (target / "chat_template.jinja").write_text(prepared.template.source, encoding="utf-8", newline="")
        (target / "README.md").write_text(model_card(config.to_dict(), summary, prepared.base_name), encoding="utf-8")

    folder.publish(write)
    first, last = summary["eval_loss_first"], summary["eval_loss_last"]
    if first is not None and last > first and not config.load_best_model_at_end:
        report(f"note: the held-out loss rose from {first:.4f} to {last:.4f}; lower learning_rate, or train less")
    write_json(folder.path / SUMMARY_FILE, summary)  # last: its presence says that all else is in place


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory; lower per_device_train_batch_size or max_seq_length, or set gradient_checkpointing"
    return str(error)


def summarise(prepared: Prepared, loop: Loop, metrics: list[dict]) -> dict:
    """summary.json: how the run ended and what it cost."""
    progress, stats = loop.progress, prepared.train_stats
    unit = "rows" if prepared.form is LABELLED else "pairs" if prepared.config.strategy == "dpo" else "tokens"
    losses = [m["loss"] for m in metrics if "loss" in m]
    evaluations = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    return {
        "status": "finished",
        "steps": progress.step,
        "stopped_early": progress.stopped_early,
        "skipped_steps": progress.skipped,
        "train_loss_first": losses[0] if losses else None,
        "train_loss_last": losses[-1] if losses else None,
        "eval_loss_first": evaluations[0] if evaluations else None,
        "eval_loss_last": evaluations[-1] if evaluations else None,
        **_change(metrics, "eval_reward_accuracy"),
        **_change(metrics, "eval_reward_margin"),
        **_change(metrics, "eval_reward_mean"),
        "best_eval_loss": progress.best_loss,
        "best_step": progress.best_step,
        "tokens": progress.tokens,
        f"trained_{unit}": progress.trained_tokens,
        "seconds": round(progress.seconds, 3),
        "tokens_per_second": round(progress.tokens / max(progress.step_seconds, 1e-9), 2),
        "peak_memory_bytes": peak_memory_bytes(loop.parameters[0].device),
        "trained_parameters": sum(p.numel() for p in loop.parameters),
        "rows": stats.kept,
        "rows_truncated": stats.truncated,
        "rows_dropped": stats.dropped,
        "template": prepared.template.name,
        "precision": prepared.plan.dtype,
        "quantization": prepared.plan.quantization,
        "device": prepared.plan.device,
        "versions": {"mini_forge": __version__, "torch": torch.__version__},
    }


def _change(metrics: list[dict], name: str) -> dict:
    """A metric's first and last value, where it was logged."""
    values = [m[name] for m in metrics if name in m]
    return {f"{name}_first": values[0], f"{name}_last": values[-1]} if values else {}
