"""DPO end to end: against a plain transformers+PEFT loop, and what a run on pairs promises."""

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mini_forge
from mini_forge.check import check
from mini_forge.cli import main
from mini_forge.data.batches import Document, split
from mini_forge.data.chat import choose_template
from mini_forge.data.pairs import PairDocument, collate_pairs, flatten, tokenize_pairs
from mini_forge.data.tasks import Pair, load_examples
from mini_forge.errors import CheckpointError, ConfigError, DataError, UserError
from mini_forge.io.runs import RunFolder
from mini_forge.model.lora import LoraSpec, inject, lora_layers
from mini_forge.training.dpo import pair_metrics, preference_objective, reference_logps, response_logps, score_pairs
from mini_forge.training.preferences import LossOptions, Scores
from mini_forge.use import Session, evaluate_run
from tests import golden_files as golden
from tests import toy_tokenizer
from tests.tiny import random_model

DPO = golden.GOLDEN / "dpo"
LOSSES = ("sigmoid", "ipo", "hinge", "robust")
TIMINGS = ("seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds")


# --- against the plain loop ---


def golden_settings(loss_type: str, batch_size: int, accumulation: int, **others) -> dict:
    wanted = json.loads((DPO / loss_type / "expected.json").read_text())["settings"]
    return {
        "task": "text-generation", "compute_specs": "low_end", "strategy": "dpo", "use_4bit": False,
        "model_name": str(golden.BASE), "dataset": str(DPO / "pairs.jsonl"), "init_adapter": str(golden.INIT_ADAPTER),
        "dtype": "float32", "device": "cpu", "optim": "adamw_torch", "max_seq_length": 256, "eval_split": 0,
        "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
        "num_train_epochs": wanted["steps"], "logging_steps": 1, "save_strategy": "no",
        **{key: wanted[key] for key in ("learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "beta",
                                        "loss_type", "label_smoothing")},
        **others,
    }  # fmt: skip


@pytest.fixture(scope="module")
def golden_run(tmp_path_factory):
    @functools.cache
    def train(loss_type, batch_size, accumulation, **others):
        folder = tmp_path_factory.mktemp(loss_type) / "run"
        config = golden_settings(loss_type, batch_size, accumulation, output_dir=str(folder), **others)
        return mini_forge.train(mini_forge.TrainingConfig.from_dict(config), report=lambda line: None)

    return train


def assert_equals_reference(result, loss_type):
    """To what another order of float32 sums changes, measured as in test_golden_training; between two losses the
    adapters differ by 5e-3."""
    expected = json.loads((DPO / loss_type / "expected.json").read_text())
    steps = [record for record in result.metrics if "loss" in record]
    assert [record["loss"] for record in steps] == pytest.approx(expected["losses"], rel=1e-4)
    assert [record["grad_norm"] for record in steps] == pytest.approx(expected["grad_norms"], rel=1e-3)
    for name in ("rewards_chosen", "rewards_rejected"):
        assert [record[name] for record in steps] == pytest.approx(expected[name], abs=1e-4)
    ours, theirs = (load_file(Path(f) / "adapter_model.safetensors") for f in (result.output_dir, DPO / loss_type))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 2e-5


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2)])
def test_six_steps_equal_the_plain_loop(golden_run, loss_type, batch_size, accumulation):
    assert_equals_reference(golden_run(loss_type, batch_size, accumulation), loss_type)


def test_fewer_pairs_in_the_last_microbatch_weigh_as_much_each(golden_run):
    """3 + 1 pairs: a mean of microbatch means would differ."""
    assert_equals_reference(golden_run("sigmoid", 3, 2), "sigmoid")


@pytest.mark.parametrize("option", [
    {"gradient_checkpointing": False}, {"group_by_length": False}, {"packing": True},
    {"precompute_reference": True, "per_device_eval_batch_size": 4},
    {"lora_dropout": 0.5}, {"neftune_noise_alpha": 5.0}, {"train_on_prompt": True}, {"provider": "unsloth"},
], ids=str)  # fmt: skip
def test_six_steps_do_not_depend_on(golden_run, option):
    assert_equals_reference(golden_run("sigmoid", 4, 1, **option), "sigmoid")


def test_pairs_have_the_tokens_and_masks_of_the_hugging_face_tokenizer():
    tokenizer = mini_forge.load_tokenizer(golden.BASE)
    template = choose_template(None, str(golden.BASE), tokenizer, "text-generation")
    rows = load_examples(str(DPO / "pairs.jsonl"), "text-generation", "dpo")
    pairs, stats = tokenize_pairs(rows, template, tokenizer, 256)
    assert (stats.rows, stats.kept, stats.dropped, stats.truncated) == (4, 4, 0, 0)
    for pair, expected in zip(pairs, json.loads((DPO / "tokens.json").read_text()), strict=True):
        for document, side in ((pair.chosen, expected["chosen"]), (pair.rejected, expected["rejected"])):
            last = len(document.ids)
            assert document.ids.tolist() == side["ids"][:last]
            assert document.is_trained.tolist() == [bool(flag) for flag in side["is_trained"][:last]]
            assert not any(side["is_trained"][last:])


# --- pairs as tokens ---


@pytest.fixture
def tokenizer(tmp_path):
    return toy_tokenizer.byte_level(tmp_path, bos_token="<|im_start|>")


@pytest.fixture
def chatml(tokenizer):
    return choose_template("chatml", "m", tokenizer, "text-generation")


def turn(role, content, **others):
    return {"role": role, "content": content, **others}


def pair(prompt="What is two and two?", chosen="four", rejected="The answer is a day, hello there", **others):
    sides = [((turn(role, text),) if isinstance(text, str) else tuple(text))
             for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected))]  # fmt: skip
    return Pair(*sides, **{"line": 1, "file": "rows.jsonl", **others})


def responses(document: Document, tokenizer) -> str:
    return tokenizer.decode(document.ids[document.is_trained], skip_special=False)


def prompt_of(document: Document) -> list[int]:
    return document.ids[: int(np.argmax(document.is_trained))].tolist()


def test_both_sides_continue_one_prompt_and_only_responses_are_trained_on(tokenizer, chatml):
    (one,), _ = tokenize_pairs([pair()], chatml, tokenizer, None, "Be brief.")
    assert prompt_of(one.chosen) == prompt_of(one.rejected)
    assert "Be brief." in tokenizer.decode(prompt_of(one.chosen), skip_special=False)
    assert responses(one.chosen, tokenizer) == "four<|im_end|>"
    assert responses(one.rejected, tokenizer) == "The answer is a day, hello there<|im_end|>"


def test_assistant_turns_of_the_prompt_are_not_trained_on_and_those_of_a_continuation_are(tokenizer, chatml):
    history = [turn("user", "a"), turn("assistant", "hello"), turn("user", "c")]
    long = [turn("assistant", "d"), turn("user", "e"), turn("assistant", "good day")]
    (one,), _ = tokenize_pairs([pair(history, long, "b")], chatml, tokenizer)
    assert responses(one.chosen, tokenizer) == "d<|im_end|>good day<|im_end|>"
    assert responses(one.rejected, tokenizer) == "b<|im_end|>"


def test_truncation_keeps_the_responses_and_cuts_one_prompt(tokenizer, chatml):
    """By what the longer side has too much, from the prompt's left and behind the BOS, on both sides."""
    (full,), _ = tokenize_pairs([pair()], chatml, tokenizer)
    prompt, longest = prompt_of(full.chosen), max(len(side.ids) for side in full.sides)
    response = longest - len(prompt)
    for max_length in range(response + 2, longest):
        (cut,), stats = tokenize_pairs([pair()], chatml, tokenizer, max_length)
        kept = [prompt[0], *prompt[1 + longest - max_length :]]
        assert prompt_of(cut.chosen) == prompt_of(cut.rejected) == kept
        assert [responses(s, tokenizer) for s in cut.sides] == [responses(s, tokenizer) for s in full.sides]
        assert max(len(side.ids) for side in cut.sides) == max_length and stats.truncated == 1
    assert tokenize_pairs([pair()], chatml, tokenizer, longest)[1].truncated == 0


def test_a_response_too_long_alone_loses_its_right_end(tokenizer, chatml):
    (full,), _ = tokenize_pairs([pair()], chatml, tokenizer)
    (cut,), _ = tokenize_pairs([pair()], chatml, tokenizer, 4)
    response = full.rejected.ids[full.rejected.is_trained].tolist()
    assert cut.rejected.ids.tolist() == [full.rejected.ids[0], *response[:3]]
    assert len(cut.chosen.ids) <= 4 and cut.chosen.is_trained.any()


def test_pairs_with_nothing_left_are_dropped_and_counted(tokenizer, chatml):
    documents, stats = tokenize_pairs([pair(), pair(line=2)], chatml, tokenizer, 1)
    assert documents == [] and (stats.rows, stats.kept, stats.dropped) == (2, 0, 2)


def test_statistics_count_rows_once_and_tokens_on_both_sides(tokenizer, chatml):
    pairs, stats = tokenize_pairs([pair(), pair(chosen="four four", line=7)], chatml, tokenizer)
    sides = flatten(pairs)
    assert (stats.rows, stats.kept, len(sides), [p.line for p in pairs]) == (2, 2, 4, [1, 7])
    assert stats.tokens == sum(len(side.ids) for side in sides)
    assert stats.trained_tokens == sum(int(side.is_trained.sum()) for side in sides)


THINKS = (  # opens an answer without thinking by an empty think block, as its generation prompt does
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and '<think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)


def test_openings_that_differ_belong_to_the_responses(tmp_path):
    tokenizer = toy_tokenizer.byte_level(tmp_path, chat_template=THINKS)
    template = choose_template(None, "m", tokenizer, "text-generation")
    (one,), _ = tokenize_pairs([pair(chosen="a", rejected="<think>\nhm\n</think>\n\nb")], template, tokenizer)
    assert prompt_of(one.chosen) == prompt_of(one.rejected)
    assert tokenizer.decode(prompt_of(one.chosen), skip_special=False).endswith("assistant\n<think>\n")
    assert responses(one.chosen, tokenizer) == "\n</think>\n\na<|im_end|>"
    assert responses(one.rejected, tokenizer) == "hm\n</think>\n\nb<|im_end|>"


SPELLS_THE_END_FIRST = (
    "{{ messages[-1]['content'][0] }}"
    "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{{ 'assistant\n' if add_generation_prompt }}"
)


def test_a_prompt_that_the_template_spells_in_two_ways_is_refused_with_its_line(tmp_path):
    tokenizer = toy_tokenizer.byte_level(tmp_path, chat_template=SPELLS_THE_END_FIRST)
    template = choose_template(None, "m", tokenizer, "text-generation")
    with pytest.raises(DataError) as caught:
        tokenize_pairs([pair(), pair(line=3, chosen="x", rejected="y")], template, tokenizer)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == ["rows.jsonl:1:", "rows.jsonl:3:"]


def documents(*sides: tuple[list[int], int]) -> list[PairDocument]:
    """Pairs of (ids, prompt tokens), chosen and rejected in turn."""
    made = [Document(np.array(ids, np.int32), np.arange(len(ids)) >= n, i) for i, (ids, n) in enumerate(sides)]
    return [PairDocument(*made[i : i + 2]) for i in range(0, len(made), 2)]


PAIRS = documents(([5, 6, 7, 8, 9], 2), ([5, 6, 200, 11], 2), ([40, 41, 42, 43], 3), ([40, 41, 42, 3, 3, 3, 17], 3))


def test_a_batch_is_its_pairs_end_to_end_chosen_first():
    batch = collate_pairs(PAIRS)
    assert batch.row.input_ids.tolist() == [[5, 6, 7, 8, 5, 6, 200, 40, 41, 42, 40, 41, 42, 3, 3, 3]]
    assert batch.row.document.unique_consecutive(return_counts=True)[1].tolist() == [4, 3, 3, 6]
    assert (batch.pairs, batch.tokens, batch.row.documents, batch.reference) == (2, 16, 4, None)
    assert collate_pairs([PairDocument(p.chosen, p.rejected, np.array([1.0, 2.0], np.float32)) for p in PAIRS]
                         ).reference.tolist() == [[1, 2], [1, 2]]  # fmt: skip


# --- log-probabilities ---


@pytest.fixture
def adapted():
    """A model with an adapter that does something, and dropout that would show."""
    model = random_model()
    inject(model, LoraSpec(4, 8.0, 0.0), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        layer.lora_B.data.normal_(std=0.2, generator=generator)
    return model


@torch.no_grad()
def slow_logps(model, document: Document) -> float:
    """Σ log softmax(logits)[token] over the response, one document alone, in float64."""
    logps = model.logits(torch.tensor(document.ids[None].astype(np.int64)))[0].double().log_softmax(-1)
    first = int(np.argmax(document.is_trained))
    return sum(float(logps[i - 1, document.ids[i]]) for i in range(first, len(document.ids)))


def test_log_probabilities_are_sums_over_responses_each_document_alone(adapted):
    logps, tokens = response_logps(adapted, collate_pairs(PAIRS).row)
    assert tokens.tolist() == [3, 2, 1, 4] and logps.dtype == torch.float32
    assert logps.tolist() == pytest.approx([slow_logps(adapted, side) for side in flatten(PAIRS)], abs=1e-4)


def test_the_reference_is_the_model_without_its_adapter(adapted):
    row, base = collate_pairs(PAIRS).row, random_model()
    reference = reference_logps(adapted, row)
    expected = [slow_logps(base, side) for side in flatten(PAIRS)]
    assert reference.tolist() == pytest.approx(expected, abs=1e-4) and not reference.requires_grad
    assert all(layer.enabled for _, layer in lora_layers(adapted))
    assert (reference - response_logps(adapted, row)[0]).abs().min() > 1e-2


def test_no_logits_of_the_whole_batch_are_made(adapted, monkeypatch):
    heads = []
    from mini_forge.training import losses

    token_nll = losses.token_nll
    monkeypatch.setattr(losses, "token_nll", lambda h, w, t: heads.append(len(h)) or token_nll(h, w, t))
    score_pairs(adapted, collate_pairs(PAIRS))
    assert heads == [10, 10]  # reference and policy, the 3 + 2 + 1 + 4 response tokens of 16


def test_a_loss_without_a_reference_computes_none(adapted):
    scores = score_pairs(adapted, collate_pairs(PAIRS), needs_reference=False)
    assert scores.ref_chosen is None and scores.chosen.requires_grad
    assert "kl" not in preference_objective("orpo", LossOptions()).sums(adapted, collate_pairs(PAIRS))[2]


def test_metrics_are_sums_over_pairs_and_equal_rewards_are_no_success():
    numbers = [torch.tensor(v) for v in ([-1.0, -2.0, -3.0], [-4.0, -4.0, -1.0], [-2.0, -2.0, -3.0],
                                         [-3.0, -4.0, -2.0], [1.0] * 3, [1.0] * 3)]  # fmt: skip
    metrics = pair_metrics(Scores(*numbers), LossOptions(0.5), "sigmoid")
    # s_w = 1, 0, 0 and s_l = -1, 0, 1
    expected = {"rewards_chosen": 0.5, "rewards_rejected": 0, "reward_margin": 0.5, "reward_accuracy": 1,
                "logps_chosen": -6, "logps_rejected": -9, "logps_accuracy": 2, "kl": 0.5}  # fmt: skip
    assert metrics == pytest.approx(expected)


# --- runs ---


@pytest.fixture
def settings(tiny, tmp_path):
    rows = [{"prompt": f"{i} + {i}", "chosen": f"= {2 * i}", "rejected": "no idea " * (1 + i % 3)} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": "text-generation", "model_name": str(tiny), "dataset": str(tmp_path / "pairs.jsonl"),
        "compute_specs": "low_end", "strategy": "dpo", "use_4bit": False, "output_dir": str(tmp_path / "run"),
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "lora_r": 4, "optim": "adamw_torch",
    }  # fmt: skip


def run(settings, on_metrics=None, resume=False, **changes):
    lines = []
    config = mini_forge.TrainingConfig.from_dict({**settings, **changes})
    result = mini_forge.train(config, report=lines.append, on_metrics=on_metrics, resume=resume)
    return result, lines


@pytest.mark.parametrize("changes", [
    {}, {"use_4bit": True}, {"use_8bit": True}, {"bf16": True}, {"lora_dropout": 0.5, "neftune_noise_alpha": 5.0},
    {"precompute_reference": True}, {"packing": True},
], ids=str)  # fmt: skip
def test_at_step_0_the_loss_is_ln_2_and_rewards_are_0(settings, changes):
    result, _ = run(settings, max_steps=1, **changes)
    before, first = result.metrics[:2]
    assert (before["step"], first["step"]) == (0, 1)
    for prefix, record in (("eval_", before), ("", first)):
        assert record[f"{prefix}loss"] == pytest.approx(math.log(2), abs=1e-6)
        for name in ("rewards_chosen", "rewards_rejected", "reward_margin", "kl"):
            assert record[f"{prefix}{name}"] == pytest.approx(0, abs=2e-6)
        assert "precompute_reference" in changes or record[f"{prefix}reward_accuracy"] == 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard",
                                       "apo_zero", "apo_down", "aot", "simpo", "orpo", "hinge"])  # fmt: skip
def test_every_loss_learns_the_preference(settings, loss_type):
    """All but discopop, whose slope at Δ = 0, where training begins, points the other way."""
    result, _ = run(settings, loss_type=loss_type, max_steps=8, max_grad_norm=1.0)
    before, after = (m for m in result.metrics if "eval_loss" in m)
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_reward_accuracy"] == 1 and after["eval_reward_margin"] > before["eval_reward_margin"]


def steps(metrics):
    return [{k: v for k, v in m.items() if k not in TIMINGS} for m in metrics]


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


class Killed(BaseException):
    """Stands for a kill -9: nothing in the program may catch it."""


@pytest.mark.parametrize("precompute_reference", [False, True])
@pytest.mark.parametrize("reference", ["base", "init_adapter"])
def test_a_kill_and_a_resume_change_no_bit(settings, tmp_path, precompute_reference, reference):
    first, _ = run(settings, output_dir=str(tmp_path / "first"), lora_r=64, max_steps=2)
    settings |= {"init_adapter": str(first.output_dir), "reference": reference}
    hard = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3, "eval_steps": 4, "optim": "adamw_8bit",
            "lora_r": 64, "precompute_reference": precompute_reference}  # fmt: skip
    whole, _ = run(settings, **hard)

    def die(record):
        if record["step"] == 5:
            raise Killed

    other = {**settings, "output_dir": str(tmp_path / "killed")}
    with pytest.raises(Killed):
        run(other, on_metrics=die, **hard)
    resumed, lines = run(other, resume=True, **hard)
    assert any("resuming from" in line and "step-3" in line for line in lines)
    assert any("from reference_logps.json" in line for line in lines) == precompute_reference
    ours, theirs = adapter(whole.output_dir), adapter(resumed.output_dir)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert steps(whole.metrics) == steps(resumed.metrics)


def test_the_reference_on_disk_is_used_for_its_data_and_model_only(settings):
    result, lines = run(settings, precompute_reference=True)
    file = result.output_dir / "reference_logps.json"
    record = json.loads(file.read_text())
    assert len(record["logps"]) == 20 and any("reference: 20 pairs, computed" in line for line in lines)
    plain, _ = run(settings, output_dir=settings["output_dir"] + "2")
    for ours, theirs in zip(result.metrics, plain.metrics, strict=True):
        name = "loss" if "loss" in ours else "eval_loss"
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)

    def again(**changes):
        config = mini_forge.TrainingConfig.from_dict({**settings, "precompute_reference": True, **changes})
        lines = []
        mini_forge.train(config, overwrite=True, report=lines.append)
        return next(line for line in lines if line.startswith("reference:"))

    assert "from reference_logps.json" in again()
    shifted = [[chosen - 10, rejected + 20] for chosen, rejected in record["logps"]]
    file.write_text(json.dumps({**record, "logps": shifted}))
    assert "from reference_logps.json" in again()
    for metrics in RunFolder(result.output_dir).metrics()[:2]:  # step 0 and 1, of training and held-out pairs alike
        prefix = "eval_" if "eval_loss" in metrics else ""
        assert metrics[f"{prefix}rewards_chosen"] == pytest.approx(1, abs=1e-5)
        assert metrics[f"{prefix}rewards_rejected"] == pytest.approx(-2, abs=1e-5)
    assert "computed" in again(use_4bit=True)
    assert "computed" in again(eval_split=0.5)  # the same rows, but other ones held out
    file.write_text('{"key"')
    assert "computed" in again(eval_split=0.5)


def test_changed_data_is_refused_on_resume(settings):
    def die(record):
        if record["step"] == 3:
            raise Killed

    extra = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Killed):
        run(settings, on_metrics=die, **extra)
    rows = Path(settings["dataset"])
    rows.write_text(rows.read_text().replace("no idea", "no clue"))
    with pytest.raises(UserError, match="dataset: .* has changed since"):
        run(settings, resume=True, **extra)


def test_eval_says_what_the_run_said_of_its_held_out_pairs(settings, capsys):
    result, _ = run(settings)
    last = [m for m in result.metrics if "eval_loss" in m][-1]
    assert main(["eval", str(result.output_dir)]) == 0
    assert "eval_reward_accuracy" in capsys.readouterr().out
    written = json.loads((result.output_dir / "eval.json").read_text())
    assert written["rows"] == written["eval_pairs"] == 4 and written["rows_dropped"] == 0
    for name in ("eval_loss", "eval_reward_accuracy", "eval_reward_margin", "eval_rewards_chosen", "eval_kl"):
        assert written[name] == pytest.approx(last[name], rel=1e-4, abs=1e-6)
    assert main(["eval", str(result.output_dir), "--dataset", settings["dataset"], "--limit", "7"]) == 0
    assert json.loads((result.output_dir / "eval.json").read_text())["rows"] == 7
    summary = json.loads((result.output_dir / "summary.json").read_text())
    assert summary["trained_pairs"] == 16 and summary["eval_reward_accuracy_last"] == last["eval_reward_accuracy"]


def test_a_run_is_prompted_as_its_pairs_were(settings):
    """A pair's prompt is what the user says; the task's phrase is not put before it, in training or after."""
    result, _ = run(settings, task="summarization", max_steps=1)
    session = Session.open(str(result.output_dir))
    assert "Summarize" not in session.tokenizer.decode(session.prompt_ids("0 + 0"), skip_special=False)


def test_the_saved_adapter_says_that_nothing_was_dropped_out(settings):
    result, lines = run(settings, max_steps=1, lora_dropout=0.3)
    assert json.loads((result.output_dir / "adapter_config.json").read_text())["lora_dropout"] == 0
    assert any("lora_dropout: 0.3 is not used" in line for line in lines)


def test_check_shows_both_sides(settings):
    report = check(mini_forge.TrainingConfig.from_dict(settings))
    chosen, rejected = report["example"].split("rejected: ")
    assert chosen.startswith("chosen: ") and "⟦=" in chosen and "⟦no idea" in rejected
    assert report["dataset"]["end_token_trained"] == "32/32" and report["dataset"]["evaluation_rows"] == 4


def test_rows_that_are_no_pairs_are_named(settings, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:1: .*needs prompt,chosen,rejected"):
        run(settings, dataset=str(tmp_path / "bad.jsonl"))


def test_an_initial_adapter_is_not_the_reference_and_the_run_says_so(settings, tmp_path):
    first, _ = run(settings)
    second, lines = run({**settings, "output_dir": str(tmp_path / "again"), "init_adapter": str(first.output_dir)})
    assert any(line.startswith("note: init_adapter: the reference is the model without it") for line in lines)
    end, start = first.metrics[-1], second.metrics[0]
    assert start["eval_reward_margin"] == pytest.approx(end["eval_reward_margin"], rel=1e-5)


@pytest.mark.parametrize("changes", [
    {}, {"precompute_reference": True}, {"use_4bit": True}, {"loss_type": "ipo"},
], ids=str)  # fmt: skip
def test_a_run_tied_to_its_first_adapter_begins_at_it(settings, tmp_path, changes):
    """Rewards of 0 before the first step; after the last, β times what the two adapters, each on a model of its own,
    differ by."""
    changes = {**changes, "bnb_4bit_compute_dtype": "float32"}
    first, _ = run(settings, **changes)
    tied = {**settings, "output_dir": str(tmp_path / "tied"), "init_adapter": str(first.output_dir)}
    second, lines = run(tied, reference="init_adapter", **changes)
    assert not any("the reference is" in line for line in lines)
    start, end = second.metrics[0], second.metrics[-1]
    assert [start[f"eval_{name}"] for name in ("kl", "reward_margin")] == pytest.approx([0, 0], abs=1e-5)
    storage = "nf4" if changes.get("use_4bit") else None
    policy, reference = (
        held_out_logps(folder, settings["dataset"], storage) for folder in (second.output_dir, first.output_dir)
    )
    margin = 0.1 * float((policy - reference) @ torch.tensor([1.0, -1.0]) @ torch.ones(4) / 4)
    assert margin > 0.01 and end["eval_reward_margin"] == pytest.approx(margin, rel=1e-3)
    metrics, _ = evaluate_run(str(second.output_dir))
    assert metrics["eval_reward_margin"] == pytest.approx(end["eval_reward_margin"], rel=1e-5)


def held_out_logps(folder, dataset: str, storage: str | None) -> torch.Tensor:
    """(pairs, 2) of the rows that the run held out."""
    session = Session.open(str(folder))
    rows = load_examples(dataset, "text-generation", "dpo")
    held_out = [rows[i] for i in split(len(rows), 0.2, 42)[1]]
    pairs, _ = tokenize_pairs(held_out, session.template, session.tokenizer, 128, None)
    model = mini_forge.load_model(folder, quantization=storage)
    with torch.no_grad():
        return response_logps(model, collate_pairs(pairs).row)[0].view(-1, 2)


def test_precomputed_logps_are_of_one_reference(settings, tmp_path):
    first, _ = run(settings)
    options = {"precompute_reference": True, "init_adapter": str(first.output_dir)}
    tied = {**settings, **options, "output_dir": str(tmp_path / "tied")}
    run(tied)
    lines: list[str] = []
    config = mini_forge.TrainingConfig.from_dict({**tied, "reference": "init_adapter"})
    mini_forge.train(config, overwrite=True, report=lines.append)
    assert any(line.startswith("reference: 20 pairs, computed") for line in lines)


@pytest.mark.parametrize("precompute_reference", [False, True])
def test_a_run_stays_tied_to_what_its_first_adapter_was(settings, tmp_path, precompute_reference):
    """Though that folder is another run's by now, on resuming, or gone, on evaluating."""
    first, _ = run(settings, output_dir=str(tmp_path / "first"))
    tied = {**settings, "init_adapter": str(first.output_dir), "reference": "init_adapter", "save_strategy": "steps",
            "save_steps": 1, "precompute_reference": precompute_reference}  # fmt: skip
    whole, _ = run(tied, output_dir=str(tmp_path / "whole"))

    def die(record):
        if record["step"] == 2 and "loss" in record:
            raise Killed

    with pytest.raises(Killed):
        run(tied, on_metrics=die, output_dir=str(tmp_path / "killed"))
    config = mini_forge.TrainingConfig.from_dict({**settings, "output_dir": str(tmp_path / "first"), "seed": 7})
    mini_forge.train(config, overwrite=True, report=str)
    resumed, _ = run(tied, resume=True, output_dir=str(tmp_path / "killed"))
    assert steps(resumed.metrics) == steps(whole.metrics)
    first.output_dir.rename(tmp_path / "elsewhere")
    metrics, _ = evaluate_run(str(resumed.output_dir))
    assert metrics["eval_reward_margin"] == pytest.approx(whole.metrics[-1]["eval_reward_margin"], rel=1e-4)
    (resumed.output_dir / "reference_adapter.safetensors").unlink()
    with pytest.raises(CheckpointError, match="reference_adapter.safetensors: file not found; the run is tied to"):
        evaluate_run(str(resumed.output_dir))


def test_a_reference_without_effect_costs_nothing(settings, tmp_path):
    first, _ = run(settings)
    tied = {**settings, "output_dir": str(tmp_path / "tied"), "init_adapter": str(first.output_dir), "max_steps": 1}
    second, _ = run(tied, reference="init_adapter", loss_type="orpo")
    assert not (second.output_dir / "reference_adapter.safetensors").exists()
    first.output_dir.rename(tmp_path / "elsewhere")
    assert "eval_loss" in evaluate_run(str(second.output_dir))[0]


@pytest.mark.parametrize(("changes", "told"), [
    ({"reference": "init_adapter"}, 'reference: "init_adapter" needs an init_adapter'),
    ({"reference": "other"}, 'reference: Must be in ["base", "init_adapter"]'),
])  # fmt: skip
def test_a_reference_that_is_not_there_is_refused(settings, changes, told):
    with pytest.raises(ConfigError) as caught:
        mini_forge.TrainingConfig.from_dict({**settings, **changes})
    assert any(problem.startswith(told) for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(("changes", "told"), [
    ({"strategy": "sft"}, 'reference: no effect with strategy "sft"; it belongs to "dpo" and "rlhf"'),
    ({"loss_type": "orpo"}, 'reference: no effect with loss_type "orpo", which has no reference'),
])  # fmt: skip
def test_a_reference_without_effect_is_told(settings, changes, told):
    tied = {**settings, "init_adapter": "x", "reference": "init_adapter"}
    config = mini_forge.TrainingConfig.from_dict({**tied, **changes})
    assert told in config.warnings


# --- the quickstart ---

CONFIGS = Path(__file__).parent.parent / "configs"


def test_the_quickstart_s_pairs_are_what_their_script_makes(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS / "quickstart"))
    make = __import__("make_preferences")
    texts = {name: (CONFIGS / "quickstart" / name).read_text(encoding="utf-8").splitlines()
             for name in ("debian_summaries.jsonl", "preferences.jsonl")}  # fmt: skip
    pairs = [json.loads(line) for line in texts["preferences.jsonl"]]
    assert make.preferences([json.loads(line) for line in texts["debian_summaries.jsonl"]]) == pairs
    assert len(pairs) == 400 and all(len(pair["rejected"]) <= len(pair["chosen"]) for pair in pairs)
    assert make.beginning("one two  three", 7) == "one two" and make.beginning("one two", 6) == "one"
    assert make.beginning("one", 9) == "one" and make.beginning("word", 2) == ""


def test_the_quickstart_learns_to_prefer_on_held_out_pairs(tmp_path):
    """15 of its 120 steps, at its highest rate. Before, all rewards are equal, and no pair counts as preferred."""
    config = mini_forge.TrainingConfig.from_file(
        CONFIGS / "dpo_quickstart.json", output_dir=str(tmp_path / "run"), max_steps=15, num_train_epochs=1,
        device="cpu", lr_scheduler_type="constant",
    )  # fmt: skip
    metrics = mini_forge.train(config, report=lambda line: None).metrics
    before, after = (m for m in metrics if "eval_loss" in m)
    assert before["eval_reward_accuracy"] == 0 and after["eval_reward_accuracy"] > 0.9
    assert after["eval_reward_margin"] > 0.05 and after["eval_loss"] < before["eval_loss"]
