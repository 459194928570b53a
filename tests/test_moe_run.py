"""The main job on families with experts: 4-bit and MXFP4 bases learn by the command line, stop, go on and merge."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mini_forge
from mini_forge.cli import main
from mini_forge.config import TrainingConfig
from mini_forge.model.experts import Routing, balance_loss, load_metrics
from mini_forge.prepare import prepare
from tests.tiny import write_rows
from tests.tiny_experts import write_checkpoint

CONFIGS = Path(__file__).parent.parent / "configs"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def settings(folder, base, **changes):
    rows = write_rows(folder / "rows.jsonl", 24)
    return {
        "task": "text-generation", "model_name": str(base), "dataset": str(rows), "compute_specs": "high_end",
        "device": "cpu", "dtype": "float32", "use_4bit": True, "bnb_4bit_compute_dtype": "float32",
        "output_dir": str(folder / "run"), "max_steps": 12, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "logging_steps": 1, "lora_r": 4, "lora_dropout": 0.05,
        "optim": "adamw_torch", "gradient_checkpointing": False, "eval_split": 0.2, "eval_steps": 12, **changes,
    }  # fmt: skip


def train(folder, base, *options, **changes):
    config = folder / "config.json"
    config.write_text(json.dumps(settings(folder, base, **changes)))
    assert main(["train", str(config), *options]) == 0
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("targets", [ATTENTION, [*ATTENTION, *EXPERTS], EXPERTS])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "gpt_oss mxfp4", "llama4_text"])
def test_experts_in_four_bits_learn(kind, targets, tmp_path):
    base = write_checkpoint(tmp_path / "base", kind.split()[0], mxfp4="mxfp4" in kind)
    metrics = train(tmp_path, base, target_modules=targets)
    held_out = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    # Twelve steps on random weights: measured 0.4 to 2.5 lower
    assert held_out[-1] < held_out[0] - 0.2
    again = mini_forge.load_model(tmp_path / "run", quantization="nf4")
    assert torch.isfinite(again.logits(torch.tensor([[1, 2, 3]]))).all()
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    mini_forge.load_model(tmp_path / "merged")


def test_a_run_with_experts_resumes_bit_for_bit(tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    base = write_checkpoint(tmp_path / "base", "qwen3_moe")
    common = {"target_modules": [*ATTENTION, *EXPERTS], "max_steps": 6, "save_strategy": "steps", "save_steps": 3,
              "gradient_checkpointing": True, "lr_scheduler_type": "constant"}  # fmt: skip
    for folder in (whole, halves):
        folder.mkdir()
    train(whole, base, **common)
    train(halves, base, **common)
    run = halves / "run"  # as if it had been killed after step 3
    for left in (run / "summary.json", run / "adapter_model.safetensors"):
        left.unlink()
    for later in (run / "checkpoints").glob("step-6"):
        later.rename(tmp_path / "gone")
    train(halves, base, "--resume", **common)
    one, other = (load_file(f / "run" / "adapter_model.safetensors") for f in (whole, halves))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_all_linear_leaves_experts_and_routers_alone(tmp_path):
    base = write_checkpoint(tmp_path / "base", "llama4_text")
    train(tmp_path, base, max_steps=1)
    names = load_file(tmp_path / "run" / "adapter_model.safetensors").keys()
    assert not any(".experts." in name or "router" in name for name in names)
    assert any("shared_expert.gate_proj" in name for name in names) and any("q_proj" in name for name in names)


def test_a_name_that_only_experts_have_on_disk_is_explained(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", "qwen3_moe")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings(tmp_path, base, target_modules=["q_proj", "gate_proj"])))
    assert main(["train", str(config)]) == 2
    assert "'gate_proj'" in (error := capsys.readouterr().err) and "experts.gate_up_proj" in error


def test_the_load_of_experts_is_logged_and_the_balance_loss_is_the_configs_choice(tmp_path):
    base = write_checkpoint(tmp_path / "base", "qwen3_moe")
    plain = train(tmp_path, base, max_steps=2, lora_dropout=0.0)
    record = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**record, "output_router_logits": True, "router_aux_loss_coef": 0.5}))
    balanced = train(tmp_path, base, "--overwrite", max_steps=2, lora_dropout=0.0)
    first, other = (next(m for m in metrics if "loss" in m) for metrics in (plain, balanced))
    assert 1 <= first["expert_load_max"] <= 6 and 0 <= first["experts_unused"] < 1
    assert "balance_loss" not in first
    # E·Σ f P of two experts a token: 2 when balanced, at most 2·E; the loss is the plain one plus 0.5 of it
    assert 1.5 < other["balance_loss"] < 12
    assert other["loss"] == pytest.approx(first["loss"] + 0.5 * other["balance_loss"], rel=1e-5)
    # held-out loss is never mixed with it
    assert plain[0]["eval_loss"] == pytest.approx(balanced[0]["eval_loss"], rel=1e-6)


def test_balance_loss_by_hand():
    # one layer, E = 2, 4 tokens, top-1: three to expert 0; mean probabilities 0.7 and 0.3: 2·(0.75·0.7 + 0.25·0.3)
    routing = Routing(4, torch.tensor([3, 1]), torch.tensor([2.8, 1.2]))
    assert float(balance_loss([routing])) == pytest.approx(1.2)
    assert load_metrics([routing]) == {"expert_load_max": pytest.approx(1.5), "experts_unused": 0.0}


@pytest.mark.parametrize("targets", [EXPERTS[:1], EXPERTS[1:], EXPERTS, ["all-linear", *EXPERTS]])
@pytest.mark.parametrize("adapter_format", ["peft", "per-expert"])
def test_either_adapter_format_loads_and_merges_to_the_same_logits(adapter_format, targets, tmp_path):
    base = write_checkpoint(tmp_path / "base", "qwen3_moe")
    options = {"use_4bit": False, "target_modules": targets, "adapter_format": adapter_format, "max_steps": 3}
    train(tmp_path, base, lora_dropout=0.0, **options)
    names = load_file(tmp_path / "run" / "adapter_model.safetensors").keys()
    assert any(".experts.3." in name for name in names) == (adapter_format == "per-expert")
    notes = prepare(TrainingConfig.from_file(tmp_path / "run" / "training_config.json")).notes
    is_left_out = adapter_format == "per-expert" and targets == EXPERTS[:1]
    assert any("PEFT leaves out adapters of experts.gate_up_proj" in note for note in notes) == is_left_out
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        adapted, merged = (mini_forge.load_model(tmp_path / name).logits(ids) for name in ("run", "merged"))
        plain = mini_forge.load_model(base).logits(ids)
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert float((plain - adapted).abs().max()) > 1e-2


def test_one_adapter_for_each_expert_is_refused_where_nothing_would_read_it(tmp_path, capsys):
    base = write_checkpoint(tmp_path / "base", "gpt_oss")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings(tmp_path, base, target_modules=EXPERTS, adapter_format="per-expert")))
    assert main(["train", str(config)]) == 2
    assert "adapter_format" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_parts_that_are_not_the_text_model_are_said_to_be_left_out(tmp_path, capsys):
    from safetensors.torch import save_file

    base = write_checkpoint(tmp_path / "base", "llama4_text")
    record = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": record}))
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    save_file({**tensors, "vision_model.weight": torch.zeros(2)}, base / "model.safetensors")
    train(tmp_path, base, max_steps=1)
    assert "only its text model is read, not 1 tensors of other parts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gpt_oss_20b.json", "gpt_oss"),
        ("training-gpt-oss-20b.json", "gpt_oss"),
        ("qwen3_coder_30b.json", "qwen3_moe"),
        ("training-qwen3-coder-30b.json", "qwen3_moe"),
        ("training-llama-4-maverick.json", "llama4_text"),
    ],
)
def test_the_shipped_configurations_train_tiny_models_of_their_kind_on_real_rows(name, kind, tmp_path):
    """As shipped but for the model, the data, the machine, and a rate and length that fit twelve steps."""
    base = write_checkpoint(tmp_path / "base", kind, mxfp4=kind == "gpt_oss")
    lines = (CONFIGS / "quickstart" / "debian_summaries.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    rows = [json.loads(line) for line in lines]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": r["summary"], "completion": r["document"]}) + "\n" for r in rows))
    changes = {
        "model_name": str(base), "device": "cpu", "learning_rate": 1e-2, "max_steps": 12, "optim": "adamw_torch",
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_seq_length": 96, "eval_split": 0.2,
        "logging_steps": 1, "save_strategy": "no", "dtype": "float32", "bf16": False,
    }  # fmt: skip
    config = json.loads((CONFIGS / name).read_text())
    for ours, other in {"model_name": "base_model", "optim": "optimizer"}.items():
        if other in config:
            changes[other] = changes.pop(ours)
    options = [part for key, value in changes.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    run = tmp_path / "run"
    assert main(["train", str(CONFIGS / name), *options, "--dataset", str(data), "--output-dir", str(run)]) == 0
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [m["eval_loss"] for m in metrics if "eval_loss" in m]
    assert held_out[-1] < held_out[0] - 0.2
    assert json.loads((run / "training_config.json").read_text())["use_4bit"] is True
