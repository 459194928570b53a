"""The page about runs: charts with points where arithmetic puts them, all that was logged, and clear refusals."""

import json
import os
import random
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from mini_forge.cli import main
from mini_forge.errors import CheckpointError, ConfigError
from mini_forge.io.runs import REPORT_MARK, RunFolder
from mini_forge.plots import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Line,
    chart,
    number,
    thinned,
    tick_labels,
    ticks,
)  # fmt: skip
from mini_forge.report import chart_names, read_run, write_report

SVG = "{http://www.w3.org/2000/svg}"
RECORDS = [
    {"step": 0, "epoch": 0.0, "eval_loss": 1.5, "eval_seconds": 2.0},
    {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.0, "grad_norm": None, "tokens": 10, "seconds": 1.0,
     "peak_memory_bytes": 2**30},
    {"step": 2, "epoch": 1.0, "loss": 1.0, "learning_rate": 1e-4, "grad_norm": 0.25, "tokens": 20, "seconds": 2.0,
     "peak_memory_bytes": 2**31},
    {"step": 2, "epoch": 1.0, "eval_loss": 0.5, "eval_seconds": 2.0},
]  # fmt: skip


def a_run(folder, records=RECORDS, **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class Page(HTMLParser):
    """Text by tag; every tag that must be closed is, in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.found, text = [], {}, path.read_text(encoding="utf-8")
        self.feed(text)
        assert not self.open, self.open
        self.charts = [ElementTree.fromstring(part.split("</svg>")[0] + "</svg>")
                       for part in text.replace("<svg", "\0<svg").split("\0")[1:]]  # fmt: skip

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.found.setdefault(self.open[-1], []).append(data)


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.31, 1.49, [0, 0.5, 1, 1.5]), (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
    (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]), (1, 34, [0, 10, 20, 30, 40]),
    (0, 0, [-0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6]), (5, 5, [2, 3, 4, 5, 6, 7, 8]), (-2, -2, [-3, -2.5, -2, -1.5, -1]),
    (1, 1 + 3e-16, [0.4, 0.6, 0.8, 1, 1.2, 1.4, 1.6]),
])  # fmt: skip
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(1, 1, [0, 1, 2]), (1, 3, [1, 2, 3]), (0, 34, [0, 10, 20, 30, 40])]
)
def test_ticks_of_steps_are_whole(low, high, expected):
    assert ticks(low, high, whole=True) == expected


def test_any_range_has_ticks_around_it_that_can_be_told_apart():
    draw = random.Random(0)
    for _ in range(3000):
        low = draw.choice((0.0, draw.uniform(-1, 1) * 10 ** draw.randint(-300, 299)))
        high = low + draw.random() * 10 ** draw.randint(-7, 3) * max(abs(low), 1e-6)
        found = ticks(low, high)
        step = found[1] - found[0]
        assert found[0] <= low + step * 1e-6 and found[-1] >= high - step * 1e-6 and 2 <= len(found) <= 9
        assert all(b - a == pytest.approx(step, rel=1e-5) for a, b in zip(found, found[1:], strict=False))
        assert len(set(tick_labels(found))) == len(found), (low, high, tick_labels(found))


@pytest.mark.parametrize(("low", "high", "expected"), [
    (5, 5.0003, ["5.0000", "5.0001", "5.0002", "5.0003"]),
    (0.69312, 0.69318, ["0.69312", "0.69314", "0.69316", "0.69318"]),
    (9998, 10001, ["9,998", "9,999", "10,000", "10,001"]), (0, 2e-4, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]),
    (-1, 1, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]), (0, 3e7, ["0", "1e7", "2e7", "3e7"]),
])  # fmt: skip
def test_labels_have_the_digits_they_need(low, high, expected):
    assert tick_labels(ticks(low, high)) == expected


@pytest.mark.parametrize(("value", "expected"), [
    (0, "0"), (-0.0, "0"), (1.23456, "1.235"), (2e-4, "2e-4"), (9999.4, "9999"), (9999.6, "10,000"),
    (12345.6, "12,346"), (1.5e12, "1.5e12"), (-0.5, "-0.5"), (1e300, "1e300"),
])  # fmt: skip
def test_a_number_is_short(value, expected):
    assert number(value) == expected


def test_a_line_goes_where_arithmetic_puts_it():
    lines = [Line("a", [(0, 0), (5, 0.5), (10, 1)]), Line("b", [(10, 0.2)], 1, is_dashed=True)]
    root = ElementTree.fromstring(chart(lines, "step"))
    points = [tuple(map(float, p.split(","))) for p in root.find(f"{SVG}polyline").get("points").split()]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    assert points == [(LEFT, bottom), ((LEFT + right) / 2, (TOP + bottom) / 2), (right, TOP)]
    circle = root.find(f"{SVG}circle")
    assert (float(circle.get("cx")), float(circle.get("cy"))) == (right, bottom - 0.2 * (bottom - TOP))
    assert circle.find(f"{SVG}title").text == "b: 0.2 at 10"


def test_long_lines_are_thinned_to_means():
    points = [(i, i % 2) for i in range(10 * MOST_POINTS)]
    found = thinned(points)
    assert len(found) == MOST_POINTS and {y for _, y in found} == {0.5}
    assert found[0][0] == 4.5 and thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_a_page_has_all_that_was_logged(tmp_path):
    summary = {"status": "finished", "steps": 2, "peak_memory_bytes": 3 * 2**29}
    config = {"model_name": "m", "lora_r": 16, "strategy": "sft", "loss_type": "sigmoid"}
    run = a_run(tmp_path / "x", training_config=config, summary=summary, eval={"f1": 0.75})
    assert write_report([str(run)]) == run / "report.html"
    page = Page(run / "report.html")
    titles = ["loss", "learning rate", "gradient norm, before clipping", "peak memory, GiB"]
    assert page.found["h3"] == titles and page.found["h2"] == ["training", "facts", "eval"]
    loss, _, norm, memory = page.charts
    lines = [line.find(f"{SVG}title").text for line in loss.iter(f"{SVG}polyline")]
    assert lines == [f"{run}, loss", f"{run}, eval_loss"]
    spots = [spot.find(f"{SVG}title").text for spot in loss.iter(f"{SVG}circle")]
    assert spots == [f"{run}, eval_loss: 1.5 at 0", f"{run}, eval_loss: 0.5 at 2"]
    assert len(norm.find(f"{SVG}polyline").get("points").split()) == 1  # a null is no point
    assert [t.text for t in memory.iter(f"{SVG}text")][:6] == ["1.0", "1.2", "1.4", "1.6", "1.8", "2.0"]
    cells = page.found["td"]
    assert {"m", "16", "sft", "finished", "2", "1.50 GiB", "0.75"} == set(cells)


def test_several_runs_share_charts_each_in_its_colour(tmp_path):
    runs = [a_run(tmp_path / name) for name in ("one", "two")]
    out = tmp_path / "page.html"
    write_report([*map(str, runs)], str(out))
    strokes = {line.find(f"{SVG}title").text: line.get("stroke") for line in Page(out).charts[0].iter(f"{SVG}polyline")}
    first, second = ({strokes[f"{run}, loss"], strokes[f"{run}, eval_loss"]} for run in runs)
    assert len(first) == len(second) == 1 and first != second
    assert not (runs[0] / "report.html").exists()


def test_runs_of_different_losses_share_no_chart(tmp_path):
    strategies = {"one": "sft", "two": "dpo", "three": "qlora"}
    runs = [str(a_run(tmp_path / name, training_config={"strategy": kind})) for name, kind in strategies.items()]
    page = Page(write_report(runs, str(tmp_path / "page.html")))
    assert page.found["h2"] == ["dpo", "sft", "facts"]
    drawn = [
        {line.find(f"{SVG}title").text.split(",")[0] for line in chart.iter(f"{SVG}polyline")} for chart in page.charts
    ]
    assert drawn == [{runs[1]}] * 4 + [{runs[0], runs[2]}] * 4


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path):
    run = a_run(tmp_path / "x", RECORDS[:2])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # as a reader may find it
    page = Page(write_report([str(run)]))
    assert "not finished" in page.found["td"]


def test_the_training_of_a_reward_model_is_a_run_of_its_own(tmp_path):
    run = a_run(tmp_path / "x", [{"step": 1, "reward_mean": 0.5}])
    a_run(run / "reward", [{"step": 1, "loss": 0.7, "reward_accuracy": 0.6}])
    for folder in (run, run / "reward"):
        rates = {"learning_rate": 0.01, "reward_learning_rate": 0.001}
        a_run(folder, [*map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())], training_config=rates)
    runs = read_run(str(run))
    assert [r.name for r in runs] == [f"{run}: reward model", str(run)]
    assert chart_names(runs) == ["loss", "reward_accuracy", "reward_mean"]
    page = Page(write_report([str(run)]))
    assert page.found["h3"] == ["reward mean", "loss", "reward accuracy"]  # the run's own come first
    assert page.found["td"][:4] == ["–", "0.01", "0.001", "–"]  # each with its own learning rate
    (run / "metrics.jsonl").unlink()  # it has not come so far
    assert [r.name for r in read_run(f"{run}/")] == [f"{run}: reward model"]


def test_what_cannot_be_drawn_is_no_point(tmp_path):
    values = (1.0, float("nan"), float("inf"), 10**400, -(10**400), "1", [1], True, {}, None, 1.7e308)
    records = [{"step": i, "loss": loss} for i, loss in enumerate(values)]
    others = {"summary": {"steps": 10**400, "best": float("nan")}, "eval": {"f1": float("-inf"), "many": [1, {"a": 2}]}}
    run = a_run(tmp_path / "x", [*records, {"step": 10**400, "a": 1}], **others)
    page = Page(write_report([str(run)]))
    (line,) = (line for chart in page.charts for line in chart.iter(f"{SVG}polyline"))
    assert len(line.get("points").split()) == 1 and {"NaN", "-Infinity", '[1, {"a": 2}]'} <= set(page.found["td"])


def test_lines_go_by_step(tmp_path):
    run = a_run(tmp_path / "x", [{"step": step, "loss": step / 10} for step in (5, 1, 3)])
    assert read_run(str(run))[0].points("loss") == [(1, 0.1), (3, 0.3), (5, 0.5)]


@pytest.mark.parametrize("name", ["\ud800", "\x00\x01", "a" * 3000, "]]>", "ünï"])
def test_odd_names_leave_a_whole_page(tmp_path, name):
    run = a_run(tmp_path / "x", [{"step": 1, name: 1.0}], training_config={"dataset": name}, eval={name: name})
    Page(write_report([str(run)]))
    assert not list(run.glob(".tmp-*"))


def test_names_are_text(tmp_path):
    run = a_run(tmp_path / "<b>&x", [{"step": 1, "<i>": 1.0}], eval={"a": "<script>"})
    page = Page(write_report([str(run)]))
    assert page.found["h3"][0] == "<i>" and "<script>" in page.found["td"] and "b" not in page.found


@pytest.mark.parametrize(("make", "message"), [
    (lambda p: [p / "none"], r"arguments: '.*none' is not a folder; report takes folders that train has written"),
    (lambda p: [p], r"has no metrics\.jsonl; report takes"),
    (lambda p: [a_run(p / "x", [])], r"metrics\.jsonl: holds no record yet; wait for the first step"),
    (lambda p: [a_run(p / "x"), p / "x"], r"'.*x' is given twice; give every run once"),
    (lambda p: [a_run(p / "x", [{"loss": 1}])], r"metrics\.jsonl:1: .*must be a JSON object with its step"),
    (lambda p: [a_run(p / "x", summary=[1])], r"summary\.json: must hold a JSON object, not list; delete it"),
    (lambda p: [a_run(p / "x"), p / "x" / ".." / "x"], r"is given twice"),
    (lambda p: [a_run(p / "x"), a_run(p / "x" / "reward")], r"reward' is given twice"),
    (lambda p: ["~nobody-of-that-name/x"], r"is not a folder"),
    (lambda p: [p / ("a" * 300)], r"is not a folder"),
])  # fmt: skip
def test_what_is_no_run_is_refused_in_a_line(tmp_path, make, message, capsys):
    folders = [str(folder) for folder in make(tmp_path)]
    with pytest.raises((ConfigError, CheckpointError), match=message):
        write_report(folders)
    assert main(["report", *folders]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_only_a_report_is_written_over(tmp_path, capsys):
    run, mine, pipe, link = a_run(tmp_path / "x"), tmp_path / "notes.html", tmp_path / "pipe", tmp_path / "link"
    mine.write_text("my notes")
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "nowhere")
    refused = {
        mine: "exists and is no report; name another file", tmp_path: "is a folder; name a file",
        tmp_path / "no" / "x.html": "is not a folder; make it", pipe: "is no plain file", link: "is no plain file",
        run / "summary.json": "is a file of a run", run / "training_config.json": "is a file of a run",
        tmp_path / ("a" * 256): "cannot be read or written", tmp_path / "x.png": "is the name of an image",
    }  # fmt: skip
    for out, message in refused.items():
        assert main(["report", str(run), "--out", str(out)]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    assert mine.read_text() == "my notes" and not list(tmp_path.rglob(".tmp-*")) and not (run / "summary.json").exists()
    for _ in range(2):
        assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report saved in {run}/report.html\n" * 2
    (tmp_path / "empty").touch()
    assert main(["report", str(run), "--out", str(tmp_path / "empty")]) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_what_may_not_be_read_or_written_is_told(tmp_path, capsys):
    run = a_run(tmp_path / "x")
    for path, mode in ((run, 0o500), (run / "metrics.jsonl", 0o000), (run, 0o000)):
        path.chmod(mode)
        assert main(["report", str(run)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_overwriting_a_run_removes_its_report_and_no_other_page(tmp_path):
    for text, is_left in ((REPORT_MARK + "<html>", False), ("my own page", True)):
        run = a_run(tmp_path / str(is_left), training_config={})
        (run / "report.html").write_text(text)
        RunFolder(run)._remove_old({})
        assert (run / "report.html").exists() == is_left and not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(("max_steps", "told", "left_out"), [(-1, "num_train_epochs", "max_steps"),
                                                            (5, "max_steps", "num_train_epochs")])  # fmt: skip
def test_what_decided_how_long_training_lasted_is_told(max_steps, told, left_out, tmp_path):
    run = a_run(tmp_path / "run", training_config={"num_train_epochs": 3, "max_steps": max_steps})
    names = Page(write_report([str(run)])).found["th"]
    assert told in names and left_out not in names
