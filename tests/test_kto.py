"""KTO: its formula, its rows and batches, and runs against a plain transformers+PEFT loop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mini_forge
from mini_forge.check import check
from mini_forge.cli import main
from mini_forge.config import TrainingConfig
from mini_forge.data.chat import choose_template
from mini_forge.data.labelled import LabelledDocument, collate_labelled, labelled_fingerprint, tokenize_labelled
from mini_forge.data.tasks import Labelled, load_examples
from mini_forge.errors import ConfigError, DataError, UserError
from mini_forge.inference.evaluate import evaluate_labelled
from mini_forge.model import decoder
from mini_forge.model.lora import LoraSpec, inject, lora_layers
from mini_forge.prepare import prepare
from mini_forge.settings import windows
from mini_forge.training.kto import KTOOptions, kto_loss, kto_objective, label_means, reference_point
from tests import golden_files as golden
from tests import toy_tokenizer
from tests.tiny import random_model

KTO = golden.GOLDEN / "kto"
CONFIGS = Path(__file__).parent.parent / "configs"
TIMINGS = ("seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds")


# --- the loss ---


def test_the_loss_is_its_formula():
    """β(r - z0) = 0.25, -0.75, 0.75 and -0.25; σ(0.25) = 0.5621765, σ(0.75) = 0.6791787."""
    ratios, labels = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([True, True, False, False])
    losses = kto_loss(ratios, labels, torch.tensor(0.5), KTOOptions(0.5, 1.5, 0.5))
    by_hand = [1.5 * (1 - 0.5621765), 1.5 * 0.6791787, 0.5 * 0.6791787, 0.5 * (1 - 0.5621765)]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-6) and losses.dtype == torch.float32


def test_the_gradient_is_the_difference_quotient_and_points_each_label_its_way():
    ratios = torch.tensor([0.3, -2.0, 4.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([True, False, True])
    z0 = torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: kto_loss(r, labels, z0, KTOOptions(0.5, 2.0, 0.3)), (ratios,))
    kto_loss(ratios, labels, z0, KTOOptions()).sum().backward()
    assert (ratios.grad < 0).tolist() == labels.tolist()


def test_means_over_all_rows_become_means_over_a_label_s_rows():
    """4 rows, 1 desirable with reward 2, 3 others with rewards that add up to -6."""
    record = {"eval_loss": 0.4, "eval_desirable": 0.25, "eval_rewards_desirable": 2 / 4,
              "eval_rewards_undesirable": -6 / 4, "eval_logps_desirable": -8 / 4, "eval_logps_undesirable": -30 / 4,
              "eval_kl": 0.5}  # fmt: skip
    means = label_means(record, "eval_")
    assert means == {"eval_loss": 0.4, "eval_desirable": 0.25, "eval_rewards_desirable": 2,
                     "eval_rewards_undesirable": -2, "eval_logps_desirable": -8, "eval_logps_undesirable": -10,
                     "eval_kl": 0.5, "eval_reward_margin": 4}  # fmt: skip


def test_nothing_is_said_of_a_label_that_no_row_has():
    record = {"desirable": 1.0, "rewards_desirable": 2.0, "rewards_undesirable": 0.0, "logps_desirable": -8.0,
              "logps_undesirable": 0.0, "kl": 0.5}  # fmt: skip
    assert label_means(record) == {"desirable": 1, "rewards_desirable": 2, "logps_desirable": -8, "kl": 0.5}


# --- rows ---


def row(prompt="What is two and two?", completion="four", label=True, **others) -> str:
    return json.dumps({"prompt": prompt, "completion": completion, "label": label, **others})


def load(folder, *lines):
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    return load_examples(file, "text-generation", "dpo", is_labelled=True)


def turn(role, content):
    return {"role": role, "content": content}


def test_rows_are_strings_or_messages(tmp_path):
    history = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
    answer = turn("assistant", "d")
    rows = load(tmp_path, row(), row(history, [answer], False), row(history, [*history, answer], False, id=3))
    assert rows[0].prompt == (turn("user", "What is two and two?"),) and rows[0].completion == (
        turn("assistant", "four"),
    )
    assert rows[1].prompt == tuple(history) and rows[1].completion == rows[2].completion == (answer,)
    assert [(r.is_desirable, r.line) for r in rows] == [(True, 1), (False, 2), (False, 3)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (row(label="true"), "label must be true (a desirable completion) or false, without quotes, is a string"),
        (row(label=1), "label must be true (a desirable completion) or false, without quotes, is 1"),
        (row(label=None), "label must be true (a desirable completion) or false, without quotes, is null"),
        (row(completion=" "), "completion is empty; remove the row or fill it"),
        (row(completion=[turn("user", "a")]), "completion must end with an assistant turn, ends with 'user'"),
        (row(prompt=[{"role": "user"}]), "prompt[0].content must be a string, is null"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "has the keys prompt, chosen, rejected; a row for dpo with "
         'loss_type "kto" needs prompt,completion,label'),
    ],
)  # fmt: skip
def test_a_row_s_fault_is_told_with_its_line(tmp_path, line, problem):
    with pytest.raises(DataError) as caught:
        load(tmp_path, row(), line)
    assert caught.value.problems == [f"{tmp_path / 'rows.jsonl'}:2: {problem}"]


# --- tokens ---


@pytest.fixture
def tokenizer(tmp_path):
    return toy_tokenizer.byte_level(tmp_path, bos_token="<|im_start|>")


@pytest.fixture
def chatml(tokenizer):
    return choose_template("chatml", "m", tokenizer, "text-generation")


def labelled(prompt="What is two and two?", completion="The answer is four.", is_desirable=True, line=1) -> Labelled:
    sides = [((turn(role, text),) if isinstance(text, str) else tuple(text))
             for role, text in (("user", prompt), ("assistant", completion))]  # fmt: skip
    return Labelled(*sides, is_desirable, line=line, file="rows.jsonl")


def test_rows_have_the_tokens_and_masks_of_the_hugging_face_tokenizer():
    tokenizer = mini_forge.load_tokenizer(golden.BASE)
    template = choose_template(None, str(golden.BASE), tokenizer, "text-generation")
    rows = load_examples(str(KTO / "rows.jsonl"), "text-generation", "dpo", is_labelled=True)
    documents, stats = tokenize_labelled(rows, template, tokenizer, 256)
    expected = json.loads((KTO / "tokens.json").read_text())
    assert [d.ids.tolist() for d in documents] == [e["ids"] for e in expected]
    assert [d.is_trained.astype(int).tolist() for d in documents] == [e["is_trained"] for e in expected]
    assert [d.is_desirable for d in documents] == [e["label"] for e in expected]
    assert (stats.rows, stats.kept, stats.dropped, stats.truncated) == (6, 6, 0, 0)
    assert stats.trained_tokens == sum(sum(e["is_trained"]) for e in expected)


def test_assistant_turns_of_the_prompt_are_not_trained_on_and_those_of_a_completion_are(tokenizer, chatml):
    history = [turn("user", "a"), turn("assistant", "hello"), turn("user", "c")]
    long = [turn("assistant", "d"), turn("user", "e"), turn("assistant", "good day")]
    (one,), _ = tokenize_labelled([labelled(history, long)], chatml, tokenizer)
    assert tokenizer.decode(one.ids[one.is_trained], skip_special=False) == "d<|im_end|>good day<|im_end|>"


def test_too_long_a_row_loses_its_prompt_s_left_then_its_completion_s_right(tokenizer, chatml):
    rows = [labelled(), labelled(line=2)]
    (full, _), _ = tokenize_labelled(rows, chatml, tokenizer)
    length, completion = len(full.ids), full.ids[full.prompt_tokens :].tolist()
    (cut, _), stats = tokenize_labelled(rows, chatml, tokenizer, length - 3)
    assert cut.ids.tolist() == [full.ids[0], *full.ids[4:].tolist()] and stats.truncated == 2
    (cut, _), _ = tokenize_labelled(rows, chatml, tokenizer, 4)
    assert cut.ids.tolist() == [full.ids[0], *completion[:3]]
    assert tokenize_labelled(rows, chatml, tokenizer, 1)[1].dropped == 2


# --- batches ---


def documents(*rows: tuple[list[int], int, bool]) -> list[LabelledDocument]:
    return [LabelledDocument(np.array(ids, np.int32), np.arange(len(ids)) >= n, i, label)
            for i, (ids, n, label) in enumerate(rows)]  # fmt: skip


ROWS = documents(([5, 6, 7, 8, 9], 2, True), ([40, 41, 42, 11], 3, False), ([3, 200, 17, 18], 1, True))
MISMATCHED = [([5, 6, 11], 2), ([40, 41, 42, 200, 17, 18], 3), ([3, 7, 8, 9], 1)]  # row i's prompt, row i+1's rest


def test_each_prompt_is_mismatched_with_the_next_row_s_completion():
    batch = collate_labelled(ROWS, 100)
    assert batch.mismatched.input_ids.tolist() == [[5, 6, 40, 41, 42, 200, 17, 3, 7, 8]]
    assert batch.mismatched.targets.tolist() == [[-100, 11, -100, -100, 200, 17, 18, 7, 8, 9]]
    assert batch.mismatched.document.tolist() == [[0, 0, 1, 1, 1, 1, 1, 2, 2, 2]]
    assert batch.row.input_ids.tolist() == [[5, 6, 7, 8, 40, 41, 42, 3, 200, 17]]
    assert batch.is_desirable.tolist() == [True, False, True]
    assert (batch.rows, batch.tokens, batch.lines) == (3, 10, (0, 1, 2))


def test_mismatched_completions_are_cut_to_the_longest_a_row_may_be():
    cut = collate_labelled(ROWS, 5).mismatched
    assert cut.targets.tolist() == [[-100, 11, -100, -100, 200, 17, 7, 8, 9]]


def test_the_fingerprint_knows_the_labels():
    other = [LabelledDocument(d.ids, d.is_trained, d.line, not d.is_desirable) for d in ROWS]
    assert len({labelled_fingerprint(rows) for rows in (ROWS, other, ROWS[:2])}) == 3


# --- the objective ---


@pytest.fixture
def adapted():
    """A model with an adapter that does something."""
    model = random_model()
    inject(model, LoraSpec(4, 8.0, 0.0), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.2, generator=generator)
    return model


@torch.no_grad()
def slow_ratio(model, ids: list[int], prompt: int) -> float:
    """Σ log π(token)/π_ref(token) over the completion, one document alone, in float64."""
    total = 0.0
    for one, sign in ((model, 1), (random_model(), -1)):
        logps = one.logits(torch.tensor([ids]))[0].double().log_softmax(-1)
        total += sign * sum(float(logps[i - 1, ids[i]]) for i in range(prompt, len(ids)))
    return total


def test_the_objective_is_the_sum_of_its_rows_losses(adapted):
    """Against one document at a time, in float64."""
    ratios = [slow_ratio(adapted, d.ids.tolist(), d.prompt_tokens) for d in ROWS]
    z0 = max(0.0, sum(slow_ratio(adapted, ids, n) for ids, n in MISMATCHED) / 3)
    sigmoid = [1 / (1 + np.exp(-0.5 * (r - z0))) for r in ratios]
    expected = 2 * (1 - sigmoid[0]) + 0.3 * sigmoid[1] + 2 * (1 - sigmoid[2])
    batch = collate_labelled(ROWS, 100)
    total, count, metrics = kto_objective(KTOOptions(0.5, 2.0, 0.3)).sums(adapted, batch)
    assert total.item() == pytest.approx(expected, abs=1e-5) and count == 3
    assert metrics["rewards_desirable"] == pytest.approx(0.5 * (ratios[0] + ratios[2]), abs=1e-4)
    assert metrics["rewards_undesirable"] == pytest.approx(0.5 * ratios[1], abs=1e-4)
    assert metrics["kl"] == pytest.approx(3 * z0, abs=1e-4) and metrics["desirable"] == 2


@pytest.mark.parametrize("sign", [1, -1])
def test_the_reference_point_is_the_mismatched_rows_mean_log_ratio_and_not_below_0(adapted, sign):
    """An adapter and the other way round: one of the two has a negative mean."""
    for _, layer in lora_layers(adapted):
        layer.lora_B.data *= sign
    mean = sum(slow_ratio(adapted, ids, n) for ids, n in MISMATCHED) / 3
    found = reference_point(adapted, collate_labelled(ROWS, 100))
    assert abs(mean) > 0.05 and not found.requires_grad
    assert float(found) == pytest.approx(max(0.0, mean), abs=1e-4)


def test_the_two_signs_above_are_those_of_two_means(adapted):
    means = []
    for sign in (1, -1):
        for _, layer in lora_layers(adapted):
            layer.lora_B.data *= sign
        means.append(sum(slow_ratio(adapted, ids, n) for ids, n in MISMATCHED))
    assert min(means) < 0 < max(means)


def test_a_row_alone_has_the_reference_point_0(adapted):
    batch = collate_labelled(ROWS[:1], 100)
    assert batch.mismatched is None and float(reference_point(adapted, batch)) == 0
    ratio = slow_ratio(adapted, ROWS[0].ids.tolist(), 2)
    total, count, metrics = kto_objective(KTOOptions(0.5)).sums(adapted, batch)
    assert total.item() == pytest.approx(1 - 1 / (1 + np.exp(-0.5 * ratio)), abs=1e-5)
    assert count == 1 and metrics["kl"] == 0


def test_evaluation_divides_only_the_totals(adapted):
    """2 + 1 rows, longest first: the sums of the batches by 3, not a mean of means."""
    sums = kto_objective(KTOOptions(0.5)).sums
    parts = [sums(adapted, collate_labelled(rows, 100)) for rows in (ROWS[:2], ROWS[2:])]
    found = evaluate_labelled(adapted, [ROWS[1], ROWS[0], ROWS[2]], sums, batch_size=2, max_length=100)
    assert found["eval_rows"] == 3
    assert found["eval_loss"] == pytest.approx(sum(total.item() for total, _, _ in parts) / 3, rel=1e-5)
    assert found["eval_kl"] == pytest.approx(sum(metrics["kl"] for _, _, metrics in parts) / 3, abs=1e-6)


# --- against the plain loop ---


def golden_run(case: str, folder, **others):
    wanted = json.loads((KTO / case / "expected.json").read_text())["settings"]
    config = TrainingConfig.from_dict({
        "task": "text-generation", "compute_specs": "low_end", "strategy": "dpo", "use_4bit": False,
        "loss_type": "kto", "model_name": str(golden.BASE), "dataset": str(KTO / "rows.jsonl"),
        "init_adapter": str(golden.INIT_ADAPTER), "dtype": "float32", "device": "cpu", "optim": "adamw_torch",
        "max_seq_length": 256, "eval_split": 0, "group_by_length": False,
        "per_device_train_batch_size": wanted["batch_size"], "gradient_accumulation_steps": 2,
        "num_train_epochs": wanted["steps"], "logging_steps": 1, "save_strategy": "no", "output_dir": str(folder),
        **{key: wanted[key] for key in ("learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "beta",
                                        "desirable_weight", "undesirable_weight", "seed")},
        **others,
    })  # fmt: skip
    return config, mini_forge.train(config, report=lambda line: None)


@pytest.mark.parametrize(("case", "option"), [
    ("equal", {}), ("weighted", {}), ("equal", {"gradient_checkpointing": False}), ("equal", {"provider": "unsloth"}),
    ("weighted", {"lora_dropout": 0.5, "neftune_noise_alpha": 5.0, "train_on_prompt": True}),
], ids=str)  # fmt: skip
def test_six_steps_equal_the_plain_loop(tmp_path, case, option):
    config, result = golden_run(case, tmp_path / "run", **option)
    expected = json.loads((KTO / case / "expected.json").read_text())
    planned = windows(prepare(config))
    orders = [[line - 1 for batch in planned(step) for line in batch.lines] for step in range(6)]
    assert orders == expected["orders"]  # who is mismatched with whom is a part of the loss
    steps = [record for record in result.metrics if "loss" in record]
    assert [record["loss"] for record in steps] == pytest.approx(expected["losses"], rel=1e-4)
    assert [record["grad_norm"] for record in steps] == pytest.approx(expected["grad_norms"], rel=1e-3)
    for name in ("rewards_desirable", "rewards_undesirable", "kl"):
        assert [record[name] for record in steps] == pytest.approx(expected[name], abs=1e-4)
    ours, theirs = (load_file(Path(f) / "adapter_model.safetensors") for f in (result.output_dir, KTO / case))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 2e-5


# --- runs ---


@pytest.fixture
def settings(tiny, tmp_path):
    rows = [{"prompt": f"{i} + {i}", "completion": f"= {2 * i}" if i % 2 else "no idea " * (1 + i % 3),
             "label": bool(i % 2)} for i in range(20)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {
        "task": "text-generation", "model_name": str(tiny), "dataset": str(tmp_path / "rows.jsonl"),
        "compute_specs": "low_end", "strategy": "dpo", "loss_type": "kto", "use_4bit": False,
        "output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "lora_r": 4,
        "optim": "adamw_torch",
    }  # fmt: skip


def run(settings, on_metrics=None, resume=False, **changes):
    lines = []
    config = TrainingConfig.from_dict({**settings, **changes})
    result = mini_forge.train(config, report=lines.append, on_metrics=on_metrics, resume=resume)
    return result, lines


@pytest.mark.parametrize("changes", [
    {}, {"use_4bit": True}, {"use_8bit": True}, {"bf16": True}, {"lora_dropout": 0.5, "neftune_noise_alpha": 5.0},
    {"packing": True, "max_seq_length": 96}, {"recompute": "selective"},
], ids=str)  # fmt: skip
def test_at_step_0_the_loss_of_every_row_is_a_half_exactly(settings, changes):
    result, _ = run(settings, max_steps=1, **changes)
    before, first = result.metrics[:2]
    assert (before["step"], first["step"]) == (0, 1)
    for prefix, record in (("eval_", before), ("", first)):
        assert record[f"{prefix}loss"] == 0.5
        for name in ("rewards_desirable", "rewards_undesirable", "reward_margin", "kl"):
            assert record[f"{prefix}{name}"] == 0


def test_a_run_tied_to_its_first_adapter_begins_at_it(settings, tmp_path):
    first, _ = run(settings, max_steps=2)
    tied = {**settings, "output_dir": str(tmp_path / "tied"), "init_adapter": str(first.output_dir), "max_steps": 2}
    untied, _ = run({**tied, "output_dir": str(tmp_path / "untied")})
    result, _ = run(tied, reference="init_adapter")
    assert result.metrics[0]["eval_loss"] == 0.5 and untied.metrics[0]["eval_loss"] != 0.5
    assert result.metrics[-1]["eval_loss"] != 0.5


def test_at_step_0_tiles_cost_no_more_than_rounding(settings, monkeypatch):
    """The passes with gradients run their MLPs on other shapes than those without. The tiny model's products are so
    small that tiles of 7 tokens give the same bits on one machine and others on the next."""
    monkeypatch.setattr(decoder, "TILE_TOKENS", 7)
    result, _ = run(settings, max_steps=1, recompute="selective")
    first = result.metrics[1]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and first["kl"] == pytest.approx(0, abs=1e-5)


def test_a_label_s_weight_scales_its_rows(settings):
    result, _ = run(settings, max_steps=1, desirable_weight=3.0, undesirable_weight=0.5)
    before = result.metrics[0]
    share = before["eval_desirable"]
    assert 0 < share < 1 and before["eval_loss"] == pytest.approx(0.5 * (3 * share + 0.5 * (1 - share)))


def test_a_run_learns_to_tell_the_labels_apart(settings):
    result, lines = run(settings, max_steps=12, max_grad_norm=1.0, eval_split=0.4)
    before, after = (m for m in result.metrics if "eval_loss" in m)
    assert after["eval_loss"] < before["eval_loss"] and after["eval_reward_margin"] > 0.5
    assert after["eval_rewards_desirable"] > after["eval_rewards_undesirable"]
    assert any("data: 12 rows" in line for line in lines)
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["trained_rows"] == 12 * 6 and summary["eval_reward_margin_last"] == after["eval_reward_margin"]


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


class Killed(BaseException):
    """Stands for a kill -9: nothing in the program may catch it."""


def killed_at(step):
    def die(record):
        if record["step"] == step:
            raise Killed

    return die


def test_a_kill_and_a_resume_change_no_bit(settings, tmp_path):
    """Rows of a microbatch are mismatched with each other, so the order must be the same too."""
    hard = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "eval_steps": 4, "optim": "adamw_8bit",
            "lora_r": 64}  # fmt: skip
    whole, _ = run(settings, **hard)
    other = {**settings, "output_dir": str(tmp_path / "killed")}
    with pytest.raises(Killed):
        run(other, on_metrics=killed_at(5), **hard)
    resumed, lines = run(other, resume=True, **hard)
    assert any("resuming from" in line and "step-3" in line for line in lines)
    ours, theirs = adapter(whole.output_dir), adapter(resumed.output_dir)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = [[{k: v for k, v in m.items() if k not in TIMINGS} for m in r.metrics] for r in (whole, resumed)]
    assert steps[0] == steps[1] and any("kl" in m for m in steps[0])


def test_changed_labels_are_refused_on_resume(settings):
    extra = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Killed):
        run(settings, on_metrics=killed_at(3), **extra)
    rows = Path(settings["dataset"])
    rows.write_text(rows.read_text().replace("true", "false"))
    with pytest.raises(UserError, match="dataset: .* has changed since"):
        run(settings, resume=True, **extra)


def test_eval_says_what_the_run_said_of_its_held_out_rows(settings, capsys):
    result, _ = run(settings)
    last = [m for m in result.metrics if "eval_loss" in m][-1]
    assert main(["eval", str(result.output_dir)]) == 0
    assert "eval_reward_margin" in capsys.readouterr().out
    written = json.loads((result.output_dir / "eval.json").read_text())
    assert written["rows"] == written["eval_rows"] == 4 and written["rows_dropped"] == 0
    compared = [name for name in last if name.startswith("eval_") and name != "eval_seconds"]
    assert "eval_kl" in compared
    for name in compared:
        assert written[name] == pytest.approx(last[name], rel=1e-4, abs=1e-5)
    assert main(["eval", str(result.output_dir), "--dataset", settings["dataset"], "--limit", "7"]) == 0
    assert json.loads((result.output_dir / "eval.json").read_text())["rows"] == 7


def test_check_shows_the_label_and_finds_faults_of_rows_beside_those_of_keys(settings, tmp_path, capsys):
    report = check(TrainingConfig.from_dict(settings))
    assert report["example"].startswith(("desirable: ", "undesirable: ")) and "⟦" in report["example"]
    (tmp_path / "bad.jsonl").write_text(row(label="no"))
    wrong = {**settings, "dataset": str(tmp_path / "bad.jsonl"), "per_device_train_batch_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    assert main(["check", str(tmp_path / "config.json")]) == 2
    errors = capsys.readouterr().err
    assert "per_device_train_batch_size: Must be ≥ 2" in errors and "bad.jsonl:1: label must be true" in errors


def test_the_loss_is_public():
    zero = torch.zeros(2)
    assert mini_forge.kto_loss(zero, zero == 0, zero.sum(), KTOOptions()).tolist() == [0.5, 0.5]


def test_labels_out_of_balance_are_told(settings):
    def notes(**changes):
        return [n for n in prepare(TrainingConfig.from_dict({**settings, "eval_split": 0, **changes})).notes
                if "desirable" in n]  # fmt: skip

    assert notes() == [] and notes(desirable_weight=1.33) == []
    (note,) = notes(desirable_weight=2)
    assert "10 desirable and 10 undesirable rows, weighed 2.00 to 1" in note and "desirable_weight 1 to 1.33" in note
    rows = Path(settings["dataset"])
    rows.write_text(rows.read_text().replace("true", "false"))
    assert "0 desirable and 20 undesirable rows; with rows of one label alone" in notes()[0]


# --- configuration ---


def config(**keys) -> TrainingConfig:
    needed = {"task": "text-generation", "model_name": "m", "dataset": "d", "compute_specs": "low_end"}
    return TrainingConfig.from_dict({**needed, "strategy": "dpo", "loss_type": "kto", **keys})


def test_a_batch_has_rows_to_mismatch():
    """low_end's batches of 1, and the default's in evaluation, are no demand of the user's."""
    left_out = config()
    assert left_out.per_device_train_batch_size == left_out.per_device_eval_batch_size == 4
    assert left_out.desirable_weight == left_out.undesirable_weight == 1 and left_out.warnings == []
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        assert getattr(config(**{name: 2}), name) == 2
        with pytest.raises(ConfigError, match=f'{name}: Must be ≥ 2 with loss_type "kto" .got 1.'):
            config(**{name: 1})
    assert config(loss_type="sigmoid", per_device_train_batch_size=1).per_device_eval_batch_size == 1


def test_keys_that_kto_cannot_use_are_told():
    with pytest.raises(ConfigError, match='precompute_reference: true contradicts loss_type "kto"'):
        config(precompute_reference=True)
    for name in ("desirable_weight", "undesirable_weight"):
        with pytest.raises(ConfigError, match=f"{name}: Must be > 0"):
            config(**{name: 0})
        (warning,) = config(loss_type="ipo", **{name: 2}).warnings
        assert warning == f'{name}: no effect with loss_type "ipo"; it belongs to "kto"'
    (warning,) = config(label_smoothing=0.1).warnings
    assert warning.startswith('label_smoothing: no effect with loss_type "kto"')


# --- the quickstart ---


def test_the_quickstart_s_rows_are_what_their_script_makes(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS / "quickstart"))
    make = __import__("make_labelled")
    pairs, rows = ([json.loads(line) for line in (CONFIGS / "quickstart" / name).read_text("utf-8").splitlines()]
                   for name in ("preferences.jsonl", "labelled.jsonl"))  # fmt: skip
    assert make.labelled(pairs) == rows and len(rows) == 240
    assert [r["label"] for r in rows[:3]] == [True, False, True]
    assert (rows[0]["completion"], rows[1]["completion"]) == (pairs[0]["chosen"], pairs[1]["rejected"])


def test_the_quickstart_s_margin_rises_on_held_out_rows(tmp_path):
    """10 of its 72 steps, at its highest rate. Before, every reward is 0."""
    config = TrainingConfig.from_file(
        CONFIGS / "kto_quickstart.json", output_dir=str(tmp_path / "run"), max_steps=10, num_train_epochs=1,
        device="cpu", lr_scheduler_type="constant",
    )  # fmt: skip
    metrics = mini_forge.train(config, report=lambda line: None).metrics
    before, after = (m for m in metrics if "eval_loss" in m)
    assert before["eval_loss"] == 0.5 and before["eval_reward_margin"] == 0
    assert after["eval_reward_margin"] > 0.5 and after["eval_loss"] < 0.45
