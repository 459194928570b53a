"""The command line: every command on a real run, the form of errors, exit codes."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

import mini_forge
from mini_forge.cli import main
from mini_forge.durable import staged
from mini_forge.progress import ProgressDisplay
from mini_forge.use import Session, run_folder
from tests.test_run import damaged
from tests.tiny import write_checkpoint, write_rows


@pytest.fixture
def config(tiny, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", 20)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({
        "task": "text-generation", "model_name": str(tiny), "dataset": str(rows), "compute_specs": "low_end",
        "use_4bit": False, "output_dir": str(tmp_path / "run"), "max_steps": 3, "lora_r": 4, "optim": "adamw_torch",
    }))  # fmt: skip
    return path


@pytest.fixture
def trained(config, tmp_path):
    assert main(["train", str(config)]) == 0
    return tmp_path / "run"


def test_train_prints_its_ops_data_and_metrics(config, tmp_path, capsys):
    assert main(["train", str(config), "--set", "max_steps=2", "--output-dir", str(tmp_path / "other")]) == 0
    out = capsys.readouterr().out
    assert "ops: plain" in out
    assert "step 2  epoch" in out
    assert f"adapter saved in {tmp_path / 'other'}" in out
    assert json.loads((tmp_path / "other" / "training_config.json").read_text())["max_steps"] == 2


def test_set_takes_json_or_a_bare_string(config, tmp_path):
    arguments = ["train", str(config), "--set", "optim=sgd", "--set", 'target_modules=["q_proj"]', "--set", "lora_r=2"]
    assert main(arguments) == 0
    record = json.loads((tmp_path / "run" / "training_config.json").read_text())
    assert (record["optim"], record["target_modules"], record["lora_r"]) == ("sgd", ["q_proj"], 2)


@pytest.mark.parametrize("arguments, message", [
    (["train"], "error: arguments: the following arguments are required: CONFIG"),
    (["fly"], "error: arguments: argument COMMAND: invalid choice"),
    (["train", "CONFIG", "--set", "novalue"], "must be KEY=VALUE"),
    (["train", "CONFIG", "--set", "lora_rr=2"], "lora_rr"),
    (["train", "CONFIG", "--set", "lora_r=0"], "lora_r"),
    (["train", "CONFIG", "--resume", "--overwrite"], "contradict"),
    (["check", "CONFIG", "--resume", "--overwrite"], "contradict"),
    (["train", "CONFIG", "--set", "lora_r=4", "--set", "lora_r=5"], "lora_r: given twice in --set, as 4 and as 5"),
    (["check", "CONFIG", "--set", "lora_r=4", "--set", "lora_r=4"], "lora_r: given twice"),
    (["check", "CONFIG", "--set", 'notes={"a": 1, "a": 2}'], "a: given twice in --set notes, as 1 and as 2"),
    (["check", "CONFIG", "--set", "notes=" + "[" * 100000], "notes: not JSON: nested too deeply; write"),
    (["check", "CONFIG", "--set", "seed=" + "1" * 9999], "seed: not JSON: a number of thousands of digits; write"),
    (["train", "CONFIG", "--dataset", "A", "--set", "dataset=B"], "dataset: 'B' of --set contradicts --dataset 'A'"),
    (["train", "CONFIG", "--output-dir", "A", "--set", "output_dir=B"], "'B' of --set contradicts --output-dir 'A'"),
    (["train", "/absent.json"], "/absent.json"),
    (["train", "CONFIG", "--dataset", "/absent.jsonl"], "/absent.jsonl"),
    (["check", "CONFIG", "--set", "model_name=/absent"], "model_name: '/absent' is not a folder"),
    (["eval", "/absent"], "/absent"),
    (["eval", "MODEL"], "--dataset"),
    (["generate", "/absent", "--prompt", "x"], "/absent"),
    (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "0"], "must be a whole number, at least 1"),
    (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "many"], "'many' must be a whole number"),
    (["generate", "MODEL", "--prompt", "x", "--seed", "4294967296"], "'4294967296' must be a whole number from 0"),
    (["eval", "x" * 300], "xxx"),
    (["generate", "x" * 300, "--prompt", "x"], "is not a folder; give a model folder"),
    (["generate", "MODEL", "--prompt", "a \udcff b"], r"\udcff b"),
    (["generate", "MODEL", "--prompt", "\udcff", "--raw"], "has half a character"),
    (["check", "CONFIG", "--set", "model_name=" + "x" * 300], "is not a folder"),
    (["check", "CONFIG", "--dataset", "x" * 300], "cannot be read (File name too long)"),
    (["check", "CONFIG", "--set", "lora_r=0", "--dataset", "x" * 300], "lora_r"),
    (["merge", "MODEL", "/tmp/never"], "no adapter_config.json"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_exit_2(config, tiny, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    arguments = [{"CONFIG": str(config), "MODEL": str(tiny)}.get(a, a) for a in arguments]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert all(line.startswith("error: ") for line in lines)
    assert message in lines[0]


def test_each_problem_has_its_own_line(config, capsys):
    assert main(["train", str(config), "--set", "lora_r=0", "--set", "optim=magic", "--set", "warmup_ratio=3"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["lora_r", "warmup_ratio", "optim"] or len(lines) == 3


def test_failed_training_is_exit_1(config, tmp_path, capsys):
    broken = damaged(tmp_path)
    assert main(["train", str(config), "--set", f"model_name={broken}", "--set", "eval_split=0"]) == 1
    assert "the loss is nan" in capsys.readouterr().err


def test_check_shows_sources_statistics_and_an_example(config, tmp_path, capsys):
    assert main(["check", str(config), "--set", "lora_alpha=9"]) == 0
    out = capsys.readouterr().out
    assert "(profile low_end)" in out and "(file)" in out and "(override)" in out
    assert "trained_share" in out
    assert "⟦= " in out and "<|im_end|>⟧" in out
    assert not (tmp_path / "run").exists()


def test_check_as_json(config, capsys):
    assert main(["check", str(config), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["lora_r"] == {"value": 4, "from": "file"}
    assert report["dataset"]["rows"] == 16
    assert report["steps"]["total"] == 3


def test_eval_writes_metrics_and_predictions(trained, tmp_path, capsys):
    assert main(["eval", str(trained), "--max-new-tokens", "8"]) == 0
    metrics = json.loads((trained / "eval.json").read_text())
    logged = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert metrics["eval_loss"] == pytest.approx([m["eval_loss"] for m in logged if "eval_loss" in m][-1], rel=1e-5)
    assert "eval_perplexity" in capsys.readouterr().out
    first = json.loads((trained / "predictions.jsonl").read_text().splitlines()[0])
    assert first.keys() >= {"prompt", "prediction", "reference"}
    other = write_rows(tmp_path / "more.jsonl", 3)
    assert main(["eval", str(trained), "--dataset", str(other), "--limit", "2", "--max-new-tokens", "4"]) == 0
    assert json.loads((trained / "eval.json").read_text())["rows"] == 2


def test_generate_uses_the_template_and_repeats_itself(trained, capsys):
    for _ in range(2):
        assert main(["generate", str(trained), "--prompt", "1 + 1", "--max-new-tokens", "8"]) == 0
    out = capsys.readouterr().out
    half = len(out) // 2
    assert out[:half] == out[half:]
    assert main(["generate", str(trained), "--prompt", "x", "--max-new-tokens", "5", "--temperature", "1"]) == 0


def test_chat_answers_and_leaves(trained, capsys, monkeypatch):
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda *_: next(lines))
    assert main(["chat", str(trained), "--max-new-tokens", "4"]) == 0


def test_merge_writes_a_model(trained, tmp_path, capsys):
    assert main(["merge", str(trained), str(tmp_path / "merged")]) == 0
    ids = torch.arange(7)[None]
    torch.testing.assert_close(mini_forge.load_model(tmp_path / "merged").logits(ids),
                               mini_forge.load_model(trained).logits(ids), rtol=1e-4, atol=1e-4)  # fmt: skip


def test_schema_is_json(capsys):
    assert main(["schema"]) == 0
    assert "lora_rank" in json.loads(capsys.readouterr().out)["properties"]


def test_check_tells_the_faults_of_config_and_dataset_together(config, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input": "x"}\n')
    assert main(["check", str(config), "--set", "lora_r=0", "--dataset", str(bad)]) == 2
    err = capsys.readouterr().err
    assert "lora_r" in err and "bad.jsonl:1:" in err


def junk(folder):
    (folder / "model.safetensors").write_bytes(b"junk" * 1000)


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def another_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize("damage", [junk, cut_short, another_config(num_hidden_layers=99), another_config(head_dim=6)])
def test_check_refuses_weights_that_train_refuses_in_the_same_words(config, tiny, tmp_path, capsys, damage):
    base = shutil.copytree(tiny, tmp_path / "base")
    damage(base)
    lines = []
    for command in ("train", "check"):
        assert main([command, str(config), "--set", f"model_name={base}"]) == 2
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1] and str(base) in lines[0]


def test_faults_of_weights_and_dataset_are_told_together(config, tiny, tmp_path, capsys):
    cut_short(shutil.copytree(tiny, tmp_path / "base"))
    (tmp_path / "rows.jsonl").write_text('{"nothing": 1}\n')
    assert main(["check", str(config), "--set", f"model_name={tmp_path / 'base'}"]) == 2
    err = capsys.readouterr().err
    assert "ends past the end of the file" in err and "rows.jsonl:1" in err


def test_check_refuses_an_initial_adapter_that_does_not_fit(config, trained, tiny, tmp_path, capsys):
    base = shutil.copytree(tiny, tmp_path / "base")
    write_checkpoint(base, intermediate_size=96)
    lines = []
    for command in ("train", "check"):
        settings = ["--set", f"init_adapter={trained}", "--set", f"model_name={base}"]
        assert main([command, str(config), *settings, "--output-dir", str(tmp_path / "other")]) == 2
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1] and "the model needs" in lines[0]


def test_check_counts_the_end_tokens_trained_on(config, capsys):
    assert main(["check", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dataset"]["end_token_trained"] == "16/16"


def test_a_terminal_gets_a_bar_and_a_file_plain_lines(capsys):
    import io

    from mini_forge.progress import ProgressDisplay

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    record = {"step": 2, "epoch": 0.5, "eval_loss": 1.25}
    for stream, has_bar in ((Terminal(), True), (io.StringIO(), False)):
        with ProgressDisplay(stream) as display:
            display.step(0, 4)
            display.step(2, 4)
            display.metrics(record)
        assert ("2/4" in stream.getvalue()) == has_bar
        assert "step 2  eval_loss 1.2500" in stream.getvalue()


def with_buffers(*command, **options) -> subprocess.Popen:
    """The command as a process of a user's: its output is buffered, and Triton does not interpret, which is noisy."""
    ours = {"PYTHONUNBUFFERED", "TRITON_INTERPRET"}
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.Popen([sys.executable, "-m", "mini_forge", *command], env=variables, stderr=subprocess.PIPE,
                            text=True, **options)  # fmt: skip


@pytest.mark.parametrize("lines", [0, 1])
def test_a_reader_that_leaves_does_not_end_the_training(config, tmp_path, lines):
    process = with_buffers("train", config, stdout=subprocess.PIPE)
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    assert (process.communicate()[1], process.returncode) == ("", 0)
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("command, code", [("check CONFIG", 0), ("--help", 0), ("schema", 0), ("check nothing", 2)])
def test_an_exit_code_is_the_same_where_the_reader_has_left(config, command, code):
    process = with_buffers(*command.replace("CONFIG", str(config)).split(), stdout=subprocess.PIPE)
    process.stdout.close()
    error = process.communicate()[1]
    assert process.returncode == code and error.count("\n") == (code != 0)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("command", ["check CONFIG", "train CONFIG", "--help", "schema"])
def test_output_that_finds_no_room_is_told(config, command):
    with open("/dev/full", "w") as full:
        process = with_buffers(*command.replace("CONFIG", str(config)).split(), stdout=full)
        error = process.communicate()[1]
    assert process.returncode == 1
    assert error == "error: standard output: No space left on device; make room\n"


@pytest.mark.parametrize("breakage, message", [
    (lambda run: (run / "adapter_model.safetensors").write_bytes(b"x"), "broken safetensors"),
    (lambda run: (run / "adapter_model.safetensors").unlink(), "file not found"),
    (lambda run: (run / "tokenizer.json").write_text("nonsense"), "tokenizer.json: not a tokenizer"),
])  # fmt: skip
def test_merging_a_broken_adapter_is_one_line(trained, tmp_path, capsys, breakage, message):
    breakage(trained)
    assert main(["merge", str(trained), str(tmp_path / "merged")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_merging_below_a_file_is_one_line(trained, tmp_path, capsys):
    assert main(["merge", str(trained), str(tmp_path / "rows.jsonl" / "merged")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_check_of_a_task_of_the_wrong_kind(config, capsys):
    assert main(["check", str(config), "--set", 'task=["x"]']) == 2
    assert "task" in capsys.readouterr().err


def test_an_adapter_without_tokenizer_files_has_its_bases(trained):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (trained / name).unlink()
    assert mini_forge.load_tokenizer(trained).encode("a") == [*mini_forge.load_tokenizer(trained).encode("a")]


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_wait_as_the_user_says_or_briefly(monkeypatch, capsys, said, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what main sets is taken back
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert main(["schema"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_check_refuses_a_reward_model_that_train_refuses(config, trained, tiny, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2 + 2"}\n' * 20)
    settings = ["strategy=rlhf", "rollout_batch_size=4", "max_new_tokens=4"]
    for reward, words in ((tiny, "no tensor 'score.weight'"), (trained, "task_type")):
        lines = []
        for command in ("train", "check"):
            given = [part for setting in (*settings, f"reward_model={reward}") for part in ("--set", setting)]
            assert main([command, str(config), *given, "--output-dir", str(tmp_path / "other")]) == 2
            lines.append(capsys.readouterr().err)
        assert lines[0] == lines[1] and words in lines[0]


@pytest.mark.parametrize("name", [
    "/dev/null", "/dev/null/x", "/proc/foo/x", "x" * 300, "a/" + "y" * 300, "z/" * 2040, "HOME", "a\0b", "\ud800",
], ids=lambda name: name[:12].encode("ascii", "replace").decode())  # fmt: skip
def test_check_refuses_a_folder_that_no_run_can_have(config, tmp_path, capsys, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    name = str(tmp_path / "home") if name == "HOME" else name
    before = sorted(tmp_path.rglob("*"))
    lines = []
    for command in ("train", "check"):
        assert main([command, str(config), "--output-dir", name]) == 2
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1] and lines[0].startswith("error: output_dir: ") and lines[0].count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("key", "inner"), [
    ("init_adapter", "."), ("init_adapter", "checkpoints/step-3"), ("dataset", "predictions.jsonl"),
    ("dataset", "samples.jsonl"),
    ("eval_dataset", "checkpoints/rows.jsonl"),
])  # fmt: skip
def test_a_run_does_not_begin_from_what_it_removes(config, trained, capsys, key, inner):
    if key != "init_adapter":
        (trained / inner).write_bytes((config.parent / "rows.jsonl").read_bytes())
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert main(["train", str(config), "--overwrite", "--set", f"{key}={trained / inner}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {key}: ") and "which a new run there replaces; copy it, or name another" in line
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_a_run_may_begin_from_another_run_and_from_a_users_file_beside_its_own(config, trained, tmp_path):
    shutil.copyfile(tmp_path / "rows.jsonl", trained / "mine.jsonl")
    assert main(["train", str(config), "--overwrite", "--dataset", str(trained / "mine.jsonl")]) == 0
    other = str(tmp_path / "other")
    assert main(["train", str(config), "--output-dir", other, "--set", f"init_adapter={trained}"]) == 0


@pytest.mark.parametrize(("key", "words"), [
    ("init_adapter", "has no adapter_config.json; give a run's or an adapter's folder"),
    ("model_name", "is the folder of an adapter, not of a model; give its base with this folder as init_adapter, or"),
])  # fmt: skip
def test_the_wrong_kind_of_folder_is_told(config, trained, tiny, capsys, key, words):
    folder = tiny if key == "init_adapter" else trained
    assert main(["check", str(config), "--set", f"{key}={folder}", "--output-dir", "new"]) == 2
    assert f"error: {key}: '{folder}' {words}" in capsys.readouterr().err


def test_the_home_folder_may_be_written_short(config, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["train", str(config), "--dataset", "~/rows.jsonl", "--set", "eval_dataset=~/rows.jsonl",
                 "--output-dir", "~/new"]) == 0  # fmt: skip
    record = json.loads((tmp_path / "new" / "training_config.json").read_text())
    assert record["dataset"] == record["eval_dataset"] == str(tmp_path / "rows.jsonl")
    assert main(["eval", "~/new", "--dataset", "~/rows.jsonl", "--limit", "1", "--max-new-tokens", "1"]) == 0
    assert (tmp_path / "new" / "eval.json").exists()


def test_an_evaluation_that_cannot_be_kept_is_still_told(trained, monkeypatch, capsys):
    (trained / "predictions.jsonl").write_text("of before")

    def full(path, text):
        if path.name == "eval.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return staged(path, text)

    monkeypatch.setattr("mini_forge.durable.staged", full)
    capsys.readouterr()
    assert main(["eval", str(trained), "--limit", "1", "--max-new-tokens", "1"]) == 1
    told = capsys.readouterr()
    assert "eval_loss" in told.out and "No space left on device; make room" in told.err
    assert (trained / "predictions.jsonl").read_text() == "of before" and not list(trained.glob(".tmp-*"))


@pytest.mark.parametrize("argument", ["--resume", "--overwrite"])
def test_a_folder_with_another_programs_configuration_is_not_trained_in(config, tmp_path, capsys, argument):
    place = tmp_path / "run" / "training_config.json"
    place.parent.mkdir()
    place.write_text('{"mine": 1}')
    assert main(["train", str(config), argument]) == 2
    assert "holds files that are not a run's; name another folder" in capsys.readouterr().err
    assert place.read_text() == '{"mine": 1}'


def test_a_finished_run_that_may_not_be_written_to_can_be_resumed(config, trained, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert main(["train", str(config), "--resume"]) == 0
    assert main(["train", str(config), "--overwrite"]) == 2


def test_a_merge_that_is_terminated_leaves_nothing(trained, tmp_path):
    code = """if True:
        import sys
        import mini_forge.io.merge as merge
        def stuck(*arguments):
            print("merging", flush=True)
            input()
        merge.write_safetensors = stuck
        from mini_forge.cli import main
        sys.argv = ["mini_forge", "merge", *sys.argv[1:]]
        sys.exit(main())
    """
    command = [sys.executable, "-c", code, str(trained), str(tmp_path / "new" / "merged")]
    other = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True)
    try:
        assert other.stdout.readline() == "merging\n" and (tmp_path / "new").exists()
        other.terminate()
        assert other.wait(30) == 143 and not (tmp_path / "new").exists()
    finally:
        other.kill()
        other.communicate()


def test_check_tells_of_a_run_that_is_there_in_a_note(config, trained, capsys):
    assert main(["check", str(config)]) == 0
    assert "note: train will refuse: output_dir" in capsys.readouterr().out
    assert main(["check", str(config), "--overwrite"]) == 0
    assert "train will refuse" not in capsys.readouterr().out


@pytest.fixture
def begun(config):
    """A run that was killed behind its checkpoint of step 2: as it looks before it is resumed."""
    data = json.loads(config.read_text()) | {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    config.write_text(json.dumps(data))
    assert main(["train", str(config)]) == 0
    run = Path(data["output_dir"])
    (run / "summary.json").unlink()
    for step in run.glob("checkpoints/step-[34]"):
        shutil.rmtree(step)
    return run


@pytest.mark.parametrize("command", [["merge", "RUN", "OUT"], ["export", "RUN", "OUT"], ["eval", "RUN"],
                                     ["generate", "RUN", "--prompt", "x"]])  # fmt: skip
def test_a_run_that_has_not_ended_is_said_to_be_one(begun, tmp_path, capsys, command):
    (begun / "adapter_config.json").unlink()
    words = [{"RUN": str(begun), "OUT": str(tmp_path / "out")}.get(word, word) for word in command]
    assert main(words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "go on with --resume, or use " in line and "checkpoints/step-2" in line


def test_a_checkpoint_is_used_as_its_run_is(begun, capsys):
    """The plain prompt of another task than text-generation, which no file in a checkpoint names."""
    record = begun / "training_config.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"task": "summarization", "chat_template": None}))
    (begun / "chat_template.jinja").unlink()
    sessions = [Session.open(str(folder)) for folder in (begun, begun / "checkpoints" / "step-2")]
    assert [session.config.task for session in sessions] == ["summarization"] * 2
    assert sessions[0].template.source == sessions[1].template.source
    for broken in ('{"task": 5}', "{"):
        record.write_text(broken)
        assert main(["generate", str(begun / "checkpoints" / "step-2"), "--prompt", "x"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines and all(line.startswith(f"error: {record}:") and line.count(str(record)) == 1 for line in lines)
        assert all(line.endswith("; or put the run's own back") for line in lines)


def test_what_only_looks_like_a_checkpoint_is_a_model_of_its_own(tiny, config, tmp_path):
    shutil.copytree(tiny, tmp_path / "checkpoints" / "mine")
    shutil.copy(config, tmp_path / "training_config.json")
    shutil.copy(config, tmp_path / "checkpoints" / "mine" / "training_config.json")
    assert run_folder(str(tmp_path / "checkpoints" / "mine")) == tmp_path / "checkpoints" / "mine"
    assert mini_forge.load_model(tmp_path / "checkpoints" / "mine").spec.vocab_size == 272


def test_more_tokens_than_the_model_has_positions_for_are_not_promised(trained, capsys):
    assert main(["generate", str(trained), "--prompt", "x", "--max-new-tokens", "100000"]) == 0
    note = capsys.readouterr().err
    assert note.startswith("note: at most ") and note.endswith(" new tokens: the model has 512 positions\n")


def test_what_has_no_effect_at_temperature_0_is_told(trained, capsys):
    for arguments, is_told in ((["--top-k", "5"], True), (["--top-k", "5", "--temperature", "1"], False), ([], False)):
        assert main(["generate", str(trained), "--prompt", "x", "--max-new-tokens", "3", *arguments]) == 0
        assert ("--top-k and --top-p have no effect" in capsys.readouterr().err) == is_told


def test_a_loss_that_rose_is_told(config, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text((json.dumps({"prompt": "?", "completion": "Q" * 80}) + "\n") * 4)
    settings = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 20, "dataset": str(other),
                "eval_dataset": json.loads(config.read_text())["dataset"]}  # fmt: skip
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    assert main(["train", str(config)]) == 0
    assert "note: the held-out loss rose from " in capsys.readouterr().out


def damage_state(config, run):
    state = run / "checkpoints" / "step-2" / "trainer_state.pt"
    state.write_bytes(state.read_bytes()[:1000])


def cut_adapter(config, run):
    adapter = run / "checkpoints" / "step-2" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1000])


def flip_adapter(config, run):
    """One byte of a number: still a whole file."""
    adapter = run / "checkpoints" / "step-2" / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-200] ^= 255
    adapter.write_bytes(content)


def remove_adapter(config, run):
    (run / "checkpoints" / "step-2" / "adapter_model.safetensors").unlink()


def change_rows(config, run):
    rows = Path(json.loads(config.read_text())["dataset"])
    rows.write_text("".join(reversed(rows.read_text().splitlines(keepends=True))))


@pytest.mark.parametrize("harm, arguments, words", [
    (None, [], None),
    (None, ["--set", "seed=7"], "seed: 7 differs from"),
    (damage_state, [], "unreadable checkpoint"),
    (cut_adapter, [], "damaged, not what was saved"),
    (flip_adapter, [], "damaged, not what was saved"),
    (remove_adapter, [], "damaged, not what was saved"),
    (change_rows, [], "has changed since"),
])  # fmt: skip
def test_check_tells_why_a_run_cannot_be_resumed_in_the_words_of_train(config, begun, capsys, harm, arguments, words):
    if harm:
        harm(config, begun)
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["check", str(config), "--resume", *arguments]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "train will refuse: " in line]
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before
    code = main(["train", str(config), "--resume", *arguments])
    refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split("refuse: ")[1] for line in told] == [line.removeprefix("error: ") for line in refused]
    assert code == (2 if words else 0) and (words is None or words in told[0])


def test_one_process_trains_in_a_folder(config, begun, capsys):
    holder = """if True:
        import sys
        from mini_forge.io.runs import RunFolder
        with RunFolder(sys.argv[1]).held():
            print("held", flush=True)
            input()
    """
    other = subprocess.Popen([sys.executable, "-c", holder, str(begun)], stdin=PIPE, stdout=PIPE, text=True)
    try:
        other.stdout.readline()
        before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
        capsys.readouterr()
        for arguments in (["--resume"], ["--overwrite"]):
            assert main(["train", str(config), *arguments]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: output_dir: another process is training in ")
        assert main(["check", str(config), "--resume"]) == 0
        assert "train will refuse: output_dir: another process" in capsys.readouterr().out
        assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before
    finally:
        other.kill()
        other.communicate()
    assert main(["train", str(config), "--resume"]) == 0  # the other is gone, however it went


def test_an_adapter_with_a_number_that_is_none_is_refused(begun, tmp_path, capsys):
    adapter = begun / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-4:] = b"\xff" * 4
    adapter.write_bytes(content)
    for command in (["merge", str(begun), str(tmp_path / "merged")], ["generate", str(begun), "--prompt", "a"]):
        assert main(command) == 2
        assert "holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-m", "mini_forge", "schema"], stdout=full, stderr=PIPE, text=True)
    assert run.returncode == 1
    assert run.stderr == "error: standard output: No space left on device; make room\n"


def test_a_user_that_is_not_there_is_a_folders_name(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["check", str(config), "--output-dir", "~nobody-of-that-name/run"]) == 0


def test_a_key_may_be_set_twice_alike(config, tmp_path):
    run = str(tmp_path / "same")
    assert main(["check", str(config), "--output-dir", run, "--set", f"output_dir={run}"]) == 0


def test_check_notes_a_format_of_experts_that_the_model_has_not(config, capsys):
    assert main(["check", str(config), "--set", "adapter_format=per-expert"]) == 0
    assert "note: adapter_format: no effect on a model without experts" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_amid_imports_comes_behind_them(number):
    """Where torch's own initialisation would swallow it."""
    code = f"""
import os, signal, sys
from mini_forge.quick_imports import quick_imports
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
try:
    with quick_imports(is_own_process=True):
        os.kill(os.getpid(), {int(number)})
        print("imported", flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("imported\n", 128 + number), done.stderr


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_an_output_without_unicode_shows_escapes(encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-m", "mini_forge", "schema"], capture_output=True, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout.decode(encoding))


def test_a_chat_without_an_input_is_refused(trained, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["chat", str(trained)]) == 2
    assert capsys.readouterr().err == (
        "error: standard input: is closed, and chat reads from it; use generate for one prompt\n"
    )


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO])
def test_a_terminal_that_is_closed_ends_no_training(number):
    class Gone:
        def isatty(self):
            return False

        def write(self, text):
            raise OSError(number, "gone")

        def flush(self):
            pass

    display = ProgressDisplay(Gone())
    display.line("a")
    display.line("b")
    assert display.stream.name == os.devnull
