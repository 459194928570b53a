"""Merged models of every family: the adapter's logits, untouched tensors bit for bit, files that say what they are."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import mini_forge
from mini_forge.cli import main
from mini_forge.errors import CheckpointError
from mini_forge.io.adapters import load_adapter, save_adapter
from mini_forge.io.merge import largest_difference, merge_adapter, streamed_logits
from mini_forge.model.lora import LoraSpec, inject, lora_layers, merge
from tests.golden_files import FAMILIES, family
from tests.test_weights import store_in_4bit
from tests.tiny import write_checkpoint

TARGETS = ("q_proj", "o_proj", "down_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def adapted(folder, run, targets=None):
    """A model with a random adapter, which is saved in `run`."""
    model = mini_forge.load_model(folder)
    experts = EXPERTS if model.spec.experts is not None else ()
    attention = ("o_proj",) if model.spec.fused_projections or experts else TARGETS
    spec = LoraSpec(2, 4, targets=targets or (*attention, *experts))
    inject(model, spec)
    generator = torch.Generator().manual_seed(0)
    for _, layer in lora_layers(model):
        layer.lora_A.data.normal_(std=0.1, generator=generator)
        layer.lora_B.data.normal_(std=0.2, generator=generator)
    run.mkdir()
    save_adapter(run, model, spec, str(folder))
    return model


def tensors(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "expected.safetensors":
            found |= load_file(file)
    return found


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_merged_model_has_the_adapters_logits_and_nothing_else_changed(name, tmp_path):
    folder, ids, base = family(name)
    wanted = adapted(folder, tmp_path / "run").logits(ids)
    out = merge_adapter(tmp_path / "run", tmp_path / "merged")
    assert float((wanted - base).abs().max()) > 0.01 * float(base.std())  # the adapter says something
    # Weights are rounded once to bfloat16, 2⁻⁹ of each; where that turns a router's choice one token differs by more.
    merged = mini_forge.load_model(out, dtype=None)
    assert float((mini_forge.load_model(out).logits(ids) - wanted).abs().mean()) < 0.03 * float(wanted.std())
    if name != "gpt_oss_mxfp4":
        inside, outside = merge(mini_forge.load_model(tmp_path / "run", dtype=None)).state_dict(), merged.state_dict()
        assert inside.keys() == outside.keys()
        assert [key for key in inside if not torch.equal(inside[key], outside[key])] == []
    before, after = tensors(folder), tensors(out)
    dense = {n.removesuffix("_blocks") for n in before if not n.endswith("_proj_scales")}
    assert after.keys() == dense
    touched = ("q_proj", "o_proj", "down_proj", ".experts.")
    same = [n for n in after if n in before and torch.equal(before[n], after[n])]
    assert {n for n in after if not any(t in n for t in touched)} <= set(same)
    assert len(same) < len(after)
    assert all(before[n].dtype == after[n].dtype and before[n].shape == after[n].shape for n in after if n in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_weight_is_rounded_once(dtype, tmp_path):
    """W + s·BA in float64, of numbers whose sum float32 holds exactly and 16 bits do not, and neither BA alone."""
    folder = write_checkpoint(tmp_path / "base")
    base = {n: ((4096 * t).round() / 4096).to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    save_file(base, folder / "model.safetensors", metadata={"format": "pt"})
    model, generator = mini_forge.load_model(folder), torch.Generator().manual_seed(0)
    spec = LoraSpec(2, 4, targets=("q_proj",))
    inject(model, spec)
    updates = {}
    for name, layer in lora_layers(model):
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = torch.randint(-64, 64, factor.shape, generator=generator) / 256
        updates[f"{name}.weight"] = 2 * layer.lora_B.data.double() @ layer.lora_A.data.double()
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "run", model, spec, str(folder))
    merged = tensors(merge_adapter(tmp_path / "run", tmp_path / "merged"))
    assert len(updates) == 2
    for name, update in updates.items():
        exact = base[name].double() + update
        assert torch.equal(exact.float().double(), exact) and merged[name].dtype == dtype
        assert torch.equal(merged[name], exact.to(dtype))
        assert not torch.equal(merged[name], base[name] + update.to(dtype))  # rounded twice


@pytest.mark.parametrize("name", FAMILIES)
def test_an_update_of_zero_changes_no_bit(name, tmp_path):
    folder = family(name)[0]
    model = adapted(folder, tmp_path / "run")
    for _, layer in lora_layers(model):
        layer.lora_B.data.zero_()
    save_adapter(tmp_path / "run", model, LoraSpec(2, 4, targets=("o_proj",)), str(folder))
    before, after = tensors(folder), tensors(merge_adapter(tmp_path / "run", tmp_path / "merged"))
    for key in after.keys() & before.keys():
        assert torch.equal(before[key], after[key]), key


def test_mxfp4_becomes_bfloat16_and_says_so(tmp_path):
    folder = family("gpt_oss_mxfp4")[0]
    adapted(folder, tmp_path / "run", ("q_proj",))
    out = merge_adapter(tmp_path / "run", tmp_path / "merged")
    config = json.loads((out / "config.json").read_text())
    stored = tensors(out)["model.layers.0.mlp.experts.gate_up_proj"]
    assert "quantization_config" not in config and config["dtype"] == str(stored.dtype).removeprefix("torch.")
    E, D, F = config["num_local_experts"], config["hidden_size"], config["intermediate_size"]
    assert stored.shape == (E, D, 2 * F)  # as the family stores dense experts
    kept = mini_forge.load_model(folder).model.layers[0].mlp.experts.gate_up_proj.expert(1, torch.float32)
    dense = mini_forge.load_model(out).model.layers[0].mlp.experts.gate_up_proj[1]
    assert torch.equal(dense, kept)  # MXFP4 values have 2 bits of mantissa: bfloat16 holds them exactly


def test_a_sharded_base_stays_sharded_with_a_true_index(tmp_path):
    folder = family("gpt_oss_sharded")[0]
    adapted(folder, tmp_path / "run")
    out = merge_adapter(tmp_path / "run", tmp_path / "merged")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = {file: load_file(out / file) for file in set(index["weight_map"].values())}
    assert len(files) > 1
    assert all(name in files[file] for name, file in index["weight_map"].items())
    total = sum(t.numel() * t.element_size() for held in files.values() for t in held.values())
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize("name", ["qwen3_moe_hub", "gpt_oss_mxfp4", "llama4_multimodal", "gemma3_text_hub"])
@torch.no_grad()
def test_a_layer_at_a_time_gives_the_same_logits(name, tmp_path):
    folder, ids, expected = family(name)
    found = streamed_logits(folder, ids[:1], {})
    assert float((found - expected[:1]).abs().max()) < 2e-4 * float(expected.std())
    model = adapted(folder, tmp_path / "run")
    out = merge_adapter(tmp_path / "run", tmp_path / "merged")
    worst, deviations = largest_difference(tmp_path / "run", out, tokens=12)
    probe = torch.randint(model.spec.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
    whole = float((model.logits(probe) - mini_forge.load_model(out).logits(probe)).abs().max())
    assert worst == pytest.approx(whole, rel=0.05, abs=1e-5)
    assert deviations == pytest.approx(worst / float(model.logits(probe).std()), rel=1e-3)


def test_the_command_prints_the_largest_difference(tmp_path, capsys):
    folder = family("qwen3_moe_hub")[0]
    adapted(folder, tmp_path / "run")
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    assert "largest logit difference between adapter-on and merged: " in capsys.readouterr().out


def test_an_adapter_of_another_model_is_refused(tmp_path):
    one, other = family("qwen3_moe_hub")[0], family("gpt_oss_hub")[0]
    adapted(one, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    record["base_model_name_or_path"] = str(other)
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(record))
    with pytest.raises(mini_forge.CheckpointError):
        merge_adapter(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(mini_forge.CheckpointError):
        load_adapter(mini_forge.load_model(other), tmp_path / "run")


def test_quantized_weights_become_what_the_embedding_is(tmp_path):
    """Also where a head in another dtype stands before it in the file."""
    folder = write_checkpoint(tmp_path / "base")
    store_in_4bit(folder, False)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors")
    adapted(folder, tmp_path / "run", ("q_proj",))
    merged = load_file(merge_adapter(tmp_path / "run", tmp_path / "merged") / "model.safetensors")
    assert merged["lm_head.weight"].dtype == torch.float32
    quantized = [name for name in tensors if name + ".absmax" in tensors]
    assert quantized and all(merged[name].dtype == torch.bfloat16 for name in quantized)


@pytest.mark.parametrize(("change", "message"), [
    ({"r": 1}, "are not of rank 1, as adapter_config.json says; fetch or train the adapter again"),
    ({"lora_alpha": 1e308}, "lora_alpha 1e.308 makes of it what is no number"),
    ({"r": 10**30}, "needs numbers `r`"),
])  # fmt: skip
@torch.no_grad()
def test_an_adapter_that_is_not_what_its_record_says_is_refused(change, message, tmp_path):
    folder = write_checkpoint(tmp_path / "base")
    adapted(folder, tmp_path / "run", ("q_proj",))
    place = tmp_path / "run" / "adapter_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        merge_adapter(tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
