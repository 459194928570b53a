"""Ten steps of `mini_forge.train` on models with experts equal the stored steps of a plain transformers+PEFT loop."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import mini_forge
from mini_forge.io.adapters import load_adapter, save_adapter
from tests import golden_files as golden
from tests.test_golden_training import ADAPTER_ABSOLUTE, LOSS_RELATIVE, NORM_RELATIVE, settings

CASES = [(kind, targets) for kind in golden.MOE_KINDS for targets in ("attention", "experts")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """place(kind) -> a model folder: the golden base with the tokenizer of the dense one; and the rows' file."""
    root = tmp_path_factory.mktemp("moe")
    lines = golden.DATASET.read_text(encoding="utf-8").splitlines(keepends=True)
    (root / "rows.jsonl").write_text("".join(lines[: golden.MOE_ROWS]), encoding="utf-8")

    def make(kind):
        folder = root / kind
        if not folder.exists():
            shutil.copytree(golden.moe_case(kind, "attention")[0], folder)
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(golden.BASE / name, folder)
        return folder, root / "rows.jsonl"

    return make


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """run(kind, targets, **others) -> RunResult; the same arguments train once."""

    @functools.cache
    def train(kind, targets, **others):
        base, rows = place(kind)
        _, init, expected = golden.moe_case(kind, targets)
        config = settings("dense", golden.MOE_ROWS, 1, model_name=str(base), dataset=str(rows), init_adapter=str(init))
        config |= {key: expected.settings[key] for key in ("lora_r", "lora_alpha")}
        config |= {"output_dir": str(tmp_path_factory.mktemp(kind) / "run"), **others}
        return mini_forge.train(mini_forge.TrainingConfig.from_dict(config))

    return train


def assert_equals_reference(result, expected):
    steps = [record for record in result.metrics if "loss" in record]
    assert [record["loss"] for record in steps] == pytest.approx(expected.losses, rel=LOSS_RELATIVE)
    assert [record["grad_norm"] for record in steps] == pytest.approx(expected.grad_norms, rel=NORM_RELATIVE)
    adapter = load_file(result.output_dir / "adapter_model.safetensors")
    assert adapter.keys() == expected.adapter.keys()
    worst = max(float((adapter[name] - expected.adapter[name]).abs().max()) for name in adapter)
    assert worst < ADAPTER_ABSOLUTE


@pytest.mark.parametrize(("kind", "targets"), CASES)
def test_ten_steps_equal_the_peers(run, kind, targets):
    expected = golden.moe_case(kind, targets)[2]
    assert len(expected.losses) == expected.settings["steps"] == 10
    assert_equals_reference(run(kind, targets), expected)


@pytest.mark.parametrize("kind", golden.MOE_KINDS)
@pytest.mark.parametrize("option", [
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    {"packing": True},
    {"gradient_checkpointing": False},
])  # fmt: skip
def test_ten_steps_on_experts_do_not_depend_on(run, kind, option):
    """Windows, chunks, sinks and temperature are of the document, however documents are arranged."""
    assert_equals_reference(run(kind, "experts", **option), golden.moe_case(kind, "experts")[2])


@pytest.mark.parametrize("kind", golden.MOE_KINDS)
def test_the_written_record_names_what_pefts_names(run, kind):
    folders = run(kind, "experts").output_dir, golden.moe_case(kind, "experts")[1]
    ours, theirs = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    for key in ("target_modules", "target_parameters", "r", "lora_alpha", "use_rslora", "use_dora", "bias"):
        assert ours[key] == theirs[key], key


def test_training_starts_from_an_adapter_in_the_per_expert_layout_too(run, place, tmp_path):
    base, _ = place("qwen3_moe")
    _, init, expected = golden.moe_case("qwen3_moe", "experts")
    model = mini_forge.load_model(base)
    spec = load_adapter(model, init)
    (tmp_path / "init").mkdir()
    save_adapter(tmp_path / "init", model, spec, str(base), "per-expert")
    assert_equals_reference(run("qwen3_moe", "experts", init_adapter=str(tmp_path / "init")), expected)


@pytest.mark.parametrize("kind", golden.MOE_KINDS)
def test_the_trained_run_opens_as_a_model(run, place, kind):
    """Through load_model, on its own base."""
    trained, ids = run(kind, "experts").output_dir, torch.arange(24)[None]
    with torch.no_grad():
        adapted, base = mini_forge.load_model(trained).logits(ids), mini_forge.load_model(place(kind)[0]).logits(ids)
    assert float((adapted - base).abs().max() / base.std()) > 0.05
