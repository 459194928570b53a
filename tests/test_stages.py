"""Strategy rlhf, whole: a reward model from pairs, then PPO, by one command; and that stopping changes no bit of it."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mini_forge
from mini_forge.check import check
from mini_forge.cli import main
from mini_forge.errors import CheckpointError, ConfigError, TrainingError
from mini_forge.io.runs import RunFolder
from mini_forge.io.state import save_state
from mini_forge.stages import truncate_samples
from mini_forge.training.loop import Interrupted

TIMINGS = ("seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds")
REWARDS = """
def letters(prompts, responses, rows):
    assert all(row["bonus"] == 1 for row in rows) and all("say" in prompt for prompt in prompts)
    return [sum(c.isascii() and c.isalpha() for c in response) for response in responses]


def broken(prompts, responses, rows):
    return [1.0]
"""


@pytest.fixture
def rows(tmp_path):
    pairs = [
        {"prompt": f"say {i}", "chosen": "aaa" * (1 + i % 3), "rejected": "!!" * (1 + i % 4), "bonus": 1}
        for i in range(20)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture
def prompts_only(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "bonus": 1}) + "\n" for i in range(40)))
    return path


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """A module of reward functions in the current folder."""
    (tmp_path / "rewards_of_test.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def settings(tiny, rows, tmp_path):
    return {
        "task": "text-generation", "model_name": str(tiny), "dataset": str(rows), "compute_specs": "low_end",
        "strategy": "rlhf", "use_4bit": False, "output_dir": str(tmp_path / "run"), "max_steps": 3,
        "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2, "reward_learning_rate": 1e-2, "lora_r": 4, "optim": "adamw_torch",
        "gradient_checkpointing": False, "max_new_tokens": 8, "rollout_batch_size": 8, "num_mini_batches": 2,
        "ppo_epochs": 2, "save_strategy": "steps", "save_steps": 1, "eval_steps": 2,
    }  # fmt: skip


def run(settings, resume=False, on_metrics=None, **changes):
    lines = []
    config = mini_forge.TrainingConfig.from_dict({**settings, **changes})
    return mini_forge.train(config, resume=resume, report=lines.append, on_metrics=on_metrics), lines


def untimed(metrics):
    return [{k: v for k, v in m.items() if k not in TIMINGS} for m in metrics]


def left(folder: Path) -> dict:
    """All that must be the same, bit for bit, after a run that was stopped and one that was not."""
    files = {name: load_file(folder / name / "adapter_model.safetensors") for name in (".", "reward")}
    tensors = {f"{name}/{key}": tensor for name, found in files.items() for key, tensor in found.items()}
    metrics = [untimed(RunFolder(folder / name).metrics()) for name in (".", "reward")]
    return {"tensors": tensors, "metrics": metrics, "samples": (folder / "samples.jsonl").read_text()}


def assert_same(one: dict, other: dict):
    assert one["metrics"] == other["metrics"] and one["samples"] == other["samples"]
    assert one["tensors"].keys() == other["tensors"].keys()
    assert all(torch.equal(tensor, other["tensors"][name]) for name, tensor in one["tensors"].items())


class Killed(BaseException):
    """Stands for a kill -9: nothing in the program may catch it."""


def test_one_command_on_pairs_trains_a_reward_model_and_then_the_policy(settings):
    result, lines = run(settings)
    folder = result.output_dir
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "samples.jsonl", "metrics.jsonl", "summary.json",
            "training_config.json", "tokenizer.json", "README.md", "reward", "checkpoints"} <= names  # fmt: skip
    reward = {path.name for path in (folder / "reward").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "summary.json"} <= reward
    assert "base_model.model.score.weight" in load_file(folder / "reward" / "adapter_model.safetensors")
    assert any("reward_accuracy" in m for m in RunFolder(folder / "reward").metrics())
    trained = [m for m in result.metrics if "loss" in m]
    assert [m["step"] for m in trained] == [1, 2, 3] and all({"reward_mean", "kl"} <= m.keys() for m in trained)
    assert trained[0]["kl"] == 0 and trained[-1]["kl"] > 0
    assert [m["step"] for m in result.metrics if "eval_reward_mean" in m] == [0, 2, 3]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {1, 2, 3}
    assert any(line.startswith("reward model: saved") and "held-out" in line for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 3 and "eval_reward_mean_last" in summary
    ids = torch.arange(9)[None]
    assert torch.equal(mini_forge.load_model(folder).logits(ids), result.model.logits(ids))


def test_the_reward_model_learns_the_preference_and_is_not_the_policy(settings):
    result, _ = run(settings, reward_epochs=6)
    metrics = RunFolder(result.output_dir / "reward").metrics()
    losses = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    assert losses[-1] < 0.5 * losses[0] and metrics[-1]["eval_reward_accuracy"] == 1
    policy = load_file(result.output_dir / "adapter_model.safetensors")
    reward = load_file(result.output_dir / "reward" / "adapter_model.safetensors")
    assert all(not torch.equal(policy[name], reward[name]) for name in policy)


@pytest.mark.parametrize("stage", ["reward", "policy"])
@pytest.mark.parametrize("changes", [{}, {"advantage": "group", "kl_target": 0.5}], ids=str)
def test_a_killed_run_goes_on_bit_for_bit(settings, tmp_path, stage, changes):
    settings |= changes
    whole, _ = run(settings)
    expected = left(whole.output_dir)
    shutil.rmtree(whole.output_dir)

    def kill(record):
        if record["step"] == 3 and "loss" in record and (record.get("stage") == "reward") == (stage == "reward"):
            raise Killed

    with pytest.raises(Killed):
        run(settings, on_metrics=kill)
    folder = Path(settings["output_dir"])
    assert (folder / "reward" / "summary.json").exists() == (stage == "policy")
    resumed, lines = run(settings, resume=True)
    assert_same(left(resumed.output_dir), expected)
    assert any("step-2" in line and "resuming" in line for line in lines)
    assert any("trained before" in line for line in lines) == (stage == "policy")


def test_a_run_killed_between_the_stages_goes_on_with_its_reward_model(settings):
    whole, _ = run(settings, save_strategy="no")
    expected = left(whole.output_dir)
    shutil.rmtree(whole.output_dir)

    def kill(record):
        if "reward_mean" in record:
            raise Killed

    with pytest.raises(Killed):
        run(settings, save_strategy="no", on_metrics=kill)
    resumed, _ = run(settings, resume=True, save_strategy="no")
    assert_same(left(resumed.output_dir), expected)


def test_a_signal_stops_at_the_next_update_and_loses_nothing(settings):
    whole, _ = run(settings)
    expected = left(whole.output_dir)
    shutil.rmtree(whole.output_dir)

    def stop(record):
        if record["step"] == 2 and "reward_mean" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(settings, save_strategy="no", on_metrics=stop)
    assert RunFolder(settings["output_dir"]).steps() == [2]
    resumed, _ = run(settings, resume=True, save_strategy="no")
    assert_same(left(resumed.output_dir), expected)


@pytest.mark.parametrize("changes", [{}, {"advantage": "group"}], ids=str)
def test_a_run_tied_to_its_first_adapter_begins_at_it(settings, tmp_path, capsys, changes):
    """Also when its reward model, another adapter, was trained in between, and when it was killed and went on."""
    first, _ = run(settings)
    settings |= {"init_adapter": str(first.output_dir), "reference": "init_adapter", **changes}
    whole, _ = run(settings, output_dir=str(tmp_path / "tied"))
    trained = [m for m in whole.metrics if "loss" in m]
    assert whole.metrics[0]["eval_kl"] == trained[0]["kl"] == 0 and trained[-1]["kl"] > 0

    def kill(record):
        if record["step"] == 2 and "loss" in record and record.get("stage") != "reward":
            raise Killed

    again = {**settings, "output_dir": str(tmp_path / "killed")}
    with pytest.raises(Killed):
        run(again, on_metrics=kill)
    resumed, _ = run(again, resume=True)
    assert_same(left(resumed.output_dir), left(whole.output_dir))
    metrics, _ = mini_forge_eval(whole.output_dir)
    assert metrics["eval_kl"] == pytest.approx(whole.metrics[-1]["eval_kl"], rel=1e-4)


@pytest.mark.parametrize("stage", ["reward", "policy"])
def test_a_reward_model_goes_on_with_its_own_pairs_alone(settings, rows, stage):
    """The prompts stay the same: what PPO looks at is not changed."""

    def kill(record):
        if "loss" in record and (record["step"] == 3 if stage == "reward" else record.get("stage") is None):
            raise Killed

    with pytest.raises(Killed):
        run(settings, on_metrics=kill)
    swapped = [json.loads(line) for line in rows.read_text().splitlines()]
    texts = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in swapped]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    folder = Path(settings["output_dir"])
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != "run.lock"}
    notes = check(mini_forge.TrainingConfig.from_dict(settings), resume=True)["notes"]
    assert any("has changed since" in note for note in notes)
    with pytest.raises(ConfigError, match="dataset: .* has changed since .*reward"):
        run(settings, resume=True)
    assert all(file.read_bytes() == text for file, text in before.items())


def test_a_reward_model_that_does_not_know_its_pairs_is_gone_on_with(settings):
    """As older versions left it."""

    def kill(record):
        if record["step"] == 2 and "loss" in record and record.get("stage") is None:
            raise Killed

    with pytest.raises(Killed):
        run(settings, on_metrics=kill)
    summary = Path(settings["output_dir"]) / "reward" / "summary.json"
    record = json.loads(summary.read_text())
    del record["data"]
    summary.write_text(json.dumps(record))
    resumed, _ = run(settings, resume=True)
    assert resumed.metrics[-1]["step"] == 3


def test_a_function_rewards_prompts_alone(settings, prompts_only, functions):
    result, _ = run(settings, dataset=str(prompts_only), reward_function="rewards_of_test:letters")
    assert not (result.output_dir / "reward").exists()
    samples = [json.loads(line) for line in (result.output_dir / "samples.jsonl").read_text().splitlines()]
    for sample in samples:
        assert sample["reward"] == sum(c.isascii() and c.isalpha() for c in sample["response"])


def test_the_mean_reward_rises_within_a_dozen_updates(settings, tiny, prompts_only, functions, tmp_path):
    """With a head six times as sharp: the plain one's 32 channels can hardly prefer letters to other bytes."""
    from safetensors.torch import save_file

    sharp = shutil.copytree(tiny, tmp_path / "sharp")
    weights = load_file(sharp / "model.safetensors")
    weights["lm_head.weight"] *= 6
    save_file(weights, sharp / "model.safetensors", metadata={"format": "pt"})
    result, _ = run(
        settings, model_name=str(sharp), dataset=str(prompts_only), reward_function="rewards_of_test:letters",
        max_steps=12, rollout_batch_size=32, per_device_train_batch_size=16, ppo_epochs=4, temperature=1.0,
        save_strategy="no", eval_split=0.2, max_grad_norm=1.0, kl_coef=0.01,
    )  # fmt: skip
    rewards = [m["reward_mean"] for m in result.metrics if "reward_mean" in m]
    kls = [m["kl"] for m in result.metrics if "kl" in m]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 1.0, rewards
    assert all(kl >= 0 for kl in kls)
    evaluated = [m["eval_reward_mean"] for m in result.metrics if "eval_reward_mean" in m]
    assert evaluated[-1] > evaluated[0]


def test_a_reward_model_that_is_given_is_used(settings, prompts_only, tmp_path):
    first, _ = run(settings)
    second, _ = run(settings, output_dir=str(tmp_path / "second"), dataset=str(prompts_only),
                    reward_model=str(first.output_dir / "reward"))  # fmt: skip
    assert not (second.output_dir / "reward").exists()
    metrics, _ = mini_forge_eval(second.output_dir)
    assert metrics["eval_rows"] == 8


def mini_forge_eval(folder, **options):
    from mini_forge.use import evaluate_run

    return evaluate_run(str(folder), **options)


def test_eval_tells_reward_and_kl_on_held_out_prompts(settings, prompts_only, capsys):
    result, _ = run(settings)
    held_out = [m for m in result.metrics if "eval_reward_mean" in m][-1]
    assert main(["eval", str(result.output_dir)]) == 0
    metrics = json.loads((result.output_dir / "eval.json").read_text())
    assert metrics["eval_rows"] == held_out["eval_rows"] == 4
    for name in ("eval_reward_mean", "eval_kl"):
        assert metrics[name] == pytest.approx(held_out[name], abs=1e-5)
    of_pairs = [m for m in RunFolder(result.output_dir / "reward").metrics() if "eval_reward_margin" in m][-1]
    assert metrics["eval_pairs"] == of_pairs["eval_pairs"] == 4 and of_pairs["eval_reward_margin"] > 0.1
    for name in ("eval_reward_accuracy", "eval_reward_margin"):
        assert metrics[name] == pytest.approx(of_pairs[name], abs=1e-5)
    predictions = [json.loads(line) for line in (result.output_dir / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 4 and predictions[0].keys() == {"prompt", "prediction", "reference", "reward", "kl"}
    assert main(["eval", str(result.output_dir), "--dataset", str(prompts_only), "--limit", "5"]) == 0
    metrics = json.loads((result.output_dir / "eval.json").read_text())
    assert metrics["eval_rows"] == 5 and "eval_reward_accuracy" not in metrics  # prompts alone prefer nothing


def test_a_checkpoint_is_evaluated_by_its_runs_reward(settings):
    result, _ = run(settings)
    last, _ = mini_forge_eval(result.output_dir / "checkpoints" / "step-3")
    assert last == mini_forge_eval(result.output_dir)[0] and "eval_reward_mean" in last
    assert mini_forge_eval(result.output_dir / "checkpoints" / "step-1")[0] != last


def cli(settings, tmp_path, *arguments) -> int:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return main(["train", str(tmp_path / "config.json"), *arguments])


@pytest.mark.parametrize(("changes", "told"), [
    ({}, ["prompts.jsonl:1: ", "reward_model: not given"]),
    ({"reward_function": "no_such_module_x:f"}, ["reward_function: 'no_such_module_x:f': there is no module"]),
    ({"reward_function": "json:dumps", "reward_model": "x"}, ["reward_function: contradicts reward_model"]),
    ({"reward_model": "no/such/folder"}, ["no/such/folder"]),
    ({"reward_function": "json:dumps", "max_new_tokens": 512}, ["max_new_tokens: 512 leaves no room"]),
    ({"reward_function": "json:dumps", "advantage": "group", "group_size": 3},
     ["rollout_batch_size: Must be a multiple of group_size, 3"]),
], ids=str)  # fmt: skip
def test_what_cannot_be_trained_is_told_before_anything_is_written(settings, prompts_only, tmp_path, capsys, changes,
                                                                   told):  # fmt: skip
    assert cli({**settings, "dataset": str(prompts_only), **changes}, tmp_path) == 2
    errors = capsys.readouterr().err
    assert all(text in errors for text in told), errors
    assert "Traceback" not in errors and not Path(settings["output_dir"]).exists()


def test_a_reward_function_that_fails_ends_the_run_with_1(settings, prompts_only, functions, tmp_path, capsys):
    changes = {"dataset": str(prompts_only), "reward_function": "rewards_of_test:broken", "eval_split": 0}
    assert cli({**settings, **changes}, tmp_path) == 1
    assert "returned 1 numbers for 8 responses" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["reward model", "policy"])
def test_a_disk_that_is_full_names_the_last_checkpoint_of_either_stage(settings, monkeypatch, stage):
    def full(path, state):
        if path.parent.name.endswith("step-2") and ("reward" in path.parts) == (stage == "reward model"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save_state(path, state)

    monkeypatch.setattr("mini_forge.checkpoints.save_state", full)
    inner = "reward/checkpoints" if stage == "reward model" else "checkpoints"
    with pytest.raises(TrainingError, match=f"No space left on device.*last good checkpoint: .*/run/{inner}/step-1$"):
        run(settings)


def test_a_run_is_no_reward_model_but_has_one(settings, prompts_only, tmp_path, capsys):
    first, _ = run(settings)
    changes = {"dataset": str(prompts_only), "reward_model": str(first.output_dir), "output_dir": str(tmp_path / "b")}
    assert cli({**settings, **changes}, tmp_path) == 2
    assert f"its reward model is {first.output_dir / 'reward'}, name that" in capsys.readouterr().err


def test_overwriting_removes_the_reward_model_and_the_samples_of_the_run_before(settings, tmp_path):
    run(settings)
    folder = Path(settings["output_dir"])
    before = (folder / "reward" / "summary.json").stat().st_mtime_ns
    config = mini_forge.TrainingConfig.from_dict(settings)
    mini_forge.train(config, overwrite=True, report=str)
    assert (folder / "reward" / "summary.json").stat().st_mtime_ns > before
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 12
    sft = {"strategy": "sft", "dataset": str(tmp_path / "sft.jsonl")}
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 12)
    mini_forge.train(mini_forge.TrainingConfig.from_dict({**settings, **sft}), overwrite=True, report=str)
    assert not (folder / "reward").exists() and not (folder / "samples.jsonl").exists()


def test_a_user_s_own_folder_named_reward_is_left_alone(settings, tmp_path):
    sft = {"strategy": "sft", "dataset": str(tmp_path / "sft.jsonl")}
    (tmp_path / "sft.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 12)
    config = mini_forge.TrainingConfig.from_dict({**settings, **sft})
    mini_forge.train(config, report=str)
    (Path(settings["output_dir"]) / "reward").mkdir()
    mini_forge.train(config, overwrite=True, report=str)
    assert (Path(settings["output_dir"]) / "reward").is_dir()


def test_another_dataset_cannot_be_resumed_with(settings, rows):
    run(settings, max_steps=3)
    folder = Path(settings["output_dir"])
    (folder / "summary.json").unlink()
    rows.write_text(rows.read_text().replace("say 1", "say 7"))
    with pytest.raises(ConfigError, match="dataset: .* has changed since"):
        run(settings, resume=True)


def test_4_bits_and_checkpointing_and_16_bits_train_too(settings):
    for i, changes in enumerate([{"use_4bit": True, "gradient_checkpointing": True}, {"bf16": True}, {"fp16": True}]):
        result, _ = run(settings, output_dir=f"{settings['output_dir']}{i}", max_steps=2, **changes)
        trained = [m for m in result.metrics if "loss" in m]
        assert len(trained) == 2 and trained[0]["kl"] == 0 and trained[0]["optimizer_steps"] == 4


def test_a_sample_that_is_no_record_is_told_on_resume(tmp_path):
    samples = tmp_path / "samples.jsonl"
    samples.write_bytes('{"step": 1, "response": "é"}\n{"step": 2}\n{"st'.encode())
    truncate_samples(samples, 1)
    assert samples.read_text(encoding="utf-8") == '{"step": 1, "response": "é"}\n'
    samples.write_bytes(b'{"step": 1}\njunk}\n')
    with pytest.raises(CheckpointError, match="samples.jsonl:2: 'junk}': must be a JSON object with its step"):
        truncate_samples(samples, 1)
