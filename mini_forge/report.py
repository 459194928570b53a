"""What runs were and how they went, on one HTML page that needs nothing else: facts, curves, evaluations.

Curves are of all that metrics.jsonl holds; of a name and its `eval_` twin one chart is made. Several runs share their
charts, each in its colour. A run that has not ended is shown as far as it is.
"""

import json
import math
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mini_forge.config_plan import GIB
from mini_forge.errors import ConfigError
from mini_forge.io.records import read_json
from mini_forge.io.runs import (
    CONFIG_FILE,
    EVAL_FILE,
    METRICS_FILE,
    REPORT_FILE,
    REWARD_FOLDER,
    SUMMARY_FILE,
    read_records,
    write_atomic,
)
from mini_forge.plots import COLOURS, Line, chart, number

MARK = "<!doctype html>\n<!-- mini_forge report -->\n"
FIRST_CHARTS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes")
NO_CHARTS = {"step", "epoch", "tokens", "seconds", "eval_seconds", "eval_tokens", "eval_rows", "eval_pairs"}
TITLES = {"loss": "loss", "learning_rate": "learning rate", "grad_norm": "gradient norm, before clipping",
          "tokens_per_second": "tokens a second", "peak_memory_bytes": "peak memory, GiB"}  # fmt: skip
# Of the configuration and of summary.json, in the order of the table.
CONFIG_FACTS = ("model_name", "dataset", "task", "strategy", "loss_type", "provider", "learning_rate",
                "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "max_seq_length",
                "packing", "gradient_checkpointing", "lora_r", "lora_alpha", "lora_dropout", "seed")  # fmt: skip
SUMMARY_FACTS = ("status", "steps", "rows", "tokens", "seconds", "tokens_per_second", "peak_memory_bytes",
                 "trained_parameters", "train_loss_first", "train_loss_last", "eval_loss_first", "eval_loss_last",
                 "best_eval_loss", "best_step", "precision", "quantization", "device")  # fmt: skip
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 1180px; margin: 2em auto; padding: 0 1em; }
h1, h2 { font-weight: 600; } h1 { font-size: 1.4em; } h2 { font-size: 1.05em; margin: 0 0 .3em; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1.6em; margin: 1.6em 0; }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
.grid { stroke: currentColor; opacity: .18; } .key { margin-right: 1.2em; white-space: nowrap; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1em 0; }
th, td { text-align: left; padding: .2em 1.2em .2em 0; border-bottom: 1px solid #8884; vertical-align: top; }
th { font-weight: 600; }
"""


@dataclass(frozen=True)
class Run:
    """A run's folder as read: the records of metrics.jsonl; configuration, summary and eval.json, {} where missing."""

    name: str
    records: list[dict]
    config: dict
    summary: dict
    evaluation: dict

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) wherever a record has a number of that name."""
        scale = GIB if name.endswith("_bytes") else 1
        return [(r["step"], r[name] / scale) for r in self.records if _is_number(r.get(name))]


def write_report(folders: list[str], out: str | None = None) -> Path:
    """Write the page about `folders` to `out`, or to report.html in the first of them. Returns where.

    Raises UserError for a folder that is no run, a file of it that is damaged, and an `out` that is something else."""
    runs = [run for folder in folders for run in read_run(folder)]
    names = [run.name for run in runs]
    problem = next((name for name in names if names.count(name) > 1), None)
    if problem is not None:
        raise ConfigError(f"arguments: {problem!r} is given twice; give every run once")
    target = Path(out or Path(folders[0], REPORT_FILE)).expanduser()
    _check_target(target)
    write_atomic(target, page(runs))
    return target


def read_run(folder: str) -> list[Run]:
    """The run in `folder` and, of rlhf, the training of its reward model before it."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"arguments: {folder!r} is not a folder; report takes folders that train has written")
    name = folder.rstrip(os.sep) or folder
    stages = {f"{name}: reward model": path / REWARD_FOLDER, name: path}
    if not any((place / METRICS_FILE).is_file() for place in stages.values()):
        raise ConfigError(f"{path}: has no {METRICS_FILE}; report takes folders that train has written")
    runs = [_read_stage(name, place) for name, place in stages.items()]
    runs = [run for run in runs if run.records]
    if not runs:
        raise ConfigError(f"{path / METRICS_FILE}: holds no record yet; wait for the first step")
    return runs


def _read_stage(name: str, place: Path) -> Run:
    files = (place / CONFIG_FILE, place / SUMMARY_FILE, place / EVAL_FILE)
    return Run(name, read_records(place / METRICS_FILE), *(read_json(f) if f.is_file() else {} for f in files))


def page(runs: list[Run]) -> str:
    """The whole page, as text."""
    title = "mini_forge: " + ", ".join(run.name for run in runs)
    keys = "".join(
        f'<span class="key" style="color: {COLOURS[i % len(COLOURS)]}">&#9644; {escape(run.name)}</span>'
        for i, run in enumerate(runs)
    )
    charts = "\n".join(
        f"<section><h2>{escape(TITLES.get(name, name.replace('_', ' ')))}</h2>\n{_chart(runs, name)}</section>"
        for name in chart_names(runs)
    )
    evaluated = [run for run in runs if run.evaluation]
    tables = [_table(runs, [_facts(run) for run in runs])]
    if evaluated:
        tables.append("<h2>eval</h2>\n" + _table(evaluated, [run.evaluation for run in evaluated]))
    return (
        f'{MARK}<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
        f"<p>{keys}<br>Solid: training. Dashed: evaluation.</p>\n"
        f'<div class="charts">\n{charts}\n</div>\n' + "\n".join(tables) + "\n</html>\n"
    )


def chart_names(runs: list[Run]) -> list[str]:
    """What is drawn, without `eval_`: the usual first, then the rest as it comes."""
    found = dict.fromkeys(
        name.removeprefix("eval_")
        for run in runs for record in run.records for name, value in record.items()
        if name not in NO_CHARTS and _is_number(value)
    )  # fmt: skip
    return [*(name for name in FIRST_CHARTS if name in found), *(name for name in found if name not in FIRST_CHARTS)]


def _chart(runs: list[Run], name: str) -> str:
    lines = [
        Line(f"{run.name}, {full}", points, i, is_dashed=full != name)
        for i, run in enumerate(runs) for full in (name, f"eval_{name}") if (points := run.points(full))
    ]  # fmt: skip
    return chart(lines, "step")


def _facts(run: Run) -> dict:
    unused = {"loss_type"} if run.config.get("strategy") != "dpo" else set()
    facts = {name: run.config[name] for name in CONFIG_FACTS if name in run.config and name not in unused}
    if not run.summary:
        facts |= {"status": "not finished", "steps": run.records[-1]["step"]}
    return facts | {name: run.summary[name] for name in SUMMARY_FACTS if name in run.summary}


def _table(runs: list[Run], facts: list[dict]) -> str:
    """A column a run, a row a fact that any has."""
    names = dict.fromkeys(name for each in facts for name in each)
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "\n".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{_cell(name, each.get(name))}</td>" for each in facts) + "</tr>"
        for name in names
    )
    return f'<div class="scroll"><table>\n<tr><th></th>{head}</tr>\n{rows}\n</table></div>'


def _cell(name: str, value) -> str:
    if value is None:
        return "–"
    if _is_number(value) and name.endswith("_bytes"):
        return f"{value / GIB:.2f} GiB"
    if isinstance(value, float):
        return number(value)
    return escape(f"{value:,}" if type(value) is int else value if isinstance(value, str) else json.dumps(value))


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_target(target: Path):
    """It is written over only where it is a report."""
    if target.is_dir():
        raise ConfigError(f"--out: {str(target)!r} is a folder; name a file")
    if not target.parent.is_dir():
        raise ConfigError(f"--out: {str(target.parent)!r} is not a folder; make it, or name another file")
    if target.exists() and not target.read_bytes().startswith(MARK.encode()):
        raise ConfigError(f"--out: {str(target)!r} exists and is no report; name another file")
