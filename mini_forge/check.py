"""`check`: everything `train` would do, said beforehand; no weight is read.

The report is a plain dict (printed as JSON with --json): resolved values and where each came from, the plan for this
machine, dataset statistics, and one example with its trained-on tokens marked.
"""

import os
from pathlib import Path

from mini_forge.config import UNPAIRED_LOSSES, TrainingConfig, detect_machine
from mini_forge.config_json import read_object
from mini_forge.data.pairs import each
from mini_forge.data.tasks import TASKS, load_examples
from mini_forge.errors import ConfigError, DataError, UserError
from mini_forge.inputs import adapter_spec
from mini_forge.io.runs import RunFolder
from mini_forge.memory_plan import format_memory, memory_plan, memory_report
from mini_forge.prepare import Prepared, prepare
from mini_forge.providers import PROVIDERS
from mini_forge.resume import on_its_own_day, own_inputs, resume_problems
from mini_forge.settings import loop_settings, windows


def check(config: TrainingConfig, *, resume: bool = False, overwrite: bool = False) -> dict:
    """The report of what `train` with the same arguments would do; raises UserError with every problem found."""
    config = config.checked()
    prepared = _prepared(config, resume)
    window = windows(prepared)
    settings = loop_settings(config, window.steps_per_epoch, has_eval=bool(prepared.eval))
    config = prepared.config
    lora = adapter_spec(config)
    notes = [*prepared.notes, *_folder_notes(prepared, resume, overwrite)]
    return {
        "config": {k: {"value": v, "from": config.provenance.get(k, "default")} for k, v in config.to_dict().items()},
        "machine": {
            "device": prepared.plan.device,
            "precision": prepared.plan.dtype,
            "base weights": prepared.stored_form,
            "provider": PROVIDERS[config.provider](prepared.plan.device).describe(),
        },
        "adapter": {"rank": lora.rank, "alpha": lora.alpha, "scaling": lora.scaling, "dropout": lora.dropout},
        "dataset": {
            **_statistics(prepared.train_stats),
            **_looked_over(prepared),
            "evaluation_rows": len(prepared.eval),
            "max_length": prepared.max_length,
            "template": prepared.template.name,
        },
        "steps": {
            "total": settings.total_steps,
            "per_epoch": settings.steps_per_epoch,
            "warmup": settings.warmup_steps,
        },
        "memory": memory_report(memory_plan(prepared, window, settings.total_steps), detect_machine(config.device)),
        "example": prepared.form.show(prepared.train[0], prepared.tokenizer),
        "notes": notes,
    }


def _prepared(config: TrainingConfig, resume: bool) -> Prepared:
    """What `prepare` gives. What is wrong with the run's folder is told together with the faults of all else."""
    folder = RunFolder(config.output_dir)
    problems = own_inputs(folder, config, resume)
    for part in (folder.check_possible, lambda: prepare(on_its_own_day(folder, config) if resume else config)):
        try:
            prepared = part()
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return prepared


def dataset_problems(path: str, overrides: dict) -> list[str]:
    """What is wrong with the dataset of a configuration that has faults itself, so that both are told at once.

    Nothing, where the configuration is too broken to say what its dataset and task are."""
    try:
        keys = {**read_object(path), **overrides}
    except ConfigError:
        return []
    task, dataset = keys.get("task", "text-generation"), keys.get("dataset")
    if not isinstance(task, str) or task not in TASKS or not isinstance(dataset, str) or not dataset.strip():
        return []
    beside = Path(path).parent / dataset
    dataset = str(beside) if not os.path.exists(dataset) and os.path.exists(beside) else dataset
    try:
        strategy = keys.get("strategy", "sft")
        has_reward = strategy == "rlhf" and bool(keys.get("reward_model") or keys.get("reward_function"))
        is_labelled = strategy == "dpo" and keys.get("loss_type") in UNPAIRED_LOSSES
        load_examples(dataset, task, strategy, not has_reward, is_labelled)
    except DataError as error:
        return error.problems
    return []


def _statistics(stats) -> dict:
    return {
        "rows": stats.rows,
        "kept": stats.kept,
        "dropped": stats.dropped,
        "truncated": stats.truncated,
        "tokens": stats.tokens,
        "trained_tokens": stats.trained_tokens,
        "trained_share": round(stats.trained_tokens / max(stats.tokens, 1), 4),
    }


def _looked_over(prepared: Prepared) -> dict:
    """What takes a look at every document (a pair is two), so in one pass: the longest, and how many train on an end
    token last; the others were cut, or their template has none that is one token."""
    stops = set(prepared.template.stop_ids(prepared.tokenizer))
    longest = ended = count = 0
    for document in each(prepared.train):
        longest, ended, count = max(longest, len(document.ids)), ended + (int(document.ids[-1]) in stops), count + 1
    return {"longest": longest, "end_token_trained": f"{ended}/{count}"}


def _folder_notes(prepared: Prepared, resume: bool, overwrite: bool) -> list[str]:
    """A run that is there already: no fault of the configuration, which is looked at again after its run too."""
    folder, problems = RunFolder(prepared.config.output_dir), []
    try:
        folder.check_usable(resume=resume, overwrite=overwrite)
        folder.check_free()
        problems = resume_problems(folder, prepared) if resume else []
    except ConfigError as error:
        problems = error.problems
    return [f"train will refuse: {problem}" for problem in problems]


def format_report(report: dict) -> str:
    """The report for a person."""
    width = max(len(key) for key in report["config"])
    lines = ["configuration"]
    lines += [f"  {key:<{width}}  {_short(item['value'])}  ({item['from']})" for key, item in report["config"].items()]
    for part in ("machine", "adapter", "dataset", "steps"):
        lines += ["", part, *(f"  {key}: {value}" for key, value in report[part].items())]
    lines += ["", *format_memory(report["memory"])]
    lines += ["", "one example; ⟦…⟧ is trained on", report["example"]]
    lines += ["", *(f"note: {note}" for note in report["notes"])] if report["notes"] else []
    return "\n".join(lines)


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
