"""A dataset whose tokens are kept on disk trains exactly as one that is held in memory."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from mini_forge.check import check
from mini_forge.config import TrainingConfig
from mini_forge.data import token_store
from mini_forge.data.token_store import TokenCache, TokenStore
from mini_forge.errors import UserError
from mini_forge.prepare import prepare
from mini_forge.run import train
from tests import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def settings(tmp_path):
    return {
        "model_name": str(tiny.write_checkpoint(tmp_path / "model")),
        "dataset": str(tiny.write_rows(tmp_path / "rows.jsonl", 40)),
        "task": "text-generation", "strategy": "sft", "compute_specs": "low_end", "use_4bit": False,
        "output_dir": str(tmp_path / "run"), "max_seq_length": 64, "eval_split": 0.2, "num_train_epochs": 1,
        "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "lora_dropout": 0.0,
    }  # fmt: skip


@pytest.fixture
def on_disk(monkeypatch):
    return lambda is_on_disk=True: monkeypatch.setattr(token_store, "LARGE_BYTES", 0 if is_on_disk else 2**60)


def as_values(documents):
    return [(d.ids.tolist(), d.is_trained.tolist(), d.line) for d in documents]


@pytest.mark.parametrize("change", [{}, {"eval_split": 0.0}, {"seed": 1}, {"packing": True}, {"has_eval": True}])
def test_it_is_prepared_as_in_memory(change, settings, on_disk, tmp_path):
    change = dict(change)
    if change.pop("has_eval", False):
        change["eval_dataset"] = str(tiny.write_rows(tmp_path / "eval.jsonl", 7))
    config = TrainingConfig.from_dict({**settings, **change})
    on_disk(False)
    held, held_report = prepare(config), check(config)
    on_disk()
    first, second = prepare(config), prepare(config)
    for stored in (first, second):
        assert isinstance(stored.train, TokenStore) and not isinstance(held.train, TokenStore)
        assert as_values(stored.train) == as_values(held.train) and as_values(stored.eval) == as_values(held.eval)
        assert (stored.train_stats, stored.eval_stats) == (held.train_stats, held.eval_stats)
        assert stored.fingerprint() == held.fingerprint()
    assert any("its tokens are kept" in note for note in first.notes) and second.notes == held.notes
    assert check(config) == held_report


def test_check_looks_at_every_document_once(settings, on_disk, monkeypatch):
    config = TrainingConfig.from_dict({**settings, "max_steps": 1})
    on_disk()
    prepare(config)
    seen, look = Counter(), TokenStore.__getitem__
    monkeypatch.setattr(TokenStore, "__getitem__", lambda self, i: seen.update([i]) or look(self, i))
    report = check(config)
    in_batches = sorted(count for i, count in seen.items() if count > 1 and i != 0)
    assert sorted(seen)[: report["dataset"]["kept"]] == list(range(report["dataset"]["kept"]))
    assert len(in_batches) <= 2 and max(in_batches, default=0) <= 2  # the largest microbatch, to predict memory


def test_it_trains_and_resumes_as_in_memory(settings, on_disk, tmp_path):
    config = TrainingConfig.from_dict({**settings, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 18})
    on_disk(False)
    whole = train(config, report=lambda line: None).metrics
    on_disk()
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    run = tmp_path / "cut"
    for later in [path for path in (run / "checkpoints").iterdir() if path.name != "step-18"]:
        shutil.rmtree(later)
    (run / "summary.json").unlink()
    resumed = train(replace(config, output_dir=str(run)), resume=True, report=lambda line: None).metrics
    pick = ("step", "loss", "grad_norm", "eval_loss", "tokens")
    assert [[m.get(k) for k in pick] for m in resumed] == [[m.get(k) for k in pick] for m in whole]


def test_faults_are_told_before_anything_is_tokenised_and_with_those_of_other_parts(settings, on_disk, cache):
    with open(settings["dataset"], "a") as file:
        file.write('noise\n{"input": "a"}\n')
    config = TrainingConfig.from_dict(settings)
    problems = []
    for is_on_disk in (False, True):
        on_disk(is_on_disk)
        with pytest.raises(UserError) as caught:
            prepare(config)
        problems.append(caught.value.problems)
        with pytest.raises(UserError) as caught:
            prepare(replace(config, model_name=settings["model_name"] + "/none"))
        assert len(caught.value.problems) == 3
    assert problems[0] == problems[1] and not cache.exists()
    assert [problem.split(":")[1] for problem in problems[1]] == ["41", "42"]


def test_rows_that_a_template_refuses_are_named_and_nothing_is_kept(settings, on_disk, cache):
    tools = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], "tools": [{}]}
    with open(settings["dataset"], "a") as file:
        file.write(json.dumps(tools) + "\n")
    config = TrainingConfig.from_dict({**settings, "chat_template": "chatml"})
    on_disk()
    with pytest.raises(UserError, match=r"rows.jsonl:41: the chatml chat template"):
        prepare(config)
    assert not any(path.is_file() for path in cache.rglob("*"))


def test_a_second_start_with_another_seed_or_rate_uses_the_same_tokens(settings, on_disk, monkeypatch):
    on_disk()
    prepare(TrainingConfig.from_dict(settings))
    monkeypatch.setattr(TokenCache, "make", lambda *_: pytest.fail("the tokens were made again"))
    changes = {"seed": 5, "learning_rate": 1e-5, "eval_split": 0.5, "packing": True}
    assert len(prepare(TrainingConfig.from_dict({**settings, **changes})).eval) == 20
