"""What runs were and how they went, on one HTML page that needs nothing else: curves, facts, evaluations.

Curves are of all that metrics.jsonl holds; of a name and its `eval_` twin one chart is made. Runs of one strategy share
their charts, each in its colour. A run that has not ended is shown as far as it is.
"""

import json
import os
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mini_forge.config_plan import GIB
from mini_forge.durable import write_atomic
from mini_forge.errors import ConfigError, is_disk_full, reason_of
from mini_forge.io.runs import (
    CONFIG_FILE,
    EVAL_FILE,
    METRICS_FILE,
    REPORT_FILE,
    REPORT_MARK,
    REWARD_FOLDER,
    RUN_FILES,
    SUMMARY_FILE,
    is_report,
    read_records,
)
from mini_forge.json_faults import read_json
from mini_forge.plots import COLOURS, LARGEST, Line, chart, number

FIRST_CHARTS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes")
NO_CHARTS = {"step", "epoch", "tokens", "seconds", "eval_seconds", "eval_tokens", "eval_rows", "eval_pairs"}
TITLES = {"loss": "loss", "learning_rate": "learning rate", "grad_norm": "gradient norm, before clipping",
          "tokens_per_second": "tokens a second", "peak_memory_bytes": "peak memory, GiB"}  # fmt: skip
# Of the configuration, in the order of the table; then what summary.json has.
FACTS = ("model_name", "dataset", "task", "strategy", "loss_type", "beta", "advantage", "kl_coef", "provider",
         "learning_rate", "num_train_epochs", "max_steps", "reward_learning_rate", "reward_epochs",
         "per_device_train_batch_size", "gradient_accumulation_steps", "max_seq_length", "packing",
         "gradient_checkpointing", "lora_r", "lora_alpha", "lora_dropout", "seed")  # fmt: skip
ONLY_OF = {"loss_type": "dpo", "beta": "dpo", "advantage": "rlhf", "kl_coef": "rlhf"}  # a strategy
OF_REWARD = {"reward_learning_rate", "reward_epochs"}  # the training of a reward model, which has no
OF_OTHERS = {"learning_rate", "num_train_epochs", "max_steps", "advantage", "kl_coef"}
REWARD = "reward model"
IMAGES = {".png", ".svg", ".pdf", ".jpg", ".jpeg"}
REMEDIES = {CONFIG_FILE: "put the run's own back"}  # of a broken file; any other the report can do without
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { max-width: 1180px; margin: 2em auto; padding: 0 1em; overflow-wrap: anywhere; }
h1, h2, h3 { font-weight: 600; }
h1 { font-size: 1.4em; } h2 { font-size: 1.2em; } h3 { font-size: 1.05em; margin: 0 0 .3em; }
.charts { display: grid; gap: 1.6em; margin: 1.6em 0;
  grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
svg { width: 100%; height: auto; } svg text { font-size: 11px; fill: currentColor; }
.grid { stroke: currentColor; opacity: .18; } .key { margin-right: 1.2em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 1em 0; }
th, td { text-align: left; padding: .2em 1.2em .2em 0; border-bottom: 1px solid #8884; vertical-align: top; }
th { font-weight: 600; }
"""


@dataclass(frozen=True)
class Run:
    """A run's folder as read: the records of metrics.jsonl; configuration, summary and eval.json, {} where missing.
    is_reward: it is the training of a reward model, before rlhf's own."""

    name: str
    folder: Path
    records: list[dict]
    config: dict
    summary: dict
    evaluation: dict
    is_reward: bool = False

    @property
    def kind(self) -> str:
        """Whose losses can be compared with its own: the strategy, of which qlora is sft in 4 bits."""
        strategy = str(self.config.get("strategy") or "training")
        return REWARD if self.is_reward else "sft" if strategy == "qlora" else strategy

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) wherever a record has a number of that name, by step."""
        scale = GIB if name.endswith("_bytes") else 1
        found = ((r["step"], r[name] / scale) for r in self.records if is_number(r.get(name)) and is_number(r["step"]))
        return sorted(found, key=lambda point: point[0])


def write_report(folders: list[str], out: str | None = None) -> Path:
    """Write the page about `folders` to `out`, or to report.html in the first of them. Returns where.

    Raises UserError for a folder that is no run, a file of it that is damaged, and an `out` that is something else."""
    try:
        runs = [run for folder in folders for run in read_run(folder)]
        places = [run.folder for run in runs]
        twice = next((run for i, run in enumerate(runs) if run.folder in places[:i]), None)
        if twice is not None:
            raise ConfigError(f"arguments: {twice.name!r} is given twice; give every run once")
        target = _expanded(folders[0]) / REPORT_FILE if out is None else _expanded(out)
        _check_target(target)
        write_atomic(target, page(runs))
    except OSError as error:
        if is_disk_full(error):
            raise
        place = error.filename or "report"
        raise ConfigError(f"{place}: cannot be read or written ({reason_of(error)}); give what can be") from None
    return target


def read_run(folder: str) -> list[Run]:
    """The run in `folder` and, of rlhf, the training of its reward model before it."""
    path, name = _expanded(folder), folder.rstrip(os.sep) or folder
    if not os.path.isdir(path):
        raise ConfigError(f"arguments: {folder!r} is not a folder; report takes folders that train has written")
    stages = {path / REWARD_FOLDER: f"{name}: {REWARD}", path: name}
    if not any(os.path.isfile(place / METRICS_FILE) for place in stages):
        raise ConfigError(f"{path}: has no {METRICS_FILE}; report takes folders that train has written")
    runs = []
    for place, name in stages.items():
        records = read_records(place / METRICS_FILE)
        if records:
            files = (
                read_json(place / file, absent={}, remedy=REMEDIES.get(file, "delete it, and the report leaves it out"))
                for file in (CONFIG_FILE, SUMMARY_FILE, EVAL_FILE)
            )
            runs.append(Run(name, place.resolve(), records, *files, is_reward=place != path))
    if not runs:
        raise ConfigError(f"{path / METRICS_FILE}: holds no record yet; wait for the first step")
    return runs


def page(runs: list[Run]) -> str:
    """The whole page, as text."""
    title = "mini_forge: " + ", ".join(run.name for run in runs)
    keys = "".join(
        f'<span class="key" style="color: {COLOURS[i % len(COLOURS)]}">&#9644; {_text(run.name)}</span>'
        for i, run in enumerate(runs)
    )
    parts = [
        f'{REPORT_MARK}<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n<h1>{_text(title)}</h1>",
        f"<p>{keys}<br>Solid: training. Dashed: evaluation.</p>",
    ]
    kinds = sorted({run.kind for run in runs}, key=lambda kind: (kind == REWARD, kind))
    for kind in kinds:  # each with a loss of its own
        heading = _text(kind) if kind == REWARD or len(kinds) - (REWARD in kinds) > 1 else "training"
        parts.append(f"<h2>{heading}</h2>\n{_charts([(i, run) for i, run in enumerate(runs) if run.kind == kind])}")
    parts.append(f"<h2>facts</h2>\n{_table(runs, [_facts(run) for run in runs])}")
    if evaluated := [run for run in runs if run.evaluation]:
        parts.append(f"<h2>eval</h2>\n{_table(evaluated, [run.evaluation for run in evaluated])}")
    # What is no text, as half a surrogate pair, is shown by its number.
    return "\n".join([*parts, "</html>\n"]).encode("utf-8", "backslashreplace").decode("utf-8")


def chart_names(runs: list[Run]) -> list[str]:
    """What is drawn, without `eval_`: the usual first, then the rest as it comes."""
    found = dict.fromkeys(
        name.removeprefix("eval_")
        for run in runs for record in run.records for name, value in record.items()
        if name not in NO_CHARTS and is_number(value) and is_number(record["step"])
    )  # fmt: skip
    return [*(name for name in FIRST_CHARTS if name in found), *(name for name in found if name not in FIRST_CHARTS)]


def _charts(runs: list[tuple[int, Run]]) -> str:
    """runs: each with the place of its colour."""
    sections = []
    for name in chart_names([run for _, run in runs]):
        lines = [
            Line(_plain(f"{run.name}, {full}"), points, i, is_dashed=full != name)
            for i, run in runs for full in (name, f"eval_{name}") if (points := run.points(full))
        ]  # fmt: skip
        title = _text(TITLES.get(name, name.replace("_", " ")))
        sections.append(f"<section><h3>{title}</h3>\n{chart(lines, 'step')}</section>")
    return '<div class="charts">\n' + "\n".join(sections) + "\n</div>"


def _facts(run: Run) -> dict:
    """What the run was told and, but for lists and the like, what its summary tells."""
    strategy = run.config.get("strategy")
    left_out = {name for name, only in ONLY_OF.items() if only != strategy}
    left_out |= OF_OTHERS if run.is_reward else OF_REWARD
    steps = run.config.get("max_steps")
    left_out.add("num_train_epochs" if isinstance(steps, int) and steps > 0 else "max_steps")
    told = {name: run.config[name] for name in FACTS if name in run.config and name not in left_out}
    facts = {name: json.dumps(value) if isinstance(value, float) else value for name, value in told.items()}
    if not run.summary:
        facts |= {"status": "not finished", "steps": run.records[-1]["step"]}
    return facts | {name: value for name, value in run.summary.items() if not isinstance(value, dict | list)}


def _table(runs: list[Run], facts: list[dict]) -> str:
    """A column a run, a row a fact that any has."""
    names = dict.fromkeys(name for each in facts for name in each)
    names = sorted(names, key=lambda name: FACTS.index(name) if name in FACTS else len(FACTS))
    head = "".join(f"<th>{_text(run.name)}</th>" for run in runs)
    rows = "\n".join(
        f"<tr><th>{_text(name)}</th>" + "".join(f"<td>{_cell(name, each.get(name))}</td>" for each in facts) + "</tr>"
        for name in names
    )
    return f'<div class="scroll"><table>\n<tr><th></th>{head}</tr>\n{rows}\n</table></div>'


def _cell(name: str, value) -> str:
    if value is None:
        return "–"
    if is_number(value) and name.endswith("_bytes"):
        return f"{value / GIB:.2f} GiB"
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else number(value)
    return _text(value if isinstance(value, str) else json.dumps(value))


def is_number(value) -> bool:
    """Whether it can be drawn: no NaN, no infinity, and nothing of which a difference would be one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _plain(text: str) -> str:
    """Without the control characters that a page must not hold."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", text)


def _text(text: str) -> str:
    return escape(_plain(text))


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(path))


def _check_target(target: Path):
    """It is written over only where it is a report, or empty."""
    shown = str(target)
    if os.path.isdir(target):
        raise ConfigError(f"--out: {shown!r} is a folder; name a file")
    if not os.path.isdir(target.parent):
        raise ConfigError(f"--out: {str(target.parent)!r} is not a folder; make it, or name another file")
    if target.name in {CONFIG_FILE, *RUN_FILES} - {REPORT_FILE}:
        raise ConfigError(f"--out: {target.name} is a file of a run; name another file")
    if target.suffix.lower() in IMAGES:
        raise ConfigError(f"--out: {shown!r} is the name of an image; the report is an HTML page, end it in .html")
    if not os.path.lexists(target):
        return
    if os.path.islink(target) or not os.path.isfile(target):
        raise ConfigError(f"--out: {shown!r} is no plain file; name another")
    if target.stat().st_size and not is_report(target):
        raise ConfigError(f"--out: {shown!r} exists and is no report; name another file")
