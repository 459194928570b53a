"""Going on with a run: whether there is one, whether it is the same, and its last checkpoint; and what beginning one
anew would take away."""

from collections.abc import Callable
from dataclasses import replace

from mini_forge.checkpoints import has_begun, put_back, read_checkpoint
from mini_forge.config import TrainingConfig
from mini_forge.errors import ConfigError, UserError
from mini_forge.io.runs import CONFIG_FILE, RunFolder
from mini_forge.model.decoder import Decoder
from mini_forge.prepare import Prepared
from mini_forge.stages import check_stages
from mini_forge.training.loop import Loop

# Keys that may change between a run and its resumption, because no step depends on them.
FREE_ON_RESUME = ("output_dir", "comment", "notes", "logging_steps", "save_steps", "save_strategy", "save_total_limit",
                  "per_device_eval_batch_size")  # fmt: skip


def is_to_resume(folder: RunFolder, config: TrainingConfig, report: Callable[[str], None]) -> bool:
    """Whether there is something to resume. Raises ConfigError if the configuration is not the run's own."""
    folder.sweep()
    if not has_begun(folder):
        report(f"{folder.path}: no checkpoint to resume from; starting from the beginning")
        return False
    _check_same(folder, config)
    return True


def on_its_own_day(folder: RunFolder, config: TrainingConfig) -> TrainingConfig:
    """The configuration with the date that the run in the folder told its template when it began."""
    if config.template_date is not None or not has_begun(folder):
        return config
    recorded = TrainingConfig.from_file(folder.path / CONFIG_FILE).template_date
    return replace(config, template_date=recorded, provenance={**config.provenance, "template_date": "the run"})


def restore(folder: RunFolder, loop: Loop, model: Decoder, prepared: Prepared, report: Callable[[str], None]):
    """Put model and loop where the last checkpoint was saved. Raises UserError where that is damaged, or of other
    data."""
    step, source, state = read_checkpoint(folder, prepared, prepared.fingerprint())
    put_back(source, state, model, loop)
    folder.truncate_metrics(step)
    report(f"resuming from {source}")


def own_inputs(folder: RunFolder, config: TrainingConfig, resume: bool) -> list[str]:
    """What `config` names of its run's own folder though that run, unless there is one to resume, begins by removing
    or replacing it: a line each. Of a reward model that is kept, only the folder itself may be named."""
    if resume and has_begun(folder):
        return []
    keys = ("dataset", "eval_dataset", "init_adapter", "reward_model")
    named = {key: value for key in keys if (value := getattr(config, key)) and folder.is_own(value)}
    if "reward_model" in named and folder.is_own_reward(named["reward_model"]):
        del named["reward_model"]
    return [
        f"{key}: {value!r} is of the run in output_dir, which a new run there replaces; copy it, or name another folder"
        for key, value in named.items()
    ]


def resume_problems(folder: RunFolder, prepared: Prepared) -> list[str]:
    """Why `train --resume` will refuse to go on here, as far as it is known without the model; nothing is written."""
    if not has_begun(folder) or folder.is_finished():
        return []
    try:
        _check_same(folder, prepared.config)
        if prepared.config.strategy == "rlhf":
            check_stages(folder, prepared)
        else:
            read_checkpoint(folder, prepared, prepared.fingerprint())
    except UserError as error:
        return list(error.problems)
    return []


def _check_same(folder: RunFolder, config: TrainingConfig):
    recorded, now = TrainingConfig.from_file(folder.path / CONFIG_FILE).to_dict(), config.to_dict()
    if recorded["template_date"] is None:  # of an older version: the tokens themselves are compared
        now["template_date"] = None
    changed = [k for k in now if k not in FREE_ON_RESUME and now[k] != recorded.get(k)]
    if changed:
        raise ConfigError(
            *[f"{k}: {now[k]!r} differs from {recorded.get(k)!r}, with which this run began; --resume goes on with the "
              "same run: give the same value, or start another with init_adapter" for k in changed]
        )  # fmt: skip
