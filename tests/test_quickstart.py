"""The embedded default: its size, its files, and that training it does what the README promises."""

import json
import sys
from pathlib import Path

import pytest
import torch

import mini_forge
from mini_forge.data.tasks import load_examples

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = CONFIGS / "quickstart"
MODEL, DATASET = QUICKSTART / "model", QUICKSTART / "debian_summaries.jsonl"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in DATASET.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def make_dataset():
    sys.path.insert(0, str(QUICKSTART))
    yield __import__("make_dataset")
    sys.path.remove(str(QUICKSTART))


def test_the_files_are_small_enough_for_a_repository():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 4_000_000
    assert DATASET.stat().st_size <= 500_000


def test_every_row_is_valid_and_none_repeats_another(rows):
    assert len(load_examples(DATASET, "summarization")) == len(rows) == 720
    assert all(row["document"].strip() and row["summary"].strip() and row["package"] for row in rows)
    for key in ("document", "summary", "package"):
        assert len({row[key] for row in rows}) == len(rows), key


def test_the_documents_fit_the_model(rows):
    tokenizer = mini_forge.load_tokenizer(MODEL)
    lengths = [len(tokenizer.encode(row["document"])) for row in rows]
    assert max(lengths) <= 200 and sum(lengths) / len(lengths) < 120


def test_the_tokenizer_spells_any_text_and_its_template_s_tokens():
    tokenizer = mini_forge.load_tokenizer(MODEL)
    text = "naïve 漢字 \x00\n\ttabs  and   spaces 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [len(tokenizer.encode(token)) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")] == [1, 1, 1]
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>" in tokenizer.chat_template


@torch.no_grad()
def test_the_model_has_learnt_from_text_and_is_finite():
    model, tokenizer = mini_forge.load_model(MODEL), mini_forge.load_tokenizer(MODEL)
    ids = torch.tensor([tokenizer.encode("This package contains the header files and static libraries needed")])
    logits = model.logits(ids)
    assert logits.shape == (1, ids.shape[1], 2048) and logits.isfinite().all()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss < 3  # a model that knows nothing has ln 2048 = 7.6


@pytest.mark.parametrize("is_beside", [True, False], ids=["from the repository", "from elsewhere"])
def test_the_configuration_finds_its_files(monkeypatch, tmp_path, is_beside):
    monkeypatch.chdir(CONFIGS.parent if is_beside else tmp_path)
    config = mini_forge.TrainingConfig.from_file(
        "configs/quickstart.json" if is_beside else CONFIGS / "quickstart.json"
    )
    assert Path(config.model_name).samefile(MODEL) and Path(config.dataset).samefile(DATASET)
    assert config.warnings == []


def test_training_lowers_the_held_out_loss(tmp_path):
    """15 of the quickstart's 243 steps, on a third of its rows, already take 0.2 nats off (seen: 4.430 to 4.168)."""
    subset = tmp_path / "rows.jsonl"
    subset.write_text("".join(DATASET.read_text(encoding="utf-8").splitlines(keepends=True)[:240]), encoding="utf-8")
    config = mini_forge.TrainingConfig.from_file(
        CONFIGS / "quickstart.json", dataset=str(subset), output_dir=str(tmp_path / "run"), max_steps=15, device="cpu",
        num_train_epochs=1,
    )  # fmt: skip
    metrics = mini_forge.train(config, report=lambda line: None).metrics
    losses = [record["eval_loss"] for record in metrics if "eval_loss" in record]
    assert losses[-1] < losses[0] - 0.2


def test_the_rows_are_what_the_script_makes_of_apt_s_text(make_dataset):
    records = "Package: a\nDescription-en: tool to do\n Wrapped\n text.\n .\n List:\n  * one\n  * two\n .\n End.\n"
    (package,) = make_dataset.read_packages(records)
    assert (package.name, package.synopsis) == ("a", "tool to do")
    assert package.paragraphs == ("Wrapped text.", "List:\n* one\n* two", "End.")


def test_the_loop_that_the_readme_shows_learns_and_leaves_an_adapter(monkeypatch, tmp_path):
    text = (CONFIGS.parent / "README.md").read_text(encoding="utf-8")
    code = next(part for part in text.split("```python\n") if "optimizer.step()" in part).partition("```")[0]
    told = code.replace("optimizer.step()", "losses.append(loss.total.item() / loss.count); optimizer.step()")
    names = {"torch": torch, "mini_forge": mini_forge, "losses": []}
    (tmp_path / "configs").symlink_to(CONFIGS)
    monkeypatch.chdir(tmp_path)
    exec(told, names)
    losses = names["losses"]
    assert len(losses) == 20 and sum(losses[-4:]) < 0.95 * sum(losses[:4])
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(mini_forge.load_model("runs/my_adapter").logits(ids), names["model"].eval().logits(ids))
