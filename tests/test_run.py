"""The main job, whole: what a run leaves, and that stopping and going on changes no bit of it."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mini_forge
from mini_forge.bench.measure import bench
from mini_forge.check import check
from mini_forge.cli import main
from mini_forge.data import chat
from mini_forge.errors import CheckpointError, ConfigError, TrainingError, UserError
from mini_forge.io.runs import RunFolder
from mini_forge.io.state import load_state, save_state
from mini_forge.use import Session, evaluate_run
from tests.tiny import CHAT_TEMPLATE, tokenizer_files, write_checkpoint, write_rows

CONTRACT_KEYS = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second",
                 "peak_memory_bytes", "seconds"}  # fmt: skip
TIMINGS = ("seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds")


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", 20)


@pytest.fixture
def settings(tiny, rows, tmp_path):
    return {
        "task": "text-generation", "model_name": str(tiny), "dataset": str(rows), "compute_specs": "low_end",
        "use_4bit": False, "output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "lora_r": 4,
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
    }  # fmt: skip


def run(settings, resume=False, overwrite=False, on_metrics=None, **changes):
    lines = []
    config = mini_forge.TrainingConfig.from_dict({**settings, **changes})
    result = mini_forge.train(config, resume=resume, overwrite=overwrite, report=lines.append, on_metrics=on_metrics)
    return result, lines


def steps(metrics):
    return [{k: v for k, v in m.items() if k not in TIMINGS} for m in metrics]


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_configuration_is_asked_for(settings):
    with pytest.raises(ConfigError, match="config: 'config.json' must be a TrainingConfig"):
        mini_forge.train("config.json")


def test_a_run_leaves_what_the_contract_says(settings):
    result, lines = run(settings)
    left = {p.name for p in result.output_dir.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json",
            "training_config.json", "metrics.jsonl", "summary.json", "README.md", "checkpoints"} <= left  # fmt: skip
    training = [m for m in result.metrics if "loss" in m]
    assert [m["step"] for m in training] == [1, 2, 3, 4]
    assert all(m.keys() >= CONTRACT_KEYS for m in training)
    assert [m["step"] for m in result.metrics if "eval_loss" in m] == [0, 4]
    assert mini_forge.TrainingConfig.from_file(result.output_dir / "training_config.json").lora_r == 4
    assert json.loads((result.output_dir / "summary.json").read_text())["status"] == "finished"
    assert any(line.startswith("ops: plain") for line in lines)
    ids = torch.arange(9)[None]
    assert torch.equal(mini_forge.load_model(result.output_dir).logits(ids), result.model.logits(ids))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
                         ids=["no_grad", "inference_mode", "autocast"])  # fmt: skip
def test_the_callers_modes_do_not_matter(settings, tmp_path, mode):
    first, _ = run(settings)
    with mode():
        second, _ = run(settings, output_dir=str(tmp_path / "second"))
    assert same(adapter(first.output_dir), adapter(second.output_dir))


def test_the_saved_template_is_the_one_trained_with(settings):
    result, _ = run(settings, chat_template="llama")
    ours = mini_forge.load_tokenizer(result.output_dir)
    assert "[INST]" in ours.chat_template
    assert "<|im_start|>" in mini_forge.load_tokenizer(settings["model_name"]).chat_template


def test_a_run_does_not_import_the_compiler_of_torch(settings):
    code = (
        "import json, sys, mini_forge; "
        "mini_forge.train(mini_forge.TrainingConfig.from_dict(json.loads(sys.argv[1])), report=str); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, json.dumps(settings)], check=False).returncode == 0


def test_training_lowers_the_held_out_loss(settings):
    result, _ = run(settings, max_steps=25)
    before, after = (m["eval_loss"] for m in result.metrics if "eval_loss" in m)
    assert after < before - 0.5


@pytest.mark.parametrize("changes", [
    {"use_4bit": True}, {"use_4bit": True, "use_nested_quant": True, "bnb_4bit_quant_type": "fp4"}, {"use_8bit": True},
    {"optim": "sgd"}, {"optim": "adamw_8bit"}, {"optim": "paged_adamw_8bit"}, {"optim": "paged_adamw_32bit"},
    {"lr_scheduler_type": "polynomial"}, {"packing": True, "max_seq_length": 96}, {"gradient_checkpointing": True},
    {"neftune_noise_alpha": 5.0}, {"fp16": True}, {"bf16": True}, {"train_on_prompt": True}, {"use_rslora": True},
    {"provider": "unsloth", "max_seq_length": 128}, {"target_modules": ["q_proj", "v_proj"]},
    {"chat_template": "llama"},
], ids=str)  # fmt: skip
def test_every_way_of_training_learns(settings, changes):
    settings["learning_rate"] = 0.5 if changes.get("optim") == "sgd" else 1e-2
    result, _ = run(settings, max_steps=8, max_grad_norm=1.0, **changes)
    before, after = (m["eval_loss"] for m in result.metrics if "eval_loss" in m)
    assert after < before


def test_accumulation_equals_one_large_batch(settings):
    common = {"eval_split": 0, "lora_dropout": 0, "group_by_length": False, "num_train_epochs": 3, "max_steps": -1}
    one, _ = run(settings, output_dir=settings["output_dir"] + "1", per_device_train_batch_size=20,
                 gradient_accumulation_steps=1, **common)  # fmt: skip
    two, _ = run(settings, output_dir=settings["output_dir"] + "2", per_device_train_batch_size=3,
                 gradient_accumulation_steps=7, **common)  # fmt: skip
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["tokens"] == b["tokens"]


def test_the_last_short_window_is_trained_with_its_own_count(settings):
    """20 rows, batch 2, accumulation 4: windows of 8, 8 and 4 rows; each epoch counts every token once."""
    result, _ = run(settings, gradient_accumulation_steps=4, eval_split=0, num_train_epochs=2, max_steps=-1)
    assert [m["step"] for m in result.metrics] == [1, 2, 3, 4, 5, 6]
    tokens = [m["tokens"] for m in result.metrics]
    assert tokens[5] == 2 * tokens[2]


HARD = {"lora_dropout": 0.2, "group_by_length": True, "optim": "adamw_8bit", "max_steps": 10, "eval_steps": 4,
        "save_strategy": "steps", "save_steps": 5, "lora_r": 64, "neftune_noise_alpha": 3.0}  # fmt: skip


class Killed(BaseException):
    """Stands for a kill -9: nothing in the program may catch it."""


def test_ten_steps_are_five_a_kill_and_five_more_bit_for_bit(settings, tmp_path):
    whole, _ = run(settings, **HARD)

    def die(record):
        if record["step"] == 7:
            raise Killed

    other = {**settings, "output_dir": str(tmp_path / "killed")}
    with pytest.raises(Killed):
        run(other, on_metrics=die, **HARD)
    resumed, lines = run(other, resume=True, **HARD)
    assert any("resuming from" in line and "step-5" in line for line in lines)
    assert same(adapter(whole.output_dir), adapter(resumed.output_dir))
    assert steps(whole.metrics) == steps(resumed.metrics)


def test_fp16_resumes_with_its_scale(settings, tmp_path):
    extra = {"fp16": True, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, _ = run(settings, **extra)

    def die(record):
        if record.get("loss") and record["step"] == 4:
            raise Killed

    other = {**settings, "output_dir": str(tmp_path / "killed")}
    with pytest.raises(Killed):
        run(other, on_metrics=die, **extra)
    resumed, _ = run(other, resume=True, **extra)
    assert same(adapter(whole.output_dir), adapter(resumed.output_dir))


def test_fp16_of_which_no_step_counted_has_failed(settings, capsys):
    """An alpha with which every product overflows; and the skipped steps of a run are told."""
    with pytest.raises(TrainingError, match="step 4: no step had a finite fp16 gradient, nothing was trained"):
        run(settings, fp16=True, lora_alpha=10**5)
    result, _ = run(settings, fp16=True, output_dir=settings["output_dir"] + "2")
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["skipped_steps"] == sum(m["grad_norm"] is None for m in result.metrics if "loss" in m) < 4


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves_and_the_run_goes_on(settings, tmp_path, number, code):
    extra = {**HARD, "max_steps": 60, "save_steps": 1000}
    whole, _ = run(settings, **extra)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**settings, **extra, "output_dir": str(tmp_path / "stopped")}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "mini_forge", "train", str(config)], env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, (out, err)
    assert "Traceback" not in err
    assert "--resume" in out
    assert main(["train", str(config), "--resume"]) == 0
    assert same(adapter(whole.output_dir), adapter(tmp_path / "stopped"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("where", ["mini_forge.run.build_model", "mini_forge.data.tokenizer.tokenizers.Tokenizer"])
def test_a_signal_before_the_first_step_leaves_with_its_code(settings, tmp_path, monkeypatch, number, code, where):
    class Load:  # called, or asked for what it reads with
        def __init__(self, *arguments, **options):
            os.kill(os.getpid(), number)

        from_str = __init__

    monkeypatch.setattr(where, Load)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as left:
        main(["train", str(config)])
    assert left.value.code == code
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not os.path.exists(settings["output_dir"])


def test_resume_without_a_checkpoint_starts_and_says_so(settings):
    result, lines = run(settings, resume=True)
    assert any("no checkpoint to resume from; starting from the beginning" in line for line in lines)
    assert len(result.metrics) == 6


def test_resuming_a_finished_run_changes_nothing(settings):
    result, _ = run(settings)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in result.output_dir.rglob("*") if p.is_file()}
    _, lines = run(settings, resume=True)
    assert any("finished; nothing to do" in line for line in lines)
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in result.output_dir.rglob("*") if p.is_file()}


def test_resuming_with_another_configuration_is_refused(settings):
    def die(record):
        if record["step"] == 3:
            raise Killed

    with pytest.raises(Killed):
        run(settings, on_metrics=die, save_strategy="steps", save_steps=1)
    with pytest.raises(ConfigError, match="learning_rate: 0.5 differs from 0.01"):
        run(settings, resume=True, save_strategy="steps", save_steps=1, learning_rate=0.5)


def test_resuming_on_changed_data_is_refused(settings, rows):
    def die(record):
        if record["step"] == 3:
            raise Killed

    extra = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Killed):
        run(settings, on_metrics=die, **extra)
    rows.write_text(rows.read_text().replace("please", "kindly"))
    with pytest.raises(ConfigError, match="dataset: .* has changed since"):
        run(settings, resume=True, **extra)


DATED = "{{ '<|im_start|>' + strftime_now('%d %B %Y') + '<|im_end|>' }}" + CHAT_TEMPLATE


class Clock(date):
    """A day that a test sets."""

    day = date(2026, 12, 24)

    @classmethod
    def today(cls):
        return cls.day


@pytest.mark.parametrize("given", [None, "2020-02-29"])
def test_a_run_that_goes_on_another_day_tells_its_template_its_own(settings, tmp_path, monkeypatch, given):
    """And so do evaluation and generation with it."""
    monkeypatch.setattr(chat, "date", Clock)
    model = write_checkpoint(tmp_path / "dated")
    tokenizer_files(model, DATED)
    settings |= {"model_name": str(model), "save_strategy": "steps", "save_steps": 1, "template_date": given}

    def die(record):
        if record["step"] == 3:
            raise Killed

    whole, _ = run(settings, output_dir=str(tmp_path / "whole"))
    with pytest.raises(Killed):
        run(settings, on_metrics=die)
    monkeypatch.setattr(Clock, "day", date(2026, 12, 25))
    resumed, _ = run(settings, resume=True)
    assert same(adapter(whole.output_dir), adapter(resumed.output_dir))
    spelled = Session.open(str(resumed.output_dir)).template.render_prompt(({"role": "user", "content": "u"},))
    assert spelled.startswith("<|im_start|>29 February 2020" if given else "<|im_start|>24 December 2026")
    metrics, _ = evaluate_run(str(resumed.output_dir))
    assert metrics["eval_loss"] == pytest.approx(whole.metrics[-1]["eval_loss"], rel=1e-6)
    with pytest.raises(ConfigError, match="template_date: '2021-01-01' differs from"):
        (resumed.output_dir / "summary.json").unlink()
        run(settings, resume=True, template_date="2021-01-01")


def test_a_dated_run_of_an_older_version_is_gone_on_with(settings, tmp_path):
    """It recorded no date; its tokens tell whether it is the same day."""
    model = write_checkpoint(tmp_path / "dated")
    tokenizer_files(model, DATED)
    settings |= {"model_name": str(model), "save_strategy": "steps", "save_steps": 1}

    def die(record):
        if record["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        run(settings, on_metrics=die)
    place = Path(settings["output_dir"]) / "training_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "template_date": None}))
    resumed, _ = run(settings, resume=True)
    assert resumed.metrics[-1]["step"] == 4
    origin = check(mini_forge.TrainingConfig.from_dict({**settings, "output_dir": "x"}))["config"]["template_date"]
    assert origin == {"value": date.today().isoformat(), "from": "today"}


def test_a_date_that_nobody_is_told_is_not_recorded(settings):
    result, lines = run(settings, template_date="2020-02-29", max_steps=1)
    assert any(line == "note: template_date: no effect, the chat template tells no date" for line in lines)
    result, _ = run(settings, output_dir=settings["output_dir"] + "2", max_steps=1)
    assert json.loads((result.output_dir / "training_config.json").read_text())["template_date"] is None


# System messages that stand before the last question alone, which a conversation that is answered does not end in.
LAST = """{% for m in messages %}{% if m.role in ('system', 'developer') %}{% elif loop.last and m.role == 'user' %}
{{- '<|im_start|>' + messages[0].content + m.content + '<|im_end|>\n' }}{% else %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_what_a_template_leaves_out_is_told(settings, tmp_path):
    rows = [[{"role": role, "content": f"c{i}"} for role in ("system", "user", "assistant")] for i in range(12)]
    rows[0][0]["role"] = rows[3][0]["role"] = "developer"
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in [rows[1], *rows]))
    model = write_checkpoint(tmp_path / "last")
    tokenizer_files(model, LAST)
    settings |= {"max_steps": 1, "dataset": str(tmp_path / "m.jsonl")}
    _, lines = run(settings, model_name=str(model), system_prompt="Be brief.")
    told = [line for line in lines if "chat template leaves" in line]
    assert len(told) == 3 and "system_prompt: the chat template leaves it out" in told[0]
    assert "m.jsonl:1: the chat template leaves out system messages" in told[1]
    assert "m.jsonl:2: the chat template leaves out developer messages" in told[2]
    _, lines = run(settings, output_dir=settings["output_dir"] + "2", system_prompt="Be brief.")
    assert not any("chat template leaves" in line for line in lines)


def test_half_written_checkpoints_are_swept_and_broken_ones_named(settings):
    def die(record):
        if record["step"] == 3:
            raise Killed

    extra = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Killed):
        run(settings, on_metrics=die, **extra)
    checkpoints = Path(settings["output_dir"]) / "checkpoints"
    (checkpoints / ".tmp-step-9").mkdir()
    (checkpoints / "step-2" / "trainer_state.pt").write_bytes(b"half")
    with pytest.raises(UserError, match="step-2.*unreadable checkpoint"):
        run(settings, resume=True, **extra)
    assert not (checkpoints / ".tmp-step-9").exists()


class Touch:
    """A pickle that would make a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not torch's")


def strange_pickle(path):
    """A torch archive whose pickle ends within a number."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02J\x01")
        archive.writestr("archive/version", "3\n")


STATE = {"data": 1, "loop": {}, "optimizer": {}, "rng": {}}


@pytest.mark.parametrize("write", [
    lambda path: torch.save({"weight": torch.zeros(2)}, path), lambda path: torch.save(torch.zeros(2), path),
    lambda path: torch.save({**STATE, "rng": 5}, path),
    lambda path: torch.save({k: v for k, v in STATE.items() if k != "data"}, path),
    lambda path: torch.save(Touch(path.with_name("touched")), path), foreign_zip, strange_pickle,
], ids=["keys", "tensor", "kind", "data", "pickle", "zip", "cut"])  # fmt: skip
def test_a_state_that_is_not_ours_is_told(tmp_path, write):
    write(tmp_path / "trainer_state.pt")
    with pytest.raises(CheckpointError, match="trainer_state.pt: not the state of a training.*; delete its folder"):
        load_state(tmp_path / "trainer_state.pt")
    assert not (tmp_path / "touched").exists()


def test_a_state_with_what_is_asked_for_is_read(tmp_path):
    save_state(tmp_path / "trainer_state.pt", STATE)
    assert load_state(tmp_path / "trainer_state.pt") == STATE
    with pytest.raises(CheckpointError, match="not the state"):
        load_state(tmp_path / "trainer_state.pt", ("head",))


@pytest.mark.parametrize("line", [b"{}", b"junk}", b'{"step": "1"}', b'{"step": 1, "x": "\xff"}'], ids=str)
def test_a_line_that_is_no_record_of_metrics_is_told(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2, "lo')
    with pytest.raises(CheckpointError, match="metrics.jsonl:2: .*must be a JSON object with its step; delete this"):
        RunFolder(tmp_path).truncate_metrics(1)


def test_a_run_that_is_there_is_not_harmed(settings, tmp_path):
    result, _ = run(settings)
    stamp = (result.output_dir / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="holds a run already; add --resume"):
        run(settings)
    assert (result.output_dir / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    run(settings, overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="holds files that are not a run's"):
        run(settings, overwrite=True, output_dir=str(tmp_path / "home"))
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"


def test_wrong_input_leaves_an_old_run_alone_even_with_overwrite(settings, tmp_path):
    result, _ = run(settings)
    (tmp_path / "bad.jsonl").write_text('{"input": "x"}\n')
    with pytest.raises(UserError):
        run(settings, overwrite=True, dataset=str(tmp_path / "bad.jsonl"))
    assert (result.output_dir / "adapter_model.safetensors").exists()


def test_save_total_limit_keeps_the_newest(settings):
    result, _ = run(settings, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert sorted(p.name for p in (result.output_dir / "checkpoints").iterdir()) == ["step-3", "step-4"]


def damaged(tmp_path):
    folder = write_checkpoint(tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(settings, tmp_path):
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan.*dataset lines.*no checkpoint was saved yet"):
        run(settings, model_name=str(damaged(tmp_path)), eval_split=0)


def test_the_last_good_checkpoint_is_named(settings, monkeypatch):
    from mini_forge.training.losses import LossSum
    from mini_forge.training.sft import SFT, sft_loss

    seen = []

    def sometimes_nan(model, batch):
        seen.append(batch)
        loss = sft_loss(model, batch)
        return loss if len(seen) <= 6 else LossSum(loss.total * float("nan"), loss.count)

    monkeypatch.setattr("mini_forge.settings.OBJECTIVES", {"sft": type(SFT)(sometimes_nan, SFT.count)})
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.*last good checkpoint: .*step-3"):
        run(settings, eval_split=0, save_strategy="steps", save_steps=1)


def test_early_stopping_and_the_best_checkpoint(settings, tmp_path):
    """Held-out answers are of other characters than trained ones: their loss falls with the end token, then rises."""
    lines = [json.dumps({"input": f"{i} + {i}", "output": "zebra"}) for i in range(4)]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    result, lines = run(settings, learning_rate=0.03, max_steps=60, eval_steps=1, early_stopping_patience=3,
                        load_best_model_at_end=True, lr_scheduler_type="constant", max_grad_norm=0, lora_dropout=0,
                        eval_dataset=str(tmp_path / "other.jsonl"))  # fmt: skip
    losses = [m["eval_loss"] for m in result.metrics if "eval_loss" in m]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 1 + 3
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["stopped_early"] and summary["best_step"] == best
    assert any(f"the best evaluation was at step {best}" in line for line in lines)
    assert same(adapter(result.output_dir), adapter(result.output_dir / "checkpoints" / f"step-{best}"))


def test_an_initial_adapter_is_where_training_starts(settings, tmp_path):
    first, _ = run(settings)
    again = {**settings, "output_dir": str(tmp_path / "again"), "init_adapter": str(first.output_dir)}
    second, _ = run(again)
    end = [m["eval_loss"] for m in first.metrics if "eval_loss" in m][-1]
    start = [m["eval_loss"] for m in second.metrics if "eval_loss" in m][0]
    assert start == pytest.approx(end, rel=1e-6)
    with pytest.raises(UserError, match="lora_r: 5 differs from 4 in init_adapter"):
        run(again, lora_r=5, overwrite=True)
    del again["lora_r"]
    third, _ = run(again, overwrite=True)
    assert mini_forge.TrainingConfig.from_file(third.output_dir / "training_config.json").lora_r == 4


def test_an_rslora_run_can_start_another(settings, tmp_path):
    first, _ = run(settings, use_rslora=True, lora_r=8)
    again = {**settings, "output_dir": str(tmp_path / "again"), "init_adapter": str(first.output_dir)}
    del again["lora_r"]
    second, _ = run(again)
    end = [m["eval_loss"] for m in first.metrics if "eval_loss" in m][-1]
    assert [m["eval_loss"] for m in second.metrics if "eval_loss" in m][0] == pytest.approx(end, rel=1e-5)


def test_one_row_trains_with_a_warning(settings, tmp_path):
    one = write_rows(tmp_path / "one.jsonl", 1)
    result, lines = run(settings, dataset=str(one))
    assert any("only 1 row to train on" in line for line in lines)
    assert math.isfinite(result.metrics[-1]["loss"])


def test_all_faults_are_told_at_once(settings, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"input": "x"}\n{broken\n')
    with pytest.raises(UserError) as raised:
        run(settings, dataset=str(tmp_path / "bad.jsonl"), model_name=str(tmp_path / "nowhere"))
    text = "\n".join(raised.value.problems)
    assert "bad.jsonl:1:" in text and "bad.jsonl:2:" in text and "nowhere" in text


def test_resume_never_touches_a_folder_that_is_not_a_run(settings, tmp_path):
    home = tmp_path / "home"
    (home / "checkpoints" / "mine").mkdir(parents=True)
    (home / ".tmp-notes").write_text("precious")
    with pytest.raises(ConfigError, match="holds files that are not a run's"):
        run(settings, resume=True, output_dir=str(home))
    assert (home / "checkpoints" / "mine").exists() and (home / ".tmp-notes").read_text() == "precious"


def test_a_kill_while_a_checkpoint_is_replaced_keeps_the_old_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)

    def write(text):
        return lambda target: (target / "state").write_text(text)

    folder.save_checkpoint(2, write("first"), keep=1, protected=None)
    rename = os.rename

    def die_at_the_second(source, target, calls=[]):  # noqa: B006
        calls.append(source)
        if len(calls) == 2:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "rename", die_at_the_second)
    with pytest.raises(Killed):
        folder.save_checkpoint(2, write("second"), keep=1, protected=None)
    monkeypatch.undo()
    folder.sweep()
    assert folder.steps() == [2]
    assert (folder.checkpoint(2) / "state").read_text() == "first"


def test_a_step_is_saved_once_and_the_last_one_is(settings):
    result, _ = run(settings, save_strategy="epoch", num_train_epochs=1, max_steps=-1, load_best_model_at_end=True)
    assert (result.output_dir / "checkpoints" / "step-4").exists()


def test_an_error_in_the_optimizer_leaves_the_old_run(settings, monkeypatch):
    result, _ = run(settings)

    def refuse(*_):
        raise ConfigError("optim: no")

    monkeypatch.setattr("mini_forge.settings.make_optimizer", refuse)
    with pytest.raises(ConfigError):
        run(settings, overwrite=True)
    assert (result.output_dir / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
    torch.OutOfMemoryError("CUDA out of memory."),
], ids=["disk", "cpu memory", "cuda memory"])  # fmt: skip
def test_lack_of_disk_or_memory_is_a_training_error(settings, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("mini_forge.run.torch.save", fail)
    with pytest.raises(TrainingError, match="No space left|out of memory.*no checkpoint was saved yet"):
        run(settings, save_strategy="steps", save_steps=1)


def test_an_unwritable_output_folder_is_told_before_anything_is_loaded(settings):
    with pytest.raises(ConfigError, match="output_dir: '/dev/null' is a file"):
        run(settings, output_dir="/dev/null/run")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
@pytest.mark.parametrize("resume", [False, True])
def test_an_output_folder_of_an_impossible_name_is_told(settings, tmp_path, name, resume):
    with pytest.raises(ConfigError, match="output_dir: .*(is no name for a folder|Must be text that can be written)"):
        run(settings, output_dir=str(tmp_path / name), resume=resume)


def test_a_tokenizer_larger_than_the_model_is_told(settings, tmp_path):
    small = write_checkpoint(tmp_path / "small", vocab_size=50)
    with pytest.raises(UserError, match="the model only 50 embeddings"):
        run(settings, model_name=str(small))


def test_unknown_targets_and_missing_weights_are_told_before_loading(settings, tmp_path):
    with pytest.raises(UserError, match="target_modules: 'nope' names no linear layer"):
        run(settings, target_modules=["nope"])
    bare = write_checkpoint(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no .safetensors file"):
        run(settings, model_name=str(bare))


@pytest.mark.parametrize("changes", [
    {"num_hidden_layers": "2"}, {"num_attention_heads": 0}, {"rope_scaling": "x"}, {"hidden_size": None},
], ids=str)  # fmt: skip
def test_values_of_the_wrong_kind_in_a_model_config_are_told(settings, tmp_path, tiny, changes):
    record = {**json.loads((tiny / "config.json").read_text()), **changes}
    shutil.copytree(tiny, tmp_path / "odd")
    (tmp_path / "odd" / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="config.json"):
        run(settings, model_name=str(tmp_path / "odd"))


def test_seconds_are_wall_time_since_the_first_step_began(settings, monkeypatch):
    from mini_forge.inference.evaluate import evaluate_loss

    def slow(*arguments, **options):
        time.sleep(0.3)
        return evaluate_loss(*arguments, **options)

    monkeypatch.setattr("mini_forge.forms.evaluate_loss", slow)
    result, _ = run(settings, eval_steps=1)
    training = [m["seconds"] for m in result.metrics if "loss" in m]
    assert training[3] - training[0] > 0.9  # three evaluations lie between
    assert training[0] < 0.3 + 1  # the one before the first step does not count


def test_a_run_can_be_evaluated_from_another_folder(settings, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(rows.parent)
    result, _ = run(settings, dataset="rows.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["eval", str(result.output_dir), "--max-new-tokens", "2"]) == 0


def test_a_finished_run_needs_no_base_to_be_resumed(settings, tmp_path, tiny):
    base = shutil.copytree(tiny, tmp_path / "base")
    run(settings, model_name=str(base))
    shutil.rmtree(base)
    _, lines = run(settings, resume=True, model_name=str(base))
    assert any("nothing to do" in line for line in lines)


def test_a_configuration_changed_by_hand_is_checked_again(settings, tmp_path):
    config = mini_forge.TrainingConfig.from_dict(settings)
    for function in (mini_forge.train, check, bench):
        for changes, message in (
            ({"lora_r": -1}, "lora_r: Must be"),
            ({"output_dir": None}, "output_dir: Cannot be empty"),
        ):
            with pytest.raises(ConfigError, match=message):
                function(replace(config, **changes))
    report = check(replace(config, max_seq_length=-1))  # which means: no limit
    assert report["dataset"] == check(replace(config, max_seq_length=None))["dataset"]
    assert report["config"]["lora_r"]["from"] == config.provenance["lora_r"]
    result = mini_forge.train(replace(config, output_dir=tmp_path / "folder"), report=lambda line: None)
    assert result.output_dir == tmp_path / "folder"


def test_a_recorded_config_trains_again(settings, tmp_path):
    first, _ = run(settings, use_rslora=True, lora_r=8)
    start = {**settings, "output_dir": str(tmp_path / "b"), "init_adapter": str(first.output_dir)}
    del start["lora_r"]
    second, _ = run(start)
    record = json.loads((second.output_dir / "training_config.json").read_text())
    run(record, output_dir=str(tmp_path / "c"))


def test_a_second_signal_at_once_changes_nothing():
    from mini_forge.training.loop import Interrupted, StopSignals

    stop = StopSignals()

    def twice():
        stop(signal.SIGTERM, None)
        stop(signal.SIGTERM, None)

    with pytest.raises(Interrupted) as raised:
        stop.hold(twice)
    assert raised.value.signal_number == signal.SIGTERM
    stop(signal.SIGTERM, None)  # while the checkpoint is saved
    stop._first_time -= 10
    with pytest.raises(SystemExit) as left:
        stop(signal.SIGTERM, None)
    assert left.value.code == 143


def test_the_last_partial_window_is_logged_when_a_run_stops_early(settings, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"input": "1", "output": "zebra"}))
    result, _ = run(settings, learning_rate=0.05, max_steps=60, eval_steps=1, early_stopping_patience=2,
                    logging_steps=50, lr_scheduler_type="constant", max_grad_norm=0,
                    eval_dataset=str(tmp_path / "other.jsonl"))  # fmt: skip
    last = max(m["step"] for m in result.metrics if "eval_loss" in m)
    assert [m["step"] for m in result.metrics if "loss" in m] == [1, last]


def test_an_initial_adapters_modules_may_be_named_in_any_way(settings, tmp_path):
    first, _ = run(settings, target_modules=["q_proj", "down_proj"])
    again = {**settings, "output_dir": str(tmp_path / "again"), "init_adapter": str(first.output_dir)}
    run(again, target_modules=["down_proj", "q_proj"])
    with pytest.raises(UserError, match="target_modules: .'q_proj',. differs from"):
        run(again, target_modules=["q_proj"], overwrite=True)
    everything, _ = run(settings, overwrite=True)  # all-linear, which the adapter's file writes out
    run({**again, "init_adapter": str(everything.output_dir)}, target_modules="all-linear", overwrite=True)


@pytest.mark.parametrize("arguments, message", [
    (["train", "CONFIG", "--set", "init_adapter=nowhere"], "error: init_adapter: 'nowhere' is not a folder"),
    (["generate", "nowhere", "--prompt", "x"], "error: model: 'nowhere' is not a folder"),
    (["check", "CONFIG", "--set", "model_name=nowhere"], "error: model_name: 'nowhere' is not a folder"),
    (["check", "CONFIG", "--set", "model_name=~nobody-here/x"], "error: model_name: '~nobody-here/x' is"),
    (["generate", "~nobody-here/x", "--prompt", "x"], "error: model: '~nobody-here/x' is not a folder"),
])  # fmt: skip
def test_an_absent_folder_is_named_by_what_names_it(settings, tmp_path, capsys, arguments, message):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert main([str(tmp_path / "config.json") if a == "CONFIG" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_an_overwritten_run_leaves_nothing_of_the_one_before_and_all_that_is_the_users(settings, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "1 + 1", "chosen": "2", "rejected": "3"}\n' * 12)
    first, _ = run(settings, strategy="dpo", dataset=str(pairs), precompute_reference=True)
    folder = first.output_dir
    assert (folder / "reference_logps.json").exists()
    (folder / ".tmp-final").mkdir()
    (folder / "tokenizer.model").write_text("of another base")
    (folder / "letter.txt").write_text("mine")

    def stop(record):
        raise OSError("stopped")

    with pytest.raises(TrainingError):
        run(settings, overwrite=True, save_strategy="no", on_metrics=stop)
    assert {p.name for p in folder.iterdir()} == {"training_config.json", "metrics.jsonl", "checkpoints", "letter.txt"}


@pytest.mark.parametrize("strategy", ["sft", "rlhf"])
def test_a_disk_that_is_full_at_the_start_harms_nothing(settings, monkeypatch, tmp_path, strategy):
    if strategy == "rlhf":
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text('{"prompt": "1 + 1", "chosen": "2", "rejected": "3"}\n' * 4)
        settings |= {"strategy": "rlhf", "dataset": str(pairs), "max_steps": 1, "max_new_tokens": 2, "eval_split": 0}
    first, _ = run(settings)
    assert strategy == "sft" or (first.output_dir / "reward").exists()
    before = {p: p.read_bytes() for p in first.output_dir.rglob("*") if p.is_file()}

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mini_forge.io.runs.staged", full)
    new = tmp_path / "new"
    for folder in (first.output_dir, new):
        with pytest.raises(TrainingError, match="No space left on device; no checkpoint was saved yet"):
            run(settings, output_dir=str(folder), overwrite=True)
    assert before == {p: p.read_bytes() for p in first.output_dir.rglob("*") if p.is_file()} and not new.exists()


def test_a_disk_that_is_full_at_a_checkpoint_is_not_kept_full_by_its_half(settings, monkeypatch):
    def full(path, state):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("mini_forge.checkpoints.save_state", full)
    with pytest.raises(TrainingError, match=r"No space left on device.*trainer_state.pt.*no checkpoint was saved yet"):
        run(settings, save_strategy="steps", save_steps=1)
    assert list(Path(settings["output_dir"], "checkpoints").iterdir()) == []


def test_what_a_killed_start_leaves_blocks_no_folder(settings, tmp_path):
    folder = Path(settings["output_dir"])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".tmp-training_config.json").touch()
    run(settings)
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="holds files that are not a run's"):
        run(settings, output_dir=str(tmp_path / "other"), overwrite=True)


def test_a_run_whose_folders_may_not_be_written_to_is_not_overwritten(settings, monkeypatch):
    first, _ = run(settings)
    before = {p: p.read_bytes() for p in first.output_dir.rglob("*") if p.is_file()}
    access = os.access  # no folder is closed to root, who may run this
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "checkpoints" and access(path, mode))
    with pytest.raises(UserError, match="checkpoints' may not be written to"):
        run(settings, overwrite=True)
    assert before == {p: p.read_bytes() for p in first.output_dir.rglob("*") if p.is_file()}


def test_a_run_that_another_began_meanwhile_is_not_replaced(settings, tmp_path):
    """Both found the folder empty; the first has finished by the time the second has loaded its model."""
    late = RunFolder(settings["output_dir"])
    late.check_usable(resume=False, overwrite=False)
    result, _ = run(settings, max_steps=1)
    before = adapter(result.output_dir)
    with pytest.raises(ConfigError, match="another run has begun in .* meanwhile; name another folder"):
        late.start({"strategy": "sft"})
    assert same(before, adapter(result.output_dir))


def test_a_disk_that_is_full_at_the_end_is_not_kept_full(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()

    def full(temporary):
        (temporary / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left on device.*run"):
        folder.publish(full)
    assert not any(folder.path.iterdir())


def test_a_checkpoint_s_number_is_one(tmp_path):
    folder = RunFolder(tmp_path)
    for name in ("step-3", "step-²", "step-x"):
        (folder.checkpoints / name).mkdir(parents=True)
    assert folder.steps() == [3]
